"""The playground without its widgets: the run in progress, what it has made, and the code that makes it again."""

from collections.abc import Mapping, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from diffusers import DiffusionPipeline, SchedulerMixin
from PIL import Image

from decinb.designs import Cell
from decinb.errors import InputError
from decinb.execution.provenance import model_name, scheduler_name
from decinb.execution.runner import State
from decinb.execution.store import Images
from decinb.figures.preview import Preview
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
"""The values of a sweep of a numeric control. ``Session.values`` has those of the others."""

LIMITS = {
    "strength": (0.05, 1.0),
    "guidance_scale": (1.0, 20.0),
    "num_inference_steps": (1, 100),
    "seed": (0, 2**31 - 1),
}
"""The lowest and the highest value of the controls."""

SEEDS = 8  # in a sweep of the seed
LARGE = 10**8  # parameters of a U-Net, from which a step on a CPU takes seconds
TEXTS = ("prompt", "negative_prompt")


class Busy(Exception):
    """The pipeline is in use by another call, such as a sweep in a cell."""


@dataclass(frozen=True)
class Settings:
    """The values of the controls when a run starts.

    Attributes:
        image: the name of a sample, or an image of the model's size; None for text to image.
        cell: the arguments of the call, with diffusers' names, without the image.
        scheduler: the name of a class in ``Session.schedulers``.
    """

    image: str | Image.Image | None
    cell: Cell
    scheduler: str

    def named(self) -> dict[str, Any]:
        """Return all settings by name; of an image that is no sample, its identity, so that settings compare fast."""
        image = self.image if isinstance(self.image, str) else id(self.image)
        return {**self.cell, "image": image, "scheduler": self.scheduler}


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
        notes: warnings about the last run.
        kept: the images that the user kept.
    """

    def __init__(self, pipe: DiffusionPipeline, folder: str | Path | None = None):
        self.adapter = adapter_of(pipe)
        self.pipe, self.folder = pipe, None if folder is None else validation.folder(folder)
        self.takes_image = self.adapter.task == IMAGE_TO_IMAGE
        self.size = image_size(pipe)
        self.schedulers = _schedulers(pipe.scheduler, self.adapter.fixed_scheduler)
        self.result: Sweep | None = None
        self.settings: Settings | None = None
        self.swept: str | None = None
        self.notes: list[str] = []
        self.kept = Sweep(None, "")
        self._runs: list[Steps] = []  # of the run in progress: one for each scheduler, taken one after another
        self._at = 0  # which of them is in progress
        self._lock = pipeline_lock(pipe)

    def check(self, cell: Cell) -> Cell:
        """Return the initial values of the controls: those in ``cell``, else the pipeline's example and defaults.

        Raises:
            InputError: ``cell`` has a name or a value that the controls do not have.
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
                    given = validation.short_repr(value)
                    raise InputError(f"{name} must be from {low} to {high} in the playground, got {given}")
            elif name == "image":
                if not isinstance(value, str) or value not in SAMPLES:
                    raise InputError(f"image must be one of {', '.join(SAMPLES)}, got {validation.short_repr(value)}")
            elif value is not None or name == "prompt":
                validation.text(value, name)
        return {"image": None, **controls, **cell}

    # --- running ---

    def prepare(self) -> None:
        """Take one step of an image and forget it, so that the first run finds everything ready.

        That hashes the weights, fits the colours of previews, and compiles what is compiled at the first call. It is
        left out while another call uses the pipeline, and where a step takes long: with a large model on a CPU.
        """
        with suppress(Exception), _Turn(self._lock):  # what fails here fails again, and is shown, when a run starts
            slow = self.pipe._execution_device.type == "cpu" and self.pipe.unet.num_parameters() > LARGE
            if slow or not self.adapter.exposes_latents:
                return
            cell = self.check({})
            with closing(steps(self.pipe, self._input(cell.pop("image")), "", [cell])) as running:
                if not running.plan.adapter.exposes_latents:
                    return  # its first step would be a whole image
                Preview(self.adapter, None).prepare()
                while (states := running.advance()) is not None and not any(state.step for state in states):
                    pass

    @property
    def is_running(self) -> bool:
        """Whether a run has been started and neither finished nor stopped."""
        return bool(self._runs)

    def start(self, settings: Settings, sweep: str | None = None) -> None:
        """Start a run: of one image, or of several that differ in one control. A run in progress is stopped.

        Images share U-Net calls, except that a sweep of the scheduler makes one image after another.

        Raises:
            InputError: a setting cannot be used; nothing was started.
            Busy: another call uses the pipeline.
        """
        self.stop()
        values = self.values(sweep, settings.cell) if sweep else []
        plain = {name: _one_line(value) if name in TEXTS else value for name, value in settings.cell.items()}
        cells, image, schedulers = [plain], settings.image, [settings.scheduler]
        if sweep == "scheduler":
            schedulers = values
        elif sweep == "image":
            image, cells = values[0], [{**plain, "image": self._input(name)} for name in values]
        elif sweep:
            cells = [{**plain, sweep: value} for value in values]
        with _Turn(self._lock):
            before = self.pipe.scheduler
            try:
                runs = []
                for name in schedulers:
                    self.pipe.scheduler = self.schedulers[name]
                    runs.append(steps(self.pipe, self._input(image), "", cells, folder=self.folder))
            finally:
                self.pipe.scheduler = before
        self._runs, self._at = runs, 0
        self.settings, self.swept, self.result = settings, sweep, None
        self.notes = list(dict.fromkeys(note for run in runs for note in run.plan.notes))

    def advance(self) -> list[State]:
        """Take one step of the run, after which every cell in progress has a prediction; return the cells' states.

        At the end of the run, ``is_running`` is false and ``result`` complete. In a sweep of the scheduler, the number
        of a cell is that of its scheduler, and its ``seconds_left`` are those of its own image.

        Raises:
            Busy: another call uses the pipeline; try again.
            SweepError: the run failed, and is over.
        """
        latest: dict[int, State] = {}
        with _Turn(self._lock):
            try:
                while self._runs:
                    states = self._runs[self._at].advance()
                    if states is None:
                        self._at += 1
                        if self._at == len(self._runs):
                            self._end()
                        continue
                    # With several runs, each has one cell, whose number is that of the run.
                    latest.update(
                        {state.cell + self._at: replace(state, cell=state.cell + self._at) for state in states}
                    )
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
        if self._runs:
            with _Turn(self._lock):
                for run in self._runs:
                    run.close()
            self._end()

    def _end(self) -> None:
        if self._runs:
            self.result, self._runs = self._joined([run.sweep for run in self._runs]), []

    def _joined(self, parts: list[Sweep]) -> Sweep:
        """Return the sweeps of a run as one."""
        first = parts[0]
        if self.swept == "image":  # each has an input of its own, which is a sample
            planned = zip(self._runs[0].plan.cells, SAMPLES, strict=True)
            names = [name for cell, name in planned if any(cell is done for done in first.cells)]
            cells = [{**cell, "image": name} for cell, name in zip(first.cells, names, strict=True)]
            records = [{**record, "image": name} for record, name in zip(first.records, names, strict=True)]
            return Sweep(None, first.prompt, cells, first.images, records, first.folder)
        if len(parts) == 1:
            return first
        return Sweep(
            first.image,
            first.prompt,
            [cell for part in parts for cell in part.cells],
            Images([source for part in parts for source in part.images.sources]),
            [record for part in parts for record in part.records],
            first.folder,
        )

    # --- sweeps ---

    def sweepable(self) -> list[str]:
        """Return the controls that can be swept."""
        names = [name for name in (*SWEEPS, *TEXTS) if self.adapter.takes(name)] + ["seed"]
        names += ["image"] if self.takes_image else []
        return names + (["scheduler"] if len(self.schedulers) > 1 else [])

    def values(self, name: str, cell: Mapping[str, Any]) -> list[Any]:
        """Return the values of a sweep of one control.

        Numbers have values of their own, and a seed is followed by the next ones. A text has one value on each line. Of
        images, all samples are taken, and of schedulers all that can be chosen.

        Raises:
            InputError: a prompt has fewer than two lines.
        """
        if name == "seed":
            return [cell["seed"] + i for i in range(SEEDS)]
        if name == "image":
            return list(SAMPLES)
        if name == "scheduler":
            return list(self.schedulers)
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
        wanted, made_with = settings.named(), self.settings.named()
        value = wanted.pop(name)
        made_with.pop(name)
        if wanted != made_with:
            return None
        values = [record[name] for record in self.result.records]
        if name in SWEEPS or name == "seed":
            return min(range(len(values)), key=lambda i: abs(values[i] - value))
        return values.index(value) if value in values else None

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
        made, image = self.result, self.settings.image
        chosen = list(range(len(made))) if index is None else [index]
        schedulers = list(dict.fromkeys(made.records[i]["scheduler"] for i in chosen))
        cells = [dict(made.cells[i]) for i in chosen[: 1 if len(schedulers) > 1 else None]]
        if self.swept == "image":
            names = [cell.pop("image") for cell in cells]
            image = names[0]
        texts = {name: cells[0][name] for name in TEXTS if name in cells[0]}
        shared = {name: text for name, text in texts.items() if all(cell[name] == text for cell in cells)}
        own = scheduler_name(type(self.pipe.scheduler))
        lines = [*(["import diffusers"] if schedulers != [own] else []), "import decinb", ""]
        if (name := model_name(self.pipe)) in MODELS:
            task = "" if self.takes_image else ", task='text-to-image'"
            lines.append(f"pipe = decinb.load_pipeline({name!r}{task})")
        else:
            lines.append("# pipe: the pipeline of this playground")
        if schedulers != [own] and len(schedulers) == 1:
            lines.append(f"pipe.scheduler = diffusers.{schedulers[0]}.from_config(pipe.scheduler.config)")
        lines.append(f"image = {self._code_of_image(image)}")
        lines.append("cells = [")
        for i, cell in enumerate(cells):
            written = [f"{name!r}: {value!r}" for name, value in cell.items() if name not in shared]
            if self.swept == "image" and len(cells) > 1:
                written.append(f"'image': {self._code_of_image(names[i])}")
            lines.append(f"    {{{', '.join(written)}}},")
        lines.append("]")
        negative = f", negative_prompt={shared['negative_prompt']!r}" if shared.get("negative_prompt") else ""
        run = f"decinb.run_sweep(pipe, image, {shared.get('prompt', '')!r}, cells{negative})"
        if len(schedulers) > 1:
            lines += [
                "own, images = pipe.scheduler, {}",
                f"for name in {schedulers!r}:",
                "    pipe.scheduler = getattr(diffusers, name).from_config(own.config)",
                f"    images[name] = {run}.images[0]",
                "pipe.scheduler = own",
                "decinb.plot_grid(list(images.values()), list(images))",
            ]
        else:
            lines += [f"sweep = {run}", "sweep.images[0]" if len(cells) == 1 else "sweep.explore()"]
        return "\n".join(lines)

    def _code_of_image(self, image: str | Image.Image | None) -> str:
        if isinstance(image, str):
            return f"decinb.load_image({image!r}, size={self.size})"
        return "None" if image is None else "play.image  # what you drew or uploaded"

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
    found = {scheduler_name(type(own)): own}
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
