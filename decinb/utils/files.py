"""Read and write files without trusting what is there already.

A reader never finds half of a file, a link that someone planted is never written through, and reading never waits for a
pipe or takes more memory than was expected.
"""

import json
import os
import secrets
import stat
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

from decinb.errors import InputError, reason
from decinb.utils.validation import short_repr

try:
    import fcntl
except ImportError:  # Windows, where a file that is open cannot be removed anyway
    fcntl = None

MAX_JSON = 4_000_000  # bytes; parsed, they take up to thirty times as much memory
NEW_FILE = os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_BINARY", 0)
EXISTING_FILE = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)  # a pipe would be waited for
LEFTOVER_SECONDS = 10.0  # a temporary file that nobody has written to for so long was left by a killed process


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside a file; at the end, rename it to the file, which is complete or unchanged.

    Nothing exists at the temporary path, whose name is random. Temporary files that a killed process left for the same
    path are removed.

    Args:
        path: the file to create or replace. Its folder must exist. If it is a link, the link is replaced, not the file
            that it leads to.

    Raises:
        OSError: the file cannot be written; the temporary file is removed, as after any error in the ``with`` block.
    """
    part = path.with_name(f".{path.name}.{secrets.token_hex(8)}.part")
    try:
        _remove_leftovers(path)
        yield part
        with open(part, "rb") as file:
            os.fsync(file.fileno())
        os.replace(part, path)
    except BaseException:
        with suppress(OSError):
            part.unlink()
        raise


def write_atomically(path: Path, data: bytes) -> None:
    """Write a whole file with ``replacing``.

    Args:
        path: the file to create or replace. Its folder must exist.
        data: all of its bytes.

    Raises:
        OSError: the file cannot be written.
    """
    with replacing(path) as part, open(os.open(part, NEW_FILE, 0o666), "wb") as file:
        _lock(file)
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def write_output(file: Path, data: bytes) -> None:
    """Write what the user asked for, completely or not at all; the folder is created.

    Raises:
        InputError: the file cannot be written.
    """
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(file, data)
    except OSError as error:
        raise InputError(f"file {short_repr(str(file))} cannot be written: {reason(error)}") from error


def open_regular(path: str | os.PathLike[str], limit: int) -> BinaryIO:
    """Open an ordinary file for reading: not a folder, a pipe or a device, and not too large.

    Args:
        path: the file, or a link to one.
        limit: the most bytes that it may have.

    Raises:
        OSError: it cannot be opened, is not an ordinary file, or is larger.
    """
    _check_regular(os.stat(path), limit)  # first, since opening a device may do something
    file = open(os.open(path, EXISTING_FILE), "rb")  # noqa: SIM115
    try:
        _check_regular(os.fstat(file.fileno()), limit)  # again, in case it was replaced in between
    except BaseException:
        file.close()
        raise
    return file


def read_regular(path: str | os.PathLike[str], limit: int) -> bytes:
    """Return the bytes of an ordinary file; arguments and errors as for ``open_regular``."""
    with open_regular(path, limit) as file:
        return file.read(limit)


def read_json(path: str | os.PathLike[str], limit: int = MAX_JSON) -> Any:
    """Return the value in a JSON file of at most ``limit`` bytes.

    Raises:
        OSError: as for ``open_regular``.
        ValueError: it is not valid JSON in UTF-8, or is nested too deeply.
    """
    return parse_json(read_regular(path, limit), limit)


def parse_json(text: str | bytes, limit: int = MAX_JSON) -> Any:
    """Return the value of a JSON text of at most ``limit`` characters.

    Raises:
        ValueError: it is not valid JSON, is nested too deeply, or is too long.
    """
    if len(text) > limit:
        raise ValueError(f"the JSON is longer than {limit:,} characters")
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("the JSON is nested too deeply") from None


def _check_regular(status: os.stat_result, limit: int) -> None:
    if not stat.S_ISREG(status.st_mode):
        raise OSError("it is not an ordinary file")
    if status.st_size > limit:
        raise OSError(f"it has {status.st_size:,} bytes, and at most {limit:,} are allowed")


def _lock(file: BinaryIO) -> None:
    """Mark a file as in use until it is closed."""
    if fcntl is not None:
        with suppress(OSError):  # a network drive without locks
            fcntl.flock(file.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)


def _remove_leftovers(path: Path) -> None:
    """Remove the temporary files of a path that no process writes any more."""
    with suppress(OSError):
        for entry in os.scandir(path.parent):
            if entry.name.startswith(f".{path.name}.") and entry.name.endswith(".part"):
                with suppress(OSError):  # still in use, or already gone
                    _remove_leftover(entry)


def _remove_leftover(entry: os.DirEntry[str]) -> None:
    status = entry.stat(follow_symlinks=False)
    if stat.S_ISREG(status.st_mode) and abs(time.time() - status.st_mtime) > LEFTOVER_SECONDS:
        if fcntl is None:
            os.unlink(entry.path)
            return
        with open(os.open(entry.path, EXISTING_FILE | os.O_NOFOLLOW), "rb") as file:
            fcntl.flock(file.fileno(), fcntl.LOCK_SH | fcntl.LOCK_NB)
            os.unlink(entry.path)
