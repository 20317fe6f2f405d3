"""A sweep: an image and a prompt, run once for every cell of a design, planned first and denoised together.

``run_sweep`` makes the images, ``load_sweep`` brings back what a folder holds, and ``replay`` makes one image again
from its file.
"""

import csv
import os
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image

from decinb import inputs
from decinb.chains import CHAIN, replay_chain
from decinb.denoise import Done, Tick, denoise, fitting_pack
from decinb.designs import Cell
from decinb.errors import InputError
from decinb.images import Source, read_input, read_record
from decinb.kinds import Job, kind_of
from decinb.labels import ARGUMENTS, label
from decinb.loading import load_pipeline
from decinb.locks import turn
from decinb.models import IMAGE_TO_IMAGE, TEXT_TO_IMAGE
from decinb.one_by_one import call_each, not_packed
from decinb.origin import check_weights, known_model, scheduler_of
from decinb.planning import NEEDED, Plan, check_image, check_pipe, count_calls, plan, read_cell
from decinb.progress import Bar, LiveGrid
from decinb.quiet import quiet
from decinb.store import Images, Record, Store

with quiet():  # importing these tells of optional libraries that are not needed here
    from diffusers import DiffusionPipeline

if TYPE_CHECKING:
    import pandas


@dataclass
class Sweep:
    """What came out: cells as they were given, records of everything (arguments, steps, seconds), images; in one order.

    ``images`` is a sequence; where the sweep has a folder, each is read from there when it is asked for.
    """

    image: Image.Image | None
    prompt: str
    cells: list[Cell] = field(default_factory=list)
    images: Sequence[Image.Image] = field(default_factory=list)
    records: list[Record] = field(default_factory=list)
    folder: Path | None = None

    def __len__(self) -> int:
        return len(self.cells)

    def select(self, **where: Any) -> "Sweep":
        """The part of the sweep with these values: ``select(seed=0, strength=[0.5, 0.75])``.

        Raises:
            InputError: an argument is not known.
        """
        inputs.known(where, [*ARGUMENTS, "steps_run"])
        several = (list, tuple, set, range)
        wanted = {name: value if isinstance(value, several) else [value] for name, value in where.items()}
        kept = [i for i, r in enumerate(self.records) if all(_among(r[name], some) for name, some in wanted.items())]
        sources = self.images.sources if isinstance(self.images, Images) else self.images
        return Sweep(
            self.image,
            self.prompt,
            [self.cells[i] for i in kept],
            Images([sources[i] for i in kept]),
            [self.records[i] for i in kept],
            self.folder,
        )

    def to_dataframe(self) -> "pandas.DataFrame":
        """The records as a table of pandas, a row for each image."""
        import pandas  # takes longer to import than everything else, and only this needs it

        return pandas.DataFrame([_flat(record) for record in self.records])

    def to_csv(self, file: str | Path) -> Path:
        """Write the records as a CSV file with a header, a row for each image."""
        file = Path(file)
        file.parent.mkdir(parents=True, exist_ok=True)
        rows = [_flat(record) for record in self.records]
        with open(file, "w", newline="", encoding="utf-8") as out:
            columns = dict.fromkeys(name for row in rows for name in row)  # records of several tasks differ in theirs
            writer = csv.DictWriter(out, list(columns or ARGUMENTS))
            writer.writeheader()
            writer.writerows(rows)
        return file

    def plot(self, *args: Any, **kwargs: Any) -> None:
        """Show the images as a labelled grid: see ``decinb.plotting.plot_sweep``."""
        from decinb.plotting import plot_sweep

        plot_sweep(self, *args, **kwargs)


class SweepError(RuntimeError):
    """A sweep broke while it ran. ``sweep`` holds everything that was finished before."""

    def __init__(self, message: str, sweep: Sweep):
        super().__init__(message)
        self.sweep = sweep


def run_sweep(
    pipe: DiffusionPipeline,
    image: Source | None,
    prompt: str,
    cells: Sequence[Cell],
    seed: int = 0,
    negative_prompt: str | None = None,
    folder: str | Path | None = None,
    progress: bool = True,
    guidance_rescale: float | None = None,
    pack: int | None = None,
    show: bool = False,
) -> Sweep:
    """Make one image for every cell, many in each U-Net call, each as if it had been made alone.

    Each cell starts from a fresh ``torch.Generator().manual_seed(seed)`` on the CPU, so any of them can be made again
    alone. All cells are checked before the first one runs; cells that come to the same computation run once. With a
    folder, each image is written there the moment it is finished, and what is there already is not made again: call
    it again after an interruption, or with more cells. Stopping the notebook cell returns what is done. Where the
    folder cannot be written to, a warning says so, and the images stay in memory.

    Under ``accelerate launch`` the processes share the cells, and ``folder`` is where they meet. Otherwise a second
    thread with the same pipeline, and a second process in the same folder, wait until the first is done.

    Args:
        pipe: from ``load_pipeline``, or any other that makes images from text, or from text and an image. Those of
            Stable Diffusion's kind (1, 2, XL, with depth) are packed; any other makes its images one after the other,
            by its own call, and the sweep says so.
        image: from ``load_image``, or what it takes; None where the pipeline makes images from text alone.
        prompt: what the picture should become; a cell's own ``prompt`` goes before it.
        cells: dicts with any of ``strength`` (above 0, at most 1), ``guidance_scale`` (0 or more; 1 or less switches
            guidance off), ``num_inference_steps`` (1 to 999), ``prompt``, ``negative_prompt``, ``image``, and ``seed``
            (0 to 2**63 - 1). Text to image has no strength and no image.
        seed: of every cell that names none.
        negative_prompt: of every cell that names none.
        folder: where every finished image is written at once, as a PNG with its record and its input inside.
        progress: show a bar.
        guidance_rescale: 0 to 1; None is the pipeline's own: 0.7 for text to image with DeciDiffusion, nothing else.
        pack: the most rows in a U-Net call; None suits it to the device and the images' size.
        show: in a notebook, show a grid that fills while the sweep runs, with previews where there is an input.

    Raises:
        InputError: a cell cannot run; the message names it.
        SweepError: the sweep broke while running; what was finished before is in its ``sweep``.
    """
    if folder is None and _is_shared():
        raise InputError("folder must be given where several processes share a sweep: it is where they meet")
    if pack is not None:
        pack = inputs.number_of(pack, "pack")
    store = None if folder is None else Store(inputs.folder(folder))
    check_pipe(pipe)
    with turn(pipe):  # planning too: it reads the scheduler
        planned = plan(pipe, image, prompt, cells, seed, negative_prompt, folder, guidance_rescale, timed=False)
        return _run(_Run(pipe, planned, store, pack, progress, show))


def _run(run: "_Run") -> Sweep:
    planned = run.plan
    try:
        run.go()
    except KeyboardInterrupt:
        print(f"stopped: {len(run.made)} of {len(planned.cells)} cells are done")
    except Exception as error:
        if isinstance(error, InputError) and not run.made:  # found at the last door: the folder, or the U-Net
            raise
        sweep = run.result()
        under_way = "; ".join(f"cell {i} ({label(planned.records[i])})" for i in run.under_way[:3])
        more = f" and {len(run.under_way) - 3} more" if len(run.under_way) > 3 else ""
        done = f"{len(sweep)} of {len(planned.cells)} cells were done and are in this error's `sweep`"
        raise SweepError(f"{under_way or 'the sweep'}{more} failed: {error}; {done}", sweep) from error
    finally:
        if run.grid:
            with run._only_shown():
                run.grid.close()
    return run.result()


def load_sweep(folder: str | Path) -> Sweep:
    """Bring back what a folder of ``run_sweep`` holds: every finished image, in the order it was asked for.

    Raises:
        InputError: the folder holds no sweep, or none of its images is finished.
    """
    store = Store(folder)
    paths, records, image = store.read()
    return Sweep(image, records[0]["prompt"], [r["cell"] for r in records], Images(paths), records, store.folder)


def replay(path: str | Path, pipe: DiffusionPipeline | Sequence[DiffusionPipeline] | None = None) -> Image.Image:
    """Make an image again from nothing but its PNG.

    Args:
        path: a file that ``run_sweep`` or ``run_chain`` has written.
        pipe: the pipeline that made it; may be left out if it was a known one (a name in ``MODELS``). A chain takes a
            list with the pipeline of every link, or one that gives its parts to all.

    Raises:
        InputError: the file is not such a PNG, or the pipeline has other weights than those it was made with.
    """
    record = read_record(path)
    if CHAIN in record:
        return replay_chain(path, pipe)
    inputs.known(NEEDED, record, f"{str(path)!r}: ")
    if pipe is None:
        task = TEXT_TO_IMAGE if record["image"] is None else IMAGE_TO_IMAGE
        pipe = load_pipeline(known_model(record, str(path)), task=task)
    check_weights(pipe, record, str(path))
    cell = {name: record[name] for name in ARGUMENTS if name != "image"}
    image = None if record["image"] is None else read_input(path)
    job = read_cell(cell, {**cell, "image": image}, lambda image: image, where=f"{str(path)!r}: ")
    check_image(pipe, job.image)
    with turn(pipe):
        before = pipe.scheduler
        pipe.scheduler = scheduler_of(pipe, record, str(path))
        try:
            rescale = inputs.share(record["guidance_rescale"], "guidance_rescale")
            done = [done for tick in _ticks(pipe, [job], None, rescale) for done in tick.done].pop()
        finally:
            pipe.scheduler = before
    if done.image is None:
        raise InputError(f"{str(path)!r}: {done.fault}")
    return done.image


def _ticks(pipe: DiffusionPipeline, jobs: Sequence[Job], pack: int | None, guidance_rescale: float) -> Iterator[Tick]:
    """An image for every job: many in each U-Net call where that can be, else one after the other."""
    if kind_of(pipe) is None:
        return call_each(pipe, jobs, guidance_rescale)
    return denoise(pipe, jobs, pack or fitting_pack(pipe, jobs), guidance_rescale)


def _is_plain(value: Any) -> bool:
    return value is None or isinstance(value, (bool, int, float, str))


def _flat(record: Record) -> dict[str, Any]:
    """The part of a record that fits into a table."""
    kept = {name: value for name, value in record.items() if _is_plain(value)}
    return {**kept, **{f"{name}_version": version for name, version in record.get("versions", {}).items()}}


def _among(value: Any, wanted: Iterable[Any]) -> bool:
    numeric = isinstance(value, float)
    return any(abs(value - one) < 1e-6 if numeric and isinstance(one, (int, float)) else value == one for one in wanted)


# --- the run ----------------------------------------------------------------------------------------------------------


def _is_shared() -> bool:
    """Whether this is one of several processes, as ``accelerate launch`` and ``torchrun`` start them."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


def _is_first() -> bool:
    """Whether this is the first of them, or the only one."""
    return os.environ.get("RANK", "0") == "0"


class _Run:
    """A sweep under way: what is asked for, what is made, and where it goes."""

    def __init__(
        self,
        pipe: DiffusionPipeline,
        planned: Plan,
        store: Store | None,
        pack: int | None,
        progress: bool,
        show: bool,
    ):
        self.pipe, self.plan, self.store = pipe, planned, store
        self.guidance_rescale = planned.records[0]["guidance_rescale"]
        self.pack, self.progress = pack, progress
        self.made: dict[int, tuple[Image.Image | Path, Record]] = {}  # by cell
        self.under_way: list[int] = []
        self.arrived: list[Done] = []  # of the last tick, not yet taken
        self.cells_of: dict[str, list[int]] = {}  # by key: cells of one computation
        for i, record in enumerate(planned.records):
            self.cells_of.setdefault(record["key"], []).append(i)
        self.grid: LiveGrid | None = None
        if show:
            with self._only_shown():
                self.grid = LiveGrid(pipe, planned.image, planned.records)
        self.refused: OSError | None = None  # by the folder: why it cannot be written to

    def go(self) -> None:
        if self.store is None:
            self._make()
            return
        first = _is_first()  # of processes that share a sweep, one notes it and keeps others out
        with self.store.alone() if first else nullcontext():
            if first:
                try:
                    self.store.note(self.plan.records)
                except OSError as error:
                    self._tell(error)
            self._make()
            if self.refused:
                self._save_again()

    def _make(self) -> None:
        found = self.store.find(self.plan.records) if self.store else {}  # anew, if it had to wait for the folder
        for made_by, path in found.items():
            self._take(made_by, path)
        mine = [made_by for made_by in self.cells_of if made_by not in found]
        if mine and kind_of(self.pipe) is None and _is_first():
            print(f"decinb: {not_packed(self.pipe)}")
        if not _is_shared():
            self._compute(mine)
            return
        from accelerate import PartialState

        with PartialState(cpu=self.pipe.device.type == "cpu").split_between_processes(mine) as share:
            self._compute(share)
        while left := self._left(mine):  # of a process that is slower, or is no more: from its far end
            self._compute(left[-1:])

    def _left(self, keys: Sequence[str]) -> list[str]:
        """What no process has finished yet; what another has is taken."""
        missing = [made_by for made_by in keys if self.cells_of[made_by][0] not in self.made]
        for made_by, path in self.store.find([self.plan.records[self.cells_of[one][0]] for one in missing]).items():
            self._take(made_by, path)
            missing.remove(made_by)
        return missing

    def _compute(self, keys: Sequence[str]) -> None:
        if not keys:
            return
        jobs = [self.plan.jobs[self.cells_of[made_by][0]] for made_by in keys]
        calls, packed = count_calls(self.pipe, jobs), kind_of(self.pipe) is not None
        rows = sum(n * (2 if packed and job.guided else 1) for n, job in zip(calls, jobs, strict=True))
        with Bar(rows, self.progress) as bar:
            ticks = _ticks(self.pipe, jobs, self.pack, self.guidance_rescale)
            try:
                for tick in ticks:
                    self._note(tick, keys)
                    bar.update(tick.rows)
            except KeyboardInterrupt as stop:  # wherever it came: what is denoised is still brought
                with suppress(KeyboardInterrupt):
                    self._take_all(keys)
                    tick = ticks.throw(stop)
                    while True:
                        self._note(tick, keys)
                        tick = next(ticks)
                raise

    def _note(self, tick: Tick, keys: Sequence[str]) -> None:
        """Take what a tick has finished, and show how far the others are."""
        self.under_way = sorted(self.cells_of[keys[index]][0] for index in tick.live)
        self.arrived += tick.done
        self._take_all(keys)
        with self._only_shown():
            for index, latents in tick.live.items() if self.grid and kind_of(self.pipe) else ():
                self.grid.preview(self.cells_of[keys[index]][0], latents)

    def _take_all(self, keys: Sequence[str]) -> None:
        while self.arrived:
            done = self.arrived.pop(0)
            made_by = keys[done.index]
            if done.image is None:
                named = label(self.plan.records[self.cells_of[made_by][0]])
                warnings.warn(f"cell {named}: {done.fault}; the others go on", stacklevel=6)
            else:
                if done.blacked_out:
                    named = label(self.plan.records[self.cells_of[made_by][0]])
                    warnings.warn(f"cell {named}: black, since the safety checker took it for unsafe", stacklevel=6)
                self._take(made_by, done.image, done.seconds, done.blacked_out)

    def _take(self, made_by: str, source: Image.Image | Path, seconds: float = 0.0, blacked_out: bool = False) -> None:
        """Note an image for every cell that it is of, and write it where that is wanted."""
        image = source if isinstance(source, Image.Image) else None
        if image is None:
            before = read_record(source)
            seconds, blacked_out = before["seconds"], before.get("blacked_out", False)
        for i in self.cells_of[made_by]:
            record = {**self.plan.records[i], "seconds": round(seconds, 3), "blacked_out": blacked_out}
            if self.store is None:
                self.made[i] = image, record
            else:
                self.made[i] = (image or source), record  # should the folder fail, it is not lost
                try:
                    self._keep(i)
                except OSError as error:
                    self._tell(error)
            if self.grid:
                with self._only_shown():
                    self.grid.show(i, image or Images([source])[0])

    @contextmanager
    def _only_shown(self) -> Iterator[None]:
        """What is only to be seen stops no sweep: the grid that raises is left alone from there on."""
        try:
            yield
        except Exception as error:
            self.grid = None
            warnings.warn(
                f"the grid cannot be shown ({type(error).__name__}: {error}); the sweep goes on", stacklevel=4
            )

    def _keep(self, i: int) -> None:
        """See that the folder has the image of a cell."""
        source, record = self.made[i]
        path = self.store.path(record)
        before = self.store.held(path, record)
        if before is None:
            self.store.save(Images([source])[0], record, self.plan.jobs[i].image)
        self.made[i] = path, before or record

    def _tell(self, error: OSError) -> None:
        """Say once that the folder cannot be written to; the sweep goes on."""
        if self.refused is None:
            warnings.warn(
                f"folder {str(self.store.folder)!r} cannot be written to ({error.strerror or error}): what it does not "
                "take stays in memory, in the sweep that is returned, and is tried again at the end",
                stacklevel=2,
            )
        self.refused = error

    def _save_again(self) -> None:
        """What the folder did not take, once more: a full disk may have room again, a lost drive be back."""
        with suppress(OSError):
            self.store.note(self.plan.records)
            for i in [i for i, (source, _) in self.made.items() if isinstance(source, Image.Image)]:
                self._keep(i)

    def result(self) -> Sweep:
        order = sorted(self.made)
        return Sweep(
            self.plan.image,
            self.plan.prompt,
            [self.plan.cells[i] for i in order],
            Images([self.made[i][0] for i in order]),
            [self.made[i][1] for i in order],
            self.store.folder if self.store else None,
        )
