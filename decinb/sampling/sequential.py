"""Pipelines that cannot share U-Net calls make their pictures one after the other, each by the pipeline's own call."""

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from time import perf_counter
from typing import Any

import numpy as np
import torch
from diffusers import DiffusionPipeline
from diffusers.image_processor import VaeImageProcessor

from decinb.sampling.adapters import Job, call_arguments
from decinb.sampling.batched import Done, Tick
from decinb.utils.quiet import quiet
from decinb.utils.validation import steps_run


def call_each(pipe: DiffusionPipeline, jobs: Sequence[Job], guidance_rescale: float = 0.0) -> Iterator[Tick]:
    """Make an image for every job, as ``decinb.sampling.batched.denoise`` does, but by a call of the pipeline each.

    Each call has a ``torch.Generator().manual_seed(seed)`` of its own on the CPU, and what the pipeline does not take
    is left out.

    Yields:
        A ``Tick`` before each call, and one with its picture. A tick counts the steps as rows; latents are not seen.
    """
    for index, job in enumerate(jobs):
        yield Tick(0, [], {index: None})
        started = perf_counter()
        with _without_bar(pipe):
            pixels = np.asarray(pipe(**_arguments(pipe, job, guidance_rescale), output_type="np").images[0])
        seconds = perf_counter() - started
        if np.isfinite(pixels).all():
            done = Done(index, VaeImageProcessor.numpy_to_pil(pixels)[0], None, seconds)
        else:
            done = Done(index, None, f"{type(pipe).__name__} gave NaN or infinity", seconds)
        yield Tick(steps_run(job.num_inference_steps, job.strength), [done], {})


def not_packed(pipe: DiffusionPipeline) -> str:
    """What to say of such a pipeline."""
    return f"a {type(pipe).__name__} is not packed: it makes one image after the other, by its own call"


def _arguments(pipe: DiffusionPipeline, job: Job, guidance_rescale: float) -> dict[str, Any]:
    given = {
        "prompt": job.prompt,
        "negative_prompt": job.negative_prompt,
        "image": job.image,
        "strength": job.strength,
        "guidance_scale": job.guidance_scale,
        "num_inference_steps": job.num_inference_steps,
        "guidance_rescale": guidance_rescale,
        "generator": torch.Generator().manual_seed(job.seed),
    }
    if job.image is not None:  # some would else make it their own size
        given |= {"width": job.image.width, "height": job.image.height}
    known = call_arguments(pipe)
    return {name: value for name, value in given.items() if value is not None and name in known}


@contextmanager
def _without_bar(pipe: DiffusionPipeline) -> Iterator[None]:
    """A bar for each of many calls, and what is said of optional libraries, would drown the bar of the sweep."""
    before = dict(getattr(pipe, "_progress_bar_config", {}))
    pipe.set_progress_bar_config(**{**before, "disable": True})
    try:
        with quiet(), warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # a pipeline of several calls the others as they once were
            yield
    finally:
        pipe.set_progress_bar_config(**before)
