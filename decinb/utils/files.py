"""Write files so that a reader never finds half of one."""

import glob
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside a file; at the end, rename it to the file, which is complete or unchanged.

    Temporary files that a killed process left for the same path are removed.

    Args:
        path: the file to create or replace. Its folder must exist.

    Raises:
        OSError: the file cannot be written; the temporary file is removed, as after any error in the ``with`` block.
    """
    leftovers = path.parent.glob(f".{glob.escape(path.name)}.*.part")
    part = path.with_name(f".{path.name}.{secrets.token_hex(4)}.part")
    try:
        for leftover in leftovers:
            leftover.unlink(missing_ok=True)
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
    with replacing(path) as part, open(part, "xb") as file:  # x: never write through a link that is already there
        file.write(data)
