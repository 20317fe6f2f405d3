"""The memory that tensors on a CPU free, kept for the next ones.

On Linux, glibc gives every large block back to the system and takes it again, zeroed page by page, which costs a CPU
more time than many a layer.
"""

import ctypes
import os
import platform
from functools import cache

# glibc's names for what mallopt sets, and the values: above the first number of bytes a block is taken from the system
# and given back at once, above the second so is free memory at the end of the heap, which grows by the third.
NAMES = {"M_MMAP_THRESHOLD": -3, "M_TRIM_THRESHOLD": -1, "M_TOP_PAD": -2}
KEPT = {"M_MMAP_THRESHOLD": 2**31 - 1, "M_TRIM_THRESHOLD": 2**31 - 1, "M_TOP_PAD": 2**28}
GIVEN_BACK = {"M_MMAP_THRESHOLD": 2**25, "M_TRIM_THRESHOLD": 2**26, "M_TOP_PAD": 2**17}  # where glibc itself ends up


def keep_freed_memory() -> bool:
    """Let this process keep the memory that its tensors free; whether that was done.

    Not done where the environment sets ``MALLOC_...`` variables itself, or where there is no glibc.
    """
    return not any(name.startswith("MALLOC_") for name in os.environ) and set_malloc(KEPT)


def set_malloc(values: dict[str, int]) -> bool:
    """Set what glibc's allocator goes by; whether there is one, and it agreed."""
    library = _glibc()
    if library is None:
        return False
    agreed = [library.mallopt(NAMES[name], value) for name, value in values.items()]
    return all(agreed)


@cache
def _glibc() -> ctypes.CDLL | None:
    return ctypes.CDLL(None) if platform.libc_ver()[0] == "glibc" else None
