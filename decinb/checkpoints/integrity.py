"""Whether a file of weights is whole, before anything reads it, and its numbers sound, before anything uses them."""

import json
import math
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from decinb.errors import ModelError

POINTER = b"version https://git-lfs"
HEADER_BYTES = 8  # a safetensors file begins with the length of its header


def check_file(part: str, file: Path, repair: str) -> None:
    """Refuse a file of weights that is not whole, or not of weights at all.

    Args:
        part: the component that it belongs to, for the message.
        file: a ``.safetensors`` or a ``.bin``; the content of the latter is not opened here.
        repair: what to do about it, for the message.

    Raises:
        ModelError: the file is empty, cut short, a git-lfs pointer, a web page, or not in its format.
    """

    def refuse(what: str) -> ModelError:
        return ModelError(f"{part}: {file} {what}; {repair}")

    with file.open("rb") as opened:
        begin = opened.read(512)
    if not begin:
        raise refuse("is empty")
    if begin.startswith(POINTER):
        raise refuse("is a git-lfs pointer, not the weights: `git lfs pull` brings them")
    if begin.lstrip()[:1] == b"<":
        raise refuse("is a web page, not the weights: something answered in place of the hub")
    if file.suffix == ".safetensors":
        size, whole = file.stat().st_size, _announced_size(file)
        if whole is not None and size < whole:
            raise refuse(f"is cut short: {size:,} bytes of {whole:,}")
        try:
            with safe_open(file, "pt"):
                pass
        except (SafetensorError, OSError, ValueError) as error:
            raise refuse(f"is damaged or cut short ({' '.join(str(error).split())})") from error


def _announced_size(file: Path) -> int | None:
    """How long a safetensors file should be, by its own header; None where that cannot be read."""
    size = file.stat().st_size
    with file.open("rb") as opened:
        header_size = int.from_bytes(opened.read(HEADER_BYTES), "little")
        if size < HEADER_BYTES + header_size:
            return None
        try:
            header = json.loads(opened.read(header_size))
            ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
        except (ValueError, KeyError, TypeError, AttributeError, IndexError):
            return None
    return HEADER_BYTES + header_size + max(ends, default=0)


def loaded_bytes(file: Path, dtype: torch.dtype) -> int:
    """The memory that the tensors of a whole file fill once they are loaded as a dtype; of a ``.bin`` its own size."""
    if file.suffix != ".safetensors":
        return file.stat().st_size
    with safe_open(file, "pt") as opened:
        return dtype.itemsize * sum(math.prod(opened.get_slice(name).get_shape()) for name in opened.keys())  # noqa: SIM118


@torch.no_grad()
def check_numbers(part: str, model: nn.Module, where: Path) -> None:
    """Refuse a model with a tensor that got no values, or whose values are not all finite numbers.

    Raises:
        ModelError: naming the tensor.
    """
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if tensor.is_meta:
            raise ModelError(f"{part}: {name} got no values from {where}")
        if not (tensor.is_floating_point() and tensor.numel()):
            continue
        if not torch.stack(tensor.aminmax()).isfinite().all():  # NaN wins both, and nothing is copied
            kind = str(tensor.dtype).removeprefix("torch.")
            raise ModelError(
                f"{part}: {name} in {where} has NaN or infinity as {kind}: the file is damaged, or its values are too "
                f"large for {kind}; fetch it again, or load it as float32"
            )
