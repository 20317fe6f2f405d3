"""The folder of a sweep: a PNG for every finished image, and a manifest that lists what belongs to it.

Each PNG holds its record and its input, so the image can be made again from the file alone. An image is found by its
key, the hash of everything that decides its pixels, whichever design it was made for. It counts as finished only if the
file proves that it is that image; see ``decinb.images`` and ``mismatch``.
"""

import errno
import json
import os
from collections.abc import Sequence
from contextlib import AbstractContextManager, suppress
from pathlib import Path
from typing import Any, overload

from PIL import Image

from decinb.errors import InputError
from decinb.execution.provenance import CHAIN, ImageRecord, key, mismatch, unknown_parts
from decinb.images import read_saved, save_image
from decinb.utils import validation
from decinb.utils.files import read_json, write_atomically
from decinb.utils.labels import ARGUMENTS, SHORT, plain
from decinb.utils.locks import file_lock

MANIFEST = "sweep.json"
MAX_MANIFEST = 8_000_000  # bytes: some 50,000 cells; parsed, they take up to twenty times as much memory
LOCK = ".lock"


class Images(Sequence):
    """Images in memory or on disk; those on disk are read whenever they are accessed."""

    def __init__(self, sources: Sequence[Image.Image | Path]):
        self.sources = list(sources)

    def __len__(self) -> int:
        return len(self.sources)

    @overload
    def __getitem__(self, index: int) -> Image.Image: ...
    @overload
    def __getitem__(self, index: slice) -> list[Image.Image]: ...
    def __getitem__(self, index):
        if isinstance(index, slice):
            return [open_image(source) for source in self.sources[index]]
        return open_image(self.sources[index])


def open_image(source: Image.Image | Path) -> Image.Image:
    """Return an image that is in memory, or in a PNG file.

    Raises:
        InputError: the file is no longer there, or was changed.
    """
    if isinstance(source, Image.Image):
        return source
    return read_saved(source).image


def file_name(record: ImageRecord) -> str:
    """Return the file name of a record's image: its settings, or its place in a chain, and its key."""
    if CHAIN in record:
        settings = f"link-{len(record[CHAIN]) - 1}_seed-{record['seed']}"
    else:
        settings = "_".join(f"{SHORT[name]}-{plain(record[name])}" for name in SHORT)
    return f"{settings}_{record['key']}.png"


class Store:
    """A folder of images, each saved with the record of what made it."""

    def __init__(self, folder: str | Path):
        try:
            self.folder = Path(folder).expanduser().absolute()  # also if the working directory changes meanwhile
        except RuntimeError as error:
            raise InputError(f"folder {str(folder)!r} cannot be found: {error}") from error
        self._in_use: os.stat_result | None = None  # the folder as it was first used

    def path(self, record: ImageRecord) -> Path:
        """Return where a record's image belongs, whether or not it is there."""
        return self.folder / file_name(record)

    def find(self, records: Sequence[ImageRecord]) -> dict[str, tuple[Path, ImageRecord]]:
        """Return by key the files of records' images and the records in them, whatever settings their names show."""
        by_key: dict[str, list[Path]] = {}
        for path in sorted(self.folder.glob("*_*.png")):
            by_key.setdefault(path.stem.rpartition("_")[2], []).append(path)
        found = {}
        for record in records:
            for path in by_key.get(record["key"], []) if record["key"] not in found else []:
                if saved := self.read_finished(path, record):
                    found[record["key"]] = path, saved
                    break
        return found

    def read_finished(self, path: Path, record: ImageRecord) -> ImageRecord | None:
        """Return the record in a file if the file proves that it holds this record's image; else None."""
        try:
            saved = read_saved(path)
        except InputError:  # missing, incomplete, changed, or not written by decinb
            return None
        made = saved.record
        if not saved.sealed or mismatch(saved) or made["key"] != record["key"]:
            return None
        if unknown_parts(record) or unknown_parts(made):  # equal keys do not tell whether it would be made again
            return None
        return made

    def keep(
        self, image: Image.Image | Path, record: ImageRecord, input_image: Image.Image | None
    ) -> tuple[Path, ImageRecord]:
        """Save an image unless the folder has it already; return its file and the record in it.

        Raises:
            OSError: the folder cannot be written to.
        """
        path = self.path(record)
        if saved := self.read_finished(path, record):
            return path, saved
        self.save(open_image(image), record, input_image)
        return path, record

    def save(self, image: Image.Image, record: ImageRecord, input_image: Image.Image | None) -> None:
        """Write an image completely or not at all."""
        self._create()
        save_image(image, self.path(record), record, input_image)

    def list_cells(self, records: Sequence[ImageRecord]) -> int:
        """Add cells to the manifest, which lists everything requested in this folder, finished or not.

        A file of an earlier version of decinb, which cannot prove what made it, is no longer listed for a cell that is
        made again.

        Returns:
            The number of files that are no longer listed.
        """
        self._create()
        listed = {entry["file"]: entry for entry in self._entries()}
        new = {self.path(record).name: record["cell"] for record in records}
        again = {(_settings(name), key(cell=cell)) for name, cell in new.items() if name not in listed}
        outdated = [
            name
            for name, entry in listed.items()
            if (_settings(name), key(cell=entry["cell"])) in again and self._is_outdated(name)
        ]
        for name in outdated:
            del listed[name]
        for name, cell in new.items():
            listed.setdefault(name, {"file": name, "cell": cell})
        manifest = json.dumps({"cells": list(listed.values())}, indent=1) + "\n"
        write_atomically(self.folder / MANIFEST, manifest.encode())
        return len(outdated)

    def _create(self) -> None:
        """Create the folder, but only once: a folder that was renamed would otherwise be split in two."""
        if self._in_use is None:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._in_use = self.folder.stat()
        elif not self.folder.is_dir() or not os.path.samestat(self._in_use, self.folder.stat()):
            raise FileNotFoundError(errno.ENOENT, "it was renamed or deleted while it was in use")

    def _is_outdated(self, name: str) -> bool:
        """Return whether a listed file was saved by an earlier version of decinb."""
        try:
            return not read_saved(self.folder / Path(name).name).sealed
        except InputError:
            return False

    def locked(self, owner: Any = None) -> AbstractContextManager[None]:
        """Keep other processes out of the folder inside the ``with`` block; wait first if one is using it.

        Args:
            owner: as for ``file_lock``.
        """
        with suppress(OSError):  # a folder that cannot be written to needs no lock
            self.folder.mkdir(parents=True, exist_ok=True)
        return file_lock(
            self.folder / LOCK,
            f"folder {str(self.folder)!r} is in use by another process: waiting until it is done",
            owner,
        )

    def read(self) -> tuple[list[Path], list[ImageRecord], Image.Image | None]:
        """Return the files and records of all finished images in the manifest's order, and the input of the first.

        Raises:
            InputError: there is no manifest, it is damaged, or none of its images is finished.

        Warns:
            A listed file is damaged or was changed, and is left out; or it is of an earlier version, and cannot prove
            what made it.
        """
        if not (self.folder / MANIFEST).is_file():
            raise InputError(f"folder {str(self.folder)!r} holds no sweep: there is no {MANIFEST} in it")
        paths, records, first = [], [], None
        refused, outdated = [], 0
        there = {path.name for path in self.folder.iterdir()}
        # Only the names, since a file must not lead out of the folder; each once.
        for name in dict.fromkeys(Path(entry["file"]).name for entry in self._entries()):
            if name not in there:
                continue
            path = self.folder / name
            try:
                saved = read_saved(path)
                if wrong := mismatch(saved) or _lacking(saved.record):
                    raise InputError(f"{str(path)!r}: {wrong}")
            except InputError as error:
                refused.append(str(error))
                continue
            outdated += not saved.sealed
            paths.append(path)
            records.append(saved.record)
            first = saved.input_image if len(paths) == 1 else first
        if refused:
            more = f", and {len(refused) - 1} more" if len(refused) > 1 else ""
            validation.warn(f"left out: {refused[0]}{more}; run the sweep again to make what is missing")
        if not records:
            raise InputError(f"folder {str(self.folder)!r} holds a sweep, but no image of it is finished yet")
        if outdated:
            validation.warn(
                f"{outdated} of {len(records)} images were saved by an earlier version of decinb and cannot prove what "
                "made them; running the sweep again makes them again"
            )
        return paths, records, first

    def _entries(self) -> list[dict[str, Any]]:
        file = self.folder / MANIFEST
        if not file.is_file():
            return []
        try:
            entries = read_json(file, MAX_MANIFEST)["cells"]
            listed = [entry for entry in entries if entry["file"] and isinstance(entry["cell"], dict)]
            if strange := [entry["file"] for entry in listed if not isinstance(entry["file"], str)]:
                raise ValueError(f"a file is called {validation.short_repr(strange[0])}")
            return listed
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise InputError(f"{MANIFEST} in {str(self.folder)!r} is damaged: {error}; move it away") from error


def _settings(file_name: str) -> str:
    """Return the part of a file name that comes before the key."""
    return file_name.rpartition("_")[0]


def _lacking(record: ImageRecord) -> str | None:
    """Return what a record lacks that every record of a sweep has; None if it lacks nothing."""
    for name in ("cell", *ARGUMENTS, "steps_run", "image_hash", "image_size", "seconds"):
        if name not in record:
            return f"the record has no {name!r}"
    if not isinstance(record["cell"], dict) or any(isinstance(record[name], (dict, list)) for name in ARGUMENTS):
        return "the record does not describe a cell"
    return None
