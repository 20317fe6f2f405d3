"""What made a picture: how a record tells of a pipeline, and how a pipeline is held against what a record tells.

A record may come from a file of a stranger's, so nothing in it is taken on trust: it names no file, and no model or
scheduler that was not there before.
"""

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from PIL import Image

from decinb.designs import Cell
from decinb.errors import InputError
from decinb.models import MODELS, image_size
from decinb.sampling.adapters import ImageToImage, Job, kind_of
from decinb.utils import validation
from decinb.utils.labels import ARGUMENTS

Record = dict[str, Any]

NEEDED = [*ARGUMENTS, "guidance_rescale", "model", "weights", "scheduler", "scheduler_config"]


def origin(pipe: DiffusionPipeline) -> Record:
    """What an image cannot be made again without, whatever the call was."""
    return {
        "model": model_name(pipe),
        "weights": weights_hash(pipe),
        "scheduler": type(pipe.scheduler).__name__,
        "scheduler_config": {name: value for name, value in pipe.scheduler.config.items() if not name.startswith("_")},
        "dtype": str(pipe.dtype).removeprefix("torch."),
        "device": pipe.device.type,
    }


def model_name(pipe: DiffusionPipeline) -> str:
    """What a pipeline was loaded as."""
    name = str(pipe.config.get("_name_or_path") or "unnamed")
    return Path(name).name if Path(name).is_absolute() else name  # where a folder lies is nobody's business


def picture_name(source: Any, image: Image.Image | None) -> str | None:
    """What to call an input: a sample's or a file's name, else a piece of its hash. Where a file lies is not told."""
    if image is None:
        return None
    if isinstance(source, (str, os.PathLike)):
        return Path(os.fsdecode(source).split("?")[0]).name
    return f"image {image_hash(image)[:6]}"


# --- and back ---------------------------------------------------------------------------------------------------------


def known_model(record: Record, where: str) -> str:
    """The model that a record names, if it is one of ``MODELS``: a name in a file is no reason to fetch another."""
    name = record["model"]
    if not isinstance(name, str) or name not in MODELS:
        raise InputError(
            f"{where!r} was made by {validation.short_repr(name)}, not by one of {', '.join(MODELS)}: give its pipe"
        )
    return name


def check_weights(pipe: DiffusionPipeline, record: Record, where: str) -> None:
    """Refuse a pipeline that did not make what the record tells of."""
    if not isinstance(pipe, DiffusionPipeline):
        raise InputError(f"pipe must be a pipeline, as load_pipeline gives it, got {validation.short_repr(pipe)}")
    if weights_hash(pipe) != record["weights"]:
        raise InputError(f"pipe has other weights than those that made {where!r} ({record['model']})")


def scheduler_of(pipe: DiffusionPipeline, record: Record, where: str) -> Any:
    """The scheduler that a record names, if it is one that the pipeline could have had."""
    name, config = str(record["scheduler"]), record["scheduler_config"]
    kinds = {kind.__name__: kind for kind in (type(pipe.scheduler), *pipe.scheduler.compatibles)}
    if name not in kinds or not isinstance(config, dict):
        raise InputError(
            f"{where!r} names the scheduler {validation.short_repr(name)}, which this pipeline cannot have"
        )
    if kind_of(pipe) is not None:
        return kinds[name].from_config(config)
    if name != type(pipe.scheduler).__name__ or not config.items() <= dict(pipe.scheduler.config).items():
        raise InputError(f"{where!r} was made with another {name}: load the pipeline anew")  # its call keeps its own
    return pipe.scheduler


def _record(
    pipe: DiffusionPipeline,
    kind: ImageToImage | None,
    cell: Cell,
    job: Job,
    shared: Record,
    image_name: str | None,
) -> Record:
    """A cell with everything that made its image. The key is of what decides the pixels, and of nothing else."""
    hashed = None if job.image is None else image_hash(job.image)
    decides = {name: shared[name] for name in ("weights", "scheduler", "scheduler_config", "dtype", "guidance_rescale")}
    made_by = key(
        **decides,
        image=hashed,
        prompt=job.prompt,
        num_inference_steps=job.num_inference_steps,
        seed=job.seed,
        **_deciding(pipe, kind, job),
    )
    arguments = {name: getattr(job, name) for name in ARGUMENTS} | {"image": image_name}
    side = image_size(pipe)
    return {
        "cell": {name: arguments[name] for name in cell},
        **arguments,
        "steps_run": job.num_inference_steps - job.skipped,
        "image_hash": hashed,
        "image_size": [side, side] if job.image is None else list(job.image.size),
        **shared,
        "key": made_by,
    }


def _deciding(pipe: DiffusionPipeline, kind: ImageToImage | None, job: Job) -> Record:
    """The part of a job that decides its pixels through something else: without guidance no words stand against it."""
    # From text alone nothing but the pipeline says how large a picture is.
    size = {"size": image_size(pipe)} if job.image is None else {}
    if kind is None:  # what its own call makes of it is not known here
        given = {name: getattr(job, name) for name in ("negative_prompt", "guidance_scale", "strength")}
        return {**size, **given, "pipeline": type(pipe).__name__}
    return {
        **size,
        "negative_prompt": kind.against(job).text if job.guided else "",
        "guidance_scale": job.guidance_scale if job.guided else 1.0,
        "skipped": job.skipped,
    }


def key(**made_by: Any) -> str:
    """A short name for everything that decides an image's pixels."""
    return hashlib.sha256(json.dumps(made_by, sort_keys=True, default=str).encode()).hexdigest()[:12]


def image_hash(image: Image.Image) -> str:
    """A name for a picture's pixels."""
    return hashlib.sha256(f"{image.mode} {image.size} ".encode() + image.tobytes()).hexdigest()[:16]


@torch.no_grad()
def weights_hash(pipe: DiffusionPipeline) -> str:
    """A name for a model's weights, from a few values of every one of its tensors: a moment's work for any size."""
    digest = hashlib.sha256()
    for part, module in sorted(pipe.components.items()):
        if isinstance(module, torch.nn.Module):
            tensors = dict(module.named_parameters()) | dict(module.named_buffers())
            few = [tensor.flatten()[:: max(1, tensor.numel() // 61)].float() for tensor in tensors.values()]
            digest.update(f"{part} {[(name, *tensor.shape) for name, tensor in tensors.items()]}".encode())
            digest.update(torch.cat(few).cpu().numpy().tobytes())
    return digest.hexdigest()[:16]
