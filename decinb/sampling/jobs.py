"""The vocabulary of sampling: a job asks for one image, and steps and results report the progress of many."""

import dis
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from types import FunctionType
from typing import Any, NamedTuple

import numpy as np
import torch
from diffusers import SchedulerMixin
from PIL import Image
from torch import Tensor


@dataclass(frozen=True)
class Job:
    """One image to make: the validated arguments of one call of a pipeline.

    For text to image, ``image`` is None and ``strength`` is 1.
    """

    image: Image.Image | None
    prompt: str
    negative_prompt: str | None
    strength: float
    guidance_scale: float
    num_inference_steps: int
    seed: int

    @property
    def guided(self) -> bool:
        """Whether classifier-free guidance is on, as in diffusers only at a scale above 1."""
        return self.guidance_scale > 1

    @property
    def skipped(self) -> int:
        """The number of steps skipped because the input is not pure noise. ``int`` truncates, as in diffusers."""
        return max(self.num_inference_steps - int(self.num_inference_steps * self.strength), 0)

    @property
    def start_key(self) -> tuple[int, ...]:
        """What decides the first latents. Jobs with equal keys, as in a sweep of guidance, share their first rows."""
        return id(self.image), self.seed, self.num_inference_steps, self.skipped

    def schedule(self, like: SchedulerMixin, device: torch.device) -> tuple[SchedulerMixin, Tensor]:
        """Return a new scheduler of the same class and config, and the timesteps it will run, one per U-Net call."""
        scheduler = copy_scheduler(like)
        scheduler.set_timesteps(self.num_inference_steps, device=device)
        begin = self.skipped * scheduler.order
        if hasattr(scheduler, "set_begin_index"):
            scheduler.set_begin_index(begin)
        return scheduler, scheduler.timesteps[begin:]


def copy_scheduler(like: SchedulerMixin) -> SchedulerMixin:
    """Return a new scheduler of the same class and config.

    ``from_config`` alone gives every setting that was once a default its default again, even if it was changed since.
    """
    return type(like).from_config({name: value for name, value in like.config.items() if name != "_use_default_values"})


OF_RUNS = ("set_timesteps", "set_begin_index")  # any other setter, such as set_shift, is the user's
TABLES = ("betas", "alphas_cumprod", "final_alpha_cumprod")  # what a scheduler makes of its configuration


def scheduler_changes(scheduler: SchedulerMixin) -> list[str]:
    """Return what of a scheduler its class and configuration do not tell, in words."""
    own, changes = vars(scheduler), []
    with suppress(Exception):  # some cannot be made from their own configuration
        fresh = vars(copy_scheduler(scheduler))
        constant = {name for name, value in fresh.items() if _is_plain(value)} - _state(type(scheduler))
        changes += [
            f"scheduler.{name}"
            for name in sorted(constant | set(TABLES) & set(fresh))
            if not _same(own.get(name), fresh[name])
        ]
    methods = [
        name for name, value in own.items() if callable(value) and callable(getattr(type(scheduler), name, None))
    ]
    return changes + [f"scheduler.{name} of its own" for name in methods]


@cache
def _state(cls: type[SchedulerMixin]) -> set[str]:
    """Return the attributes that a scheduler's methods set while it runs, after it was made."""
    methods = [
        getattr(method, "__wrapped__", method)
        for base in cls.__mro__
        for name, method in vars(base).items()
        if name not in ("__init__", "register_to_config") and not (name.startswith("set_") and name not in OF_RUNS)
    ]
    methods += [method.fset for method in methods if isinstance(method, property)]
    return {
        instruction.argval
        for method in methods
        if isinstance(method, FunctionType)
        for instruction in dis.get_instructions(method)
        if instruction.opname == "STORE_ATTR"
    }


def _is_plain(value: Any) -> bool:
    """Return whether an attribute is a number, a text, an array or a list of these. What is filled later holds None."""
    if isinstance(value, list):
        return all(map(_is_plain, value))
    return isinstance(value, (bool, int, float, str, Tensor, np.ndarray))


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, (Tensor, np.ndarray)) and type(one) is type(other):
        return np.array_equal(torch.as_tensor(one).cpu(), torch.as_tensor(other).cpu())
    return type(one) is type(other) and bool(one == other)


class Conditioning(NamedTuple):
    """The text of one row: a prompt, or None for zeros, and whether it is the negative side of guidance."""

    text: str | None
    negative: bool = False


@dataclass(frozen=True)
class Result:
    """A job that has ended.

    Args:
        index: its number in the list of jobs.
        image: None if an error occurred.
        error: where NaN or infinity appeared; None if the image is good.
        seconds: its share of the time.
        blacked_out: whether a safety checker replaced the image with a black one.
    """

    index: int
    image: Image.Image | None
    error: str | None
    seconds: float
    blacked_out: bool = False


@dataclass(frozen=True)
class Progress:
    """How far a job is.

    Args:
        step: U-Net calls made, 0 if it has just started.
        steps: U-Net calls that it takes in all.
        predict: returns the clean latents that the last call predicts, (1, channels, height, width), or None; None
            itself before the first call, and for a pipeline that does not expose its latents.
    """

    step: int
    steps: int
    predict: Callable[[], Tensor | None] | None = None


@dataclass(frozen=True)
class Step:
    """Progress on a list of jobs.

    Args:
        rows: U-Net rows computed in this step; 0 when jobs only started or were decoded.
        results: jobs that ended in this step.
        active: the progress of the jobs that have not ended, by index.
    """

    rows: int
    results: list[Result]
    active: dict[int, Progress]
