"""Write files so that a reader never finds half of one."""

import os
from contextlib import suppress
from pathlib import Path


def write_atomically(path: Path, data: bytes) -> None:
    """Write to a temporary file beside the path, then rename it: the file is complete or unchanged, even after a crash.

    Args:
        path: the file to create or replace. Its folder must exist.
        data: all of its bytes.

    Raises:
        OSError: the file cannot be written; the temporary file is removed.
    """
    # The same name every time, so that what a killed process left is replaced; the processes of one run never share it.
    part = path.with_name(f".{path.name}.{os.environ.get('RANK', '0')}.part")
    try:
        part.unlink(missing_ok=True)
        with open(part, "xb") as file:  # x: never write through a link
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except BaseException:
        with suppress(OSError):
            part.unlink()
        raise
