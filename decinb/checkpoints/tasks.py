"""Choose the pipeline class that does a task with a model's components, and put the components together."""

import inspect
from collections.abc import Iterable, Mapping
from typing import Any

import diffusers
from diffusers import DiffusionPipeline
from diffusers.pipelines import auto_pipeline

from decinb import pipeline
from decinb.checkpoints.components import INCOMPLETE, NO_REMOTE_CODE, Component, Contents, as_model_error
from decinb.errors import InputError, ModelError
from decinb.models import IMAGE_TO_IMAGE, MODELS, TEXT_TO_IMAGE
from decinb.sampling.adapters import adapter_of
from decinb.unet_nas import UNetNAS
from decinb.utils import validation
from decinb.utils.quiet import quiet

AUTO_PIPELINES = {
    IMAGE_TO_IMAGE: auto_pipeline.AUTO_IMAGE2IMAGE_PIPELINES_MAPPING,
    TEXT_TO_IMAGE: auto_pipeline.AUTO_TEXT2IMAGE_PIPELINES_MAPPING,
}


def known_pipeline_class(name: str, task: str) -> type[DiffusionPipeline]:
    """Return the pipeline class of a known model for a task, as its entry in ``MODELS`` names it.

    Raises:
        InputError: the model cannot do the task.
    """
    classes = MODELS[name].pipelines
    if task not in classes:
        raise InputError(f"task: {name} cannot do {task!r}, only {', '.join(map(repr, classes))}")
    return getattr(pipeline, classes[task], None) or getattr(diffusers, classes[task])


def pipeline_class(contents: Contents, task: str, where: str) -> type[DiffusionPipeline]:
    """Return the pipeline class that does a task with the components of any model.

    Args:
        contents: the components and the index of the model.
        task: one of ``TASKS``.
        where: the model's folder, id or class, for messages.

    Raises:
        InputError: the model cannot do the task.
        ModelError: its index names a pipeline that diffusers does not have.
    """
    unet = contents.components.get("unet")
    if unet is not None and unet.cls is UNetNAS:
        base, cls = _decidiffusion_class(contents, task)
    else:
        base, cls = _diffusers_class(contents, task, where)
    if cls is None:
        model = where if where == base.__name__ else f"{where}, a {base.__name__},"
        raise InputError(f"task: {model} cannot do {task!r}; choose another task, or a model that can")
    return cls


def check_complete(cls: type[DiffusionPipeline], components: Iterable[str], where: str) -> None:
    """Check that a model has every component that a pipeline class requires.

    Raises:
        ModelError: some are missing; the message names them.
    """
    expected, _ = cls._get_signature_keys(cls)
    parameters = inspect.signature(cls.__init__).parameters
    optional = {name for name, parameter in parameters.items() if parameter.default is None}
    if missing := sorted(set(expected) - set(components) - optional - set(cls._optional_components)):
        raise ModelError(f"{where} has no {', '.join(missing)}, which {cls.__name__} needs: {INCOMPLETE}")


def assemble(
    cls: type[DiffusionPipeline], components: Mapping[str, Any], settings: Mapping[str, Any], where: str
) -> DiffusionPipeline:
    """Create a pipeline from its components.

    Args:
        cls: the class of the pipeline.
        components: the loaded components, by name.
        settings: the other arguments of its constructor, as in an index or a pipeline's ``config``.
        where: the model's folder, id or class, for messages.

    Raises:
        ModelError: the components do not fit the class.
    """
    expected, _ = cls._get_signature_keys(cls)
    plain = {
        name: value
        for name, value in settings.items()
        if not isinstance(value, (list, tuple)) and name not in {*expected, *cls._optional_components}
    }
    arguments = dict.fromkeys(expected) | plain | dict(components)
    parameters = inspect.signature(cls.__init__).parameters
    with as_model_error(f"{where}: cannot create a {cls.__name__} from its components"):
        pipe = cls(**{name: value for name, value in arguments.items() if name in parameters})
    extra = adapter_of(pipe).extra_channels
    if extra is not None:  # a U-Net for inpainting has more channels, since it also takes the mask and the image
        takes, given = pipe.unet.config.in_channels, pipe.vae.config.latent_channels + extra
        if takes != given:
            raise ModelError(
                f"{where}: its U-Net takes {takes} channels, but {cls.__name__} gives it {given}: it was made for "
                "another task; use another model"
            )
    return pipe


def switch_task(pipe: DiffusionPipeline, task: str) -> DiffusionPipeline:
    """Return a pipeline for another task that shares all components, or ``pipe`` itself if it does that task.

    Raises:
        InputError: the model cannot do the task.
        ModelError: a component that the task requires is missing.
    """
    name = type(pipe).__name__
    components = {key: component for key, component in pipe.components.items() if component is not None}
    stock = next(cls for cls in type(pipe).__mro__ if getattr(diffusers, cls.__name__, None) is cls)
    settings = {**pipe.config, "_class_name": stock.__name__}
    contents = Contents({key: Component(type(component), []) for key, component in components.items()}, settings)
    cls = pipeline_class(contents, task, name)
    if isinstance(pipe, cls):
        return pipe
    check_complete(cls, components, name)
    with quiet():
        switched = assemble(cls, components, settings, name)
    if model := pipe.config.get("_name_or_path"):
        switched.register_to_config(_name_or_path=model)
    return switched


def _decidiffusion_class(
    contents: Contents, task: str
) -> tuple[type[DiffusionPipeline], type[DiffusionPipeline] | None]:
    """Return the image-to-image class of a model with a U-Net-NAS, and its class for a task, if there is one."""
    has_depth = "depth_estimator" in contents.components
    base = pipeline.DeciDiffusionDepth2ImgPipeline if has_depth else pipeline.DeciDiffusionImg2ImgPipeline
    if task == IMAGE_TO_IMAGE:
        return base, base
    return base, None if has_depth else pipeline.DeciDiffusionPipeline


def _diffusers_class(
    contents: Contents, task: str, where: str
) -> tuple[type[DiffusionPipeline], type[DiffusionPipeline] | None]:
    """Return the class that an index names, and diffusers' class for a task with the same components, if any."""
    name = str(contents.index.get("_class_name"))
    base = getattr(diffusers, name, None)
    if not (isinstance(base, type) and issubclass(base, DiffusionPipeline)):
        raise ModelError(
            f"{where} asks for the pipeline {validation.short_repr(name)}, which diffusers {diffusers.__version__} "
            f"does not have: {NO_REMOTE_CODE}"
        )
    if task == TEXT_TO_IMAGE and contents.index.get("requires_aesthetics_score"):
        return base, None  # an SDXL refiner: text to image does not give its U-Net the aesthetic score that it needs
    cls = auto_pipeline._get_task_class(AUTO_PIPELINES[task], base.__name__, throw_error_if_not_exist=False)
    if cls is None and _does(base, task):
        return base, base  # not among the auto pipelines, but it does the task itself
    return base, cls


def _does(cls: type[DiffusionPipeline], task: str) -> bool:
    """Return whether a call of a class takes exactly the inputs of a task, and makes images rather than videos."""
    parameters = inspect.signature(cls.__call__).parameters
    takes_image = "image" in parameters
    return "prompt" in parameters and takes_image == (task == IMAGE_TO_IMAGE) and "num_frames" not in parameters
