"""How much memory there is, and how much a pipeline fills."""

import os
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import nn

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
