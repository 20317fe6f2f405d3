"""A sweep: one image and one prompt, run once for every cell of a design.

A cell is a plain dict with the argument names of diffusers, a design is a plain list of cells. So designs are joined
with ``+``, thinned with a list comprehension, and sampled with ``random.sample``.
"""

import itertools
import math
import numbers
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from tqdm.auto import tqdm

from decinb.errors import InputError
from decinb.images import save_image
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
    """A cell understood: every argument of the call as a plain value."""

    prompt: str
    negative_prompt: str | None
    strength: float
    guidance_scale: float
    num_inference_steps: int
    seed: int

    @property
    def steps_run(self) -> int:
        """How many steps really run. Strength acts through this number alone; ``int`` cuts as diffusers does."""
        return min(int(self.num_inference_steps * self.strength), self.num_inference_steps)


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
    image: Image.Image,
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
        image: from ``load_image``.
        prompt: what the picture should become; a cell's own ``prompt`` goes before it.
        cells: dicts with any of ``strength`` (above 0, at most 1), ``guidance_scale`` (0 or more; 1 or less switches
            guidance off), ``num_inference_steps`` (1 to 999), ``prompt``, ``negative_prompt``, ``seed`` (0 to 2**63 - 1).
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
    if not isinstance(image, Image.Image):
        raise InputError(f"image must be a PIL image (load_image makes one), got {type(image).__name__}")
    if not isinstance(cells, Sequence) or isinstance(cells, str) or not cells:
        raise InputError(f"cells must be a list of at least one dict, got {cells!r}")
    runs = [_read(cell, defaults, where=f"cell {i}") for i, cell in enumerate(cells)]
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
            made, record = _make(pipe, image, run)
            if folder is not None:
                save_image(made, folder / f"{i:03d}_{_file_name(cell)}.png", record)
            sweep.cells.append(cell)
            sweep.images.append(made)
            sweep.records.append(record)
    except KeyboardInterrupt:
        print(f"stopped: {len(sweep)} of {len(cells)} cells are done")
    except Exception as error:
        done = f"{len(sweep)} of {len(cells)} cells were done and are in this error's `sweep`"
        raise SweepError(f"cell {len(sweep)} ({label(cells[len(sweep)])}) failed: {error}; {done}", sweep) from error
    finally:
        pipe.set_progress_bar_config(**bar_config)
    return sweep


def label(cell: Cell) -> str:
    """A cell in a few words, as it stands above its picture."""
    return ", ".join(f"{SHORT[name]} {plain(cell[name])}" for name in SHORT if name in cell) or "defaults"


def plain(value: Any) -> str:
    """A value as a reader would write it: 0.85, not 0.8500000000000001."""
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def _make(pipe: DeciDiffusionImg2ImgPipeline, image: Image.Image, run: Run) -> tuple[Image.Image, dict[str, Any]]:
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
    seconds = round(time.perf_counter() - started, 3)
    return made, {**vars(run), "steps_run": run.steps_run, "seconds": seconds}


def _file_name(cell: Cell) -> str:
    return "_".join(f"{SHORT[name]}-{plain(cell[name])}" for name in SHORT if name in cell) or "defaults"


# --- the door: what a user gave becomes plain values, or one clear line -----------------------------------------------


def _read(cell: Cell, defaults: Cell, where: str) -> Run:
    if not isinstance(cell, dict):
        raise InputError(f"{where} must be a dict such as {{'strength': 0.75}}, got {cell!r}")
    for name in cell:
        if name not in defaults:
            near = get_close_matches(str(name), defaults, 1)
            hint = f"; did you mean {near[0]!r}?" if near else f"; known are {', '.join(defaults)}"
            raise InputError(f"{where}: unknown argument {name!r}{hint}")
    given = {**defaults, **cell}
    run = Run(
        prompt=_text(given["prompt"], f"{where}: prompt"),
        negative_prompt=None
        if given["negative_prompt"] is None
        else _text(given["negative_prompt"], f"{where}: negative_prompt"),
        strength=_number(given["strength"], f"{where}: strength", "above 0 and at most 1", lambda x: 0 < x <= 1),
        guidance_scale=_number(given["guidance_scale"], f"{where}: guidance_scale", "0 or more", lambda x: x >= 0),
        num_inference_steps=_whole(given["num_inference_steps"], f"{where}: num_inference_steps", 1, 999),
        seed=_whole(given["seed"], f"{where}: seed", 0, 2**63 - 1),
    )
    if run.steps_run == 0:
        smallest = math.ceil(1e6 / run.num_inference_steps) / 1e6
        raise InputError(
            f"{where}: strength {plain(run.strength)} of {run.num_inference_steps} steps leaves 0 steps to run; "
            f"the smallest strength at {run.num_inference_steps} steps is {smallest:g}"
        )
    return run


def _text(value: Any, name: str) -> str:
    if not isinstance(value, str):
        raise InputError(f"{name} must be a string, got {value!r}")
    return value


def _number(value: Any, name: str, allowed: str, fits: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, numbers.Real) or not math.isfinite(value):
        raise InputError(f"{name} must be a number {allowed}, got {value!r}")
    value = round(float(value), 6)  # a list built by adding 0.05 ends in 1.0000000000000002
    if not fits(value):
        raise InputError(f"{name} must be {allowed}, got {value:g}")
    return value


def _whole(value: Any, name: str, low: int, high: int) -> int:
    if (
        isinstance(value, bool)
        or not isinstance(value, numbers.Real)
        or value != value
        or value != int(value)
        or not low <= value <= high
    ):
        raise InputError(f"{name} must be a whole number from {low} to {high}, got {value!r}")
    return int(value)
