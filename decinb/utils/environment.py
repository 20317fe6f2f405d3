"""How much memory there is, and how much a pipeline fills."""

import importlib.metadata
import os
import platform
import re
import subprocess
import sys
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import DiffusionPipeline
from torch import nn

from decinb.errors import InputError
from decinb.utils import validation

LIMITS = (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"))  # of a container


def total_memory(device: torch.device | str = "cpu") -> int | None:
    """Bytes that a device has in all; on the CPU what this process may use of them. None where nobody knows."""
    device = torch.device(device)
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory if torch.cuda.is_available() else None
    try:
        found = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):  # Windows has no such call
        return None
    for file in LIMITS:
        with suppress(OSError, ValueError):  # there is no such file, or it says "max"
            found = min(found, int(file.read_text()))
    return found


def used_memory(pipe: Any) -> int:
    """Bytes that the weights of a pipeline fill as they are loaded."""
    parts = (part for part in pipe.components.values() if isinstance(part, nn.Module))
    tensors = {id(tensor): tensor for part in parts for tensor in (*part.parameters(), *part.buffers())}
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())


def in_notebook() -> bool:
    """Whether there is a notebook to show pictures in."""
    ipython = sys.modules.get("IPython")  # where it was never imported, nobody can be in a notebook
    shell = ipython.get_ipython() if ipython else None
    return hasattr(shell, "kernel")


def choose(
    device: torch.device | str | None = None, dtype: torch.dtype | str | None = None, size: int | None = None
) -> tuple[torch.device, torch.dtype, int]:
    """Fill in what is None with what suits this machine: device, dtype, and side of the latent.

    CUDA if there is any, in float16; else Apple's MPS, in float32. On a CPU bfloat16 where it has units for it, else
    float32 and a latent of 32 x 32 (an image of 256 x 256 pixels), so that a comparison stays within minutes.

    Raises:
        InputError: there is no such device here, or the dtype or size cannot be used on it.
    """
    here = [kind for kind, is_here in _devices().items() if is_here]
    device = here[0] if device is None else str(device)
    if device.partition(":")[0] not in here:
        raise InputError(f"device must be {' or '.join(here)} on this machine, got {device!r}")
    device = torch.device(device)
    if dtype is None:
        dtype = "float16" if device.type == "cuda" else "float32"
        if device.type == "cpu" and _fast_bfloat16():
            dtype = "bfloat16"
    dtype = str(dtype).removeprefix("torch.")
    if dtype not in ("float32", "bfloat16", "float16") or (dtype == "float16" and device.type == "cpu"):
        raise InputError(f"dtype must be float32, bfloat16 or, not on a CPU, float16, got {dtype!r} for {device.type}")
    if size is None:
        size = 32 if device.type == "cpu" and dtype == "float32" else 64
    if not isinstance(size, int) or size < 8 or size % 8:
        raise InputError(f"size must be a multiple of 8, at least 8, got {size!r}")
    return device, getattr(torch, dtype), size


def _devices() -> dict[str, bool]:
    """The kinds of device, the best first, and whether there is one here."""
    return {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}


def _fast_bfloat16() -> bool:
    # torch tells this of x86 under private names only; where it does not, float32 is always right.
    tests = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return any(getattr(torch.cpu, test, lambda: False)() for test in tests)


def environment(device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    """What a time depends on: device, driver, versions, number format, threads, load, date. No host names, no paths."""
    device = torch.device(device)
    return {
        "device": _device_name(device),
        "driver": _driver() if device.type == "cuda" else None,
        "dtype": str(dtype).removeprefix("torch."),
        "threads": torch.get_num_threads(),
        "load": _load(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "diffusers": diffusers.__version__,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type == "mps":
        return f"{platform.machine()} MPS"
    try:
        found = re.search(r"^model name\s*: (.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        found = None
    return found[1].strip() if found else platform.processor() or platform.machine()


def _load() -> float | None:
    """How many processes wanted a core over the last minute: near 0 before a measurement, if the machine is quiet."""
    return round(os.getloadavg()[0], 1) if hasattr(os, "getloadavg") else None  # Windows does not tell


def _driver() -> str | None:
    ask = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(ask, capture_output=True, text=True, timeout=10, check=True).stdout.split("\n")[0].strip()
    except (OSError, subprocess.SubprocessError):
        return None


DTYPES = {
    "float16": torch.float16,
    "fp16": torch.float16,
    "half": torch.float16,
    "bfloat16": torch.bfloat16,
    "bf16": torch.bfloat16,
    "float32": torch.float32,
    "fp32": torch.float32,
    "float": torch.float32,
}


def _device(device: str | torch.device | None) -> torch.device:
    has_cuda, has_mps = torch.cuda.is_available(), torch.backends.mps.is_available()
    if device is None:
        if has_cuda and "LOCAL_RANK" in os.environ:  # one of several processes, each with a GPU of its own
            return torch.device("cuda", int(os.environ["LOCAL_RANK"]) % torch.cuda.device_count())
        return torch.device("cuda" if has_cuda else "mps" if has_mps else "cpu")
    try:
        found = torch.device(device)
    except (RuntimeError, TypeError):
        raise InputError(f"device: {device!r} is not a device; give 'cuda', 'mps', 'cpu' or None") from None
    if (found.type == "mps" and not has_mps) or (
        found.type == "cuda" and not (has_cuda and (found.index or 0) < torch.cuda.device_count())
    ):
        raise InputError(f"device: {device!r} was asked for, but torch finds none here; give 'cpu' or None")
    return found


def _dtype(dtype: str | torch.dtype | None, device: torch.device) -> torch.dtype:
    if dtype is None:
        # On MPS half precision still overflows to black images with some releases of macOS and torch.
        return torch.float16 if device.type == "cuda" else torch.float32
    found = DTYPES.get(str(dtype).removeprefix("torch.").lower())
    if found is None:
        raise InputError(
            f"dtype: {validation.short_repr(dtype)} cannot be used; give one of {', '.join(DTYPES)} or None"
        )
    if found == torch.float16 and device.type == "cpu":
        validation.warn(
            "float16 was asked for on the CPU, where one convolution takes hundreds of times longer: float32 is used"
        )
        return torch.float32
    return found


def versions() -> dict[str, str]:
    """Of what a picture depends on."""
    return {name: importlib.metadata.version(name) for name in ("decinb", "diffusers", "torch")}


def describe(pipe: DiffusionPipeline) -> dict[str, Any]:
    """What a report depends on besides its settings: versions, device, number format, threads, parameters a part."""
    return {
        "date": datetime.now(UTC).date().isoformat(),
        "python": platform.python_version(),
        **{library: importlib.metadata.version(library) for library in ("torch", "diffusers", "transformers")},
        "device": pipe.device.type,
        "dtype": str(pipe.dtype).removeprefix("torch."),
        "threads": torch.get_num_threads(),
        "parameters": {
            name: sum(parameter.numel() for parameter in part.parameters())
            for name, part in pipe.components.items()
            if isinstance(part, torch.nn.Module)
        },
    }
