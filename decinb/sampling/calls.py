"""The arguments and defaults of a pipeline's own call."""

import inspect
from typing import Any

from diffusers import DiffusionPipeline

from decinb.models import defaults_of


def call_arguments(pipe: DiffusionPipeline) -> dict[str, Any]:
    """Return the names of a call's arguments, each with its default, or None if it has none.

    A call with ``**kwargs``, such as those of decinb, forwards them to the class it extends, whose arguments count too.
    The defaults of the pipeline's model come before those of its class.
    """
    found: dict[str, Any] = {}
    for cls in type(pipe).__mro__:
        if "__call__" not in vars(cls):
            continue
        parameters = [one for name, one in inspect.signature(cls.__call__).parameters.items() if name != "self"]
        for one in parameters:
            if one.kind not in (one.VAR_POSITIONAL, one.VAR_KEYWORD):
                found.setdefault(one.name, None if one.default is one.empty else one.default)
        if not any(one.kind is one.VAR_KEYWORD for one in parameters):
            break
    return found | {name: value for name, value in defaults_of(pipe).items() if name in found}


def takes(pipe: DiffusionPipeline, name: str) -> bool:
    """Return whether a pipeline's call has an argument of this name."""
    return name in call_arguments(pipe)


def defaults(pipe: DiffusionPipeline) -> dict[str, Any]:
    """Return a pipeline's own strength, guidance scale, number of steps and guidance rescale.

    Without such an argument, the strength is 1 (the input is replaced by noise) and the guidance rescale is 0 (off).
    """
    steps = getattr(pipe, "deci_default_number_of_iterations", 30)
    fallback = {"strength": 1.0, "guidance_scale": 1.0, "num_inference_steps": steps, "guidance_rescale": 0.0}
    own = call_arguments(pipe)
    return {name: value if own.get(name) is None else own[name] for name, value in fallback.items()}
