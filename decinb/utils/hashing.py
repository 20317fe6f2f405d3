"""Hash tensors where they are, at about the speed of memory."""

import functools
from typing import Any

import numpy as np
import torch
from torch import Tensor

CHUNK = 2**17  # words of 8 bytes that are hashed at once: they stay in the cache of a processor


def tensor_hash(tensor: Tensor) -> str:
    """Return a hash of a tensor's bytes, whatever its device and memory layout.

    Words of 8 bytes are multiplied by fixed random odd numbers and added, modulo 2**64 (Carter and Wegman (1979),
    https://doi.org/10.1016/0022-0000(79)90044-8), where the tensor is, so nothing is copied from a GPU. A change of one
    word shows unless all of its 64 bits change, any other with a probability of at least 1 - 2**-31.
    """
    data = tensor.detach().reshape(-1).contiguous().view(torch.uint8)
    whole = data.numel() // 8 * 8
    rest = bytes(data[whole:].tolist()).hex() if whole < data.numel() else ""
    if not whole:
        return rest
    if data.storage_offset() % 8:  # words must be aligned
        data = data.clone()
    words: Any = data[:whole].view(torch.int64)
    on_cpu = words.device.type == "cpu"
    words = words.numpy() if on_cpu else words  # NumPy's calls cost less, and most tensors are small
    factors = _factors(data.device)
    pieces = [words[i : i + CHUNK] for i in range(0, len(words), CHUNK)]
    # High bits reach the lower ones first, because the highest survives a multiplication only as a parity.
    sums = [((piece ^ (piece >> 32)) * factors[: len(piece)]).sum() for piece in pieces]
    parts = list(map(int, sums)) if on_cpu else torch.stack(sums).tolist()  # waiting for a GPU once
    total = sum((part ^ (part >> 32)) * int(factor) for part, factor in zip(parts, _random_words(), strict=False))
    return f"{total % 2**64:016x}{rest}"


@functools.cache
def _random_words() -> np.ndarray:
    return np.random.Generator(np.random.PCG64(0)).integers(-(2**63), 2**63, CHUNK, dtype=np.int64) | 1


@functools.cache
def _factors(device: torch.device) -> Any:
    return _random_words() if device.type == "cpu" else torch.from_numpy(_random_words()).to(device)
