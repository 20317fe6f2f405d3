"""The folder of a sweep: a PNG for every finished image, and a manifest that lists what belongs to it.

Each PNG holds its record and the input picture, so it can be made again from itself alone. What decides an image's
pixels is summed up in its key; an image is found again by its key, whatever design it was asked for in.
"""

import json
from collections.abc import Sequence
from contextlib import AbstractContextManager, suppress
from pathlib import Path
from typing import Any, overload

from PIL import Image

from decinb.errors import InputError
from decinb.execution.provenance import Record
from decinb.images import read_input, read_record, save_image
from decinb.utils.files import write_atomically
from decinb.utils.labels import SHORT, plain
from decinb.utils.locks import file_lock

pass


MANIFEST = "sweep.json"
LOCK = ".lock"


class Images(Sequence):
    """Pictures that are in memory or wait on disk, where they are read from when they are asked for."""

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
            return [_open(source) for source in self.sources[index]]
        return _open(self.sources[index])


def _open(source: Image.Image | Path) -> Image.Image:
    if isinstance(source, Image.Image):
        return source
    with Image.open(source, formats=("PNG",)) as image:
        return image.convert("RGB")


class Store:
    """A folder that images are written to and found in again."""

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)

    def path(self, record: Record) -> Path:
        """The file of a record: its settings in words, and its key."""
        words = "_".join(f"{SHORT[name]}-{plain(record[name])}" for name in SHORT)
        return self.folder / f"{words}_{record['key']}.png"

    def find(self, records: Sequence[Record]) -> dict[str, Path]:
        """By key, a whole file with the image of each record that has one, under its own name or another's."""
        named: dict[str, list[Path]] = {}
        for path in sorted(self.folder.glob("*_*.png")):
            named.setdefault(path.stem.rpartition("_")[2], []).append(path)
        found = {}
        for record in records:
            candidates = named.get(record["key"], []) if record["key"] not in found else []
            if path := next((path for path in candidates if self.held(path, record)), None):
                found[record["key"]] = path
        return found

    def held(self, path: Path, record: Record) -> Record | None:
        """What stands in a file, if it is a whole one with the image of this record."""
        try:
            inside = read_record(path)
        except InputError:  # not there, cut short, or not ours
            return None
        return inside if inside.get("key") == record["key"] else None

    def save(self, image: Image.Image, record: Record, input_image: Image.Image | None) -> Path:
        """Write an image, whole or not at all."""
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.path(record)
        save_image(image, path, record, input_image)
        return path

    def note(self, records: Sequence[Record]) -> None:
        """Add records to the manifest: what is asked for here, finished or not."""
        self.folder.mkdir(parents=True, exist_ok=True)
        listed = {entry["file"]: entry for entry in self._entries()}
        for record in records:
            listed.setdefault(self.path(record).name, {"file": self.path(record).name, "cell": record["cell"]})
        manifest = json.dumps({"cells": list(listed.values())}, indent=1) + "\n"
        write_atomically(self.folder / MANIFEST, manifest.encode())

    def alone(self) -> AbstractContextManager[None]:
        """Work in the folder while no other process does; it waits until then, and says so."""
        with suppress(OSError):  # who cannot write there has nothing to lock either
            self.folder.mkdir(parents=True, exist_ok=True)
        return file_lock(
            self.folder / LOCK, f"folder {str(self.folder)!r} is in use by another process: waiting until it is done"
        )

    def read(self) -> tuple[list[Path], list[Record], Image.Image | None]:
        """The finished images of the manifest, in its order: files, records, and the input of the first, if it has one.

        Raises:
            InputError: there is no manifest, it is damaged, or nothing in it is finished.
        """
        if not (self.folder / MANIFEST).is_file():
            raise InputError(f"folder {str(self.folder)!r} holds no sweep: there is no {MANIFEST} in it")
        paths, records = [], []
        for entry in self._entries():
            path = self.folder / Path(str(entry["file"])).name  # a name, never a way out of the folder
            try:
                records.append(read_record(path))
                paths.append(path)
            except InputError:
                continue  # not finished
        if not records:
            raise InputError(f"folder {str(self.folder)!r} holds a sweep of which no image is finished yet")
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
