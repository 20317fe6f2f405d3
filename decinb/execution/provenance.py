"""What made an image: the record that its file holds, and how a pipeline is matched with such a record again.

A record may come from a stranger's file, so nothing in it is trusted: it cannot name a file to read, and no model or
scheduler other than those already known.
"""

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline, SchedulerMixin
from PIL import Image

from decinb.designs import Cell
from decinb.errors import InputError
from decinb.models import MODELS
from decinb.runtimes.openvino import precision
from decinb.sampling.base import Adapter
from decinb.sampling.jobs import Job
from decinb.utils import validation
from decinb.utils.environment import versions
from decinb.utils.labels import ARGUMENTS

ImageRecord = dict[str, Any]
"""Everything that is needed to make one image again, and what it took."""

CHAIN = "chain"
"""The field that only records of a chain's images have: its links up to this image."""

MADE_BY = ("model", "weights", "scheduler", "scheduler_config")
IMAGE_FIELDS = [*ARGUMENTS, "guidance_rescale", *MADE_BY]
"""The fields that a sweep's image is made again from."""

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
    hashed = None if job.image is None else image_hash(job.image)
    decides = {name: shared[name] for name in ("weights", "scheduler", "scheduler_config", "dtype", "guidance_rescale")}
    arguments = {name: getattr(job, name) for name in ARGUMENTS} | {"image": image_name}
    return {
        "cell": {name: arguments[name] for name in cell},
        **arguments,
        "steps_run": job.num_inference_steps - job.skipped,
        "image_hash": hashed,
        "image_size": list(size),
        **shared,
        "key": key(
            **decides,
            image=hashed,
            prompt=job.prompt,
            num_inference_steps=job.num_inference_steps,
            seed=job.seed,
            **key_parts,
        ),
    }


def shared_record(pipe: DiffusionPipeline, guidance_rescale: float) -> ImageRecord:
    """Return what the records of all images of a sweep have in common."""
    return {"guidance_rescale": guidance_rescale, **pipeline_record(pipe), "versions": versions()}


def chain_records(
    links: Sequence[ImageRecord], seed: int, image: Image.Image | None, image_name: str | None
) -> list[ImageRecord]:
    """Return the records of a chain's images, each made by the links up to it.

    Args:
        links: for each, its task and pipeline class, its ``pipeline_record``, and its ``LINK_ARGUMENTS``.
        seed: of the generator that all links share.
        image: the input of the first link, or None.
        image_name: what to call it.
    """
    decides = [{name: link[name] for name in (*LINK_FIELDS, "dtype") if name != "model"} for link in links]
    hashed = None if image is None else image_hash(image)
    return [
        {
            CHAIN: list(links[:i]),
            "seed": seed,
            "image": image_name,
            "image_hash": hashed,
            "image_size": None if image is None else list(image.size),
            "versions": versions(),
            "key": key(chain=decides[:i], seed=seed, image=hashed),
        }
        for i in range(1, len(links) + 1)
    ]


def pipeline_record(pipe: DiffusionPipeline) -> ImageRecord:
    """Return what an image depends on besides the arguments of the call: the model, scheduler, dtype and device."""
    return {
        "model": model_name(pipe),
        "weights": weights_hash(pipe),
        "scheduler": type(pipe.scheduler).__name__,
        "scheduler_config": {name: value for name, value in pipe.scheduler.config.items() if not name.startswith("_")},
        "dtype": precision(pipe),
        "device": pipe.device.type,
    }


def model_name(pipe: DiffusionPipeline) -> str:
    """Return the name a pipeline was loaded by; of a folder only its last part, since a path is private."""
    name = str(pipe.config.get("_name_or_path") or "unnamed")
    return Path(name).name if Path(name).is_absolute() else name


def image_name(source: Any, image: Image.Image | None) -> str | None:
    """Return what to call an input: the name of its sample or file without the folder, else a part of its hash."""
    if image is None:
        return None
    if isinstance(source, (str, os.PathLike)):
        return Path(os.fsdecode(source).split("?")[0]).name
    return f"image {image_hash(image)[:6]}"


def key(**made_by: Any) -> str:
    """Return a short hash of everything that decides an image's pixels. Equal keys mean equal images."""
    return hashlib.sha256(json.dumps(made_by, sort_keys=True, default=str).encode()).hexdigest()[:12]


def image_hash(image: Image.Image) -> str:
    """Return a hash of an image's mode, size and pixels."""
    return hashlib.sha256(f"{image.mode} {image.size} ".encode() + image.tobytes()).hexdigest()[:16]


@torch.no_grad()
def weights_hash(pipe: DiffusionPipeline) -> str:
    """Return a hash of the names, shapes and some 61 values of every tensor, which is quick for a model of any size."""
    digest = hashlib.sha256()
    for part, module in sorted(pipe.components.items()):
        if isinstance(module, torch.nn.Module):
            tensors = dict(module.named_parameters()) | dict(module.named_buffers())
            few = [tensor.flatten()[:: max(1, tensor.numel() // 61)].float() for tensor in tensors.values()]
            digest.update(f"{part} {[(name, *tensor.shape) for name, tensor in tensors.items()]}".encode())
            digest.update(torch.cat(few).cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


# --- from a record ----------------------------------------------------------------------------------------------------


def check_fields(record: ImageRecord, fields: Sequence[str], where: str) -> None:
    """Refuse a record that lacks a field; the message starts with ``where``."""
    for name in fields:
        if name not in record:
            raise InputError(f"{where}the record has no {name!r}")


def known_model(record: ImageRecord, where: str) -> str:
    """Return the model that a record names, if it is in ``MODELS``: a file must not make decinb fetch any other.

    Raises:
        InputError: it is not.
    """
    name = record["model"]
    if not isinstance(name, str) or name not in MODELS:
        raise InputError(
            f"{where!r} was made by {validation.short_repr(name)}, not by one of {', '.join(MODELS)}: "
            "give the pipeline that made it as pipe"
        )
    return name


def check_weights(pipe: DiffusionPipeline, record: ImageRecord, where: str) -> None:
    """Refuse a pipeline with other weights than a record names."""
    if weights_hash(pipe) != record["weights"]:
        raise InputError(f"pipe has other weights than those that made {where!r} ({record['model']})")


def restore_scheduler(adapter: Adapter, record: ImageRecord, where: str) -> SchedulerMixin:
    """Return the scheduler that a record names, if the pipeline can use it.

    Raises:
        InputError: it cannot.
    """
    own = adapter.pipe.scheduler
    name, config = str(record["scheduler"]), record["scheduler_config"]
    allowed = {cls.__name__: cls for cls in (type(own), *own.compatibles)}
    if name not in allowed or not isinstance(config, dict):
        raise InputError(
            f"{where!r} names the scheduler {validation.short_repr(name)}, which {adapter.name} cannot use"
        )
    if not adapter.fixed_scheduler:
        return allowed[name].from_config(config)
    if name != type(own).__name__ or not config.items() <= dict(own.config).items():
        raise InputError(f"{where!r} was made with another configuration of {name}: load the pipeline again")
    return own
