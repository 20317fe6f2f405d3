"""What made a picture: how a record tells of a pipeline, and how a pipeline is held against what a record tells.

A record may come from a file of a stranger's, so nothing in it is taken on trust: it names no file, and no model or
scheduler that was not there before.
"""

import importlib.metadata
import os
from pathlib import Path
from typing import Any

from PIL import Image

from decinb import inputs
from decinb.errors import InputError
from decinb.kinds import kind_of
from decinb.models import MODELS
from decinb.quiet import quiet
from decinb.store import Record, image_hash, weights_hash

with quiet():  # importing these tells of optional libraries that are not needed here
    from diffusers import DiffusionPipeline


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


def versions() -> dict[str, str]:
    """Of what a picture depends on."""
    return {name: importlib.metadata.version(name) for name in ("decinb", "diffusers", "torch")}


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
        raise InputError(f"{where!r} was made by {inputs.told(name)}, not by one of {', '.join(MODELS)}: give its pipe")
    return name


def check_weights(pipe: DiffusionPipeline, record: Record, where: str) -> None:
    """Refuse a pipeline that did not make what the record tells of."""
    if not isinstance(pipe, DiffusionPipeline):
        raise InputError(f"pipe must be a pipeline, as load_pipeline gives it, got {inputs.told(pipe)}")
    if weights_hash(pipe) != record["weights"]:
        raise InputError(f"pipe has other weights than those that made {where!r} ({record['model']})")


def scheduler_of(pipe: DiffusionPipeline, record: Record, where: str) -> Any:
    """The scheduler that a record names, if it is one that the pipeline could have had."""
    name, config = str(record["scheduler"]), record["scheduler_config"]
    kinds = {kind.__name__: kind for kind in (type(pipe.scheduler), *pipe.scheduler.compatibles)}
    if name not in kinds or not isinstance(config, dict):
        raise InputError(f"{where!r} names the scheduler {inputs.told(name)}, which this pipeline cannot have")
    if kind_of(pipe) is not None:
        return kinds[name].from_config(config)
    if name != type(pipe.scheduler).__name__ or not config.items() <= dict(pipe.scheduler.config).items():
        raise InputError(f"{where!r} was made with another {name}: load the pipeline anew")  # its call keeps its own
    return pipe.scheduler
