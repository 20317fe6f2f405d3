"""Run a plan: compute what is not finished yet, alone or shared among processes, whatever interrupts it."""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter

from PIL import Image

from decinb.errors import InputError
from decinb.execution.fingerprint import parameters_hash, stamp
from decinb.execution.provenance import pipeline_record, scheduler_config, unknown_parts
from decinb.execution.results import Results
from decinb.execution.store import open_image
from decinb.figures.live import LiveGrid, progress_bar
from decinb.figures.preview import Preview
from decinb.runtimes.openvino import precision
from decinb.sampling.jobs import Progress, Result, Step
from decinb.utils import validation
from decinb.utils.locks import pipeline_lock

IN_WORDS = {"unknown": "code"}  # what messages call a field of the record
SELDOM = 30  # a pipeline is compared in full after this many times the seconds that comparing takes, and at the end


@dataclass(frozen=True)
class State:
    """The progress of one cell, as ``steps`` yields it.

    Attributes:
        cell: the number of the cell in the list of cells.
        step: U-Net calls made: 0 if the cell has just started, ``steps`` if it only has to be decoded or is finished.
        steps: U-Net calls that the cell takes in all.
        seconds_left: the estimated time until the whole list is finished; None before the first U-Net call.
    """

    cell: int
    step: int
    steps: int
    seconds_left: float | None
    _source: Image.Image | Path | None = None
    _progress: Progress | None = None
    _preview: Preview | None = None

    @property
    def image(self) -> Image.Image | None:
        """The finished image; None while the cell is in progress, or if it ended with NaN."""
        return None if self._source is None else open_image(self._source)

    @property
    def predicted(self) -> Image.Image | None:
        """The clean image that the last U-Net call predicts, computed when it is asked for; at the end, the image.

        It is decoded by the VAE if that is fast, and otherwise has one pixel per latent. None before the first call,
        and for a pipeline that keeps its latents to itself.
        """
        if self._source is not None:
            return self.image
        latents = self._progress.predict() if self._progress and self._progress.predict else None
        return None if latents is None or self._preview is None else self._preview(latents)


def is_shared() -> bool:
    """Return whether this is one of several processes, as ``accelerate launch`` and ``torchrun`` start them.

    Raises:
        InputError: the environment variables ``WORLD_SIZE`` and ``RANK`` are not numbers, or left over from a launcher.
    """
    given = os.environ.get("WORLD_SIZE") or "1"
    for name, value in (("WORLD_SIZE", given), ("RANK", os.environ.get("RANK") or "0")):
        if not (value.isdecimal() and len(value) < 7):
            shown = validation.short_repr(value)
            raise InputError(f"{name} in the environment must be a number, got {shown}: unset it")
    if int(given) > 1 and not os.environ.get("RANK"):
        raise InputError(f"WORLD_SIZE is {given} in the environment, but RANK is not set: no launcher runs; unset it")
    if int(given) > 1 and int(os.environ["RANK"]) >= int(given):
        raise InputError(f"RANK is {os.environ['RANK']} in the environment, but WORLD_SIZE is {given}: unset both")
    return int(given) > 1


def is_first() -> bool:
    """Return whether this is the first of several processes, or the only one."""
    return not is_shared() or os.environ.get("RANK", "0") == "0"


def check_processes() -> None:
    """Warn if the environment has only a part of what a launcher sets: this process then computes everything."""
    if os.environ.get("RANK") and not os.environ.get("WORLD_SIZE"):
        validation.warn("RANK is set in the environment, but not WORLD_SIZE: this process runs the whole sweep alone")


class Runner:
    """Computes the images of a plan that are not finished.

    Args:
        results: of the plan, where images go, even if the run is interrupted or fails.
        max_rows: the most rows in a U-Net call; None chooses for the device.
        progress: show a bar.
        show: show a grid that fills, in a notebook.
    """

    def __init__(self, results: Results, max_rows: int | None, progress: bool, show: bool):
        self.results, self.plan, self.adapter = results, results.plan, results.plan.adapter
        self.max_rows, self.progress = max_rows, progress
        self._calls: dict[int, int] = {}  # U-Net calls made for each cell that was started
        self._pending: list[tuple[str, Result]] = []  # results of the last step that have not been added yet
        self._preview = Preview(self.adapter, self.plan.image) if self.adapter.exposes_latents else None
        self._stamp = stamp(self.adapter.pipe)  # of the pipeline that the plan describes
        # Of a pipeline that may fill caches of its own in a call, which is no change, only the parameters are compared.
        self._parameters = None if self.adapter.exposes_latents else parameters_hash(self.adapter.pipe)
        self._new: list[str] = []  # keys of images made since the pipeline was last compared in full
        self._compared, self._comparing = perf_counter(), 0.1  # when that was, and the seconds that it takes: a guess
        self._grid: LiveGrid | None = None
        if show:
            with self._only_display():
                self._grid = LiveGrid(self._preview, self.plan.image, self.plan.records)

    def steps(self) -> Iterator[list[State]]:
        """Compute what is missing, in a folder that no other run uses at the same time.

        Closing the iterator stops like a ``KeyboardInterrupt``: what is fully denoised is still decoded and kept.

        Yields:
            Whenever cells start, advance or end, their states; first those of cells that the folder holds already.
        """
        store = self.results.store
        try:
            pipeline = pipeline_lock(self.adapter.pipe)
            with store.locked(pipeline) if store is not None and is_first() else nullcontext():  # the first, for all
                if is_first():
                    self.results.list_cells()
                    if store is not None and (unknown := unknown_parts(self.plan.records[0])):
                        print(f"decinb: {unknown[0]} cannot be compared, so every image is computed again")
                yield self._load_saved()  # now, because waiting for the folder may have changed it
                self._check_unchanged()
                missing = self.results.missing
                if missing and self.adapter.note and is_first():
                    print(f"decinb: {self.adapter.note}")
                yield from self._compute_share(missing) if is_shared() else self._compute(missing)
                self.results.save_again()
        finally:
            with self._only_display():
                if self._grid:
                    self._grid.close()

    def _compute_share(self, keys: Sequence[str]) -> Iterator[list[State]]:
        """Compute this process's share, then what slower or dead processes have left, from the end of the list."""
        from accelerate import PartialState

        with PartialState(cpu=self.adapter.pipe.device.type == "cpu").split_between_processes(list(keys)) as share:
            yield from self._compute(share)
        yield self._load_saved()
        while missing := self.results.missing:
            yield from self._compute(missing[-1:])
            yield self._load_saved()

    def _compute(self, keys: Sequence[str]) -> Iterator[list[State]]:
        if not keys:
            return
        cells = [self._cell(key) for key in keys]
        jobs, calls = [self.plan.jobs[cell] for cell in cells], [self.plan.cell_calls[cell] for cell in cells]
        total_rows = sum(number * self.adapter.rows(job) for number, job in zip(calls, jobs, strict=True))
        steps = self.adapter.run(jobs, self.max_rows, self.plan.guidance_rescale)
        rows_done, started = 0, perf_counter()
        with progress_bar(len(jobs), total_rows, self.progress) as bar:
            try:
                for step in steps:
                    rows_done += step.rows
                    left = (total_rows - rows_done) * (perf_counter() - started) / rows_done if rows_done else None
                    states = self._take(step, keys, calls, left)
                    if step.results:
                        due = perf_counter() - self._compared >= SELDOM * self._comparing
                        self._check_unchanged(in_full=due or not self.adapter.exposes_latents)
                    bar.advance(step.rows, len(step.results))
                    yield states
            except (KeyboardInterrupt, GeneratorExit):  # what is fully denoised by then is still decoded and kept
                with suppress(KeyboardInterrupt):
                    self._take_pending()
                    step = steps.throw(KeyboardInterrupt())
                    while True:
                        self._take(step, keys, calls, None)
                        step = next(steps)
                raise
            finally:
                if self._new:
                    self._check_unchanged(in_full=True)

    def _take(self, step: Step, keys: Sequence[str], calls: Sequence[int], seconds_left: float | None) -> list[State]:
        """Keep what a step has finished, show the progress of the rest, and return the state of both."""
        active = {self._cell(keys[index]): progress for index, progress in step.active.items()}
        self.results.in_progress = sorted(cell for cell, progress in active.items() if progress.step < progress.steps)
        self._pending += [(keys[result.index], result) for result in step.results]
        self._take_pending()
        with self._only_display():
            for cell, progress in active.items() if self._grid else ():
                if progress.predict is not None:
                    self._grid.preview(cell, progress.predict)
        advanced = {cell: progress for cell, progress in active.items() if self._calls.get(cell) != progress.step}
        self._calls.update((cell, progress.step) for cell, progress in advanced.items())
        return [
            State(cell, progress.step, progress.steps, seconds_left, None, progress, self._preview)
            for cell, progress in advanced.items()
        ] + [
            State(cell, calls[result.index], calls[result.index], seconds_left, result.image)
            for result in step.results
            for cell in self.results.cells_of[keys[result.index]]
        ]

    def _take_pending(self) -> None:
        while self._pending:
            key, result = self._pending.pop(0)
            if self.results.add(key, result):
                self._new.append(key)
                self._show(key, result.image)

    def _load_saved(self) -> list[State]:
        """Take over what the folder holds already."""
        saved = self.results.load_saved()
        for key, path in saved.items():
            self._show(key, path)
        cells = [(cell, path) for key, path in saved.items() for cell in self.results.cells_of[key]]
        steps = [self.plan.records[cell]["steps_run"] for cell, _ in cells]
        return [State(cell, made, made, None, path) for (cell, path), made in zip(cells, steps, strict=True)]

    def _cell(self, key: str) -> int:
        """Return the number of the first cell that an image is for."""
        return self.results.cells_of[key][0]

    def _check_unchanged(self, in_full: bool = False) -> None:
        """Refuse a pipeline that was changed after planning: its images would be saved as those of the one planned.

        Args:
            in_full: compare every weight and setting of a batched pipeline, and every parameter of another one, and not
                only what the stamp and the scheduler show.

        Raises:
            InputError: it was changed. Images that were made since the last full comparison are discarded.
        """
        pipe, planned, started = self.adapter.pipe, self.plan.records[0], perf_counter()
        found = {"dtype": precision(pipe), "scheduler_config": scheduler_config(pipe.scheduler)}
        batched = self.adapter.exposes_latents
        if (in_full and batched) or stamp(pipe) != self._stamp:
            record = pipeline_record(pipe)
            found |= {"weights": record["weights"], "unknown": record["unknown"]}
            self._stamp = stamp(pipe)
        changed = [IN_WORDS.get(name, name) for name, value in found.items() if value != planned[name]]
        if in_full and not batched and "weights" not in changed and parameters_hash(pipe) != self._parameters:
            changed.append("weights")
        if changed:
            removed, self._new = self.results.discard(self._new), []
            raise InputError(
                f"pipe was changed while its sweep was unfinished ({' and '.join(changed)}): start the sweep again; "
                + (f"images removed because they may be wrong: {removed}" if removed else "what was finished was kept")
            )
        if in_full:
            self._new, self._compared = [], perf_counter()
            self._comparing = self._compared - started

    # --- display ---

    def _show(self, key: str, image: Image.Image | Path) -> None:
        with self._only_display():
            for i in self.results.cells_of[key] if self._grid else ():
                self._grid.show(i, open_image(image))

    @contextmanager
    def _only_display(self) -> Iterator[None]:
        """Keep a failure of the live grid from stopping the sweep: warn, and continue without the grid."""
        try:
            yield
        except Exception as error:
            self._grid = None
            validation.warn(f"the grid cannot be shown ({type(error).__name__}: {error}); the sweep continues")
