"""Run a pipeline faster with the same images: keep freed memory on the CPU, compile networks, lay them out for a GPU.

On Linux, glibc returns every large block to the system when it is freed. The next tensor gets it back zeroed page by
page, which takes longer than some of a U-Net's layers.
"""

import ctypes
import os
import platform
import shutil
from functools import cache

import torch
from diffusers import StableDiffusionImg2ImgPipeline
from torch import nn

from decinb.utils import validation

# The parameters of glibc's mallopt, in bytes: larger blocks than the first come from the system and are returned when
# freed, more free memory at the end of the heap than the second is returned, and the heap grows by the third.
NAMES = {"M_MMAP_THRESHOLD": -3, "M_TRIM_THRESHOLD": -1, "M_TOP_PAD": -2}
KEPT = {"M_MMAP_THRESHOLD": 2**31 - 1, "M_TRIM_THRESHOLD": 2**31 - 1, "M_TOP_PAD": 2**28}
GIVEN_BACK = {"M_MMAP_THRESHOLD": 2**25, "M_TRIM_THRESHOLD": 2**26, "M_TOP_PAD": 2**17}  # glibc's own, adapted


def keep_freed_memory() -> bool:
    """Let this process keep the memory that its tensors free, and return whether it does.

    Nothing changes without glibc, or if the environment sets ``MALLOC_...`` variables itself.
    """
    return not any(name.startswith("MALLOC_") for name in os.environ) and set_malloc(KEPT)


def set_malloc(values: dict[str, int]) -> bool:
    """Set parameters of glibc's allocator, and return whether there is one and it took all of them."""
    library = _glibc()
    if library is None:
        return False
    taken = [library.mallopt(NAMES[name], value) for name, value in values.items()]
    return all(taken)


@cache
def _glibc() -> ctypes.CDLL | None:
    return ctypes.CDLL(None) if platform.libc_ver()[0] == "glibc" else None


def tune(pipe: StableDiffusionImg2ImgPipeline) -> str:
    """Compile a pipeline's networks for its device, and return what was done in a few words.

    On CUDA the networks are laid out channels last, and the U-Net and the decoder are compiled; on a CPU with a C++
    compiler the U-Net is. Images stay the same except for rounding. The first call of each new image size or batch size
    waits for the compiler, up to minutes.
    """
    kind = pipe.device.type
    if kind == "cuda":
        set_memory_format(pipe, torch.channels_last)
        compile_network(pipe.unet)
        compile_network(pipe.vae.decoder)
        return "channels last, U-Net and decoder compiled"
    if kind == "cpu" and has_compiler():
        compile_network(pipe.unet)
        return "U-Net compiled"
    reason = "no C++ compiler was found" if kind == "cpu" else f"torch.compile is not used on {kind}"
    validation.warn(f"compile=True changes nothing here: {reason}")
    return "not compiled"


def has_compiler() -> bool:
    """Return whether torch can compile for the CPU: it writes C++ and needs a compiler for it."""
    return any(shutil.which(name) for name in (os.environ.get("CXX"), "g++", "clang++") if name)


def set_memory_format(pipe: StableDiffusionImg2ImgPipeline, memory_format: torch.memory_format) -> None:
    """Lay out the weights of the U-Net and the VAE in a memory format."""
    for network in (pipe.unet, pipe.vae):
        nn.Module.to(network, memory_format=memory_format)


def compile_network(network: nn.Module, mode: str | None = None) -> None:
    """Compile a network with ``torch.compile``, in place; ``mode`` is torch's."""
    # Only `forward` and not the module: adding a hook, as counting calls does, never compiles again.
    network.forward = torch.compile(type(network).forward.__get__(network), mode=mode)


def uncompile_network(network: nn.Module) -> None:
    """Undo ``compile_network``."""
    vars(network).pop("forward", None)
