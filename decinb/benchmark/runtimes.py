"""Compare runtimes of the U-Net: whole images and sweeps of a model, and U-Nets of full size."""

import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import Tensor, nn

from decinb.benchmark.counting import NETWORKS, random_model
from decinb.benchmark.latency import Measurement, measure, ratio, unet_call
from decinb.benchmark.packing import DEFAULTS, DESIGNS, images_of, ways_to_make
from decinb.designs import Cell
from decinb.errors import InputError
from decinb.images import load_image
from decinb.models import example
from decinb.runtimes import openvino
from decinb.runtimes.openvino import RUNTIMES, TORCH
from decinb.sampling.adapters import adapter_of
from decinb.sampling.jobs import Job
from decinb.utils.acceleration import compile_network, has_compiler, uncompile_network
from decinb.utils.environment import environment, versions

ONE_CALL = "one call"
GUIDES: dict[str, Sequence[Cell]] = {ONE_CALL: [{}]} | {
    name: DESIGNS[name] for name in ("guidance", "strength", "steps")
}
"""One image with the defaults, and the guide's three sweeps."""

COMPILED = "torch, compiled"
BFLOAT16 = "torch, bfloat16"


def compare(
    load: Callable[[str], DiffusionPipeline],
    designs: Mapping[str, Sequence[Cell]] = GUIDES,
    runtimes: Sequence[str] = RUNTIMES,
    rounds: int = 4,
    model: str = "unnamed",
) -> Measurement:
    """Time the guide's loop and packed sweeps in each runtime, and compare the images with those of torch's loop.

    Args:
        load: returns the pipeline in a runtime.
        designs: lists of cells, by name.
        runtimes: as for ``load_pipeline``, ``torch`` among them.
        rounds: how often each way is timed, 1 or more; an even number is fairer.
        model: the name of the model, for the settings.

    Returns:
        Times as ``timings[design][way]``, where a way is such as ``"packed, openvino"``. In
        ``settings["designs"][design][way]`` are ``psnr_median`` and ``psnr_worst`` in dB (None where all pixels are
        equal), ``levels``, the largest difference in levels of 255, and ``first``, the seconds of the first run.

    Raises:
        InputError: ``rounds`` is below 1, or ``torch`` is missing.
    """
    if rounds < 1 or TORCH not in runtimes:
        raise InputError(f"rounds must be at least 1 and runtimes include torch, got {rounds} and {list(runtimes)}")
    pipes = {runtime: load(runtime) for runtime in runtimes}
    pipe = pipes[TORCH]
    where = environment(pipe.device, pipe.dtype) | versions(["openvino"])
    for one in pipes.values():
        one.set_progress_bar_config(disable=True)
    sample, prompt = example(pipe)
    image = load_image(sample)
    settings: dict[str, Any] = {"model": model, "size": image.width, "rounds": rounds, "designs": {}}
    timings = {}
    for name, cells in designs.items():
        jobs = [Job(image, prompt, None, **{**DEFAULTS, **cell}) for cell in cells]
        ways = {}
        for runtime, one in pipes.items():
            both = ways_to_make(one, jobs, adapter_of(one).default_max_rows(jobs))
            ways |= {f"{way}, {runtime}": (one, run) for way, run in both.items()}
        found, expected = {}, None
        for way, (one, run) in ways.items():
            started = time.perf_counter()
            images = images_of(one, run)
            expected = expected or images
            found[way] = {**_difference(images, expected), "first": time.perf_counter() - started}
        settings["designs"][name] = found
        functions = {way: lambda run=run: deque(run(), maxlen=0) for way, (_, run) in ways.items()}
        timings[name] = measure(functions, rounds, warmup=0)
    return Measurement(timings, settings, where)


def _difference(images: Mapping[int, Tensor], expected: Mapping[int, Tensor]) -> dict[str, float | None]:
    """Return the PSNR and the largest difference of images with values from 0 to 1."""
    errors = sorted(float((images[i] - expected[i]).square().mean()) for i in expected)
    levels = 255 * max(float((images[i] - expected[i]).abs().max()) for i in expected)

    def psnr(error: float) -> float | None:
        return None if error == 0 else -10 * torch.tensor(error).log10().item()

    return {"psnr_median": psnr(errors[len(errors) // 2]), "psnr_worst": psnr(errors[-1]), "levels": levels}


def compare_networks(
    rows: Sequence[int] = (2,),
    size: int = 64,
    repeats: int = 4,
    networks: Mapping[str, Callable[[], nn.Module]] = NETWORKS,
    runtimes: Sequence[str] = (*RUNTIMES, openvino.EIGHT_BITS),
    with_compiled: bool = True,
) -> Measurement:
    """Time calls of U-Nets with random weights on the CPU in each runtime, and in PyTorch compiled and in bfloat16.

    Args:
        rows: the numbers of rows of the calls; a guided step has two.
        size: height and width of the latent.
        repeats: how often each call is timed.
        networks: functions that build the U-Nets, by name.
        runtimes: as for ``load_pipeline``, and OpenVINO with weights of 8 bits.
        with_compiled: also time ``torch.compile``, where there is a compiler.

    Returns:
        Times as ``timings["U-Net-NAS, 2 rows"][runtime]``; the seconds of the first call, with the export or the
        compilation, as ``settings["first"][network][runtime]``.

    Raises:
        InputError: a number is below 1.
    """
    if min(*rows, size, repeats) < 1:
        raise InputError(f"rows, size and repeats must be at least 1, got {tuple(rows)}, {size} and {repeats}")
    where = environment("cpu", torch.float32) | versions(["openvino"])
    timings, first = {}, {}
    for name, build in networks.items():
        unet = random_model(build)
        switches = {runtime: _switch_to(runtime) for runtime in runtimes}
        if with_compiled and has_compiler():
            switches[COMPILED] = compile_network
        switches[BFLOAT16] = lambda network: nn.Module.to(network, torch.bfloat16)
        by_rows: dict[str, dict] = {f"{name}, {number} rows": {} for number in rows}
        first[name] = {}
        # One runtime after the other: all of them at once would need several copies of the weights.
        for runtime, switch in switches.items():
            switch(unet)
            started = time.perf_counter()
            unet_call(unet, rows[0], size)()
            first[name][runtime] = time.perf_counter() - started
            for number in rows:
                call = {runtime: unet_call(unet, number, size)}
                by_rows[f"{name}, {number} rows"] |= measure(call, repeats)
            openvino.detach(unet)
            uncompile_network(unet)
        timings |= by_rows
    return Measurement(timings, {"size": size, "tokens": 77, "repeats": repeats, "first": first}, where)


def _switch_to(runtime: str) -> Callable[[nn.Module], None]:
    return lambda network: None if runtime == TORCH else openvino.attach(network, runtime)


def table(measurement: Measurement) -> str:
    """Return what ``compare`` or ``compare_networks`` measured as text: a line for each way, faster than the first."""
    where, designs = measurement.environment, measurement.settings.get("designs", {})
    lines = [
        f"{where['device']}, threads {where['threads']}, load {where['load']}",
        f"{'work':20}{'way':32}{'seconds':>9}{'faster':>8}{'PSNR dB, median and worst':>28}",
    ]
    for work, timings in measurement.timings.items():
        base = next(iter(timings.values()))
        for way, timing in timings.items():
            found = designs.get(work, {}).get(way, {})
            psnr = [found.get("psnr_median"), found.get("psnr_worst")]
            shown = "" if None in psnr else f"{psnr[0]:.0f}, {psnr[1]:.0f}"
            lines.append(f"{work:20}{way:32}{timing.median:9.3f}{ratio(base, timing)[1]:8.2f}{shown:>28}")
    return "\n".join(lines)
