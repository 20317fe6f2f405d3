"""The interface that planning, sweeps, replay and chains use, so that none of them needs to know a pipeline's class."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any, NamedTuple

import torch
from diffusers import DiffusionPipeline
from PIL import Image
from torch import Tensor
from transformers import CLIPTokenizer

from decinb.designs import Cell
from decinb.errors import InputError
from decinb.images import Source
from decinb.models import IMAGE_TO_IMAGE, TEXT_TO_IMAGE, height_and_width
from decinb.sampling.calls import call_arguments, defaults
from decinb.sampling.jobs import Job, Step
from decinb.utils import validation


class Output(NamedTuple):
    """What one call of a pipeline made.

    Args:
        image: None if it is not finite.
        latents: (1, channels, height / 8, width / 8), where the pipeline returns them.
        blacked_out: whether a safety checker replaced the image with a black one.
    """

    image: Image.Image | None
    latents: Tensor | None
    blacked_out: bool


class Adapter(ABC):
    """One pipeline, behind the interface that all pipelines share.

    Attributes:
        note: what users should know before a sweep, or None.
        exposes_latents: whether latents can be seen during a sweep and passed on to the next link of a chain.
        accepts_latents: whether latents can be given in place of an image.
        fixed_scheduler: whether its call works only with the scheduler it was loaded with.
        extra_channels: channels of the U-Net's input beyond the latent's; None if unknown.
    """

    note: str | None = None
    exposes_latents = False
    accepts_latents = False
    fixed_scheduler = False
    extra_channels: int | None = None

    def __init__(self, pipe: DiffusionPipeline):
        self.pipe = pipe

    @property
    def name(self) -> str:
        """The pipeline's class."""
        return type(self.pipe).__name__

    # --- the call ---

    @cached_property
    def arguments(self) -> dict[str, Any]:
        """The arguments of the pipeline's call, each with its default or None."""
        return call_arguments(self.pipe)

    @cached_property
    def defaults(self) -> dict[str, Any]:
        """The pipeline's own strength, guidance scale, number of steps and guidance rescale."""
        return defaults(self.pipe)

    def takes(self, name: str) -> bool:
        """Return whether the pipeline's call has an argument of this name."""
        return name in self.arguments

    @property
    def task(self) -> str:
        """Image to image if the call takes an image, else text to image."""
        return IMAGE_TO_IMAGE if self.takes("image") else TEXT_TO_IMAGE

    @abstractmethod
    def call(self, arguments: Mapping[str, Any], generator: torch.Generator) -> Output:
        """Run the pipeline's own call once.

        Raises:
            ModelError: the latents contain NaN or infinity.
        """

    # --- input validation ---

    def check_image(self, image: Source | None, where: str = "") -> None:
        """Refuse a missing image for image to image, and any image for text to image."""
        if image is None and self.takes("image"):
            raise InputError(
                f"{where}image must be a sample's name, a path, a URL, bytes, an array or a PIL image, got None: "
                f"{self.name} makes images from images"
            )
        if image is not None and not self.takes("image"):
            raise InputError(f"{where}image must be None: {self.name} makes images from text alone")

    def check_cell(self, cell: Cell, where: str = "") -> None:
        """Refuse arguments that the pipeline's call does not take."""
        for name in cell:
            if name != "seed" and not self.takes(name):
                raise InputError(f"{where}{name} must be left out: {self.name} does not take it")
        if "image" in cell:
            self.check_image(cell["image"], where)

    def guidance_rescale(self, value: float | None) -> float:
        """Return a valid guidance rescale, the pipeline's default for None."""
        return validation.fraction(self.defaults["guidance_rescale"] if value is None else value, "guidance_rescale")

    # --- planning ---

    def output_size(self, job: Job) -> tuple[int, int]:
        """Return the width and height in pixels of a job's image."""
        height, width = height_and_width(self.pipe)
        return (width, height) if job.image is None else job.image.size

    def truncated_text(self, text: str) -> str:
        """Return the end of a prompt that is cut off; with several tokenizers, by the one that reads least."""
        tokenizers = [part for part in self.pipe.components.values() if isinstance(part, CLIPTokenizer)]
        return max((validation.lost_words(text, tokenizer) for tokenizer in tokenizers), key=len, default="")

    def key_parts(self, job: Job) -> dict[str, Any]:
        """Return what else determines a job's pixels, besides model, input, prompt, steps and seed."""
        if job.image is not None:  # which determines the size
            return {}
        height, width = height_and_width(self.pipe)
        return {"size": height if height == width else [height, width]}

    @abstractmethod
    def count_calls(self, jobs: Sequence[Job]) -> list[int]:
        """Return how many U-Net calls each job takes alone.

        Raises:
            InputError: the scheduler cannot run a job.
        """

    def rows(self, job: Job) -> int:
        """Return how many rows a job has in each U-Net call."""
        return 1

    def seconds_per_row(self, jobs: Sequence[Job]) -> float | None:
        """Measure the time one row takes; None if the pipeline gives no access to single steps."""
        return None

    def schedule_note(self, jobs: Sequence[Job]) -> str | None:
        """Return a warning if a job's schedule starts far below full noise."""
        return None

    def ignores_negative(self, job: Job) -> bool:
        """Return whether a job has a negative prompt that is known to have no effect."""
        return False

    # --- sampling ---

    @abstractmethod
    def run(self, jobs: Sequence[Job], max_rows: int | None = None, guidance_rescale: float = 0.0) -> Iterator[Step]:
        """Make an image for every job.

        Each job has its own ``torch.Generator().manual_seed(seed)`` on the CPU.

        Args:
            jobs: what to make.
            max_rows: the most rows in one U-Net call, for pipelines that batch jobs; None chooses for the device.
            guidance_rescale: 0 to 1 (Lin et al. (2023), arXiv:2305.08891, section 3.4).

        Yields:
            A ``Step`` whenever jobs start, advance or end.
        """
