"""Write files so that a reader never finds half of one."""

import glob
import os
import secrets
from contextlib import suppress
from pathlib import Path


def write_atomically(path: Path, data: bytes) -> None:
    """Write to a temporary file beside the path, then rename it: the file is complete or unchanged, even after a crash.

    Temporary files that a killed process left for the same path are removed.

    Args:
        path: the file to create or replace. Its folder must exist.
        data: all of its bytes.

    Raises:
        OSError: the file cannot be written; the temporary file is removed.
    """
    leftovers = path.parent.glob(f".{glob.escape(path.name)}.*.part")
    part = path.with_name(f".{path.name}.{secrets.token_hex(4)}.part")
    try:
        for leftover in leftovers:
            leftover.unlink(missing_ok=True)
        with open(part, "xb") as file:  # x: never write into a file or a link that is already there
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except BaseException:
        with suppress(OSError):
            part.unlink()
        raise
