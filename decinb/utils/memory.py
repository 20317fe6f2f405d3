"""Measure how much memory a device has, and how much a pipeline's weights take."""

from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import nn

# Linux control groups, version 2 and 1: the limits of a container.
LIMITS = (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"))


def total_memory(device: torch.device | str = "cpu") -> int | None:
    """Return the total bytes of a device, on the CPU those that a container allows; None for CUDA without a GPU."""
    device = torch.device(device)
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory if torch.cuda.is_available() else None
    total = psutil.virtual_memory().total
    for file in LIMITS:
        with suppress(OSError, ValueError):  # no such file, or it says "max"
            total = min(total, int(file.read_text()))
    return total


def used_memory(pipe: Any) -> int:
    """Return the bytes that the weights of a pipeline take as they are loaded; shared tensors count once."""
    parts = (part for part in pipe.components.values() if isinstance(part, nn.Module))
    tensors = {id(tensor): tensor for part in parts for tensor in (*part.parameters(), *part.buffers())}
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
