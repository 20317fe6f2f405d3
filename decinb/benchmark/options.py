"""Time individual options that make a pipeline faster and change its images only by rounding.

Options that are on by default are included, so that each can be timed with and without.
``decinb.utils.acceleration.tune``, which ``load_pipeline(..., compile=True)`` calls, turns on those that pay off.
"""

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from diffusers import StableDiffusionImg2ImgPipeline
from diffusers.models.attention_processor import Attention, AttnProcessor, AttnProcessor2_0
from PIL import Image
from torch import nn

from decinb.benchmark.latency import Measurement, measure, ratio
from decinb.errors import InputError
from decinb.images import load_image
from decinb.metrics import psnr
from decinb.models import example
from decinb.utils.acceleration import (
    GIVEN_BACK,
    KEPT,
    compile_network,
    has_compiler,
    set_malloc,
    set_memory_format,
    uncompile_network,
)
from decinb.utils.environment import environment

AS_LOADED = "as loaded"
MAX_PSNR = 150.0  # dB, for equal images: their ratio is infinite, which JSON does not have


@dataclass(frozen=True)
class Option:
    """A way to run a pipeline: what it is, how to turn it on and off, and whether it compiles."""

    about: str
    on: Callable[[], object]
    off: Callable[[], object]
    compiles: bool = False


def options(pipe: StableDiffusionImg2ImgPipeline) -> dict[str, Option]:
    """Return all options for the device of a pipeline, by name."""
    unet, device = pipe.unet, pipe.device.type
    found = {
        "plain attention": Option(
            "attention as matrix products and a softmax, without PyTorch's fused kernel (SDPA), the default",
            lambda: unet.set_attn_processor(AttnProcessor()),
            lambda: unet.set_attn_processor(AttnProcessor2_0()),
        ),
        "channels last": Option(
            "the channels of a pixel are adjacent in memory",
            lambda: set_memory_format(pipe, torch.channels_last),
            lambda: set_memory_format(pipe, torch.contiguous_format),
        ),
        "fused QKV": Option(
            "queries, keys and values in one matrix product",
            lambda: unet.fuse_qkv_projections(),
            lambda: _unfuse(unet),
        ),
    }
    if device == "cpu":
        threads = torch.get_num_threads()
        found["one thread"] = Option(
            f"one thread instead of {threads}", lambda: torch.set_num_threads(1), lambda: torch.set_num_threads(threads)
        )
        if set_malloc(KEPT):
            found["memory given back"] = Option(
                "freed memory is returned to the system, as by default; decinb keeps it",
                lambda: set_malloc(GIVEN_BACK),
                lambda: set_malloc(KEPT),
            )
    if device == "cuda" or (device == "cpu" and has_compiler()):
        found["torch.compile"] = Option(
            "kernels generated for this network",
            lambda: compile_network(unet),
            lambda: uncompile_network(unet),
            compiles=True,
        )
    if device == "cuda":
        found["CUDA graphs"] = Option(
            "compiled, and all kernels of a call launched at once",
            lambda: compile_network(unet, "reduce-overhead"),
            lambda: uncompile_network(unet),
            compiles=True,
        )
    return found


def example_call(pipe: StableDiffusionImg2ImgPipeline, steps: int) -> Callable[[], Image.Image]:
    """Return a function that makes one guided image in ``steps`` steps from the pipeline's example, to be timed."""
    pipe.set_progress_bar_config(disable=True)
    sample, prompt = example(pipe)
    image = load_image(sample)

    def call() -> Image.Image:
        return pipe(prompt, image, 1.0, steps, generator=torch.Generator().manual_seed(0)).images[0]

    return call


def compare_options(
    pipe: StableDiffusionImg2ImgPipeline,
    call: Callable[[], object],
    names: Iterable[str] | None = None,
    repeats: int = 4,
    model: str = "unnamed",
) -> Measurement:
    """Time every option against the pipeline as it was loaded, in turns, and compare the images.

    Args:
        pipe: the pipeline in which the options are turned on and off.
        call: makes one image with it, always from the same seed, and returns it as a PIL image.
        names: names from ``options(pipe)``; None takes all that need no compilation.
        repeats: how often each is timed; an even number is fairer.
        model: the name of the model, for the settings.

    Returns:
        ``timings[option]`` has the times with the option and as loaded. ``settings["options"][option]`` has ``psnr``
        (dB between the two images, at most 150) and ``first`` (seconds of the first call, with the compilation).

    Raises:
        InputError: there is no such option on this device.
    """
    available = options(pipe)
    if names is None:
        names = [name for name, option in available.items() if not option.compiles]
    names = list(names)
    for name in names:
        if name not in available:
            raise InputError(
                f"names: there is no option {name!r} on {pipe.device.type}; there are {', '.join(available)}"
            )
    where = environment(pipe.device, pipe.dtype)
    expected = call()
    timings, settings = {}, {}
    for name in names:
        option, switch = available[name], _switch(available[name])
        try:
            switch(name)
            start = time.perf_counter()
            similarity = min(psnr(call(), expected), MAX_PSNR)
            settings[name] = {"psnr": similarity, "first": time.perf_counter() - start, "about": option.about}
            timings[name] = measure({AS_LOADED: call, name: call}, repeats, prepare=switch)
        finally:
            switch(AS_LOADED)
    return Measurement(timings, {"model": model, "repeats": repeats, "options": settings}, where)


def describe(measurement: Measurement, name: str) -> tuple[str, str, str]:
    """Return what a table and a plot say of an option: how many times faster, the PSNR, and the first call.

    How many times faster is the median of the ratios of neighbouring runs.
    """
    found, (before, after) = measurement.settings["options"][name], measurement.timings[name].values()
    similarity = f"{found['psnr']:.0f} dB" if found["psnr"] < MAX_PSNR else "equal"
    return f"{ratio(before, after)[1]:.2f} x", similarity, f"{found['first']:.1f} s"


def table(measurement: Measurement) -> str:
    """Return what ``compare_options`` measured as text: the machine, then a line for each option."""
    where, settings = measurement.environment, measurement.settings
    lines = [
        f"{where['device']}, {where['dtype']}, threads {where['threads']}, load {where['load']}; {settings['model']}",
        f"{'option':20}{'as loaded s':>12}{'with s':>9}{'faster':>9}{'PSNR':>9}{'first call':>12}",
    ]
    for name, timings in measurement.timings.items():
        (before, after), (faster, similarity, first) = timings.values(), describe(measurement, name)
        lines.append(f"{name:20}{before.median:12.3f}{after.median:9.3f}{faster:>9}{similarity:>9}{first:>12}")
    return "\n".join(lines)


def _switch(option: Option) -> Callable[[str], None]:
    """Return a function that turns an option on, or off for the name ``AS_LOADED``.

    It does nothing if the option already is in that state, since some options cannot be turned on twice.
    """
    is_on = False

    def switch(name: str) -> None:
        nonlocal is_on
        if is_on != (name != AS_LOADED):
            is_on = not is_on
            (option.on if is_on else option.off)()

    return switch


def _unfuse(unet: nn.Module) -> None:
    # diffusers leaves the fused weights in the network, which could then not be saved and loaded again.
    unet.unfuse_qkv_projections()
    for module in unet.modules():
        if isinstance(module, Attention):
            module.fused_projections = False
            for name in {"to_qkv", "to_kv"} & vars(module)["_modules"].keys():
                delattr(module, name)
