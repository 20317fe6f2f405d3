"""Measure the playground on ``tiny``: from a click on Generate to the first preview, and to the image.

What the kernel does is measured, in fresh processes. The page adds the time of two messages and of its drawing.
"""

from collections.abc import Sequence

import torch

from decinb.benchmark.latency import Measurement, Timing
from decinb.benchmark.processes import in_turns, run_fresh
from decinb.errors import InputError
from decinb.runtimes.openvino import RUNTIMES
from decinb.utils import validation
from decinb.utils.environment import environment

PARTS = ("first click: preview", "first click: image", "preview", "image")

# What the kernel does when someone clicks, with a page that asks for the next step at once.
CLICKS = """
import json, sys, time
import decinb
pipe = decinb.load_pipeline("tiny", "cpu", runtime=sys.argv[1])
play = decinb.playground(pipe, prompt="a blue house on snow at night")
play._repr_mimebundle_()  # what a notebook calls to show it
laps = []
for _ in range(int(sys.argv[2])):
    clicked = time.perf_counter()
    play.generate()
    preview = time.perf_counter() - clicked
    while play.is_running:
        play.step()
    assert len(play.result) == 1
    laps.append((preview, time.perf_counter() - clicked))
print(json.dumps(laps))
"""


def measure_playground(runtimes: Sequence[str] = ("torch",), rounds: int = 4, clicks: int = 5) -> Measurement:
    """Time clicks on Generate with the controls as they are at first: 22 guided steps of 30.

    Args:
        runtimes: as for ``load_pipeline``.
        rounds: fresh processes of each, in turns.
        clicks: in each process. The first is reported apart, because it prepares what the others find.

    Returns:
        Seconds as ``timings[part][runtime]``, with the ``PARTS``. Those to the image include all previews.

    Raises:
        InputError: there is no such runtime, or a number is out of range.
    """
    for runtime in runtimes:
        validation.choice(runtime, "runtimes", RUNTIMES)
    if rounds < 1 or clicks < 2:
        raise InputError(f"rounds must be at least 1 and clicks at least 2, got {rounds} and {clicks}")
    where = environment("cpu", torch.float32)
    found = in_turns(list(runtimes), lambda runtime: run_fresh(CLICKS, runtime, str(clicks)), rounds)
    timings: dict[str, dict[str, Timing]] = {part: {} for part in PARTS}
    for runtime, processes in found.items():
        first, later = [one[0] for one in processes], [click for one in processes for click in one[1:]]
        seconds = [*zip(*first, strict=True), *zip(*later, strict=True)]
        for part, values in zip(PARTS, seconds, strict=True):
            timings[part][runtime] = Timing(tuple(values))
    return Measurement(timings, {"model": "tiny", "rounds": rounds, "clicks": clicks}, where)


def table(measurement: Measurement) -> str:
    """Return what was measured as text: the median milliseconds, with the shortest and the longest."""
    where = measurement.environment
    runtimes = list(measurement.timings[PARTS[0]])
    lines = [
        f"{where['device']}, threads {where['threads']}, load {where['load']}; milliseconds after a click on Generate",
        f"{'':22}" + "".join(f"{runtime:>26}" for runtime in runtimes),
    ]
    for part, timings in measurement.timings.items():
        texts = [_milliseconds(timings[runtime]) for runtime in runtimes]
        lines.append(f"{part:22}" + "".join(f"{text:>26}" for text in texts))
    return "\n".join(lines)


def _milliseconds(timing: Timing) -> str:
    return f"{1000 * timing.median:.0f} ({1000 * timing.fastest:.0f} to {1000 * timing.slowest:.0f})"
