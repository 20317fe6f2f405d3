"""The memory that tensors on a CPU free, kept for the next ones.

On Linux, glibc gives every large block back to the system and takes it again, zeroed page by page, which costs a CPU
more time than many a layer.
"""

import ctypes
import os
import platform
import shutil
import warnings
from functools import cache

import torch
from diffusers import StableDiffusionImg2ImgPipeline
from torch import nn

# glibc's names for what mallopt sets, and the values: above the first number of bytes a block is taken from the system
# and given back at once, above the second so is free memory at the end of the heap, which grows by the third.
NAMES = {"M_MMAP_THRESHOLD": -3, "M_TRIM_THRESHOLD": -1, "M_TOP_PAD": -2}
KEPT = {"M_MMAP_THRESHOLD": 2**31 - 1, "M_TRIM_THRESHOLD": 2**31 - 1, "M_TOP_PAD": 2**28}
GIVEN_BACK = {"M_MMAP_THRESHOLD": 2**25, "M_TRIM_THRESHOLD": 2**26, "M_TOP_PAD": 2**17}  # where glibc itself ends up


def keep_freed_memory() -> bool:
    """Let this process keep the memory that its tensors free; whether that was done.

    Not done where the environment sets ``MALLOC_...`` variables itself, or where there is no glibc.
    """
    return not any(name.startswith("MALLOC_") for name in os.environ) and set_malloc(KEPT)


def set_malloc(values: dict[str, int]) -> bool:
    """Set what glibc's allocator goes by; whether there is one, and it agreed."""
    library = _glibc()
    if library is None:
        return False
    agreed = [library.mallopt(NAMES[name], value) for name, value in values.items()]
    return all(agreed)


@cache
def _glibc() -> ctypes.CDLL | None:
    return ctypes.CDLL(None) if platform.libc_ver()[0] == "glibc" else None


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


def _lay_out(pipe: StableDiffusionImg2ImgPipeline, memory_format: torch.memory_format) -> None:
    for network in (pipe.unet, pipe.vae):
        nn.Module.to(network, memory_format=memory_format)


def _compile(network: nn.Module, mode: str | None = None) -> None:
    # Only `forward`, not the module: hooks, which count calls, stay outside and never make it compile anew.
    network.forward = torch.compile(type(network).forward.__get__(network), mode=mode)


def _uncompile(network: nn.Module) -> None:
    vars(network).pop("forward", None)
