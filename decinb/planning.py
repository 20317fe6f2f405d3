"""The plan of a sweep: every cell understood, checked and counted before anything runs."""

import importlib.metadata
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from decinb import inputs
from decinb.denoise import Job, seconds_per_row
from decinb.designs import Cell
from decinb.errors import InputError
from decinb.images import load_image
from decinb.labels import ARGUMENTS
from decinb.pipeline import DeciDiffusionImg2ImgPipeline
from decinb.store import Record, Store, image_hash, key, weights_hash


@dataclass
class Plan:
    """What a sweep will take. ``print`` it, or ``plot`` the grid that it will fill.

    ``computations`` are the distinct images among the cells, ``finished`` those that the folder holds already, and
    ``calls``, ``rows``, ``seconds`` (None if not timed) and ``bytes`` what the rest takes; calls as if each ran alone.
    """

    image: Image.Image
    prompt: str
    cells: list[Cell]
    records: list[Record]
    jobs: list[Job]
    found: dict[str, Path]
    calls: int
    rows: int
    seconds: float | None
    bytes: int

    @property
    def computations(self) -> int:
        return len({record["key"] for record in self.records})

    @property
    def finished(self) -> int:
        return len(self.found)

    def __str__(self) -> str:
        missing = self.computations - self.finished
        parts = [f"{len(self.cells)} cells, {self.computations} distinct"]
        if self.finished:
            parts.append(f"{self.finished} finished before")
        parts.append(f"{missing} to compute: {self.calls:,} U-Net calls one by one, {self.rows:,} rows")
        if self.seconds is not None:
            parts.append(f"about {_duration(self.seconds)}")
        parts.append(f"about {max(self.bytes / 1e6, 0.1):,.1f} MB on disk")
        return "; ".join(parts)

    def plot(self, *args: Any, **kwargs: Any) -> None:
        """Show the empty grid: see ``decinb.plotting.plot_plan``."""
        from decinb.plotting import plot_plan

        plot_plan(self, *args, **kwargs)


def plan(
    pipe: DeciDiffusionImg2ImgPipeline,
    image: Image.Image | str | Path,
    prompt: str,
    cells: Sequence[Cell],
    seed: int = 0,
    negative_prompt: str | None = None,
    folder: str | Path | None = None,
    guidance_rescale: float = 0.0,
    timed: bool = True,
) -> Plan:
    """Say what ``run_sweep`` with these arguments would take, before anything runs.

    Args:
        pipe, image, prompt, cells, seed, negative_prompt, folder, guidance_rescale: as for ``run_sweep``.
        timed: time two U-Net calls to estimate the seconds.

    Raises:
        InputError: a cell cannot run; the message names it.
    """
    defaults = {
        "strength": 0.8,
        "guidance_scale": 7.5,
        "num_inference_steps": getattr(pipe, "deci_default_number_of_iterations", 30),
        "prompt": prompt,
        "negative_prompt": negative_prompt,
        "seed": seed,
        "image": image,
    }
    guidance_rescale = inputs.share(guidance_rescale, "guidance_rescale")
    if not isinstance(cells, Sequence) or isinstance(cells, str) or not cells:
        raise InputError(f"cells must be a list of at least one dict, got {cells!r}")
    load = _loader()
    jobs = [read_cell(cell, defaults, load, where=f"cell {i}: ") for i, cell in enumerate(cells)]
    calls = count_calls(pipe, jobs)
    origin = _origin(pipe, guidance_rescale)
    records = [
        _record(cell, job, origin, _name(cell.get("image", image), job.image))
        for cell, job in zip(cells, jobs, strict=True)
    ]
    found = Store(folder).find(records) if folder is not None else {}
    missing = {record["key"]: i for i, record in enumerate(records) if record["key"] not in found}
    rows = sum(calls[i] * (2 if jobs[i].guided else 1) for i in missing.values())
    width, height = jobs[0].image.size
    return Plan(
        load(image),
        inputs.text(prompt, "prompt"),
        list(cells),
        records,
        jobs,
        found,
        sum(calls[i] for i in missing.values()),
        rows,
        rows * seconds_per_row(pipe, [jobs[i] for i in missing.values()]) if timed and missing else None,
        len(missing) * 3 * width * height,  # a picture of many colours, and its input, half as large each at best
    )


# --- from cells to jobs -----------------------------------------------------------------------------------------------


def read_cell(cell: Cell, defaults: Cell, load: Callable[[Any], Image.Image], where: str) -> Job:
    """Understand a cell, or raise an InputError that begins with ``where``."""
    if not isinstance(cell, dict):
        raise InputError(f"{where}a cell must be a dict such as {{'strength': 0.75}}, got {cell!r}")
    inputs.known(cell, defaults, where)
    given = {**defaults, **cell}
    steps = inputs.num_inference_steps(given["num_inference_steps"], where)
    strength = inputs.strength(given["strength"], where)
    inputs.steps_run(steps, strength, where)
    negative = given["negative_prompt"]
    return Job(
        image=load(given["image"]),
        prompt=inputs.text(given["prompt"], f"{where}prompt"),
        negative_prompt=None if negative is None else inputs.text(negative, f"{where}negative_prompt"),
        strength=strength,
        guidance_scale=inputs.guidance_scale(given["guidance_scale"], where),
        num_inference_steps=steps,
        seed=inputs.seed(given["seed"], where),
    )


def _loader() -> Callable[[Any], Image.Image]:
    """``load_image`` that gives the same object for the same source."""
    loaded: dict[Any, tuple[Any, Image.Image]] = {}

    def load(source: Any) -> Image.Image:
        name = id(source) if isinstance(source, Image.Image) else source
        if not isinstance(name, (int, str, Path)):
            return load_image(source)  # which refuses it
        if name not in loaded:
            loaded[name] = source, load_image(source)  # the source is held, so that its id is not given again
        return loaded[name][1]

    return load


def count_calls(pipe: DeciDiffusionImg2ImgPipeline, jobs: Sequence[Job]) -> list[int]:
    """How many U-Net calls each job takes alone; refuses one that the scheduler cannot run."""
    calls: dict[tuple[int, int], int] = {}
    for i, job in enumerate(jobs):
        steps = job.num_inference_steps, job.skipped
        if steps not in calls:
            try:
                calls[steps] = len(job.schedule(pipe.scheduler, pipe._execution_device)[1])
            except Exception as error:
                told = f"{job.num_inference_steps} steps at strength {job.strength:g}"
                name = type(pipe.scheduler).__name__
                raise InputError(f"cell {i}: {name} cannot run {told}: {' '.join(str(error).split())}") from error
    return [calls[job.num_inference_steps, job.skipped] for job in jobs]


# --- records ----------------------------------------------------------------------------------------------------------


def _origin(pipe: DeciDiffusionImg2ImgPipeline, guidance_rescale: float) -> Record:
    """What all cells share and an image cannot be made again without."""
    return {
        "guidance_rescale": guidance_rescale,
        "model": _model_name(pipe),
        "weights": weights_hash(pipe),
        "scheduler": type(pipe.scheduler).__name__,
        "scheduler_config": {name: value for name, value in pipe.scheduler.config.items() if not name.startswith("_")},
        "dtype": str(pipe.dtype).removeprefix("torch."),
        "device": pipe.device.type,
        "versions": {name: importlib.metadata.version(name) for name in ("decinb", "diffusers", "torch")},
    }


NEEDED = [*ARGUMENTS, "guidance_rescale", "model", "weights", "scheduler", "scheduler_config"]


def _record(cell: Cell, job: Job, origin: Record, image_name: str) -> Record:
    """A cell with everything that made its image. The key is of what decides the pixels, and of nothing else."""
    hashed = image_hash(job.image)
    decides = {name: origin[name] for name in ("weights", "scheduler", "scheduler_config", "dtype", "guidance_rescale")}
    made_by = key(
        **decides,
        image=hashed,
        prompt=job.prompt,
        negative_prompt=(job.negative_prompt or "") if job.guided else "",
        guidance_scale=job.guidance_scale if job.guided else 1.0,
        num_inference_steps=job.num_inference_steps,
        skipped=job.skipped,
        seed=job.seed,
    )
    arguments = {name: getattr(job, name) for name in ARGUMENTS} | {"image": image_name}
    return {
        "cell": {name: arguments[name] for name in cell},
        **arguments,
        "steps_run": job.num_inference_steps - job.skipped,
        "image_hash": hashed,
        "image_size": list(job.image.size),
        **origin,
        "key": made_by,
    }


def _name(source: Any, image: Image.Image) -> str:
    """What to call an input: a sample's or a file's name, else a piece of its hash. Where a file lies is not told."""
    if isinstance(source, Image.Image):
        return f"image {image_hash(image)[:6]}"
    return Path(str(source).split("?")[0]).name


def _model_name(pipe: DeciDiffusionImg2ImgPipeline) -> str:
    name = str(pipe.config.get("_name_or_path") or "unnamed")
    return Path(name).name if Path(name).is_absolute() else name  # where a folder lies is nobody's business


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
