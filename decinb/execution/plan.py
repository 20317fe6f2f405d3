"""The plan of a sweep, in three steps: cells become jobs, jobs become records, and records are counted."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from diffusers import DiffusionPipeline
from PIL import Image

from decinb.designs import Cell
from decinb.errors import InputError
from decinb.execution.provenance import (
    ImageRecord,
    distinguish_inputs,
    image_name,
    image_record,
    pipeline_record,
    shared_record,
)
from decinb.execution.store import Store
from decinb.images import Source, fit, read_image
from decinb.sampling.adapters import adapter_of
from decinb.sampling.base import Adapter
from decinb.sampling.jobs import Job
from decinb.utils import validation
from decinb.utils.labels import ARGUMENTS, SHORT, label

MANY_IMAGES = 1000  # in one sweep, beyond which a warning asks whether it was meant
LISTED_CELLS = 5  # named in one note
TEXTS = [name for name in ARGUMENTS if name not in SHORT]  # arguments that labels name only where cells differ in them


@dataclass
class Plan:
    """What a sweep will take. ``print`` it, or ``plot`` the grid that it will fill.

    Attributes:
        image, prompt: of all cells that do not name their own.
        cells: as they were given.
        records, jobs, cell_calls: of every cell: its record so far, its validated arguments, and its U-Net calls.
        adapter: of the pipeline.
        found: the files of images that the folder holds already, by key.
        calls: U-Net calls left, if every image were made alone.
        rows: rows left in these calls; guidance takes two per call.
        seconds: the estimated time; None if it was not measured.
        bytes: the estimated size on disk.
        notes: what may not be as intended.
    """

    image: Image.Image | None
    prompt: str
    cells: list[Cell]
    records: list[ImageRecord]
    jobs: list[Job]
    cell_calls: list[int]
    adapter: Adapter
    found: dict[str, Path]
    calls: int
    rows: int
    seconds: float | None
    bytes: int
    notes: list[str]

    @property
    def computations(self) -> int:
        """The number of distinct images among the cells."""
        return len({record["key"] for record in self.records})

    @property
    def guidance_rescale(self) -> float:
        """The guidance rescale of all cells."""
        return self.records[0]["guidance_rescale"]

    @property
    def finished(self) -> int:
        """The number of distinct images that the folder holds already."""
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

    def label(self, i: int) -> str:
        """Return a cell in words: its numbers, and the prompts and the input where cells differ in them."""
        differing = [name for name in TEXTS if len({record[name] for record in self.records}) > 1]
        return label(self.records[i], differing)

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
    """Return what ``run_sweep`` with these arguments would take, without running it.

    Args:
        pipe, image, prompt, cells, seed, negative_prompt, folder, guidance_rescale: as for ``run_sweep``.
        timed: time two U-Net calls to estimate the seconds.

    Raises:
        InputError: a cell cannot run; the message names it.

    Warns:
        Once for each kind of cell that can run but may not give what is expected: settings that give the same image,
        prompts that are cut off, very high guidance, negative prompts without guidance, schedules that start late, very
        many images.
    """
    given = {"image": image, "prompt": prompt, "negative_prompt": negative_prompt, "seed": seed}
    store = None if folder is None else Store(validation.folder(folder))
    return make_plan(adapter_of(pipe), cells, given, guidance_rescale, store, timed)


def make_plan(
    adapter: Adapter,
    cells: Sequence[Cell],
    given: Cell,
    guidance_rescale: float | None,
    store: Store | None,
    timed: bool = False,
) -> Plan:
    """Plan a sweep.

    Args:
        adapter: of the pipeline.
        cells: as for ``run_sweep``.
        given: the image, prompt, negative prompt and seed of all cells that do not name their own.
        guidance_rescale: as for ``run_sweep``.
        store: where finished images are looked for.
        timed: time two U-Net calls to estimate the seconds.
    """
    inputs = _Inputs()
    jobs = _cells_to_jobs(adapter, cells, given, inputs)
    adapter, made_by = examine(adapter)
    shared = shared_record(made_by, adapter.guidance_rescale(guidance_rescale))
    records = _jobs_to_records(adapter, cells, jobs, shared, [inputs.describe(job.image) for job in jobs])
    calls = adapter.count_calls(jobs)
    found = {key: path for key, (path, _) in store.find(records).items()} if store else {}
    missing = list({record["key"]: i for i, record in enumerate(records) if record["key"] not in found}.values())
    rows = sum(calls[i] * adapter.rows(jobs[i]) for i in missing)
    per_row = adapter.seconds_per_row([jobs[i] for i in missing]) if timed and missing else None
    return Plan(
        image=inputs.load(given["image"]),
        prompt=given["prompt"],
        cells=list(cells),
        records=records,
        jobs=jobs,
        cell_calls=calls,
        adapter=adapter,
        found=found,
        calls=sum(calls[i] for i in missing),
        rows=rows,
        seconds=None if per_row is None else rows * per_row,
        # Three bytes a pixel: a colourful PNG and its input, each compressed to half its size at best.
        bytes=sum(3 * math.prod(records[i]["image_size"]) for i in missing),
        notes=_warn_and_note(adapter, cells, jobs, records, len(missing)),
    )


def examine(adapter: Adapter) -> tuple[Adapter, ImageRecord]:
    """Return the record of an adapter's pipeline, and a sequential adapter if the record lists unknown code."""
    made_by = pipeline_record(adapter.pipe)
    return adapter_of(adapter.pipe, made_by["unknown"][0]) if made_by["unknown"] else adapter, made_by


# --- from cells to jobs -----------------------------------------------------------------------------------------------


class _Inputs:
    """The input images of a sweep. Each source is read once and gives the same object every time."""

    def __init__(self) -> None:
        self._loaded: dict[Any, tuple[Source, Image.Image]] = {}
        self._description: dict[int, ImageRecord] = {}

    def load(self, source: Source | None) -> Image.Image | None:
        """Return the image of a source, cropped to a size that models take."""
        if source is None:
            return None
        key = source if isinstance(source, (str, bytes, Path)) else id(source)
        if key not in self._loaded:
            original = read_image(source)
            image = fit(original)
            self._description[id(image)] = {"image": image_name(source, image), "original_size": list(original.size)}
            self._loaded[key] = source, image  # the source is kept, so that no other object gets its id
        return self._loaded[key][1]

    def describe(self, image: Image.Image | None) -> ImageRecord:
        """Return the name of a loaded image, and its width and height before it was cropped."""
        return {"image": None, "original_size": None} if image is None else self._description[id(image)]


def _cells_to_jobs(adapter: Adapter, cells: Sequence[Cell], given: Cell, inputs: _Inputs) -> list[Job]:
    """Validate all cells, filling in what they leave out.

    Raises:
        InputError: an argument of the sweep or of a cell cannot be used.
    """
    adapter.check_image(given["image"])
    validation.text(given["prompt"], "prompt")
    if given["negative_prompt"] is not None:
        adapter.check_cell({"negative_prompt": given["negative_prompt"]})
    if not isinstance(cells, Sequence) or isinstance(cells, (str, bytes)) or not cells:
        raise InputError(f"cells must be a list of at least one dict, got {validation.short_repr(cells)}")
    own = {name: adapter.defaults[name] for name in ("strength", "guidance_scale", "num_inference_steps")}
    jobs = []
    for i, cell in enumerate(cells):
        where = f"cell {i}: "
        arguments = complete_cell(cell, {**own, **given}, where)
        try:
            image = inputs.load(arguments["image"])
        except InputError as error:
            raise InputError(f"{where if 'image' in cell else ''}{error}") from error
        jobs.append(make_job(arguments, image, where))
        adapter.check_cell(cell, where)
    return jobs


def complete_cell(cell: Cell, defaults: Cell, where: str) -> Cell:
    """Return a cell with the defaults for what it leaves out.

    Raises:
        InputError: it is not a dict, or has an unknown argument; the message starts with ``where``.
    """
    if not isinstance(cell, dict):
        raise InputError(
            f"{where}a cell must be a dict such as {{'strength': 0.75}}, got {validation.short_repr(cell)}"
        )
    validation.known(cell, defaults, where)
    return {**defaults, **cell}


def make_job(arguments: Mapping[str, Any], image: Image.Image | None, where: str) -> Job:
    """Return a job with validated arguments.

    Raises:
        InputError: an argument cannot be used; the message starts with ``where``.
    """
    steps = validation.num_inference_steps(arguments["num_inference_steps"], where)
    strength = validation.strength(arguments["strength"], where)
    validation.steps_run(steps, strength, where)
    negative = arguments["negative_prompt"]
    return Job(
        image=image,
        prompt=validation.text(arguments["prompt"], f"{where}prompt"),
        negative_prompt=None if negative is None else validation.text(negative, f"{where}negative_prompt"),
        strength=strength,
        guidance_scale=validation.guidance_scale(arguments["guidance_scale"], where),
        num_inference_steps=steps,
        seed=validation.seed(arguments["seed"], where),
    )


# --- from jobs to records ---------------------------------------------------------------------------------------------


def _jobs_to_records(
    adapter: Adapter,
    cells: Sequence[Cell],
    jobs: Sequence[Job],
    shared: ImageRecord,
    inputs: Sequence[ImageRecord],
) -> list[ImageRecord]:
    """Return the record of each image, as far as it is known before the image is made."""
    truncated_text = lru_cache(None)(adapter.truncated_text)
    records = []
    for cell, job, source in zip(cells, jobs, inputs, strict=True):
        texts = {"prompt": job.prompt, "negative_prompt": (job.negative_prompt or "") if job.guided else ""}
        truncated = {name: end for name, text in texts.items() if (end := truncated_text(text))}
        record = image_record(cell, job, source["image"], adapter.output_size(job), adapter.key_parts(job), shared)
        records.append({**record, "original_size": source["original_size"], "truncated": truncated})
    return distinguish_inputs(records)


# --- from records to a plan -------------------------------------------------------------------------------------------


def _warn_and_note(
    adapter: Adapter, cells: Sequence[Cell], jobs: Sequence[Job], records: Sequence[ImageRecord], missing: int
) -> list[str]:
    """Return notes on what can run but may surprise; warn about what was probably not intended."""
    warned = [validation.high_guidance(max(job.guidance_scale for job in jobs)), adapter.schedule_note(jobs)]

    # A cell that names both arguments is intended: it shows that without guidance a negative prompt does nothing.
    unused = [i for i, job in enumerate(jobs) if adapter.ignores_negative(job)]
    intended = [i for i in unused if {"negative_prompt", "guidance_scale"} <= cells[i].keys()]
    if surprising := [i for i in unused if i not in intended]:
        warned.append(f"{validation.unused_negative(jobs[surprising[0]].guidance_scale)}, {_list_cells(surprising)}")

    by_key: dict[str, list[int]] = {}
    for i, record in enumerate(records):
        by_key.setdefault(record["key"], []).append(i)
    if len(by_key) < len(cells):
        same = max(by_key.values(), key=len)
        named = [{name: records[i][name] for name in cells[i]} for i in same[:LISTED_CELLS]]
        settings = "; ".join(label(one, TEXTS) for one in named)
        warned.append(
            f"{len(cells) - len(by_key)} of {len(cells)} cells repeat another and are not computed again: "
            f"{_list_cells(same)} give the same image ({settings})"
        )
    for name in ("prompt", "negative_prompt"):
        for end in dict.fromkeys(record["truncated"].get(name) for record in records):
            warned.append(end and validation.lost(name, end))
    if missing > MANY_IMAGES:
        warned.append(f"{missing:,} images are to be made: print the plan of this sweep to see how long that takes")

    warned = [note for note in warned if note]
    for note in warned:
        validation.warn(note)
    mentioned = [f"negative_prompt is unused in {_list_cells(intended)}" if intended else None, adapter.note]
    return warned + [note for note in mentioned if note]


def _list_cells(cells: Sequence[int]) -> str:
    """Return the numbers of a few cells in words."""
    more = f" and {len(cells) - LISTED_CELLS} more" if len(cells) > LISTED_CELLS else ""
    return f"cell{'s' if len(cells) > 1 else ''} {', '.join(map(str, cells[:LISTED_CELLS]))}{more}"


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
