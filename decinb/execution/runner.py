"""Run a plan: what is not finished yet is computed, kept and shown, whatever interrupts it."""

import os
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any

from diffusers import DiffusionPipeline
from PIL import Image

from decinb.execution.plan import Plan
from decinb.execution.provenance import Record
from decinb.execution.store import Images, Store
from decinb.figures.live import LiveGrid, progress_bar
from decinb.images import read_record
from decinb.sampling.adapters import Job, count_calls, kind_of
from decinb.sampling.batched import Done, Tick, denoise, fitting_pack
from decinb.sampling.sequential import call_each, not_packed
from decinb.utils.labels import label


def _ticks(pipe: DiffusionPipeline, jobs: Sequence[Job], pack: int | None, guidance_rescale: float) -> Iterator[Tick]:
    """An image for every job: many in each U-Net call where that can be, else one after the other."""
    if kind_of(pipe) is None:
        return call_each(pipe, jobs, guidance_rescale)
    return denoise(pipe, jobs, pack or fitting_pack(pipe, jobs), guidance_rescale)


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
        with progress_bar(rows, self.progress) as bar:
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

    def result(self) -> Any:
        from decinb.sweep import Sweep

        order = sorted(self.made)
        return Sweep(
            self.plan.image,
            self.plan.prompt,
            [self.plan.cells[i] for i in order],
            Images([self.made[i][0] for i in order]),
            [self.made[i][1] for i in order],
            self.store.folder if self.store else None,
        )
