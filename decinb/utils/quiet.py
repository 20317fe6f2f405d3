"""Silence the log lines and progress bars of diffusers and transformers for a while."""

from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def quiet() -> Iterator[None]:
    """Hide log lines below an error and progress bars inside the ``with`` block; restore the settings afterwards.

    The settings belong to the process, so other threads are silenced too while the block runs.
    """
    from diffusers.utils import logging as diffusers_logging  # imported here, so that importing this module is cheap
    from transformers.utils import logging as transformers_logging

    libraries = (diffusers_logging, transformers_logging)
    before = [(library, library.get_verbosity(), library.is_progress_bar_enabled()) for library in libraries]
    for library in libraries:
        library.set_verbosity_error()
        library.disable_progress_bar()
    try:
        yield
    finally:
        for library, verbosity, had_bar in before:
            library.set_verbosity(verbosity)
            if had_bar:
                library.enable_progress_bar()
