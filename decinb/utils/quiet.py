"""Silence the log lines and progress bars of diffusers and transformers for a while."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

_changing = threading.Lock()
_active = 0
_before: list[tuple[Any, int, bool]] = []


@contextmanager
def quiet() -> Iterator[None]:
    """Hide log lines below an error and progress bars inside the ``with`` block; restore the settings afterwards.

    The settings belong to the process, so other threads are silenced too while the block runs. Blocks may overlap in
    several threads: the last one to end restores what the first one found.
    """
    from diffusers.utils import logging as diffusers_logging  # imported here, so that importing this module is cheap
    from transformers.utils import logging as transformers_logging

    global _active
    libraries = (diffusers_logging, transformers_logging)
    with _changing:
        if _active == 0:
            _before[:] = [(one, one.get_verbosity(), one.is_progress_bar_enabled()) for one in libraries]
        _active += 1
        for library in libraries:
            library.set_verbosity_error()
            library.disable_progress_bar()
    try:
        yield
    finally:
        with _changing:
            _active -= 1
            for library, verbosity, had_bar in _before if _active == 0 else ():
                library.set_verbosity(verbosity)
                if had_bar:
                    library.enable_progress_bar()
