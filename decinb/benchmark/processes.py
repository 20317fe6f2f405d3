"""Run what is measured in fresh processes, in turns."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

Result = TypeVar("Result")

# What decides how threads wait and how many there are; a measurement sets them itself.
OF_THREADS = ("OMP_NUM_THREADS", "OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "DECINB_FIXED_THREADS")


def run_fresh(code: str, *arguments: str, env: Mapping[str, str] | None = None) -> Any:
    """Run Python code in a fresh process, and return the JSON value in the last line that it prints.

    Args:
        code: reads ``arguments`` from ``sys.argv``.
        env: variables that replace all of ``OF_THREADS``; None changes nothing in the environment.
    """
    ours = dict(os.environ)
    if env is not None:
        ours = {name: value for name, value in ours.items() if name not in OF_THREADS} | dict(env)
    command = [sys.executable, "-c", code, *arguments]
    output = subprocess.run(command, env=ours, stdout=subprocess.PIPE, text=True, check=True).stdout
    return json.loads(output.strip().splitlines()[-1])


def in_turns(
    names: Sequence[str], function: Callable[[str], Result], rounds: int, warmup: int = 0
) -> dict[str, list[Result]]:
    """Call a function with each name in turns, as A B B A; return its results without those of the warm-up."""
    results: dict[str, list[Result]] = {name: [] for name in names}
    for turn in range(-warmup, rounds):
        for name in names if turn % 2 == 0 else reversed(names):
            results[name].append(function(name))
    return {name: found[warmup:] for name, found in results.items()}
