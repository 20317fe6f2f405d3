"""The results of a sweep in progress: each image goes to every cell that asked for it, and to the folder."""

from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from PIL import Image

from decinb.designs import Cell
from decinb.errors import reason
from decinb.execution.plan import Plan
from decinb.execution.provenance import ImageRecord, image_hash, unknown_parts
from decinb.execution.store import Images, Store
from decinb.images import OUTPUT_HASH
from decinb.sampling.jobs import Result
from decinb.utils import validation

MADE = ("seconds", "blacked_out", OUTPUT_HASH)
"""The fields of a record that are known when its image is made."""


class Results:
    """The finished images of a plan.

    An image that cannot be saved stays in memory; ``save_again`` tries to save it once more.

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
        self._copied: dict[int, Path] = {}  # the files of cells whose images are also kept in memory
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
        """Add the cells of the plan to the manifest of the folder."""
        if self.store is not None:
            try:
                outdated = self.store.list_cells(self.plan.records)
            except OSError as error:
                self._warn_refused(error)
            else:
                if outdated:
                    print(
                        f"decinb: {outdated} images were saved by an earlier version, which did not record all that "
                        "decides an image: they are made again"
                    )

    def load_saved(self) -> dict[str, Path]:
        """Add the images that are in the folder already, also from other processes; return the files by key."""
        if self.store is None:
            return {}
        saved = self.store.find([self.plan.records[self.cells_of[key][0]] for key in self.missing])
        for key, (path, record) in saved.items():
            made = {name: record.get(name) for name in MADE}
            self._take(key, path, made)
        return {key: path for key, (path, _) in saved.items()}

    def add(self, key: str, result: Result) -> bool:
        """Add a new result, and return whether it has an image. Warn if it has none, or a black one."""
        cell = f"cell {self.plan.label(self.cells_of[key][0])}"
        if result.image is None:
            self._failed.add(key)
            validation.warn(f"{cell}: {result.error}; the other cells continue")
            return False
        if result.blacked_out:
            validation.warn(f"{cell}: the image is black, because the safety checker judged it unsafe")
        made = (round(result.seconds, 3), result.blacked_out, image_hash(result.image.convert("RGB")))
        self._take(key, result.image, dict(zip(MADE, made, strict=True)))
        return True

    def discard(self, keys: Iterable[str]) -> int:
        """Remove images, also from the folder, and return how many."""
        cells = [i for key in keys for i in self.cells_of[key] if i in self._finished]
        discarded = [self._finished.pop(i)[0] for i in cells]
        copies = [self._copied.pop(i) for i in cells if i in self._copied]
        for path in {*copies, *(source for source in discarded if isinstance(source, Path))}:
            try:
                path.unlink(missing_ok=True)
            except OSError as error:
                validation.warn(f"{str(path)!r} may be wrong and cannot be removed ({reason(error)}): remove it")
        return len(discarded)

    def save_again(self) -> None:
        """Save what could not be saved: a full disk may have room again, a drive may be back, an interrupt is over.

        Warns:
            Images that had been saved are no longer there. They are left out.
        """
        in_memory = [
            i for i, (source, _) in self._finished.items() if isinstance(source, Image.Image) and i not in self._copied
        ]
        if self.store is not None and (in_memory or self._refused):
            with suppress(OSError):
                self.store.list_cells(self.plan.records)
                for i in in_memory:
                    self._save(i)
        gone = [i for i, (source, _) in self._finished.items() if isinstance(source, Path) and not source.is_file()]
        for i in gone:
            del self._finished[i]
        if gone:
            validation.warn(
                f"{len(gone)} images that were saved in {str(self.store.folder)!r} are no longer there and are left "
                "out: was the folder renamed, or emptied?"
            )

    def _take(self, key: str, source: Image.Image | Path, made: ImageRecord) -> None:
        for i in self.cells_of[key]:
            self._finished[i] = source, {**self.plan.records[i], **made}
        for i in self.cells_of[key] if self.store is not None else ():
            try:
                self._save(i)
            except OSError as error:
                self._warn_refused(error)

    def _save(self, i: int) -> None:
        """Save the image of a cell under the cell's own file name, unless it is there already."""
        source, record = self._finished[i]
        path, saved = self.store.keep(source, record, self.plan.jobs[i].image)
        if unknown_parts(record):  # another sweep with code that cannot be compared may write over the file
            self._copied[i] = path
        else:  # the file's record may be that of another cell with the same image
            self._finished[i] = path, {**record, **{name: saved.get(name) for name in MADE}}

    def _warn_refused(self, error: OSError) -> None:
        if not self._refused:
            validation.warn(
                f"folder {str(self.store.folder)!r} cannot be written to ({error.strerror or error}): what cannot be "
                "saved stays in memory, in the returned sweep, and saving is tried again at the end"
            )
        self._refused = True
