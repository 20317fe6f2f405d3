"""Ways to run the same network faster, which leave its pictures as they are, but for rounding.

``tune`` is the one-word switch behind ``load_pipeline(..., compile=True)``. ``options`` lists every single way for a
pipeline's device, also those that are on from the start, so that each can be timed with and without.
"""

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from diffusers import StableDiffusionImg2ImgPipeline
from diffusers.models.attention_processor import Attention, AttnProcessor, AttnProcessor2_0
from torch import nn

from decinb.benchmark.latency import Measurement, measure
from decinb.errors import InputError
from decinb.metrics import psnr
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
EQUAL = 150.0  # dB: of two equal pictures the ratio is infinite, which JSON cannot say


@dataclass(frozen=True)
class Option:
    """One way to run a pipeline: how to turn it on and off again, and what it is."""

    about: str
    on: Callable[[], object]
    off: Callable[[], object]
    compiles: bool = False


def options(pipe: StableDiffusionImg2ImgPipeline) -> dict[str, Option]:
    """Every option that leaves a picture as it is, by name, for the device that a pipeline is on."""
    unet, kind = pipe.unet, pipe.device.type
    found = {
        "plain attention": Option(
            "attention as written down, without PyTorch's fused kernel (SDPA), which is on from the start",
            lambda: unet.set_attn_processor(AttnProcessor()),
            lambda: unet.set_attn_processor(AttnProcessor2_0()),
        ),
        "channels last": Option(
            "the colours of a pixel lie side by side in memory",
            lambda: set_memory_format(pipe, torch.channels_last),
            lambda: set_memory_format(pipe, torch.contiguous_format),
        ),
        "fused QKV": Option(
            "queries, keys and values in one matrix product",
            lambda: unet.fuse_qkv_projections(),
            lambda: _unfuse(unet),
        ),
    }
    if kind == "cpu":
        threads = torch.get_num_threads()
        found["one thread"] = Option(
            f"one core instead of {threads}", lambda: torch.set_num_threads(1), lambda: torch.set_num_threads(threads)
        )
        if set_malloc(KEPT):
            found["memory given back"] = Option(
                "freed memory goes back to the system, as it does unless decinb keeps it",
                lambda: set_malloc(GIVEN_BACK),
                lambda: set_malloc(KEPT),
            )
    if kind == "cuda" or (kind == "cpu" and has_compiler()):
        found["torch.compile"] = Option(
            "kernels written for this network",
            lambda: compile_network(unet),
            lambda: uncompile_network(unet),
            compiles=True,
        )
    if kind == "cuda":
        found["CUDA graphs"] = Option(
            "compiled, and all kernels of a call started at once",
            lambda: compile_network(unet, "reduce-overhead"),
            lambda: uncompile_network(unet),
            compiles=True,
        )
    return found


def compare_options(
    pipe: StableDiffusionImg2ImgPipeline,
    call: Callable[[], object],
    names: Iterable[str] | None = None,
    repeats: int = 4,
    model: str = "unnamed",
) -> Measurement:
    """Time every option beside the pipeline as it was loaded, in turns, and compare the pictures.

    Args:
        pipe: the options are turned on and off in it.
        call: makes one picture with it, always from the same seed, and returns it as a PIL image.
        names: of ``options(pipe)``; None takes those that need no compilation.
        repeats: how often each is timed; even is fairer.
        model: what the record calls the pipeline.

    Returns:
        ``timings[option]`` holds the option's times and those as loaded; ``settings["options"][option]`` has ``psnr``
        (dB between the two pictures, at most 150) and ``first`` (seconds of the first call, with the compilation).

    Raises:
        InputError: there is no such option on this device.
    """
    known = options(pipe)
    names = [name for name, option in known.items() if not option.compiles] if names is None else list(names)
    for name in names:
        if name not in known:
            raise InputError(f"names: {name!r} is no option on {pipe.device.type}; known are {', '.join(known)}")
    where = environment(pipe.device, pipe.dtype)
    expected = call()
    timings, settings = {}, {}
    for name in names:
        option, prepare = known[name], _switch(known[name])
        try:
            prepare(name)
            started = time.perf_counter()
            ratio = min(psnr(call(), expected), EQUAL)
            settings[name] = {"psnr": ratio, "first": time.perf_counter() - started, "about": option.about}
            timings[name] = measure({AS_LOADED: call, name: call}, repeats, prepare=prepare)
        finally:
            prepare(AS_LOADED)
    return Measurement(timings, {"model": model, "repeats": repeats, "options": settings}, where)


def _switch(option: Option) -> Callable[[str], None]:
    """Turns an option on, or off for the name ``AS_LOADED``; only where it changes, since not all can be on twice."""
    is_on = False

    def prepare(which: str) -> None:
        nonlocal is_on
        if is_on != (which != AS_LOADED):
            is_on = not is_on
            (option.on if is_on else option.off)()

    return prepare


def _unfuse(unet: nn.Module) -> None:
    # diffusers leaves the fused matrices in the network, which could then not be saved and loaded again.
    unet.unfuse_qkv_projections()
    for module in unet.modules():
        if isinstance(module, Attention):
            module.fused_projections = False
            for name in {"to_qkv", "to_kv"} & vars(module)["_modules"].keys():
                delattr(module, name)
