"""Check the files of a model before they are read, and its values after loading. Nothing in them is trusted.

What a model costs is bounded by its weights: its other files are small, and its configuration may not describe a larger
network than the weights fill.
"""

import json
import math
import os
import stat
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.nn.modules.module import (
    register_module_buffer_registration_hook,
    register_module_module_registration_hook,
    register_module_parameter_registration_hook,
)

from decinb.errors import ModelError, reason

GIT_LFS_POINTER = b"version https://git-lfs"
WEB_PAGE = (b"<!doctype", b"<html", b"<head", b"<body", b"<?xml")
HEADER_LENGTH_BYTES = 8  # a safetensors file starts with the length of its JSON header
MAX_HEADER = 10_000_000  # bytes; its notes on training may be long
MAX_TENSORS = 5_000  # of a weight file; the largest networks have some 2,000
MAX_SMALL_FILE = 2_000_000  # bytes of a file without weights
MAX_VOCABULARY = 50_000_000  # bytes of a large tokenizer's file
VOCABULARIES = ("tokenizer.json", "vocab.json", "vocab.txt", "merges.txt")
READ = (".json", ".txt", ".model", ".jinja")  # endings of files that are read whole

WEIGHT_TYPES = ("F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2")  # as safetensors names them
NOT_WEIGHTS = ("position_ids", "num_batches_tracked")  # integers that older models hold besides their weights

# How far a network may exceed its weights: some tensors are shared, and a few are computed.
MORE_TENSORS, FEW_TENSORS = 2, 100
MORE_VALUES, FEW_VALUES = 1.25, 25_000_000
MODULES_PER_TENSOR, FEW_MODULES = 50, 1000


def check_folder(component: str, folder: Path) -> None:
    """Check that a component's folder holds only ordinary files, and that those without weights are small.

    Raises:
        ModelError: it holds a pipe, a device or a very large file; the message names it.
    """
    for parent, folders, files in os.walk(folder):
        for name in (*folders, *files):
            path = os.path.join(parent, name)
            try:
                status = os.stat(path)
            except OSError:  # a broken link
                continue
            if not (stat.S_ISREG(status.st_mode) or stat.S_ISDIR(status.st_mode)):
                raise ModelError(f"{component}: {path} is not an ordinary file; remove it")
            limit = MAX_VOCABULARY if name in VOCABULARIES or name.endswith(".model") else MAX_SMALL_FILE
            if name.endswith(READ) and stat.S_ISREG(status.st_mode) and status.st_size > limit:
                raise ModelError(
                    f"{component}: {path} has {status.st_size:,} bytes, and at most {limit:,} are "
                    "allowed; download it again, or use another copy"
                )


def check_file(component: str, file: Path, repair: str) -> None:
    """Check that a file holds weights and is complete.

    Args:
        component: the component that the file belongs to, for the message.
        file: a ``.safetensors`` or ``.bin`` file. The content of a ``.bin`` file is not unpickled here.
        repair: how to get an intact copy, for the message.

    Raises:
        ModelError: the file is empty, truncated, a git-lfs pointer, a web page, not in its format, or it holds integers
            instead of weights.
    """

    def error(problem: str) -> ModelError:
        return ModelError(f"{component}: {file} {problem}; {repair}")

    with file.open("rb") as opened:
        start = opened.read(512)
    if not start:
        raise error("is empty")
    if start.startswith(GIT_LFS_POINTER):
        raise error("is a git-lfs pointer, not the weights: run `git lfs pull` to get them")
    if start.lstrip().lower().startswith(WEB_PAGE):
        raise error("is a web page, not the weights: another server answered instead of the hub")
    if file.suffix != ".safetensors":
        return
    header_length = int.from_bytes(start[:HEADER_LENGTH_BYTES], "little")
    size, expected = file.stat().st_size, None
    if header_length > MAX_HEADER:
        raise error(f"is damaged: it announces a header of {header_length:,} bytes")
    with suppress(ValueError, RecursionError, KeyError, TypeError, AttributeError, IndexError):
        count, data_bytes = _count_tensors(file, header_length)
        if count > MAX_TENSORS:
            raise error(f"holds {count:,} tensors, and at most {MAX_TENSORS:,} are allowed")
        expected = HEADER_LENGTH_BYTES + header_length + data_bytes
    if expected is not None and size < expected:
        raise error(f"is truncated: {size:,} of {expected:,} bytes")
    try:
        types = _types(file)
    except (SafetensorError, OSError, ValueError, MemoryError) as cause:
        raise error(f"is damaged or truncated ({reason(cause)})") from cause
    for name, kind in types.items():
        if kind not in WEIGHT_TYPES and not name.endswith(NOT_WEIGHTS):
            raise error(f"has {name} as {kind}, not as floating-point numbers: these are not plain weights")


def _count_tensors(file: Path, header_length: int) -> tuple[int, int]:
    """Return how many tensors a file has, and how many bytes follow its header, as the header says itself."""
    with file.open("rb") as opened:
        opened.seek(HEADER_LENGTH_BYTES)
        header = json.loads(opened.read(header_length))
    ends = [int(entry["data_offsets"][1]) for name, entry in header.items() if name != "__metadata__"]
    return len(ends), max(ends, default=0)


def _types(file: Path) -> dict[str, str]:
    with safe_open(file, "pt") as opened:
        return {name: opened.get_slice(name).get_dtype() for name in opened.keys()}  # noqa: SIM118


def tensor_sizes(file: Path) -> dict[str, int]:
    """Return the number of values in each tensor of a weight file.

    Raises:
        ModelError: a ``.bin`` file holds integers instead of weights.
        Exception: a ``.bin`` file holds more than plain tensors, or is damaged.
    """
    if file.suffix == ".safetensors":
        with safe_open(file, "pt") as opened:
            return {name: math.prod(opened.get_slice(name).get_shape()) for name in opened.keys()}  # noqa: SIM118
    tensors = torch.load(file, map_location="meta", weights_only=True)
    for name, tensor in tensors.items():
        if not tensor.is_floating_point() and not name.endswith(NOT_WEIGHTS):
            kind = str(tensor.dtype).removeprefix("torch.")
            raise ModelError(f"{file} has {name} as {kind}, not as floating-point numbers: these are not plain weights")
    return {name: tensor.numel() for name, tensor in tensors.items()}


def loaded_bytes(file: Path, dtype: torch.dtype) -> int:
    """Return how many bytes of memory a weight file takes once loaded as ``dtype``; for a ``.bin``, its file size."""
    if file.suffix != ".safetensors":
        return file.stat().st_size
    return dtype.itemsize * sum(tensor_sizes(file).values())


@contextmanager
def bounded_by(sizes: Mapping[str, int], component: str, where: Path) -> Iterator[None]:
    """Refuse to create a network in the ``with`` block that is much larger than its weights.

    It is refused while it is created, before it takes much time or memory. Networks that other threads create do not
    count.

    Args:
        sizes: the number of values in each of its tensors.
        component: its name in the pipeline, for the message.
        where: its folder, for the message.

    Raises:
        ModelError: the network has far more modules, tensors or values than the weights.
    """
    thread = threading.get_ident()
    left = {
        "modules": MODULES_PER_TENSOR * len(sizes) + FEW_MODULES,
        "tensors": MORE_TENSORS * len(sizes) + FEW_TENSORS,
        "values": int(MORE_VALUES * sum(sizes.values())) + FEW_VALUES,
    }

    def spend(what: str, number: int) -> None:
        left[what] -= number
        if left[what] < 0:
            raise ModelError(
                f"{component}: the configuration in {where} describes a network with far more {what} than its weights; "
                "the files do not belong together, so download them again, or use another copy"
            )

    def count_tensor(module: nn.Module, name: str, tensor: Tensor | None) -> None:
        if tensor is not None and threading.get_ident() == thread:
            spend("tensors", 1)
            spend("values", tensor.numel())

    def count_module(module: nn.Module, name: str, child: nn.Module | None) -> None:
        if threading.get_ident() == thread:
            spend("modules", 1)

    hooks = (
        register_module_parameter_registration_hook(count_tensor),
        register_module_buffer_registration_hook(count_tensor),
        register_module_module_registration_hook(count_module),
    )
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


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
