"""Measure the time from starting Python to the first image of ``tiny``, part by part, in fresh processes."""

from collections.abc import Sequence

import torch

from decinb.benchmark.latency import Measurement, Timing
from decinb.benchmark.processes import in_turns, run_fresh
from decinb.errors import InputError
from decinb.runtimes.openvino import RUNTIMES
from decinb.utils import validation
from decinb.utils.environment import environment

PARTS = ("import torch", "import diffusers", "import decinb", "load_pipeline", "first image")
TOTAL = "total"

# What a user does. The imports are taken apart in the order in which decinb needs them.
FIRST_IMAGE = """
import json, sys, time
laps, before = [], time.perf_counter()
def lap():
    global before
    laps.append(time.perf_counter() - before)
    before = time.perf_counter()
import decinb
import torch
lap()
import diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion_img2img
lap()
decinb.load_pipeline, decinb.load_image
lap()
pipe = decinb.load_pipeline("tiny", "cpu", runtime=sys.argv[1])
pipe.set_progress_bar_config(disable=True)
image = decinb.load_image("day")
lap()
pipe("a blue house on snow at night", image, generator=torch.Generator().manual_seed(0))
lap()
print(json.dumps(laps))
"""


def measure_first_image(runtimes: Sequence[str] = ("torch",), rounds: int = 6, warmup: int = 1) -> Measurement:
    """Time fresh processes to their first image of ``tiny``, 24 guided steps of 30, in turns.

    Args:
        runtimes: as for ``load_pipeline``.
        rounds: how often each is timed.
        warmup: untimed processes of each before that, which leave files and graphs in the caches.

    Returns:
        Seconds as ``timings[part][runtime]``, with the ``TOTAL`` last.

    Raises:
        InputError: there is no such runtime, or a number is out of range.
    """
    for runtime in runtimes:
        validation.choice(runtime, "runtimes", RUNTIMES)
    if rounds < 1 or warmup < 0:
        raise InputError(f"rounds must be at least 1 and warmup at least 0, got {rounds} and {warmup}")
    where = environment("cpu", torch.float32)
    laps = in_turns(list(runtimes), lambda runtime: run_fresh(FIRST_IMAGE, runtime), rounds, warmup)
    timings = {
        part: {runtime: Timing(tuple(one[i] for one in found)) for runtime, found in laps.items()}
        for i, part in enumerate(PARTS)
    }
    timings[TOTAL] = {runtime: Timing(tuple(map(sum, found))) for runtime, found in laps.items()}
    return Measurement(timings, {"model": "tiny", "rounds": rounds, "warmup": warmup}, where)


def table(measurement: Measurement) -> str:
    """Return what was measured as text: the median seconds of each part."""
    where = measurement.environment
    runtimes = list(measurement.timings[TOTAL])
    lines = [
        f"{where['device']}, threads {where['threads']}, load {where['load']}; seconds to the first image of tiny",
        f"{'':20}" + "".join(f"{runtime:>20}" for runtime in runtimes),
    ]
    for part, timings in measurement.timings.items():
        lines.append(f"{part:20}" + "".join(f"{timings[runtime].median:20.2f}" for runtime in runtimes))
    return "\n".join(lines)
