"""Silence for a while, also in several threads at once."""

import threading

from diffusers.utils import logging

from decinb.utils.quiet import quiet


def test_blocks_that_overlap_in_two_threads_restore_the_settings():
    before = logging.get_verbosity(), logging.is_progress_bar_enabled()
    inside, leave = threading.Event(), threading.Event()

    def other():
        with quiet():
            inside.set()
            leave.wait(10)

    thread = threading.Thread(target=other)
    with quiet():
        thread.start()
        assert inside.wait(10)
    assert logging.get_verbosity() == logging.ERROR  # the other block goes on
    leave.set()
    thread.join(10)
    assert (logging.get_verbosity(), logging.is_progress_bar_enabled()) == before
