"""A process that reads what a stranger made, and reports what that cost and whether anything was done that must not be.

Run as a program, it imports decinb once and then answers requests on its standard input, each in a fork of its own:
under a limit of memory and of processor time, with an alarm, and watched by an audit hook.
"""

import json
import os
import resource
import signal
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

CPU_SECONDS = 5
WALL_SECONDS = 120  # of a pipe that is waited for
MEMORY = 600_000_000  # bytes of address space beyond what the process has already

WATCHED = (
    "socket.connect",
    "socket.getaddrinfo",
    "socket.gethostbyname",
    "socket.sendto",
    "subprocess.Popen",
    "os.system",
    "os.exec",
    "os.posix_spawn",
    "pickle.find_class",
    "ctypes.dlopen",
)
"""Events that no stranger's file may lead to."""


class Jail:
    """The process. Use it in a ``with`` block; ``ask`` makes a request."""

    def __enter__(self) -> "Jail":
        ours = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "MALLOC_"))}
        settings = {
            "HF_ENDPOINT": "http://127.0.0.1:9",  # a request would be seen, and fail
            "OMP_NUM_THREADS": "1",
            "PYTHONDONTWRITEBYTECODE": "1",
            "PYTHONPATH": str(Path(__file__).parents[2]),
        }
        self.home = tempfile.TemporaryDirectory()  # with an empty cache
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.helpers.jail"],
            env={**ours, **settings, "HF_HOME": self.home.name},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        return self

    def __exit__(self, *_: object) -> None:
        self.process.stdin.close()
        self.process.wait()
        self.home.cleanup()

    def ask(self, action: str, path: Path) -> dict[str, Any]:
        """Do one of ``ACTIONS`` with a path.

        Returns:
            The ``error`` and its ``message``, or None and what came out; the ``growth`` of memory in MB; the ``events``
            that must not be; the signal that ended it, as ``killed``.
        """
        self.process.stdin.write(json.dumps([action, os.fspath(path)]) + "\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        assert line, "the process ended"
        return json.loads(line)


def check(answer: dict[str, Any], legitimate: float = 0.0) -> str:
    """Fail unless an answer is an error of ours or a result, at a bounded cost; return the message.

    Args:
        answer: from ``Jail.ask``.
        legitimate: MB of the tensors or pixels that may be loaded.
    """
    assert not answer.get("killed"), f"stopped by signal {answer['killed']}: {answer}"
    assert not answer["events"], answer
    assert answer["growth"] < 200 + legitimate, answer
    message = answer["message"]
    assert answer["error"] in (None, "InputError", "ModelError"), answer
    assert "\n" not in message and len(message) < 1500 and not message.rstrip(" ;").endswith(":"), answer
    return message


# --- the process ------------------------------------------------------------------------------------------------------


def _actions() -> dict[str, Callable[[str], Any]]:
    import torch

    import decinb
    from decinb.images import read_input

    torch.set_num_threads(1)
    pipe = decinb.load_pipeline("tiny", device="cpu")
    cells = [{"strength": 1.0, "num_inference_steps": 1}]
    return {
        "load": lambda path: decinb.load_pipeline(Path(path), device="cpu"),
        "image": decinb.load_image,
        "record": lambda path: (decinb.read_record(path), read_input(path)),
        "replay": lambda path: decinb.replay(path, pipe),
        "replay without a pipeline": decinb.replay,
        "plan": lambda path: decinb.plan(pipe, "day", "a house", cells, folder=path, timed=False),
        "load_sweep": lambda path: decinb.load_sweep(path).images[0],
    }


def _resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def _run(action: Callable[[str], Any], path: str) -> dict[str, Any]:
    """Do one action in this process, which is a fork, within limits."""
    virtual = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (virtual + MEMORY, virtual + MEMORY))
    resource.setrlimit(resource.RLIMIT_CPU, (CPU_SECONDS, CPU_SECONDS + 1))
    signal.alarm(WALL_SECONDS)
    before, events = _resident(), []

    def watch(event: str, arguments: tuple) -> None:
        is_write = event == "open" and isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR)
        is_code = event == "exec" and str(getattr(arguments[0], "co_filename", "")).startswith(path)
        if event in WATCHED or is_code or (is_write and str(arguments[0]) != os.devnull):
            events.append(f"{event} {str(arguments[:2])[:200]}")
            raise PermissionError(f"{event} is not allowed here")

    sys.addaudithook(watch)
    answer: dict[str, Any] = {"error": None, "message": ""}
    try:
        answer["message"] = type(action(path)).__name__
    except BaseException as error:
        answer |= {"error": type(error).__name__, "message": str(error)}
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return answer | {"events": events, "growth": round(max(0, peak - before) / 1e6)}


def main() -> None:
    """Answer requests, one on each line, in forks."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what the libraries print is no answer
    warnings.simplefilter("ignore")
    actions = _actions()
    for line in sys.stdin:
        action, path = json.loads(line)
        child = os.fork()
        if child == 0:
            answer = _run(actions[action], path)
            print(json.dumps(answer), file=answers, flush=True)
            os._exit(0)
        _, status = os.waitpid(child, 0)
        if status:
            print(json.dumps({"killed": os.WTERMSIG(status) or status}), file=answers, flush=True)


if __name__ == "__main__":
    main()
