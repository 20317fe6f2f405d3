"""One at a time: with a pipeline, among the threads of a process; with a file or folder, among processes."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

from filelock import FileLock, Timeout

_turns: WeakKeyDictionary[Any, Any] = WeakKeyDictionary()
_making = threading.Lock()


def pipeline_lock(pipe: Any) -> Any:
    """The lock of a pipeline, to be used in a ``with`` block: another thread's call waits until it ends.

    A call changes its scheduler at every step, so two at once would give wrong pictures without a word. The lock
    belongs to the U-Net, which pipelines made by ``from_pipe`` share, as they do the scheduler.
    """
    unet = getattr(pipe, "unet", None)
    with _making:
        return _turns.setdefault(pipe if unet is None else unet, threading.RLock())


@contextmanager
def file_lock(lock_file: Path, waiting: str | None = None) -> Iterator[None]:
    """Wait until no other process or thread holds this file; what a killed process held is free at once.

    Args:
        lock_file: an empty file beside what is to be used alone. It stays there.
        waiting: a line to print where another holds it.
    """
    lock = FileLock(lock_file, fallback_to_soft=False)  # a soft lock would outlive a process that is killed
    try:
        lock.acquire(timeout=0)
    except Timeout:
        if waiting:
            print(waiting, flush=True)
        lock.acquire()
    except (OSError, NotImplementedError):  # read-only, or a network drive without locks: no protection, but no harm
        yield
        return
    try:
        yield
    finally:
        lock.release()
