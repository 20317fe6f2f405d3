"""The folder of a sweep: a PNG for every finished image, and a manifest that lists what belongs to it.

Each PNG holds its record and its input, so the image can be made again from the file alone. An image is found by its
key, the hash of everything that decides its pixels, whatever design asked for it.
"""

import json
from collections.abc import Sequence
from contextlib import AbstractContextManager, suppress
from pathlib import Path
from typing import Any, overload

from PIL import Image

from decinb.errors import InputError
from decinb.execution.provenance import CHAIN, ImageRecord
from decinb.images import read_input, read_record, save_image
from decinb.utils.files import write_atomically
from decinb.utils.labels import SHORT, plain
from decinb.utils.locks import file_lock

MANIFEST = "sweep.json"
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
    """Return an image that is in memory, or in a PNG file."""
    if isinstance(source, Image.Image):
        return source
    with Image.open(source, formats=("PNG",)) as image:
        return image.convert("RGB")


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
        self.folder = Path(folder)

    def path(self, record: ImageRecord) -> Path:
        """Return where a record's image belongs, whether or not it is there."""
        return self.folder / file_name(record)

    def find(self, records: Sequence[ImageRecord]) -> dict[str, Path]:
        """Return by key the complete files of records' images, whatever settings their names show."""
        by_key: dict[str, list[Path]] = {}
        for path in sorted(self.folder.glob("*_*.png")):
            by_key.setdefault(path.stem.rpartition("_")[2], []).append(path)
        found = {}
        for record in records:
            candidates = by_key.get(record["key"], []) if record["key"] not in found else []
            if path := next((path for path in candidates if self.read_saved(path, record)), None):
                found[record["key"]] = path
        return found

    def read_saved(self, path: Path, record: ImageRecord) -> ImageRecord | None:
        """Return the record in a file, or None unless the file is complete and holds this record's image."""
        try:
            saved = read_record(path)
        except InputError:  # missing, incomplete, or not written by decinb
            return None
        return saved if saved.get("key") == record["key"] else None

    def keep(
        self, image: Image.Image | Path, record: ImageRecord, input_image: Image.Image | None
    ) -> tuple[Path, ImageRecord]:
        """Save an image unless the folder has it already; return its file and the record in it.

        Raises:
            OSError: the folder cannot be written to.
        """
        path = self.path(record)
        if saved := self.read_saved(path, record):
            return path, saved
        self.save(open_image(image), record, input_image)
        return path, record

    def save(self, image: Image.Image, record: ImageRecord, input_image: Image.Image | None) -> None:
        """Write an image completely or not at all."""
        self.folder.mkdir(parents=True, exist_ok=True)
        save_image(image, self.path(record), record, input_image)

    def list_cells(self, records: Sequence[ImageRecord]) -> None:
        """Add cells to the manifest, which lists all that was asked for in this folder, finished or not."""
        self.folder.mkdir(parents=True, exist_ok=True)
        listed = {entry["file"]: entry for entry in self._entries()}
        for record in records:
            listed.setdefault(self.path(record).name, {"file": self.path(record).name, "cell": record["cell"]})
        manifest = json.dumps({"cells": list(listed.values())}, indent=1) + "\n"
        write_atomically(self.folder / MANIFEST, manifest.encode())

    def locked(self) -> AbstractContextManager[None]:
        """Keep other processes out of the folder inside the ``with`` block, waiting first for one that is in it."""
        with suppress(OSError):  # a folder that cannot be written to needs no lock
            self.folder.mkdir(parents=True, exist_ok=True)
        return file_lock(
            self.folder / LOCK, f"folder {str(self.folder)!r} is in use by another process: waiting until it is done"
        )

    def read(self) -> tuple[list[Path], list[ImageRecord], Image.Image | None]:
        """Return the files and records of all finished images in the manifest's order, and the input of the first.

        Raises:
            InputError: there is no manifest, it is damaged, or none of its images is finished.
        """
        if not (self.folder / MANIFEST).is_file():
            raise InputError(f"folder {str(self.folder)!r} holds no sweep: there is no {MANIFEST} in it")
        paths, records = [], []
        for entry in self._entries():
            path = self.folder / Path(str(entry["file"])).name  # only the name: it must not lead out of the folder
            with suppress(InputError):  # not finished
                records.append(read_record(path))
                paths.append(path)
        if not records:
            raise InputError(f"folder {str(self.folder)!r} holds a sweep, but no image of it is finished yet")
        return paths, records, None if records[0]["image"] is None else read_input(paths[0])

    def _entries(self) -> list[dict[str, Any]]:
        file = self.folder / MANIFEST
        if not file.is_file():
            return []
        try:
            entries = json.loads(file.read_text(encoding="utf-8"))["cells"]
            return [entry for entry in entries if entry["file"] and isinstance(entry["cell"], dict)]
        except (ValueError, KeyError, TypeError) as error:
            raise InputError(f"{MANIFEST} in {str(self.folder)!r} is damaged: {error}; move it away") from error
