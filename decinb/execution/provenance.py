"""What made an image: the record that its file holds, and how a pipeline is matched with such a record again.

The key of a record is a hash of everything that decides its image: of the pipeline's fingerprint, its scheduler, and
what the arguments of the call come to. It follows from the record alone, so a record that was changed does not match
its own key.

A record may come from a stranger's file, so nothing in it is trusted: it cannot name a file to read, and no model or
scheduler other than those already known.
"""

import hashlib
import json
import math
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import DiffusionPipeline, SchedulerMixin
from PIL import Image
from torch import nn

from decinb.designs import Cell
from decinb.errors import InputError
from decinb.execution.fingerprint import fingerprint, sampled_hash, scheduler_code, significant
from decinb.images import OUTPUT_HASH, Saved
from decinb.loading import is_here
from decinb.models import MODELS, known_model
from decinb.runtimes.openvino import AUTOCAST, RUNTIMES, precision
from decinb.sampling.base import Adapter
from decinb.sampling.jobs import Job, scheduler_changes
from decinb.utils import validation
from decinb.utils.environment import versions
from decinb.utils.labels import ARGUMENTS
from decinb.utils.origins import OURS

ImageRecord = dict[str, Any]
"""Everything that is needed to make one image again, and what it took."""

CHAIN = "chain"
"""The field that only records of a chain's images have: its links up to this image."""

MADE_BY = ("model", "weights", "scheduler", "scheduler_config")
IMAGE_FIELDS = [*ARGUMENTS, "guidance_rescale", *MADE_BY]
"""The fields that a sweep's image is made again from."""
NOT_PLAIN = "not recorded"
"""The key of a value in a scheduler's configuration that JSON cannot hold, such as a function."""

KEY_FIELDS = (
    "weights",
    "scheduler",
    "scheduler_config",
    "dtype",
    "guidance_rescale",
    "image_hash",
    "prompt",
    "num_inference_steps",
    "seed",
    "decides",
)
"""The fields that decide a sweep's image; ``decides`` holds what the other arguments come to in its pipeline."""

TYPES: dict[str, tuple[type, ...]] = {
    "image_hash": (str, type(None)),
    "scheduler": (str,),
    "seconds": (int, float, type(None)),
    "unknown": (list,),
    "versions": (dict,),
}
"""The types of fields that are read without another check."""

LINK_ARGUMENTS = (
    "prompt",
    "negative_prompt",
    "strength",
    "guidance_scale",
    "num_inference_steps",
    "guidance_rescale",
    "takes",
)
LINK_FIELDS = ["task", *MADE_BY, *LINK_ARGUMENTS]
"""The fields that a link of a chain is made again from."""


# --- to a record ------------------------------------------------------------------------------------------------------


def image_record(
    cell: Cell,
    job: Job,
    image_name: str | None,
    size: tuple[int, int],
    key_parts: Mapping[str, Any],
    shared: Mapping[str, Any],
) -> ImageRecord:
    """Return the record of a cell's image, with its key, before the image is made.

    Args:
        cell: as the user wrote it.
        job: the cell, validated and completed.
        image_name: what to call the input.
        size: width and height of the image in pixels.
        key_parts: what else decides the image, depending on the pipeline; see ``Adapter.key_parts``.
        shared: what all images of the sweep have in common, from ``shared_record``.
    """
    arguments = {name: getattr(job, name) for name in ARGUMENTS} | {"image": image_name}
    record = {
        "cell": {name: arguments[name] for name in cell},
        **arguments,
        "steps_run": job.num_inference_steps - job.skipped,
        "image_hash": None if job.image is None else image_hash(job.image),
        "image_size": list(size),
        **shared,
        "decides": dict(key_parts),
    }
    return record | {"key": record_key(record)}


def shared_record(made_by: ImageRecord, guidance_rescale: float) -> ImageRecord:
    """Return what the records of all images of a sweep have in common; ``made_by`` is the pipeline's record."""
    return {"guidance_rescale": guidance_rescale, **made_by, "versions": versions()}


def chain_records(
    links: Sequence[ImageRecord], seed: int, image: Image.Image | None, image_name: str | None
) -> list[ImageRecord]:
    """Return the records of a chain's images, each made by the links up to it.

    Args:
        links: for each, its task and pipeline class, its ``pipeline_record``, its ``LINK_ARGUMENTS``, and what else
            decides its image.
        seed: of the generator that all links share.
        image: the input of the first link, or None.
        image_name: what to call it.
    """
    shared = {
        "seed": seed,
        "image": image_name,
        "image_hash": None if image is None else image_hash(image),
        "image_size": None if image is None else list(image.size),
        "versions": versions(),
    }
    records = [{CHAIN: list(links[:i]), **shared} for i in range(1, len(links) + 1)]
    return [record | {"key": record_key(record)} for record in records]


def pipeline_record(pipe: DiffusionPipeline) -> ImageRecord:
    """Return what an image depends on besides the arguments of the call: the model, scheduler, dtype and device."""
    found, config = fingerprint(pipe), scheduler_config(pipe.scheduler)
    callables = [f"scheduler.{name} ({_plain_type(value)})" for name, value in config.items() if _plain_type(value)]
    return {
        "model": model_name(pipe),
        "weights": key(**found.components),
        "components": found.components,
        "adapters": active_adapters(pipe),
        "unknown": found.unknown + callables + scheduler_code(pipe.scheduler) + scheduler_changes(pipe.scheduler),
        "scheduler": scheduler_name(type(pipe.scheduler)),
        "scheduler_config": config,
        "dtype": precision(pipe),
        "device": pipe._execution_device.type,
    }


def scheduler_name(cls: type[SchedulerMixin]) -> str:
    """Return the name of a scheduler's class, with its module if it is not one of diffusers or decinb."""
    is_known = cls.__module__.partition(".")[0] in ("diffusers", OURS)
    return cls.__name__ if is_known else f"{cls.__module__}.{cls.__qualname__}"


def scheduler_config(scheduler: SchedulerMixin) -> ImageRecord:
    """Return a scheduler's configuration as JSON can hold it: arrays as lists, infinity as a string."""
    return {name: _plain(value) for name, value in scheduler.config.items() if not name.startswith("_")}


def _plain(value: Any) -> Any:
    if isinstance(value, (torch.Tensor, np.ndarray, np.generic)):
        value = value.tolist()
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    if isinstance(value, Mapping):
        return {str(name): _plain(one) for name, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(one) for one in value]
    return value if isinstance(value, (bool, int, str, type(None))) else {NOT_PLAIN: type(value).__name__}


def _plain_type(value: Any) -> str | None:
    """Return the type of a value that JSON cannot hold, from what ``_plain`` made of it; else None."""
    return value.get(NOT_PLAIN) if isinstance(value, dict) else None


def _from_plain(value: Any) -> Any:
    """Return a value of a configuration from what ``_plain`` made of it."""
    return float(value) if value in ("inf", "-inf", "nan") else value


def unknown_parts(record: ImageRecord) -> list[str]:
    """Return what could not be hashed of the pipelines that made an image: it may be another one next time."""
    return [part for link in record.get(CHAIN, [record]) for part in link.get("unknown", [])]


def lora_layers(pipe: DiffusionPipeline) -> list[Any]:
    """Return the layers of a pipeline that have LoRA adapters."""
    peft = sys.modules.get("peft.tuners.lora")  # without it there are no adapters
    parts = [part for part in pipe.components.values() if peft and isinstance(part, nn.Module)]
    return [layer for part in parts for layer in part.modules() if isinstance(layer, peft.LoraLayer)]


def active_adapters(pipe: DiffusionPipeline) -> list[tuple[str, float | None]]:
    """Return the names of a pipeline's active adapters with their scales; None if layers differ in the scale."""
    scales: dict[str, set[float]] = {}
    for layer in lora_layers(pipe):
        for name in () if layer.disable_adapters else layer.active_adapters:
            if layer.scaling.get(name):
                rank = math.sqrt(layer.r[name]) if layer.use_rslora.get(name) else layer.r[name]
                scale = layer.scaling[name] * rank / layer.lora_alpha[name]
                # More digits than the fingerprint counts: replay multiplies it again, which would shift the last one.
                scales.setdefault(name, set()).add(significant(scale, 15))
    return [[name, found.pop() if len(found) == 1 else None] for name, found in sorted(scales.items())]


def model_name(pipe: DiffusionPipeline) -> str:
    """Return the name a pipeline was loaded by; of a folder only its last part, since a path is private."""
    name = str(pipe.config.get("_name_or_path") or "unnamed")
    if known_model(pipe) is not None:
        return name
    name = Path(name).name if Path(name).is_absolute() else name
    return f"./{name}" if name in MODELS else name  # a folder that is called like a known model


def image_name(source: Any, image: Image.Image | None) -> str | None:
    """Return what to call an input: the name of its sample or file without the folder, else a part of its hash."""
    if image is None:
        return None
    if isinstance(source, (str, os.PathLike)):
        name = Path(os.fsdecode(source).split("?")[0]).name
        return os.fsencode(name).decode("utf-8", "replace")  # a name in another encoding
    return f"image {image_hash(image)[:6]}"


def distinguish_inputs(records: Sequence[ImageRecord]) -> list[ImageRecord]:
    """Return records in which different inputs have different names, since two files may both be ``photo.png``."""
    hashes: dict[Any, set[Any]] = {}
    for record in records:
        hashes.setdefault(record["image"], set()).add(record["image_hash"])

    def renamed(record: ImageRecord) -> ImageRecord:
        name = record["image"]
        if len(hashes[name]) == 1:
            return record
        full = f"{name} ({str(record['image_hash'])[:6]})"
        cell = {argument: full if argument == "image" else value for argument, value in record["cell"].items()}
        return {**record, "image": full, "cell": cell}

    return list(map(renamed, records))


def record_key(record: ImageRecord) -> str:
    """Return the key of a record. Equal keys mean equal images.

    Raises:
        KeyError: the record lacks a field.
    """
    if CHAIN in record:
        names = [name for name in (*LINK_FIELDS, "dtype") if name != "model"]
        more = [{"decides": link["decides"]} if "decides" in link else {} for link in record[CHAIN]]
        links = [{name: link[name] for name in names} | one for link, one in zip(record[CHAIN], more, strict=True)]
        return key(chain=links, seed=record["seed"], image=record["image_hash"])
    return key(**{name: record[name] for name in KEY_FIELDS})


def key(**made_by: Any) -> str:
    """Return a short hash of values that JSON can hold."""
    return hashlib.sha256(json.dumps(made_by, sort_keys=True, allow_nan=False).encode()).hexdigest()[:12]


def image_hash(image: Image.Image) -> str:
    """Return a hash of an image's mode, size and pixels."""
    return hashlib.sha256(f"{image.mode} {image.size} ".encode() + image.tobytes()).hexdigest()[:16]


def mismatch(saved: Saved) -> str | None:
    """Return how the images in a file differ from what its record says of them; None if they do not."""
    record = saved.record
    if wrong := _malformed(record):
        return wrong
    try:
        json.dumps(record, ensure_ascii=False).encode()  # fails for text that is not valid Unicode
        if saved.input_image is not None and image_hash(saved.input_image) != record["image_hash"]:
            return "the input image in it is another one than the record names"
        if saved.sealed and image_hash(saved.image) != record[OUTPUT_HASH]:
            return "the image is another one than the record names"
        if saved.sealed and record_key(record) != record["key"]:
            return "the record does not match its own key"
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        return f"the record is damaged ({type(error).__name__}: {error})"
    return None


def _malformed(record: ImageRecord) -> str | None:
    """Return which field of a record has a wrong type; None if none has."""
    for part in (record, *(record[CHAIN] if isinstance(record.get(CHAIN), list) else [])):
        for name, types in TYPES.items() if isinstance(part, dict) else ():
            if name in part and not isinstance(part[name], types):
                return f"the record is damaged: {name} is {validation.short_repr(part[name])}"
        for name in ("prompt", "negative_prompt"):
            if isinstance(part, dict) and part.get(name) is not None:
                try:
                    validation.text(part[name], name)
                except InputError as error:
                    return f"the record is damaged: {error}"
    return None


# --- from a record ----------------------------------------------------------------------------------------------------


def check_fields(record: ImageRecord, fields: Sequence[str], where: str) -> None:
    """Refuse a record that lacks a field; the message starts with ``where``."""
    for name in fields:
        if name not in record:
            raise InputError(f"{where}the record has no {name!r}")


def recorded_model(record: ImageRecord, where: str) -> str:
    """Return the model that a record names, if it is in ``MODELS`` and on this machine.

    A file must not make decinb fetch anything.

    Raises:
        InputError: it is not, or adapters were added to it.
    """
    name = record["model"]
    if not isinstance(name, str) or name not in MODELS:
        raise InputError(
            f"{where!r} was made by {validation.short_repr(name)}, not by one of {', '.join(MODELS)}: "
            "give the pipeline that made it as pipe"
        )
    if not is_here(MODELS[name]):
        raise InputError(
            f"{where!r} was made by {name!r}, which is not on this machine: give load_pipeline({name!r}) as pipe, or "
            f"call decinb.download({name!r}) first"
        )
    if adapters := record.get("adapters"):
        raise InputError(
            f"{where!r} was made by {name!r} with adapters ({validation.short_repr(adapters)}): "
            "give a pipeline that has loaded them as pipe"
        )
    return name


def check_pipeline(pipe: DiffusionPipeline, made_by: ImageRecord, record: ImageRecord, where: str) -> None:
    """Refuse a pipeline that would make another image than the one that a record describes.

    Args:
        pipe: the pipeline.
        made_by: its own record, from ``pipeline_record``.
        record: of the image.
        where: the start of the message.

    Raises:
        InputError: its dtype, weights, adapters or settings are not those of the record, or it has other code.
    """
    unknown = unknown_parts(record)
    if other := [part for part in made_by["unknown"] if part not in unknown]:
        raise InputError(f"pipe has code that {where!r} was not made with, and that cannot be compared: {other[0]}")
    made_in, own = record.get("dtype"), made_by["dtype"]
    if made_in not in (own, None):
        argument = "runtime" if made_in in RUNTIMES else "dtype"
        advice = f"give load_pipeline(..., {argument}=...) with that {argument} as pipe"
        if AUTOCAST in str(made_in):
            advice = "call replay inside the same torch.autocast, with a pipeline in the first of these dtypes"
        elif AUTOCAST in own:
            advice = "call replay outside torch.autocast"
        raise InputError(f"{where!r} was made in {validation.short_repr(made_in)}, but pipe is in {own}: {advice}")
    if "components" not in record:
        if sampled_hash(pipe) != record["weights"]:
            raise InputError(f"pipe has other weights than those that made {where!r} ({record['model']})")
        return
    if made_by["weights"] != record["weights"]:
        found, said = made_by["components"], record["components"] if isinstance(record["components"], dict) else {}
        names = [name for name in {**found, **said} if found.get(name) != said.get(name)]
        raise InputError(
            f"pipe has other weights or settings than what made {where!r} ({record['model']}): "
            f"{' and '.join(map(validation.short_repr, names)) or 'the whole'} differs"
        )
    if unknown:
        validation.warn(f"{where!r} may come out differently: it was made with {unknown[0]}, which cannot be compared")


def restore_scheduler(adapter: Adapter, record: ImageRecord, where: str) -> SchedulerMixin:
    """Return the scheduler that a record names, if the pipeline can use it.

    Raises:
        InputError: it cannot.
    """
    own = adapter.pipe.scheduler
    own_name = scheduler_name(type(own))
    name, config = str(record["scheduler"]), record["scheduler_config"]
    if name == type(own).__name__ and any(part in record.get("unknown", []) for part in scheduler_code(own)):
        name = own_name  # older records name a class of the user without its module
    if name == own_name and config == scheduler_config(own):
        return own
    allowed = {scheduler_name(cls): cls for cls in (type(own), *own.compatibles)}
    if name not in allowed or not isinstance(config, dict):
        advice = ": give a pipeline whose scheduler is of that class as pipe" if "." in name else ""
        raise InputError(
            f"{where!r} names the scheduler {validation.short_repr(name)}, which {adapter.name} cannot use{advice}"
        )
    if adapter.fixed_scheduler:
        expected = scheduler_config(own)
        if name != own_name or any(expected.get(field, value) != value for field, value in config.items()):
            raise InputError(f"{where!r} was made with another configuration of {name}: load the pipeline again")
        return own
    try:
        validation.scheduler_config(config)
        if lost := [field for field, value in config.items() if _plain_type(value)]:
            raise ValueError(f"{lost[0]} was not recorded")
        return allowed[name].from_config({field: _from_plain(value) for field, value in config.items()})
    except Exception as error:
        raise InputError(f"{where!r}: {name} cannot be made: {validation.short_repr(str(error))}") from error
