"""Pipelines that cannot batch jobs: one image after the other, each by the pipeline's own call."""

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from time import perf_counter
from typing import Any

import numpy as np
import torch
from diffusers import DiffusionPipeline
from diffusers.image_processor import VaeImageProcessor

from decinb.errors import InputError, ModelError
from decinb.sampling.base import Adapter, Output
from decinb.sampling.jobs import Job, Progress, Result, Step
from decinb.utils import validation
from decinb.utils.quiet import quiet


class SequentialAdapter(Adapter):
    """Any pipeline, used only through its own call. Its latents stay inside the call.

    Args:
        pipe: the pipeline.
        why: what keeps it from being batched, in words; None if its class does.
    """

    fixed_scheduler = True

    def __init__(self, pipe: DiffusionPipeline, why: str | None = None):
        super().__init__(pipe)
        self._because = f" because of {why}" if why else ""
        self.note = f"{self.name} is not packed{self._because}: it makes one image after the other, by its own call"

    def call(self, arguments: Mapping[str, Any], generator: torch.Generator) -> Output:
        # Floats, because converting NaN to an 8-bit image would hide it.
        draws = {"generator": generator} if self.takes("generator") else {}
        made = self.pipe(**arguments, **draws, output_type="np")
        pixels, unsafe = np.asarray(made.images[0]), getattr(made, "nsfw_content_detected", None)
        image = VaeImageProcessor.numpy_to_pil(pixels)[0] if np.isfinite(pixels).all() else None
        return Output(image, None, bool(unsafe and unsafe[0]))

    def guidance_rescale(self, value: float | None) -> float:
        value = super().guidance_rescale(value)
        if value and not self.takes("guidance_rescale"):
            alone = f", and it is not packed{self._because}" if self._because else ""
            raise InputError(f"guidance_rescale must be 0: {self.name} does not take it{alone}")
        return value

    def key_parts(self, job: Job) -> dict[str, Any]:
        # What the call makes of these is unknown, so each of them counts.
        given = {name: getattr(job, name) for name in ("negative_prompt", "guidance_scale", "strength")}
        return {**super().key_parts(job), **given, "pipeline": self.name}

    def count_calls(self, jobs: Sequence[Job]) -> list[int]:
        return [validation.steps_run(job.num_inference_steps, job.strength) for job in jobs]

    def run(self, jobs: Sequence[Job], max_rows: int | None = None, guidance_rescale: float = 0.0) -> Iterator[Step]:
        """Make one image after the other; see ``Adapter.run``. Arguments that the call does not take are left out.

        Yields:
            A ``Step`` before each call, and one with its result, whose rows are the steps run.
        """
        for index, (job, steps) in enumerate(zip(jobs, self.count_calls(jobs), strict=True)):
            yield Step(0, [], {index: Progress(0, steps)})
            started = perf_counter()
            with _without_progress_bar(self.pipe):
                made = self._try(self._arguments(job, guidance_rescale), job.seed)
            error = None if made.image else f"{self.name} returned NaN or infinity"
            yield Step(steps, [Result(index, made.image, error, perf_counter() - started, made.blacked_out)], {})

    def _try(self, arguments: Mapping[str, Any], seed: int) -> Output:
        try:
            return self.call(arguments, torch.Generator().manual_seed(seed))
        except ModelError:  # our own pipeline's, in place of a black image
            return Output(None, None, False)

    def _arguments(self, job: Job, guidance_rescale: float) -> dict[str, Any]:
        given = {
            "prompt": job.prompt,
            "negative_prompt": job.negative_prompt,
            "image": job.image,
            "strength": job.strength,
            "guidance_scale": job.guidance_scale,
            "num_inference_steps": job.num_inference_steps,
            "guidance_rescale": guidance_rescale,
        }
        if job.image is not None:  # some pipelines would resize it to a default of their own
            given |= {"width": job.image.width, "height": job.image.height}
        return {name: value for name, value in given.items() if value is not None and self.takes(name)}


@contextmanager
def _without_progress_bar(pipe: DiffusionPipeline) -> Iterator[None]:
    """Hide the bar of each call and warnings about optional libraries, which would bury the bar of the sweep."""
    before = dict(getattr(pipe, "_progress_bar_config", {}))
    pipe.set_progress_bar_config(**{**before, "disable": True})
    try:
        with quiet(), warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # combined pipelines call their own parts in outdated ways
            yield
    finally:
        pipe.set_progress_bar_config(**before)
