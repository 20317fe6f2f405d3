"""Choose the device and the number format for a model."""

import os

import torch

from decinb.errors import InputError
from decinb.utils import validation

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
"""The number formats that a model can be loaded in, by every name that is understood."""


def available_devices() -> list[str]:
    """Return the names of this machine's devices, the fastest first: ``cuda:0`` and so on, ``mps``, ``cpu``."""
    cuda = [f"cuda:{i}" for i in range(torch.cuda.device_count())] if torch.cuda.is_available() else []
    return [*cuda, *(["mps"] if torch.backends.mps.is_available() else []), "cpu"]


def choose_device(device: str | torch.device | None = None) -> torch.device:
    """Return the device to run on.

    Args:
        device: None takes CUDA (under ``accelerate launch`` the process's own GPU), else Apple's MPS, else the CPU.

    Raises:
        InputError: this machine has no such device.
    """
    available = available_devices()
    if device is None:
        kind = available[0].partition(":")[0]
        if kind == "cuda" and "LOCAL_RANK" in os.environ:  # one of several processes, each with a GPU of its own
            return torch.device("cuda", int(os.environ["LOCAL_RANK"]) % torch.cuda.device_count())
        return torch.device(kind)
    try:
        found = torch.device(device)
    except (RuntimeError, TypeError, ValueError):  # a ValueError for an integer of more than 64 bits
        found = None
    name = f"cuda:{found.index or 0}" if found is not None and found.type == "cuda" else found and found.type
    if name not in available:
        raise InputError(
            f"device must be None or one of {', '.join(available)} on this machine, got {validation.short_repr(device)}"
        )
    return found


def choose_dtype(dtype: str | torch.dtype | None, device: torch.device) -> torch.dtype:
    """Return the number format for a model's weights on a device.

    Args:
        dtype: a key of ``DTYPES`` or a torch dtype. None takes float16 on CUDA and float32 elsewhere.
        device: where the weights will be. On the CPU float16 is far too slow: float32 is used instead, with a warning.

    Raises:
        InputError: a model cannot be loaded in this format.
    """
    if dtype is None:
        # On MPS, half precision still overflows to black images with some releases of macOS and torch.
        return torch.float16 if device.type == "cuda" else torch.float32
    found = _named_dtype(dtype)
    if found == torch.float16 and device.type == "cpu":
        validation.warn("float16 on the CPU is hundreds of times slower than float32: float32 is used instead")
        return torch.float32
    return found


def choose_workload(
    device: torch.device | str | None = None, dtype: torch.dtype | str | None = None, size: int | None = None
) -> tuple[torch.device, torch.dtype, int]:
    """Return the device, number format and latent size of a benchmark that takes minutes on this machine.

    Args:
        device: as for ``choose_device``.
        dtype: as for ``choose_dtype``, but None takes bfloat16 on a CPU with instructions for it.
        size: height and width of the latent, a multiple of 8. None takes 64 (an image of 512 x 512 pixels), and 32 for
            float32 on the CPU.

    Raises:
        InputError: the device is not here, or the dtype or size cannot be used on it.
    """
    device = choose_device(device)
    if dtype is None and device.type == "cpu" and _has_fast_bfloat16():
        dtype = torch.bfloat16
    if dtype is not None and _named_dtype(dtype) == torch.float16 and device.type == "cpu":
        raise InputError("dtype must be float32 or bfloat16 on the CPU, got float16")
    dtype = choose_dtype(dtype, device)
    if size is None:
        size = 32 if device.type == "cpu" and dtype == torch.float32 else 64
    if not isinstance(size, int) or size < 8 or size % 8:
        raise InputError(f"size must be a multiple of 8, at least 8, got {validation.short_repr(size)}")
    return device, dtype, size


def _named_dtype(dtype: str | torch.dtype) -> torch.dtype:
    found = DTYPES.get(str(dtype).removeprefix("torch.").lower())
    if found is None:
        raise InputError(f"dtype must be None or one of {', '.join(DTYPES)}, got {validation.short_repr(dtype)}")
    return found


def _has_fast_bfloat16() -> bool:
    # torch only has private names for this, and only on x86; without them float32 is always right.
    tests = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return any(getattr(torch.cpu, test, lambda: False)() for test in tests)
