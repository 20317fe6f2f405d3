"""Measure what busy processes beside a sweep cost: rows a second of the guide's guidance sweep, in fresh processes."""

import json
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from time import perf_counter

import torch

from decinb.benchmark.latency import Measurement, Timing
from decinb.benchmark.packing import DEFAULTS, DESIGNS
from decinb.benchmark.processes import in_turns, run_fresh
from decinb.errors import InputError
from decinb.images import load_image
from decinb.loading import load_pipeline
from decinb.models import example
from decinb.sampling.adapters import adapter_of
from decinb.sampling.jobs import Job
from decinb.utils.environment import environment

BUSY = "while True: pass"
RATE = "import sys; from decinb.benchmark.neighbours import rate; print(rate(sys.argv[1], float(sys.argv[2])))"

WAYS: dict[str, Mapping[str, str]] = {
    "threads adapt": {},
    "all threads": {"DECINB_FIXED_THREADS": "1"},
    "one thread": {"OMP_NUM_THREADS": "1"},
}
"""The environment of each way to run a sweep; ``OpenVINO`` comes with its runtime."""
OPENVINO = "OpenVINO"


def compare(
    busy: Sequence[int] = (0, 1, 2), rounds: int = 2, seconds: float = 10.0, ways: Sequence[str] = tuple(WAYS)
) -> Measurement:
    """Time the guidance sweep on ``tiny`` beside busy processes, each way in a fresh process, in turns.

    Args:
        busy: numbers of busy processes.
        rounds: how often each way is timed.
        seconds: how long a sweep is repeated, after once to warm up.
        ways: keys of ``WAYS``, or ``OPENVINO``.

    Returns:
        Seconds a row as ``timings["2 busy"][way]``.

    Raises:
        InputError: there is no such way, or a number is out of range.
    """
    known = (*WAYS, OPENVINO)
    if unknown := [way for way in ways if way not in known]:
        raise InputError(f"ways must be of {', '.join(known)}, got {unknown[0]!r}")
    if rounds < 1 or min(busy, default=0) < 0:
        raise InputError(f"rounds must be at least 1 and busy at least 0, got {rounds} and {list(busy)}")
    where = environment("cpu", torch.float32)

    def seconds_per_row(way: str) -> float:
        runtime = "openvino" if way == OPENVINO else "torch"
        return 1 / run_fresh(RATE, runtime, str(seconds), env=WAYS.get(way, {}))

    timings = {}
    for number in busy:
        with busy_processes(number):
            measured = in_turns(list(ways), seconds_per_row, rounds)
        timings[f"{number} busy"] = {way: Timing(tuple(taken)) for way, taken in measured.items()}
    return Measurement(timings, {"model": "tiny", "design": "guidance", "seconds": seconds, "rounds": rounds}, where)


@contextmanager
def busy_processes(number: int) -> Iterator[None]:
    """Run processes that do nothing but compute, each on one thread, while the ``with`` block runs."""
    processes = [subprocess.Popen([sys.executable, "-c", BUSY]) for _ in range(number)]
    try:
        yield
    finally:
        for process in processes:
            process.kill()
            process.wait()


def rate(runtime: str, seconds: float) -> str:
    """Return as JSON how many rows a second the guidance sweep on ``tiny`` makes in this process.

    Args:
        runtime: as for ``load_pipeline``.
        seconds: how long to repeat it; the sweep that has begun is finished.
    """
    pipe = load_pipeline("tiny", "cpu", runtime=runtime)
    sample, prompt = example(pipe)
    image = load_image(sample)
    jobs = [Job(image, prompt, None, **{**DEFAULTS, **cell}) for cell in DESIGNS["guidance"]]

    def sweep() -> int:
        return sum(step.rows for step in adapter_of(pipe).run(jobs))

    sweep()
    rows, began = 0, perf_counter()
    while not rows or perf_counter() < began + seconds:
        rows += sweep()
    return json.dumps(rows / (perf_counter() - began))


def table(measurement: Measurement) -> str:
    """Return what ``compare`` measured as text: rows a second for each way and number of busy processes."""
    where, timings = measurement.environment, measurement.timings
    lines = [
        f"{where['device']}, threads {where['threads']}, load {where['load']}; rows a second of a guidance sweep",
        f"{'':16}" + "".join(f"{work:>10}" for work in timings),
    ]
    for way in next(iter(timings.values())):
        lines.append(f"{way:16}" + "".join(f"{1 / by_way[way].median:10.1f}" for by_way in timings.values()))
    return "\n".join(lines)
