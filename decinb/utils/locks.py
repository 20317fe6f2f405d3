"""Locks: on a pipeline among the threads of a process, on a file among processes."""

import os
import stat
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

from filelock import FileLock, Timeout

from decinb.errors import InputError
from decinb.utils import validation
from decinb.utils.files import NEW_FILE

_held: list[tuple[Path, int, int, Any]] = []  # locked files: with the process, the thread and the owner of each lock
_locks: WeakKeyDictionary[Any, Any] = WeakKeyDictionary()
_creating = threading.Lock()


def pipeline_lock(pipe: Any) -> Any:
    """Return the lock of a pipeline, to be held during a call.

    A call changes the state of the scheduler at every step, so two calls at once would silently give wrong images. The
    lock belongs to the U-Net, because pipelines made by ``from_pipe`` share the U-Net and the scheduler.
    """
    unet = getattr(pipe, "unet", None)
    with _creating:
        return _locks.setdefault(pipe if unet is None else unet, threading.RLock())


def _is_own(lock_file: Path) -> bool:
    """Return whether a lock is an ordinary file under this name only: not a link, which leads to another file."""
    try:
        status = os.lstat(lock_file)
    except OSError:  # the folder cannot be written to
        return False
    return stat.S_ISREG(status.st_mode) and status.st_nlink == 1


@contextmanager
def file_lock(lock_file: Path, waiting: str | None = None, owner: Any = None) -> Iterator[None]:
    """Hold a lock on a file inside the ``with`` block; wait while another process or thread holds it.

    The lock of a killed process is released by the system.

    Args:
        lock_file: an empty file beside what is to be locked. It is created if need be, and stays.
        waiting: a line to print before waiting.
        owner: a lock that the caller holds now, and needs again before it can release this one.

    Raises:
        InputError: waiting would never end, because this thread or this owner has locked the file already.
    """
    mine = Path(os.path.realpath(lock_file)), os.getpid(), threading.get_ident(), owner
    for place, process, thread, other in list(_held):
        if (place, process) == mine[:2] and (thread == mine[2] or (owner is not None and other is owner)):
            folder = validation.short_repr(str(lock_file.parent))
            raise InputError(
                f"folder {folder} is in use by a run that is not finished: finish it, or stop it with close()"
            )
    with suppress(OSError):  # it is there, or cannot be made
        os.close(os.open(lock_file, NEW_FILE, 0o666))
    if not _is_own(lock_file):
        yield
        return
    # A soft lock would outlive a killed process. The thread that releases the lock may be another (see `Steps`).
    lock = FileLock(lock_file, fallback_to_soft=False, thread_local=False)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        if waiting:
            print(waiting, flush=True)
        lock.acquire()
    except (OSError, NotImplementedError):
        pass  # a read-only folder, or a network drive without locks: go on without
    _held.append(mine)
    try:
        yield
    finally:
        _held.remove(mine)
        lock.release()  # does nothing if it is not held
