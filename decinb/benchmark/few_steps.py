"""Compare packed sweeps of the bundled model with those of its few-step student."""

from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any

from diffusers import DiffusionPipeline

from decinb.benchmark.counting import count_unet_calls
from decinb.benchmark.latency import Measurement, measure, ratio
from decinb.benchmark.packing import DEFAULTS, DESIGNS, PACKED, ways_to_make
from decinb.designs import Cell, grid
from decinb.errors import InputError
from decinb.images import load_image
from decinb.models import example
from decinb.sampling.adapters import adapter_of
from decinb.sampling.jobs import Job
from decinb.utils.environment import environment

SWEEPS: dict[str, Sequence[Cell]] = {
    "one image": [{"strength": 1.0}],
    "strength": DESIGNS["strength"],
    "seeds": grid(strength=[1.0], seed=range(16)),
}
TEACHER, STUDENT = "tiny, 20 steps", "tiny-lcm, 4 steps"
SETTINGS: dict[str, Cell] = {
    TEACHER: {"num_inference_steps": 20, "guidance_scale": 7.5},
    STUDENT: {"num_inference_steps": 4, "guidance_scale": 1.0},
}


def compare(
    teacher: DiffusionPipeline,
    student: DiffusionPipeline,
    designs: Mapping[str, Sequence[Cell]] = SWEEPS,
    rounds: int = 6,
) -> Measurement:
    """Time packed sweeps of both models in turns, after one run of each to warm up and count.

    Args:
        teacher, student: their pipelines, on the same device.
        designs: lists of cells, by name, without steps and guidance scale, which are those of ``SETTINGS``.
        rounds: how often each sweep is timed, 1 or more; an even number is fairer.

    Returns:
        Times as ``timings[design][way]``, where a way is ``TEACHER`` or ``STUDENT``; U-Net calls and rows as
        ``settings["designs"][design][way]``.

    Raises:
        InputError: ``rounds`` is below 1.
    """
    if rounds < 1:
        raise InputError(f"rounds must be at least 1, got {rounds}")
    where = environment(teacher.device, teacher.dtype)  # first, since it holds the load of the machine
    sample, prompt = example(teacher)
    image = load_image(sample)
    settings: dict[str, Any] = {"size": image.width, "rounds": rounds, "ways": SETTINGS, "designs": {}}
    timings = {}
    for name, cells in designs.items():
        functions, counts = {}, {}
        for way, pipe in {TEACHER: teacher, STUDENT: student}.items():
            pipe.set_progress_bar_config(disable=True)
            jobs = [Job(image, prompt, None, **{**DEFAULTS, **cell, **SETTINGS[way]}) for cell in cells]
            packed = ways_to_make(pipe, jobs, adapter_of(pipe).default_max_rows(jobs))[PACKED]
            functions[way] = lambda packed=packed: deque(packed(), maxlen=0)
            with count_unet_calls(pipe) as counted:
                functions[way]()
            counts[way] = {"calls": counted.calls, "rows": counted.rows}
        settings["designs"][name] = {"images": len(cells), **counts}
        timings[name] = measure(functions, rounds, warmup=0)
    return Measurement(timings, settings, where)


def table(measurement: Measurement) -> str:
    """Return what ``compare`` measured as text: two lines and their ratio for each design."""
    where = measurement.environment
    lines = [
        f"{where['device']}, {where['dtype']}, threads {where['threads']}, load {where['load']}",
        f"{'sweep':12}{'way':20}{'calls':>7}{'rows':>7}{'seconds':>9}",
    ]
    for name, timings in measurement.timings.items():
        found = measurement.settings["designs"][name]
        for way, timing in timings.items():
            counted = found[way]
            lines.append(f"{name:12}{way:20}{counted['calls']:7}{counted['rows']:7}{timing.median:9.3f}")
        least, middle, most = ratio(timings[TEACHER], timings[STUDENT])
        lines.append(f"{'':12}{middle:.2f} times faster ({least:.2f} to {most:.2f}); {found['images']} images")
    return "\n".join(lines)
