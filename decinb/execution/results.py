"""The results of a sweep in progress: each image goes to every cell that asked for it, and to the folder."""

from contextlib import suppress
from pathlib import Path

from PIL import Image

from decinb.designs import Cell
from decinb.execution.plan import Plan
from decinb.execution.provenance import ImageRecord
from decinb.execution.store import Images, Store
from decinb.images import read_record
from decinb.sampling.jobs import Result
from decinb.utils import validation
from decinb.utils.labels import label


class Results:
    """The finished images of a plan.

    An image that the folder does not take stays in memory, and is saved by ``save_again`` if the folder recovers.

    Args:
        plan: what the images are for.
        store: where they are saved; None keeps them in memory.
    """

    def __init__(self, plan: Plan, store: Store | None):
        self.plan, self.store = plan, store
        self.cells_of: dict[str, list[int]] = {}
        """The numbers of the cells that share an image, by key."""
        for i, record in enumerate(plan.records):
            self.cells_of.setdefault(record["key"], []).append(i)
        self.in_progress: list[int] = []
        """The numbers of the cells that are being computed."""
        self._finished: dict[int, tuple[Image.Image | Path, ImageRecord]] = {}
        self._failed: set[str] = set()  # keys of jobs that ended without an image
        self._refused = False  # whether the folder could not be written to

    def __len__(self) -> int:
        return len(self._finished)

    @property
    def missing(self) -> list[str]:
        """The keys of images that are left to compute, in the order of the plan."""
        done = {self.plan.records[i]["key"] for i in self._finished} | self._failed
        return [key for key in self.cells_of if key not in done]

    def in_order(self) -> tuple[list[Cell], Images, list[ImageRecord]]:
        """Return the finished cells, their images and their records, in the order of the plan."""
        order = sorted(self._finished)
        sources, records = [self._finished[i][0] for i in order], [self._finished[i][1] for i in order]
        return [self.plan.cells[i] for i in order], Images(sources), records

    def list_cells(self) -> None:
        """Note in the folder what was asked for."""
        if self.store is not None:
            try:
                self.store.list_cells(self.plan.records)
            except OSError as error:
                self._warn_refused(error)

    def load_saved(self) -> dict[str, Path]:
        """Take what the folder holds already, or another process has saved since; return the files by key."""
        if self.store is None:
            return {}
        saved = self.store.find([self.plan.records[self.cells_of[key][0]] for key in self.missing])
        for key, path in saved.items():
            record = read_record(path)
            self._take(key, path, record["seconds"], record.get("blacked_out", False))
        return saved

    def add(self, key: str, result: Result) -> bool:
        """Take a new result; return whether it has an image. Warn where it has none, or a black one."""
        cell = f"cell {label(self.plan.records[self.cells_of[key][0]])}"
        if result.image is None:
            self._failed.add(key)
            validation.warn(f"{cell}: {result.error}; the other cells continue")
            return False
        if result.blacked_out:
            validation.warn(f"{cell}: the image is black, because the safety checker judged it unsafe")
        self._take(key, result.image, result.seconds, result.blacked_out)
        return True

    def save_again(self) -> None:
        """Try once more to save what the folder did not take: a full disk may have room again, a drive be back."""
        if not self._refused:
            return
        with suppress(OSError):
            self.store.list_cells(self.plan.records)
            for i, (source, _) in self._finished.items():
                if isinstance(source, Image.Image):
                    self._save(i)

    def _take(self, key: str, source: Image.Image | Path, seconds: float, blacked_out: bool) -> None:
        made = {"seconds": round(seconds, 3), "blacked_out": blacked_out}
        for i in self.cells_of[key]:
            self._finished[i] = source, {**self.plan.records[i], **made}
        for i in self.cells_of[key] if self.store is not None else ():
            try:
                self._save(i)
            except OSError as error:
                self._warn_refused(error)

    def _save(self, i: int) -> None:
        """Let the folder keep the image of a cell under the cell's own file name."""
        source, record = self._finished[i]
        self._finished[i] = self.store.keep(source, record, self.plan.jobs[i].image)

    def _warn_refused(self, error: OSError) -> None:
        if not self._refused:
            validation.warn(
                f"folder {str(self.store.folder)!r} cannot be written to ({error.strerror or error}): what cannot be "
                "saved stays in memory, in the returned sweep, and saving is tried again at the end"
            )
        self._refused = True
