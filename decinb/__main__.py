"""``python -m decinb``: what a bug report needs. It holds no secret, no path and no user name."""

import os
import platform
import re
from collections.abc import Iterator
from pathlib import Path

import torch

from decinb.loading import is_here
from decinb.models import MODELS
from decinb.utils.device import choose_device, choose_dtype
from decinb.utils.environment import versions
from decinb.utils.memory import total_memory

PACKAGES = ("decinb", "torch", "diffusers", "transformers", "accelerate", "huggingface_hub", "safetensors", "Pillow")
SWITCHES = re.compile("(HF|DIFFUSERS|TRANSFORMERS|DECINB|PYTORCH|CUDA|OMP|MKL)_")
SECRET = re.compile("TOKEN|KEY|SECRET|PASS|AUTH", re.IGNORECASE)
HARMLESS = re.compile(r"[\d.,:]{1,6}|true|false|yes|no|on|off", re.IGNORECASE)  # else it could be a path, or a name


def report() -> str:
    """A few lines about this installation and machine, to be pasted in public. Nothing is asked of any network."""
    return "\n".join(f"{name}: {value}" for name, value in _facts())


def _facts() -> Iterator[tuple[str, str]]:
    yield "python", f"{platform.python_version()} on {platform.system()} {platform.machine()}"
    yield from versions(PACKAGES).items()
    device = choose_device()
    yield "device", _describe_device(device)
    yield "memory", _memory()
    yield "threads", f"{torch.get_num_threads()} of {os.cpu_count()} cores"
    yield "dtype", f"{str(choose_dtype(None, device)).removeprefix('torch.')}, unless another is asked for"
    for name, model in MODELS.items():
        where = "bundled" if model.is_bundled else "in a folder" if isinstance(model.source, Path) else ""
        yield f"model {name}", where or ("cached" if is_here(model) else "not cached")
    for name in sorted(filter(SWITCHES.match, os.environ)):
        value = os.environ[name]
        plain = (HARMLESS.fullmatch(value) or value in MODELS) and not SECRET.search(name)
        yield name, value if plain else "set" if value else "empty"


def _describe_device(device: torch.device) -> str:
    if device.type != "cuda":
        return device.type
    properties = torch.cuda.get_device_properties(device)
    return f"{device} ({properties.name}, {properties.total_memory / 2**30:.0f} GiB, CUDA {torch.version.cuda})"


def _memory() -> str:
    there = total_memory()
    return "unknown" if there is None else f"{there / 2**30:.0f} GiB"


if __name__ == "__main__":
    print(report())
