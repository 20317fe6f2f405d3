"""The errors that decinb raises. Each message says what was given, what is allowed, and what to do next.

In a notebook, an error is two lines: the user's own line and the message. ``%tb`` shows the whole traceback.
"""

import os
import sys
import traceback
from pathlib import Path

MAX_REASON = 400  # characters of another library's message that one of ours repeats
MAX_MESSAGE = 4_000  # characters of a message; some repeat what a file or a server says


class _TwoLines(Exception):
    """An error that IPython shows in two lines. Its message is one line, without control characters."""

    _was_shown = False

    def __init__(self, message: str = ""):
        super().__init__(_printable(message))

    def _render_traceback_(self) -> list[str]:
        """Return the lines that IPython shows: two the first time, the whole traceback after that, for ``%tb``."""
        if self._was_shown:
            tb = sys.modules["IPython"].get_ipython().InteractiveTB
            return tb.structured_traceback(type(self), self, self.__traceback__, tb_offset=1)
        self._was_shown = True
        message = f"{type(self).__name__}: {self}  (%tb shows the traceback)"
        if line := _user_line(self):
            return [f"line {line.lineno}: {line.line}", message]
        return [message]


class InputError(_TwoLines, ValueError):
    """An argument cannot be used. Raised before any work starts."""


class ModelError(_TwoLines, OSError):
    """A model cannot be loaded (its folder, files, tensors or source), or its output is NaN."""


class SweepError(_TwoLines, RuntimeError):
    """A sweep or a chain failed while it ran. Its ``sweep``, or ``chain``, holds what was finished before."""

    def __init__(self, message: str, sweep: object):
        super().__init__(message)
        self.sweep = sweep


class Stopped(_TwoLines, KeyboardInterrupt):
    """The user interrupted a sweep or a chain. Its ``done`` is that sweep or chain, with all that was finished."""

    def __init__(self, message: str, done: object):
        super().__init__(message)
        self.done = done


def reason(error: BaseException) -> str:
    """Return what an error says, on one line, after its class if the text says nothing: ``KeyError: 'seconds'``."""
    text = " ".join(str(error).split())
    if len(text) > MAX_REASON:
        text = f"{text[: MAX_REASON // 2]}…{text[-MAX_REASON // 2 :]}"
    return text if " " in text else f"{type(error).__name__}: {text}" if text else type(error).__name__


def _printable(message: str) -> str:
    if len(message) > MAX_MESSAGE:
        message = f"{message[: MAX_MESSAGE // 2]}…{message[-MAX_MESSAGE // 2 :]}"
    if message.isprintable():
        return message
    return "".join(one if one.isprintable() else ascii(one)[1:-1] for one in message)


def _user_line(error: BaseException) -> traceback.FrameSummary | None:
    """Return the last line of the user's code that led to an error: the one that called decinb."""
    package = str(Path(__file__).parent) + os.sep
    frames = traceback.extract_tb(error.__traceback__)
    calls = [i for i, frame in enumerate(frames) if frame.filename.startswith(package)]
    before = frames[: calls[0]] if calls else frames
    return before[-1] if before else None
