"""Run a plan: compute what is not finished yet, alone or shared among processes, whatever interrupts it."""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path

from PIL import Image

from decinb.errors import InputError
from decinb.execution.provenance import unknown_parts
from decinb.execution.results import Results
from decinb.execution.store import open_image
from decinb.figures.live import LiveGrid, progress_bar
from decinb.sampling.base import Adapter
from decinb.sampling.jobs import Result, Step
from decinb.utils import validation


def is_shared() -> bool:
    """Return whether this is one of several processes, as ``accelerate launch`` and ``torchrun`` start them.

    Raises:
        InputError: the environment variable ``WORLD_SIZE`` is not a number.
    """
    given = os.environ.get("WORLD_SIZE") or "1"
    if not given.isdecimal():
        raise InputError(f"WORLD_SIZE in the environment must be a number of processes, got {given!r}: unset it")
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
        adapter: of the pipeline.
        results: of the plan, where images go, even if the run is interrupted or fails.
        max_rows: the most rows in a U-Net call; None chooses for the device.
        progress: show a bar.
        show: show a grid that fills, in a notebook.
    """

    def __init__(self, adapter: Adapter, results: Results, max_rows: int | None, progress: bool, show: bool):
        self.adapter, self.results, self.plan = adapter, results, results.plan
        self.max_rows, self.progress = max_rows, progress
        self._pending: list[tuple[str, Result]] = []  # results of the last step that have not been added yet
        self._grid: LiveGrid | None = None
        if show:
            with self._only_display():
                self._grid = LiveGrid(adapter, self.plan.image, self.plan.records)

    def run(self) -> None:
        """Compute what is missing, in a folder that no other run uses at the same time."""
        store = self.results.store
        try:
            with store.locked() if store is not None and is_first() else nullcontext():  # the first locks it for all
                if is_first():
                    self.results.list_cells()
                    if store is not None and (unknown := unknown_parts(self.plan.records[0])):
                        print(f"decinb: {unknown[0]} may change unseen: with it, images are made anew every time")
                self._load_saved()  # now, because waiting for the folder may have changed it
                missing = self.results.missing
                if missing and self.adapter.note and is_first():
                    print(f"decinb: {self.adapter.note}")
                if is_shared():
                    self._compute_share(missing)
                else:
                    self._compute(missing)
                self.results.save_again()
        finally:
            with self._only_display():
                if self._grid:
                    self._grid.close()

    def _compute_share(self, keys: Sequence[str]) -> None:
        """Compute this process's share, then what slower or dead processes have left, from the end of the list."""
        from accelerate import PartialState

        with PartialState(cpu=self.adapter.pipe.device.type == "cpu").split_between_processes(list(keys)) as share:
            self._compute(share)
        self._load_saved()
        while missing := self.results.missing:
            self._compute(missing[-1:])
            self._load_saved()

    def _compute(self, keys: Sequence[str]) -> None:
        if not keys:
            return
        jobs = [self.plan.jobs[self._cell(key)] for key in keys]
        calls = self.adapter.count_calls(jobs)
        total_rows = sum(number * self.adapter.rows(job) for number, job in zip(calls, jobs, strict=True))
        steps = self.adapter.run(jobs, self.max_rows, self.plan.guidance_rescale)
        with progress_bar(total_rows, self.progress) as bar:
            try:
                for step in steps:
                    self._take(step, keys)
                    bar.update(step.rows)
            except KeyboardInterrupt as interrupt:  # what is fully denoised by then is still decoded and kept
                with suppress(KeyboardInterrupt):
                    self._take_pending()
                    step = steps.throw(interrupt)
                    while True:
                        self._take(step, keys)
                        step = next(steps)
                raise

    def _take(self, step: Step, keys: Sequence[str]) -> None:
        """Keep what a step has finished, and show the progress of the rest."""
        self.results.in_progress = sorted(self._cell(keys[index]) for index in step.active)
        self._pending += [(keys[result.index], result) for result in step.results]
        self._take_pending()
        with self._only_display():
            for index, latents in step.active.items() if self._grid else ():
                if latents is not None:
                    self._grid.preview(self._cell(keys[index]), latents)

    def _take_pending(self) -> None:
        while self._pending:
            key, result = self._pending.pop(0)
            if self.results.add(key, result):
                self._show(key, result.image)

    def _load_saved(self) -> None:
        for key, path in self.results.load_saved().items():
            self._show(key, path)

    def _cell(self, key: str) -> int:
        """Return the number of the first cell that an image is for."""
        return self.results.cells_of[key][0]

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
