"""Ways to run the same network faster, which leave its pictures as they are, but for rounding.

``tune`` is the one-word switch behind ``load_pipeline(..., compile=True)``. ``options`` lists every single way for a
pipeline's device, also those that are on from the start, so that each can be timed with and without.
"""

import os
import shutil
import time
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import nn

from decinb.allocator import GIVEN_BACK, KEPT, set_malloc
from decinb.errors import InputError
from decinb.latency import Record, environment, measure
from decinb.metrics import psnr
from decinb.quiet import quiet

with quiet():  # importing these tells of optional libraries that are not needed here
    from diffusers import StableDiffusionImg2ImgPipeline
    from diffusers.models.attention_processor import Attention, AttnProcessor, AttnProcessor2_0

AS_LOADED = "as loaded"
EQUAL = 150.0  # dB: of two equal pictures the ratio is infinite, which JSON cannot say


@dataclass(frozen=True)
class Option:
    """One way to run a pipeline: how to turn it on and off again, and what it is."""

    about: str
    on: Callable[[], object]
    off: Callable[[], object]
    compiles: bool = False


def tune(pipe: StableDiffusionImg2ImgPipeline) -> str:
    """Turn on what makes a pipeline faster on its device and costs a compilation first; says in words what was done.

    On CUDA the networks are laid out channels last and compiled, on a CPU the U-Net is compiled. Pictures stay the same
    but for rounding. The first call of every new size, or number of rows, waits for the compiler, up to minutes.
    """
    kind = pipe.device.type
    if kind == "cuda":
        _lay_out(pipe, torch.channels_last)
        _compile(pipe.unet)
        _compile(pipe.vae.decoder)
        return "channels last, U-Net and decoder compiled"
    if kind == "cpu" and has_compiler():
        _compile(pipe.unet)
        return "U-Net compiled"
    reason = "no C++ compiler was found" if kind == "cpu" else f"torch.compile is not used on {kind}"
    warnings.warn(f"compile=True changes nothing here: {reason}", stacklevel=3)
    return "not compiled"


def has_compiler() -> bool:
    """Whether torch can compile for this CPU: it writes C++ for a compiler that must be there."""
    return any(shutil.which(name) for name in (os.environ.get("CXX"), "g++", "clang++") if name)


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
            lambda: _lay_out(pipe, torch.channels_last),
            lambda: _lay_out(pipe, torch.contiguous_format),
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
            "kernels written for this network", lambda: _compile(unet), lambda: _uncompile(unet), compiles=True
        )
    if kind == "cuda":
        found["CUDA graphs"] = Option(
            "compiled, and all kernels of a call started at once",
            lambda: _compile(unet, "reduce-overhead"),
            lambda: _uncompile(unet),
            compiles=True,
        )
    return found


def compare_options(
    pipe: StableDiffusionImg2ImgPipeline,
    call: Callable[[], object],
    names: Iterable[str] | None = None,
    repeats: int = 4,
    model: str = "unnamed",
) -> Record:
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
    return Record(timings, {"model": model, "repeats": repeats, "options": settings}, where)


def _switch(option: Option) -> Callable[[str], None]:
    """Turns an option on, or off for the name ``AS_LOADED``; only where it changes, since not all can be on twice."""
    is_on = False

    def prepare(which: str) -> None:
        nonlocal is_on
        if is_on != (which != AS_LOADED):
            is_on = not is_on
            (option.on if is_on else option.off)()

    return prepare


def _lay_out(pipe: StableDiffusionImg2ImgPipeline, memory_format: torch.memory_format) -> None:
    for network in (pipe.unet, pipe.vae):
        nn.Module.to(network, memory_format=memory_format)


def _unfuse(unet: nn.Module) -> None:
    # diffusers leaves the fused matrices in the network, which could then not be saved and loaded again.
    unet.unfuse_qkv_projections()
    for module in unet.modules():
        if isinstance(module, Attention):
            module.fused_projections = False
            for name in {"to_qkv", "to_kv"} & vars(module)["_modules"].keys():
                delattr(module, name)


def _compile(network: nn.Module, mode: str | None = None) -> None:
    # Only `forward`, not the module: hooks, which count calls, stay outside and never make it compile anew.
    network.forward = torch.compile(type(network).forward.__get__(network), mode=mode)


def _uncompile(network: nn.Module) -> None:
    vars(network).pop("forward", None)
