"""A sweep: one image and one prompt, run once for every cell of a design.

A cell is a plain dict with the argument names of diffusers, a design is a plain list of cells. So designs are joined
with ``+``, thinned with a list comprehension, and sampled with ``random.sample``.
"""

import hashlib
import importlib.metadata
import itertools
import json
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from tqdm.auto import tqdm

from decinb import inputs
from decinb.errors import InputError
from decinb.images import load_image, save_image
from decinb.pipeline import DeciDiffusionImg2ImgPipeline

Cell = dict[str, Any]

SHORT = {"strength": "strength", "guidance_scale": "guidance", "num_inference_steps": "steps", "seed": "seed"}
"""The arguments that are told in labels and file names, in this order, and how."""


def grid(**axes: Sequence[Any]) -> list[Cell]:
    """Every combination of the values given, the last argument changing fastest.

    Example: ``grid(strength=[0.5, 0.75], guidance_scale=[5, 7.5])`` gives four cells.

    Raises:
        InputError: an axis is not a list of values, or is empty.
    """
    for name, values in axes.items():
        if isinstance(values, str) or not isinstance(values, Iterable):
            raise InputError(f"{name} must be a list of values, got {values!r}")
    lists = {name: list(values) for name, values in axes.items()}
    if empty := [name for name, values in lists.items() if not values]:
        raise InputError(f"{empty[0]} is an empty list: give at least one value")
    return [dict(zip(lists, values, strict=True)) for values in itertools.product(*lists.values())]


@dataclass(frozen=True)
class Run:
    """A cell understood: every argument of the call as a plain value, and how many steps really run."""

    prompt: str
    negative_prompt: str | None
    strength: float
    guidance_scale: float
    num_inference_steps: int
    seed: int
    steps_run: int

    @classmethod
    def read(cls, cell: Cell, defaults: Cell, where: str) -> "Run":
        """Understand a cell, or raise an InputError that begins with ``where``."""
        if not isinstance(cell, dict):
            raise InputError(f"{where}a cell must be a dict such as {{'strength': 0.75}}, got {cell!r}")
        inputs.known(cell, defaults, where)
        given = {**defaults, **cell}
        steps = inputs.num_inference_steps(given["num_inference_steps"], where)
        strength = inputs.strength(given["strength"], where)
        negative = given["negative_prompt"]
        return cls(
            prompt=inputs.text(given["prompt"], f"{where}prompt"),
            negative_prompt=None if negative is None else inputs.text(negative, f"{where}negative_prompt"),
            strength=strength,
            guidance_scale=inputs.guidance_scale(given["guidance_scale"], where),
            num_inference_steps=steps,
            seed=inputs.seed(given["seed"], where),
            steps_run=inputs.steps_run(steps, strength, where),
        )


@dataclass
class Sweep:
    """What came out: cells, images and records (arguments, steps run, seconds) in one order, and where they lie."""

    image: Image.Image
    prompt: str
    cells: list[Cell] = field(default_factory=list)
    images: list[Image.Image] = field(default_factory=list)
    records: list[dict[str, Any]] = field(default_factory=list)
    folder: Path | None = None

    def __len__(self) -> int:
        return len(self.images)

    def plot(self, rows: str | None = None, cols: str | None = None, file: str | Path | None = None) -> None:
        """Show the images as a labelled grid: see ``decinb.plotting.plot_sweep``."""
        from decinb.plotting import plot_sweep

        plot_sweep(self, rows, cols, file)


class SweepError(RuntimeError):
    """A cell failed while it ran. ``sweep`` holds everything that was finished before it."""

    def __init__(self, message: str, sweep: Sweep):
        super().__init__(message)
        self.sweep = sweep


def run_sweep(
    pipe: DeciDiffusionImg2ImgPipeline,
    image: Image.Image | str | Path,
    prompt: str,
    cells: Sequence[Cell],
    seed: int = 0,
    negative_prompt: str | None = None,
    folder: str | Path | None = None,
    progress: bool = True,
) -> Sweep:
    """Make one image for every cell.

    Each cell starts from a fresh ``torch.Generator().manual_seed(seed)`` on the CPU, so any of them can be made again
    alone. All cells are checked before the first one runs. Stopping the notebook cell returns what is done.

    Args:
        pipe: from ``load_pipeline``.
        image: from ``load_image``, or what it takes.
        prompt: what the picture should become; a cell's own ``prompt`` goes before it.
        cells: dicts with any of ``strength`` (above 0, at most 1), ``guidance_scale`` (0 or more; 1 or less switches
            guidance off), ``num_inference_steps`` (1 to 999), ``prompt``, ``negative_prompt``, and ``seed``
            (0 to 2**63 - 1).
        seed: of every cell that names none.
        negative_prompt: of every cell that names none.
        folder: where every finished image is written at once, as a PNG with its record inside.
        progress: show a bar.

    Raises:
        InputError: a cell cannot run; the message names it.
        SweepError: a cell failed while running; what was finished before is in its ``sweep``.
    """
    defaults = {
        "strength": 0.8,
        "guidance_scale": 7.5,
        "num_inference_steps": pipe.deci_default_number_of_iterations,
        "prompt": prompt,
        "negative_prompt": negative_prompt,
        "seed": seed,
    }
    if not isinstance(cells, Sequence) or isinstance(cells, str) or not cells:
        raise InputError(f"cells must be a list of at least one dict, got {cells!r}")
    runs = [Run.read(cell, defaults, where=f"cell {i}: ") for i, cell in enumerate(cells)]
    image = load_image(image)
    origin = _origin(pipe, image)
    if folder is not None:
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)

    sweep = Sweep(image, prompt, folder=folder)
    bar_config = getattr(pipe, "_progress_bar_config", {})
    pipe.set_progress_bar_config(disable=True)
    try:
        for i, (cell, run) in enumerate(
            zip(tqdm(cells, "sweep", disable=not progress, leave=False), runs, strict=True)
        ):
            made, seconds = _make(pipe, image, run)
            record = {**vars(run), **origin, "seconds": seconds}
            sweep.cells.append(cell)
            sweep.images.append(made)
            sweep.records.append(record)
            if folder is not None:
                save_image(made, folder / f"{i:03d}_{_file_name(cell, record)}.png", record)
    except KeyboardInterrupt:
        print(f"stopped: {len(sweep)} of {len(cells)} cells are done")
    except Exception as error:
        done = f"{len(sweep)} of {len(cells)} cells were done and are in this error's `sweep`"
        raise SweepError(f"cell {i} ({label(cell)}) failed: {error}; {done}", sweep) from error
    finally:
        pipe.set_progress_bar_config(**bar_config)
    return sweep


def label(cell: Cell) -> str:
    """A cell in a few words, as it stands above its picture."""
    return ", ".join(f"{SHORT[name]} {plain(cell[name])}" for name in SHORT if name in cell) or "defaults"


def plain(value: Any) -> str:
    """A value as a reader would write it: 0.85, not 0.8500000000000001."""
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def _make(pipe: DeciDiffusionImg2ImgPipeline, image: Image.Image, run: Run) -> tuple[Image.Image, float]:
    started = time.perf_counter()
    made = pipe(
        prompt=run.prompt,
        image=image,
        strength=run.strength,
        num_inference_steps=run.num_inference_steps,
        guidance_scale=run.guidance_scale,
        negative_prompt=run.negative_prompt,
        generator=torch.Generator().manual_seed(run.seed),
    ).images[0]
    return made, round(time.perf_counter() - started, 3)


def _origin(pipe: DeciDiffusionImg2ImgPipeline, image: Image.Image) -> dict[str, Any]:
    """What all cells share and an image cannot be made again without."""
    return {
        "model": _model_name(pipe),
        "scheduler": type(pipe.scheduler).__name__,
        "image": hashlib.sha256(image.tobytes()).hexdigest()[:16],
        "image_size": list(image.size),
        "device": pipe.device.type,
        "dtype": str(pipe.dtype).removeprefix("torch."),
        "versions": {name: importlib.metadata.version(name) for name in ("decinb", "diffusers", "torch")},
    }


def _model_name(pipe: DeciDiffusionImg2ImgPipeline) -> str:
    name = str(pipe.config.get("_name_or_path") or "unnamed")
    return Path(name).name if Path(name).is_absolute() else name  # where a folder lies is nobody's business


def _file_name(cell: Cell, record: dict[str, Any]) -> str:
    """The cell in words, and a short key of all that made the image: another prompt or image is another file."""
    words = "_".join(f"{SHORT[name]}-{plain(cell[name])}" for name in SHORT if name in cell) or "defaults"
    made_by = {name: value for name, value in record.items() if name != "seconds"}
    return f"{words}_{hashlib.sha256(json.dumps(made_by, sort_keys=True).encode()).hexdigest()[:8]}"
