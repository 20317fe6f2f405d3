"""The vocabulary of sampling: a job asks for one image, and steps and results report the progress of many."""

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import NamedTuple

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
        scheduler = type(like).from_config(like.config)
        scheduler.set_timesteps(self.num_inference_steps, device=device)
        begin = self.skipped * scheduler.order
        if hasattr(scheduler, "set_begin_index"):
            scheduler.set_begin_index(begin)
        return scheduler, scheduler.timesteps[begin:]


TABLES = ("betas", "alphas_cumprod", "final_alpha_cumprod")  # what a scheduler makes of its configuration


def scheduler_changes(scheduler: SchedulerMixin) -> list[str]:
    """Return what of a scheduler its class and configuration do not tell, in words."""
    own = vars(scheduler)
    methods = [
        name for name, value in own.items() if callable(value) and callable(getattr(type(scheduler), name, None))
    ]
    changes = [f"scheduler.{name} of its own" for name in methods]
    with suppress(Exception):  # some cannot be made from their own configuration
        fresh = vars(type(scheduler).from_config(scheduler.config))
        for name in TABLES:
            if isinstance(tensor := own.get(name), Tensor) and not torch.equal(tensor.cpu(), fresh[name].cpu()):
                changes.append(f"scheduler.{name}")
    return changes


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
