"""A session of the playground: what runs, what it has made, and the code that makes it again. It shows nothing."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffusers import DiffusionPipeline, SchedulerMixin
from PIL import Image

from decinb.designs import Cell
from decinb.errors import InputError
from decinb.execution.provenance import model_name
from decinb.execution.runner import State
from decinb.images import SAMPLES, load_image
from decinb.models import IMAGE_TO_IMAGE, MODELS, example, image_size
from decinb.sampling.adapters import adapter_of
from decinb.sweep import Steps, Sweep, steps
from decinb.utils import validation
from decinb.utils.locks import pipeline_lock

SCHEDULERS = (
    "DDIMScheduler",
    "DDPMScheduler",
    "DPMSolverMultistepScheduler",
    "EulerDiscreteScheduler",
    "EulerAncestralDiscreteScheduler",
    "UniPCMultistepScheduler",
)
"""The schedulers to choose from, besides the pipeline's own, where its configuration fits them."""

WAIT = 0.2  # seconds that a step waits for a pipeline that is busy with another call

SWEEPS: dict[str, Sequence[Any]] = {
    "strength": (0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0),
    "guidance_scale": (1.0, 2.0, 4.0, 6.0, 7.5, 10.0, 15.0, 20.0),
    "num_inference_steps": (5, 10, 15, 20, 30, 40, 50),
}
"""The values of a sweep of one control. A seed is followed by the next ones, texts are swept line by line."""

LIMITS = {
    "strength": (0.05, 1.0),
    "guidance_scale": (1.0, 20.0),
    "num_inference_steps": (1, 100),
    "seed": (0, 2**31 - 1),
}
"""The lowest and the highest value of the controls."""

SEEDS = 8
TEXTS = ("prompt", "negative_prompt")


class Busy(Exception):
    """The pipeline is in use by another call, such as a sweep in a cell."""


@dataclass(frozen=True)
class Settings:
    """What the controls say when a run starts.

    Attributes:
        image: the name of a sample, or an image of the model's size; None for text to image.
        cell: the arguments of the call, with diffusers' names, without the image.
        scheduler: the name of a class in ``Session.schedulers``.
    """

    image: str | Image.Image | None
    cell: Cell
    scheduler: str

    def without(self, name: str) -> tuple[Any, ...]:
        """Return all settings but one, to compare them."""
        image = self.image if isinstance(self.image, str) else id(self.image)
        return image, self.scheduler, tuple((key, value) for key, value in self.cell.items() if key != name)


class Session:
    """Runs one image or one sweep at a time, one U-Net call after another.

    Args:
        pipe: a pipeline; its scheduler is left as it is.
        folder: where every image is saved with its record, and found again; None saves nothing.

    Attributes:
        size: height and width of inputs and images, in pixels.
        schedulers: to choose from, by the name of their class, the pipeline's own first.
        result: what the last run made, which may be unfinished.
        settings: of the last run.
        swept: the control that the last run swept, or None.
        notes: what may not be as intended in the last run.
        kept: the images that the user kept.
    """

    def __init__(self, pipe: DiffusionPipeline, folder: str | Path | None = None):
        self.pipe, self.folder = pipe, folder
        self.adapter = adapter_of(pipe)
        self.takes_image = self.adapter.task == IMAGE_TO_IMAGE
        self.size = image_size(pipe)
        self.schedulers = _schedulers(pipe.scheduler, self.adapter.fixed_scheduler)
        self.result: Sweep | None = None
        self.settings: Settings | None = None
        self.swept: str | None = None
        self.notes: list[str] = []
        self.kept = Sweep(None, "")
        self._running: Steps | None = None
        self._lock = pipeline_lock(pipe)

    def check(self, cell: Cell) -> Cell:
        """Return where the controls stand at first: as in ``cell``, otherwise at the pipeline's example and defaults.

        Raises:
            InputError: a name or a value that the controls do not have.
        """
        defaults, (image, prompt) = {**self.adapter.defaults, "seed": 0}, example(self.pipe)
        numbers = {name: min(max(defaults[name], low), high) for name, (low, high) in LIMITS.items()}
        controls = {"image": image, "prompt": prompt, "negative_prompt": None, **numbers}
        controls = {name: value for name, value in controls.items() if name == "seed" or self.adapter.takes(name)}
        validation.known(cell, controls)
        for name, value in cell.items():
            if name in LIMITS:
                getattr(validation, name)(value)
                low, high = LIMITS[name]
                if not low <= value <= high:
                    raise InputError(f"{name} must be from {low} to {high} in the playground, got {value!r}")
            elif name == "image":
                if not isinstance(value, str) or value not in SAMPLES:
                    raise InputError(f"image must be one of {', '.join(SAMPLES)}, got {validation.short_repr(value)}")
            elif value is not None or name == "prompt":
                validation.text(value, name)
        return {"image": None, **controls, **cell}

    # --- running ---

    @property
    def is_running(self) -> bool:
        """Whether a run has been started and neither finished nor stopped."""
        return self._running is not None

    def start(self, settings: Settings, sweep: str | None = None) -> None:
        """Start a run: of one image, or of several that differ in one control. A run in progress is stopped.

        Raises:
            InputError: a setting cannot be used; nothing was started.
            Busy: another call uses the pipeline.
        """
        self.stop()
        values = self.values(sweep, settings.cell) if sweep else []
        plain = {name: _one_line(value) if name in TEXTS else value for name, value in settings.cell.items()}
        cells = [{**plain, sweep: value} for value in values] if sweep else [plain]
        with _Turn(self._lock):
            before, self.pipe.scheduler = self.pipe.scheduler, self.schedulers[settings.scheduler]
            try:
                self._running = steps(self.pipe, self._input(settings.image), "", cells, folder=self.folder)
            finally:
                self.pipe.scheduler = before
        self.settings, self.swept, self.result = settings, sweep, None
        self.notes = self._running.plan.notes

    def advance(self) -> list[State]:
        """Take one step of the run, after which every cell in progress has a prediction; return the cells' states.

        At the end of the run, ``is_running`` is false and ``result`` complete.

        Raises:
            Busy: another call uses the pipeline; try again.
            SweepError: the run failed, and is over.
        """
        latest: dict[int, State] = {}
        with _Turn(self._lock):
            try:
                while self._running:
                    states = self._running.advance()
                    if states is None:
                        self._end()
                        break
                    latest.update({state.cell: state for state in states})
                    if any(0 < state.step < state.steps for state in latest.values()):
                        break  # otherwise cells have only started, or only have to be decoded
            except Exception:
                self._end()
                raise
        return [latest[cell] for cell in sorted(latest)]

    def stop(self) -> None:
        """End the run in progress, if there is one; what is finished stays in ``result``.

        Raises:
            Busy: another call uses the pipeline; try again.
        """
        if self._running:
            with _Turn(self._lock):
                self._running.close()
            self._end()

    def _end(self) -> None:
        if self._running:
            self.result, self._running = self._running.sweep, None

    # --- sweeps ---

    def sweepable(self) -> list[str]:
        """Return the controls that can be swept."""
        names = [name for name in (*SWEEPS, *TEXTS) if self.adapter.takes(name)]
        return [*names, "seed"]

    def values(self, name: str, cell: Mapping[str, Any]) -> list[Any]:
        """Return the values of a sweep of one control."""
        if name == "seed":
            return [cell["seed"] + i for i in range(SEEDS)]
        if name in SWEEPS:
            return list(SWEEPS[name])
        lines = [line.strip() for line in (cell[name] or "").splitlines() if line.strip()]
        if name == "negative_prompt":
            return [None, *lines]
        if len(lines) < 2:
            raise InputError(f"{name}: write one on each line to sweep them, got {len(lines)}")
        return lines

    def find(self, settings: Settings) -> int | None:
        """Return which image of the last sweep is nearest to some settings; None if they differ in anything else."""
        name = self.swept
        if self.is_running or not name or not self.result or not len(self.result):
            return None
        if settings.without(name) != self.settings.without(name):
            return None
        wanted, values = settings.cell[name], [cell[name] for cell in self.result.cells]
        if isinstance(wanted, (int, float)):
            return min(range(len(values)), key=lambda i: abs(values[i] - wanted))
        return values.index(wanted) if wanted in values else None

    # --- what was made ---

    def keep(self, index: int = 0) -> None:
        """Keep an image of the last result.

        Raises:
            InputError: there is none.
        """
        if not self.result or not len(self.result):
            raise InputError("there is no finished image to keep: generate one first")
        kept, made = self.kept, self.result
        self.kept = Sweep(
            made.image if not len(kept) or _same(kept.image, made.image) else None,
            made.prompt,
            [*kept.cells, made.cells[index]],
            [*kept.images, made.images[index]],
            [*kept.records, made.records[index]],
        )

    def code(self, index: int | None = None) -> str:
        """Return the cell that makes the last result again, or one image of it."""
        cells = self.result.cells if index is None else [self.result.cells[index]]
        lines = ["import decinb", ""]
        if (name := model_name(self.pipe)) in MODELS:
            task = "" if self.takes_image else ", task='text-to-image'"
            lines.append(f"pipe = decinb.load_pipeline({name!r}{task})")
        else:
            lines.append("# pipe: the pipeline of this playground")
        if self.settings.scheduler != type(self.pipe.scheduler).__name__:
            lines.insert(1, "import diffusers")
            lines.append(f"pipe.scheduler = diffusers.{self.settings.scheduler}.from_config(pipe.scheduler.config)")
        image = self.settings.image
        if isinstance(image, str):
            lines.append(f"image = decinb.load_image({image!r}, size={self.size})")
        else:
            lines.append("image = None" if image is None else "image = play.image  # what you drew or uploaded")
        texts = {name: cells[0][name] for name in TEXTS if name in cells[0]}
        shared = {name: text for name, text in texts.items() if all(cell[name] == text for cell in cells)}
        lines.append("cells = [")
        for cell in cells:
            lines.append(f"    { ({name: value for name, value in cell.items() if name not in shared})!r},")
        lines.append("]")
        negative = f", negative_prompt={shared['negative_prompt']!r}" if shared.get("negative_prompt") else ""
        lines.append(f"sweep = decinb.run_sweep(pipe, image, {shared.get('prompt', '')!r}, cells{negative})")
        lines.append("sweep.images[0]" if len(cells) == 1 else "sweep.explore()")
        return "\n".join(lines)

    def _input(self, image: str | Image.Image | None) -> str | Image.Image | None:
        """Return the input of a run: a sample by its name, for the record, if it is drawn at the model's size."""
        if not isinstance(image, str) or SAMPLES[image][1] == self.size:
            return image
        return load_image(image, self.size)


class _Turn:
    """Hold the lock of a pipeline inside the ``with`` block.

    Raises:
        Busy: another thread holds it for longer than ``WAIT``.
    """

    def __init__(self, lock: Any):
        self._lock = lock

    def __enter__(self) -> None:
        if not self._lock.acquire(timeout=WAIT):
            raise Busy("the pipeline is busy with another call; this continues when it is free")

    def __exit__(self, *error: object) -> None:
        self._lock.release()


def _schedulers(own: SchedulerMixin, fixed: bool) -> dict[str, SchedulerMixin]:
    """Return a pipeline's own scheduler, and those that its configuration fits."""
    found = {type(own).__name__: own}
    compatible = {} if fixed else {cls.__name__: cls for cls in own.compatibles}
    for name in SCHEDULERS:
        if name in compatible and name not in found:
            found[name] = compatible[name].from_config(own.config)
    return found


def _one_line(text: str | None) -> str | None:
    return " ".join(text.split()) if text else text


def _same(one: Image.Image | None, other: Image.Image | None) -> bool:
    if one is None or other is None:
        return one is other
    return one.size == other.size and one.tobytes() == other.tobytes()
