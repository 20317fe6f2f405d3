"""Check that weight files are complete before they are read, and that their values are finite after loading."""

import json
import math
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from decinb.errors import ModelError

GIT_LFS_POINTER = b"version https://git-lfs"
HEADER_LENGTH_BYTES = 8  # a safetensors file starts with the length of its JSON header


def check_file(component: str, file: Path, repair: str) -> None:
    """Check that a file holds weights and is complete.

    Args:
        component: the component that the file belongs to, for the message.
        file: a ``.safetensors`` or ``.bin`` file. The content of a ``.bin`` file is not unpickled here.
        repair: how to get an intact copy, for the message.

    Raises:
        ModelError: the file is empty, truncated, a git-lfs pointer, a web page, or not in its format.
    """

    def error(problem: str) -> ModelError:
        return ModelError(f"{component}: {file} {problem}; {repair}")

    with file.open("rb") as opened:
        start = opened.read(512)
    if not start:
        raise error("is empty")
    if start.startswith(GIT_LFS_POINTER):
        raise error("is a git-lfs pointer, not the weights: run `git lfs pull` to get them")
    if start.lstrip()[:1] == b"<":
        raise error("is a web page, not the weights: another server answered instead of the hub")
    if file.suffix != ".safetensors":
        return
    size, expected = file.stat().st_size, _expected_size(file)
    if expected is not None and size < expected:
        raise error(f"is truncated: {size:,} of {expected:,} bytes")
    try:
        with safe_open(file, "pt"):
            pass
    except (SafetensorError, OSError, ValueError) as cause:
        raise error(f"is damaged or truncated ({' '.join(str(cause).split())})") from cause


def _expected_size(file: Path) -> int | None:
    """Return the size in bytes that a safetensors header announces, or None if the header cannot be read."""
    size = file.stat().st_size
    with file.open("rb") as opened:
        header_length = int.from_bytes(opened.read(HEADER_LENGTH_BYTES), "little")
        if size < HEADER_LENGTH_BYTES + header_length:
            return None
        try:
            header = json.loads(opened.read(header_length))
            ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
        except (ValueError, KeyError, TypeError, AttributeError, IndexError):
            return None
    return HEADER_LENGTH_BYTES + header_length + max(ends, default=0)


def loaded_bytes(file: Path, dtype: torch.dtype) -> int:
    """Return how many bytes of memory a weight file takes once loaded as ``dtype``; for a ``.bin``, its file size."""
    if file.suffix != ".safetensors":
        return file.stat().st_size
    with safe_open(file, "pt") as opened:
        return dtype.itemsize * sum(math.prod(opened.get_slice(name).get_shape()) for name in opened.keys())  # noqa: SIM118


@torch.no_grad()
def check_finite(component: str, model: nn.Module, where: Path) -> None:
    """Check that every tensor of a model was loaded and that all of its values are finite.

    Args:
        component: the name of the model in its pipeline, for the message.
        model: the loaded model.
        where: the folder that it was loaded from, for the message.

    Raises:
        ModelError: a tensor has no values, NaN or infinity; the message names it.
    """
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if tensor.is_meta:
            raise ModelError(f"{component}: {name} was not loaded from {where}")
        if not (tensor.is_floating_point() and tensor.numel()):
            continue
        if not torch.stack(tensor.aminmax()).isfinite().all():  # NaN propagates to both, and nothing is copied
            dtype = str(tensor.dtype).removeprefix("torch.")
            raise ModelError(
                f"{component}: {name} in {where} has NaN or infinity as {dtype}: the file is damaged, or its values "
                f"are too large for {dtype}; download it again, or load it as float32"
            )
