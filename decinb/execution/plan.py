"""The plan of a sweep: every cell understood, checked and counted before anything runs."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from diffusers import DiffusionPipeline
from PIL import Image

from decinb.designs import Cell
from decinb.errors import InputError
from decinb.execution.provenance import Record, _record, origin, picture_name
from decinb.execution.store import Store
from decinb.images import Source, fit, read_image
from decinb.sampling.adapters import (
    Job,
    _check_taken,
    _guidance_rescale,
    check_image,
    check_pipe,
    count_calls,
    defaults,
    kind_of,
    lost_words,
)
from decinb.sampling.batched import seconds_per_row
from decinb.sampling.sequential import not_packed
from decinb.utils import validation
from decinb.utils.environment import versions
from decinb.utils.labels import label

MANY = 1000  # images in one sweep, beyond which one may not have meant it
LISTED = 5  # cells that a note names


@dataclass
class Plan:
    """What a sweep will take. ``print`` it, or ``plot`` the grid that it will fill.

    ``computations`` are the distinct images among the cells, ``finished`` those that the folder holds already, and
    ``calls``, ``rows``, ``seconds`` (None if not timed) and ``bytes`` what the rest takes; calls as if each ran alone.
    ``notes`` say what may not be as it was meant.
    """

    image: Image.Image | None
    prompt: str
    cells: list[Cell]
    records: list[Record]
    jobs: list[Job]
    found: dict[str, Path]
    calls: int
    rows: int
    seconds: float | None
    bytes: int
    notes: list[str]

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
        return "; ".join(parts + self.notes)

    def plot(self, *args: Any, **kwargs: Any) -> None:
        """Show the empty grid: see ``decinb.plotting.plot_plan``."""
        from decinb.plotting import plot_plan

        plot_plan(self, *args, **kwargs)


def plan(
    pipe: DiffusionPipeline,
    image: Source | None,
    prompt: str,
    cells: Sequence[Cell],
    seed: int = 0,
    negative_prompt: str | None = None,
    folder: str | Path | None = None,
    guidance_rescale: float | None = None,
    timed: bool = True,
) -> Plan:
    """Say what ``run_sweep`` with these arguments would take, before anything runs.

    Args:
        pipe, image, prompt, cells, seed, negative_prompt, folder, guidance_rescale: as for ``run_sweep``.
        timed: time two U-Net calls to estimate the seconds.

    Raises:
        InputError: a cell cannot run; the message names it.

    Warns:
        Once, of each kind of cell that can run and will surprise: settings that come to the same image, prompts that
        are cut off, guidance that burns out, a negative prompt without guidance, steps that begin late, very many.
    """
    check_pipe(pipe)
    own = defaults(pipe)
    taken = {
        "strength": own["strength"],
        "guidance_scale": own["guidance_scale"],
        "num_inference_steps": own["num_inference_steps"],
        "prompt": prompt,
        "negative_prompt": negative_prompt,
        "seed": seed,
        "image": image,
    }
    check_image(pipe, image)
    rescale = _guidance_rescale(pipe, own["guidance_rescale"] if guidance_rescale is None else guidance_rescale)
    prompt = validation.text(prompt, "prompt")
    if not isinstance(cells, Sequence) or isinstance(cells, (str, bytes)) or not cells:
        raise InputError(f"cells must be a list of at least one dict, got {validation.short_repr(cells)}")
    store = Store(validation.folder(folder)) if folder is not None else None
    pictures = _Pictures()
    if negative_prompt is not None:
        _check_taken(pipe, {"negative_prompt": negative_prompt}, "")
    jobs = []
    for i, cell in enumerate(cells):
        jobs.append(read_cell(cell, taken, pictures.load, where=f"cell {i}: "))
        _check_taken(pipe, cell, f"cell {i}: ")
    calls = count_calls(pipe, jobs)
    shared = {"guidance_rescale": rescale, **origin(pipe), "versions": versions()}
    packed = kind_of(pipe)
    kind = packed and packed(pipe)
    cut = lru_cache(None)(lambda words: lost_words(pipe, words))
    records = [
        _record(pipe, kind, cell, job, shared, picture_name(cell.get("image", image), job.image))
        | {"original_size": pictures.original_size(job.image), "truncated": _truncated(job, cut)}
        for cell, job in zip(cells, jobs, strict=True)
    ]
    found = store.find(records) if store else {}
    missing = {record["key"]: i for i, record in enumerate(records) if record["key"] not in found}
    rows = sum(calls[i] * (2 if kind and jobs[i].guided else 1) for i in missing.values())
    width, height = records[0]["image_size"]
    loud, quiet = _notes(pipe, cells, jobs, records)
    if len(missing) > MANY:
        loud.append(f"{len(missing):,} images are to be made: print the plan of this sweep to see how long that takes")
    if kind is None:
        quiet.append(not_packed(pipe))
    for note in loud:
        validation.warn(note)
    return Plan(
        None if image is None else pictures.load(image),
        prompt,
        list(cells),
        records,
        jobs,
        found,
        sum(calls[i] for i in missing.values()),
        rows,
        rows * seconds_per_row(pipe, [jobs[i] for i in missing.values()]) if timed and missing and kind else None,
        len(missing) * 3 * width * height,  # a picture of many colours, and its input, half as large each at best
        loud + quiet,
    )


def _notes(
    pipe: DiffusionPipeline, cells: Sequence[Cell], jobs: Sequence[Job], records: Sequence[Record]
) -> tuple[list[str], list[str]]:
    """What can run and will surprise: to warn of, and only to mention."""
    notes, packed = [validation.high_guidance(max(job.guidance_scale for job in jobs))], kind_of(pipe) is not None
    steps = sorted({job.num_inference_steps for job in jobs}, reverse=True) if packed else []
    notes.append(next(filter(None, (validation.late_start(number, pipe.scheduler) for number in steps)), None))

    # A cell that names both means it: it shows that without guidance a negative prompt does nothing.
    unused = [i for i, job in enumerate(jobs) if packed and job.negative_prompt and not job.guided]
    meant = [i for i in unused if {"negative_prompt", "guidance_scale"} <= cells[i].keys()]
    if by_default := [i for i in unused if i not in meant]:
        notes.append(validation.unused_negative(jobs[by_default[0]].guidance_scale) + f", {_of(by_default)}")

    alike: dict[str, list[int]] = {}
    for i, record in enumerate(records):
        alike.setdefault(record["key"], []).append(i)
    if len(alike) < len(cells):
        same = max(alike.values(), key=len)
        settings = "; ".join(label(cells[i]) for i in same[:LISTED])
        number = f"{len(cells) - len(alike)} of {len(cells)}"
        notes.append(f"cells that repeat another are not made again, {number}: {_of(same)} are one ({settings})")
    for name in ("prompt", "negative_prompt"):
        for words in dict.fromkeys(record["truncated"].get(name) for record in records):
            notes.append(words and validation.lost(name, words))
    mentioned = [f"negative_prompt is unused in {_of(meant)}"] if meant else []
    return [note for note in notes if note], mentioned


def _of(cells: Sequence[int]) -> str:
    """A few cells by number."""
    more = f" and {len(cells) - LISTED} more" if len(cells) > LISTED else ""
    return f"cell{'s' if len(cells) > 1 else ''} {', '.join(map(str, cells[:LISTED]))}{more}"


def _truncated(job: Job, cut: Callable[[str], str]) -> dict[str, str]:
    """The words of a job that the text encoder does not read."""
    read = {"prompt": job.prompt, "negative_prompt": (job.negative_prompt or "") if job.guided else ""}
    return {name: lost for name, words in read.items() if (lost := cut(words))}


# --- from cells to jobs -----------------------------------------------------------------------------------------------


def read_cell(cell: Cell, defaults: Cell, load: Callable[[Any], Image.Image], where: str) -> Job:
    """Understand a cell, or raise an InputError that begins with ``where``."""
    if not isinstance(cell, dict):
        raise InputError(
            f"{where}a cell must be a dict such as {{'strength': 0.75}}, got {validation.short_repr(cell)}"
        )
    validation.known(cell, defaults, where)
    given = {**defaults, **cell}
    steps = validation.num_inference_steps(given["num_inference_steps"], where)
    strength = validation.strength(given["strength"], where)
    validation.steps_run(steps, strength, where)
    negative = given["negative_prompt"]
    return Job(
        image=None if given["image"] is None else load(given["image"]),
        prompt=validation.text(given["prompt"], f"{where}prompt"),
        negative_prompt=None if negative is None else validation.text(negative, f"{where}negative_prompt"),
        strength=strength,
        guidance_scale=validation.guidance_scale(given["guidance_scale"], where),
        num_inference_steps=steps,
        seed=validation.seed(given["seed"], where),
    )


class _Pictures:
    """The pictures of a sweep, each read once: the same object for the same source."""

    def __init__(self) -> None:
        self._read: dict[Any, tuple[Any, Image.Image]] = {}
        self._original: dict[int, tuple[int, int]] = {}

    def load(self, source: Any) -> Image.Image:
        name = source if isinstance(source, (str, bytes, Path)) else id(source)
        if name not in self._read:
            original = read_image(source)
            image = fit(original)
            self._original[id(image)] = original.size
            self._read[name] = source, image  # the source is held, so that its id is not given again
        return self._read[name][1]

    def original_size(self, image: Image.Image | None) -> list[int] | None:
        """Width and height of what was loaded as this, before it was cut to fit."""
        return None if image is None else list(self._original[id(image)])


# --- records ----------------------------------------------------------------------------------------------------------


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
