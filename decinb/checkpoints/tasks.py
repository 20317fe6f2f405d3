"""Which pipeline class does a task with the components of a model, and how it is put together."""

import inspect
from collections.abc import Mapping
from typing import Any

import diffusers
from diffusers import DiffusionPipeline
from diffusers.pipelines import auto_pipeline

from decinb import pipeline
from decinb.checkpoints.components import INCOMPLETE, Contents, Part, blaming
from decinb.errors import InputError, ModelError
from decinb.models import IMAGE_TO_IMAGE, MODELS, TEXT_TO_IMAGE
from decinb.sampling.adapters import adapter_of
from decinb.unet_nas import UNetNAS
from decinb.utils import validation
from decinb.utils.quiet import quiet


def _class_of_known(name: str, task: str) -> type[DiffusionPipeline]:
    """The pipeline class that a known model's entry names for a task.

    Raises:
        InputError: it names none.
    """
    named = MODELS[name].pipelines
    if task not in named:
        raise InputError(f"task: {name} cannot do {task!r}, only {', '.join(map(repr, named))}")
    return getattr(pipeline, named[task], None) or getattr(diffusers, named[task])


def _class_for(found: Contents, task: str, where: str) -> type[DiffusionPipeline]:
    """The pipeline class that does a task with the parts of a model that is not known by name.

    Raises:
        InputError: none does.
        ModelError: the index names a pipeline that diffusers does not have.
    """
    depth = "depth_estimator" in found.parts
    if "unet" in found.parts and found.parts["unet"].cls is UNetNAS:
        base = pipeline.DeciDiffusionDepth2ImgPipeline if depth else pipeline.DeciDiffusionImg2ImgPipeline
        cls = base if task == IMAGE_TO_IMAGE else None if depth else pipeline.DeciDiffusionPipeline
    else:
        named = str(found.index.get("_class_name"))
        base = getattr(diffusers, named, None)
        if not (isinstance(base, type) and issubclass(base, DiffusionPipeline)):
            raise ModelError(
                f"{where} asks for the pipeline {validation.short_repr(named)}, which diffusers "
                f"{diffusers.__version__} does not have: no code of a model's own is run; take a model that it knows"
            )
        auto = {
            IMAGE_TO_IMAGE: auto_pipeline.AUTO_IMAGE2IMAGE_PIPELINES_MAPPING,
            TEXT_TO_IMAGE: auto_pipeline.AUTO_TEXT2IMAGE_PIPELINES_MAPPING,
        }[task]
        cls = auto_pipeline._get_task_class(auto, base.__name__, throw_error_if_not_exist=False)
        if cls is None and _does(base, task):  # the auto pipelines do not know it, but it does the task itself
            cls = base
        if task == TEXT_TO_IMAGE and found.index.get("requires_aesthetics_score"):
            cls = None  # a refiner: its U-Net is told other numbers than text to image gives
    if cls is None:
        who = where if where == base.__name__ else f"{where}, a {base.__name__},"
        raise InputError(f"task: {who} cannot do {task!r}; take another task, or a model that does it")
    return cls


def _does(cls: type[DiffusionPipeline], task: str) -> bool:
    """Whether a call of a class takes what a task gives, and no more, and makes pictures."""
    takes = inspect.signature(cls.__call__).parameters
    return "prompt" in takes and ("image" in takes) == (task == IMAGE_TO_IMAGE) and "num_frames" not in takes


def _check_complete(cls: type[DiffusionPipeline], parts: Mapping[str, Any], where: str) -> None:
    """Refuse a model that lacks a part without which a class cannot run."""
    expected, _ = cls._get_signature_keys(cls)
    optional = {name for name, it in inspect.signature(cls.__init__).parameters.items() if it.default is None}
    if lacking := sorted(set(expected) - set(parts) - optional - set(cls._optional_components)):
        raise ModelError(f"{where} has no {', '.join(lacking)}, which {cls.__name__} needs: {INCOMPLETE}")


def _make(
    cls: type[DiffusionPipeline], components: Mapping[str, Any], settings: Mapping[str, Any], where: str
) -> DiffusionPipeline:
    """A pipeline of a class, from parts and from what an index, or a pipeline's config, says beside them."""
    given = {name: value for name, value in settings.items() if not isinstance(value, (list, tuple))} | dict(components)
    expected, _ = cls._get_signature_keys(cls)
    given = dict.fromkeys(expected) | given
    takes = inspect.signature(cls.__init__).parameters
    with blaming(f"{where}: {cls.__name__} cannot be made of its parts"):
        made = cls(**{name: value for name, value in given.items() if name in takes})
    if (extra := adapter_of(made).extra_channels) is not None:  # a U-Net for inpainting sees mask and image too
        sees, gives = made.unet.config.in_channels, made.vae.config.latent_channels + extra
        if sees != gives:
            raise ModelError(
                f"{where}: its U-Net sees {sees} channels, and {cls.__name__} gives it {gives}: it was made for "
                "another task; take another model"
            )
    return made


def _for_task(pipe: DiffusionPipeline, task: str) -> DiffusionPipeline:
    """A pipeline for a task, of the same parts; the same pipeline if it does the task already."""
    components = {name: part for name, part in pipe.components.items() if part is not None}
    stock = next(cls for cls in type(pipe).__mro__ if getattr(diffusers, cls.__name__, None) is cls)
    settings = {**pipe.config, "_class_name": stock.__name__}
    found = Contents({name: Part(type(part), []) for name, part in components.items()}, settings)
    cls = _class_for(found, task, type(pipe).__name__)
    if isinstance(pipe, cls):
        return pipe
    _check_complete(cls, components, type(pipe).__name__)
    with quiet():
        made = _make(cls, components, settings, type(pipe).__name__)
    if name := pipe.config.get("_name_or_path"):
        made.register_to_config(_name_or_path=name)
    return made
