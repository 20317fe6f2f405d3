"""What the pipelines of Stable Diffusion's kind do differently, for those who denoise many cells together.

A kind says how a cell begins, what stands beside its latent, what the U-Net is told in each row, and how a latent
becomes a picture: each as the stock pipeline does it, with the same random draws in the same order.
"""

import inspect
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from diffusers import (
    AutoencoderKL,
    DiffusionPipeline,
    SchedulerMixin,
    StableDiffusionDepth2ImgPipeline,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLImg2ImgPipeline,
    StableDiffusionXLPipeline,
)
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion_img2img import retrieve_latents
from diffusers.utils.torch_utils import randn_tensor
from PIL import Image
from torch import Tensor
from transformers import CLIPTokenizer

from decinb.designs import Cell
from decinb.errors import InputError
from decinb.images import Source
from decinb.models import image_size
from decinb.pipeline import is_decidiffusion
from decinb.utils import validation
from decinb.utils.quiet import quiet


@dataclass(frozen=True)
class Job:
    """One image to make: the arguments of a call of the stock pipeline, as plain values that are known to be good.

    Without an ``image`` it is text to image, and ``strength`` is 1.
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
        """Whether there is a second row a step, without the prompt. At a scale of 1 or less there is none."""
        return self.guidance_scale > 1

    @property
    def skipped(self) -> int:
        """How many of the steps are not run, since the input is no noise. ``int`` cuts off, as diffusers does."""
        return max(self.num_inference_steps - int(self.num_inference_steps * self.strength), 0)

    @property
    def beginning(self) -> tuple[int, ...]:
        """What decides the first latents: jobs that agree in it, as in a sweep of guidance, share their first rows."""
        return id(self.image), self.seed, self.num_inference_steps, self.skipped

    def schedule(self, kind: SchedulerMixin, device: torch.device) -> tuple[SchedulerMixin, Tensor]:
        """A scheduler of the same kind set to begin where this job does, and its timesteps: one a U-Net call."""
        scheduler = type(kind).from_config(kind.config)
        scheduler.set_timesteps(self.num_inference_steps, device=device)
        begin = self.skipped * scheduler.order
        if hasattr(scheduler, "set_begin_index"):
            scheduler.set_begin_index(begin)
        return scheduler, scheduler.timesteps[begin:]


class Words(NamedTuple):
    """What a row is told: a text, or None for nothing at all, and whether it is the side that guidance leaves."""

    text: str | None
    against: bool = False


class ImageToImage:
    """Stable Diffusion's image to image; the other kinds differ from it in what they say anew."""

    beside_channels = 0  # that the U-Net sees beside the latent

    def __init__(self, pipe: DiffusionPipeline):
        self.pipe = pipe
        self.device = pipe._execution_device  # diffusers looks through every part for it, which takes a while

    def size(self, job: Job) -> tuple[int, int]:
        """Height and width of a job's latent."""
        scale = self.pipe.vae_scale_factor
        return job.image.height // scale, job.image.width // scale

    def words(self, job: Job) -> list[Words]:
        """A row each: the prompt, and what stands against it where there is guidance."""
        return [Words(job.prompt), self.against(job)] if job.guided else [Words(job.prompt)]

    def against(self, job: Job) -> Words:
        """What guidance leads away from."""
        return Words(job.negative_prompt or "", True)

    # --- the beginning ---

    @property
    def dtype(self) -> torch.dtype:
        """Of latents."""
        return self.pipe.unet.dtype

    def see(self, image: Image.Image) -> Any:
        """What is made of an input picture, once for all jobs that have it."""
        return self.encode(self.pixels(image))

    def encode(self, pixels: Tensor) -> Any:
        """What the VAE makes of pixels."""
        return self.pipe.vae.encode(pixels)

    def scale(self, latents: Tensor) -> Tensor:
        """The VAE's latents as the U-Net knows them."""
        return self.pipe.vae.config.scaling_factor * latents

    def unscale(self, latents: Tensor) -> Tensor:
        """The U-Net's latents as the VAE knows them."""
        return latents / self.pipe.vae.config.scaling_factor

    def pixels(self, image: Image.Image | Sequence[Image.Image]) -> Tensor:
        return self.pipe.image_processor.preprocess(image).to(self.device, self.dtype)

    def begin(
        self, job: Job, seen: Any, scheduler: SchedulerMixin, timestep: Tensor, generator: torch.Generator
    ) -> Tensor:
        """The first latents of a job: the VAE's sample is drawn first, then the noise."""
        latents = self.scale(retrieve_latents(seen, generator).to(self.dtype))
        noise = randn_tensor(latents.shape, generator=generator, device=latents.device, dtype=latents.dtype)
        return scheduler.add_noise(latents, noise, timestep)

    def beside(self, seen: Any) -> Tensor | None:
        """Channels that the U-Net sees beside the latent at every step, as large as it; None where there are none."""
        return None

    # --- each step ---

    def tell(self, words: Words, size: tuple[int, int]) -> dict[str, Tensor]:
        """What the U-Net is told in a row, as tensors of one row each."""
        with quiet():  # what is cut off is told when a sweep is planned
            text = self.pipe.encode_prompt(words.text, self.device, 1, False)[0]
        return {"encoder_hidden_states": text}

    def arguments(self, told: Sequence[dict[str, Tensor]]) -> dict[str, Any]:
        """The arguments of a U-Net call with many rows."""
        return {name: torch.cat([row[name] for row in told]) for name in told[0]}

    # --- the end ---

    def decode(self, latents: Tensor) -> Tensor:
        """Pixels."""
        return decode(self.pipe.vae, self.unscale(latents))

    def check(self, pixels: Tensor) -> tuple[Tensor, list[bool]]:
        """Pixels, black where a safety checker took them for unsafe, and where that was."""
        if getattr(self.pipe, "safety_checker", None) is None:
            return pixels, [False] * len(pixels)
        pixels, unsafe = self.pipe.run_safety_checker(pixels, pixels.device, pixels.dtype)
        return pixels, [False] * len(pixels) if unsafe is None else list(map(bool, unsafe))

    @torch.no_grad()
    def pictures(self, latents: Tensor) -> list[tuple[Image.Image | None, bool]]:
        """Decode latents: each its picture, or None where it is no numbers, and whether a safety checker blacked it."""
        pixels = self.decode(latents)
        good = pixels.isfinite().flatten(1).all(dim=1)
        pixels, unsafe = self.check(torch.where(good[:, None, None, None], pixels, 0))
        shown = [not flag for flag in unsafe]
        pictures = self.pipe.image_processor.postprocess(pixels, output_type="pil", do_denormalize=shown)
        rows = zip(pictures, good.tolist(), unsafe, strict=True)
        return [(picture, flag) if fine else (None, False) for picture, fine, flag in rows]


class TextToImage(ImageToImage):
    """Begins with noise alone."""

    def size(self, job: Job) -> tuple[int, int]:
        side = image_size(self.pipe) // self.pipe.vae_scale_factor
        return side, side

    def see(self, image: None) -> None:
        return None

    def begin(
        self, job: Job, seen: None, scheduler: SchedulerMixin, timestep: Tensor, generator: torch.Generator
    ) -> Tensor:
        shape = (1, self.pipe.unet.config.in_channels, *self.size(job))
        noise = randn_tensor(shape, generator=generator, device=self.device, dtype=self.dtype)
        return noise * scheduler.init_noise_sigma


class DepthToImage(ImageToImage):
    """Sees the depth of the input in a fifth channel."""

    beside_channels = 1

    def see(self, image: Image.Image) -> tuple[Any, Tensor]:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "In CPU autocast", UserWarning)  # it asks for half precision anywhere
            depth = self.pipe.prepare_depth_map(image, None, 1, False, self.dtype, self.device)
        return super().see(image), depth

    def begin(
        self,
        job: Job,
        seen: tuple[Any, Tensor],
        scheduler: SchedulerMixin,
        timestep: Tensor,
        generator: torch.Generator,
    ) -> Tensor:
        return super().begin(job, seen[0], scheduler, timestep, generator)

    def beside(self, seen: tuple[Any, Tensor]) -> Tensor:
        return seen[1]


class ImageToImageXL(ImageToImage):
    """Stable Diffusion XL: two text encoders, and the sizes of the picture among what the U-Net is told."""

    def against(self, job: Job) -> Words:
        nothing = job.negative_prompt is None and self.pipe.config.force_zeros_for_empty_prompt
        return Words(None if nothing else job.negative_prompt or "", True)

    def encode(self, pixels: Tensor) -> Any:
        vae = self.pipe.vae
        if not vae.config.force_upcast or vae.dtype == torch.float32:
            return vae.encode(pixels)
        with in_float32(vae):  # in half precision it would overflow
            return vae.encode(pixels.float())

    def scale(self, latents: Tensor) -> Tensor:
        if (spread := self._spread(latents)) is None:
            return super().scale(latents)
        mean, deviation = spread
        return (latents - mean) * self.pipe.vae.config.scaling_factor / deviation

    def unscale(self, latents: Tensor) -> Tensor:
        if (spread := self._spread(latents)) is None:
            return super().unscale(latents)
        mean, deviation = spread
        return latents * deviation / self.pipe.vae.config.scaling_factor + mean

    def _spread(self, latents: Tensor) -> tuple[Tensor, Tensor] | None:
        """The mean and the deviation of every channel, where a VAE names them."""
        named = [getattr(self.pipe.vae.config, name, None) for name in ("latents_mean", "latents_std")]
        if None in named:
            return None
        mean, deviation = (torch.tensor(values).view(1, -1, 1, 1).to(latents) for values in named)
        return mean, deviation

    def tell(self, words: Words, size: tuple[int, int]) -> dict[str, Tensor]:
        with quiet():
            text, _, pooled, _ = self.pipe.encode_prompt(
                words.text or "", device=self.device, num_images_per_prompt=1, do_classifier_free_guidance=False
            )
        if words.text is None:
            text, pooled = torch.zeros_like(text), torch.zeros_like(pooled)
        times = self.time_ids(size, pooled)[words.against].to(self.device)
        return {"encoder_hidden_states": text, "text_embeds": pooled, "time_ids": times}

    def time_ids(self, size: tuple[int, int], pooled: Tensor) -> tuple[Tensor, Tensor]:
        """The numbers that tell sizes and looks, for the prompt and for what stands against it."""
        pixels = self._pixels_of(size)
        width = pooled.shape[-1]
        # The scores are the stock call's own.
        return self.pipe._get_add_time_ids(
            pixels,
            (0, 0),
            pixels,
            6.0,
            2.5,
            pixels,
            (0, 0),
            pixels,
            dtype=pooled.dtype,
            text_encoder_projection_dim=width,
        )

    def _pixels_of(self, size: tuple[int, int]) -> tuple[int, int]:
        height, width = (side * self.pipe.vae_scale_factor for side in size)
        return height, width

    def arguments(self, told: Sequence[dict[str, Tensor]]) -> dict[str, Any]:
        rows = super().arguments(told)
        return {"encoder_hidden_states": rows.pop("encoder_hidden_states"), "added_cond_kwargs": rows}

    def decode(self, latents: Tensor) -> Tensor:
        pixels = decode(self.pipe.vae, self.unscale(latents), in_full=self.pipe.vae.config.force_upcast)
        mark = getattr(self.pipe, "watermark", None)
        return pixels if mark is None else mark.apply_watermark(pixels)


class TextToImageXL(ImageToImageXL, TextToImage):
    """Stable Diffusion XL from noise alone."""

    see, begin = TextToImage.see, TextToImage.begin

    def time_ids(self, size: tuple[int, int], pooled: Tensor) -> tuple[Tensor, Tensor]:
        pixels = self._pixels_of(size)
        told = self.pipe._get_add_time_ids(
            pixels, (0, 0), pixels, dtype=pooled.dtype, text_encoder_projection_dim=pooled.shape[-1]
        )
        return told, told


KINDS: dict[type[DiffusionPipeline], type[ImageToImage]] = {
    StableDiffusionPipeline: TextToImage,
    StableDiffusionImg2ImgPipeline: ImageToImage,
    StableDiffusionDepth2ImgPipeline: DepthToImage,
    StableDiffusionXLPipeline: TextToImageXL,
    StableDiffusionXLImg2ImgPipeline: ImageToImageXL,
}


def kind_of(pipe: DiffusionPipeline) -> type[ImageToImage] | None:
    """The kind of a pipeline whose cells can share U-Net calls; None for one that must make each by its own call."""
    return next((kind for cls, kind in KINDS.items() if isinstance(pipe, cls)), None)


def decode(vae: AutoencoderKL, latents: Tensor, in_full: bool = False) -> Tensor:
    """Pixels, from a VAE in half precision that overflows once more in float32, as some of that time's do.

    Args:
        in_full: decode in float32 at once.
    """
    half = vae.dtype
    if half == torch.float32 or not (in_full and half == torch.float16):
        pixels = vae.decode(latents)[0]
        if half == torch.float32 or pixels.isfinite().all():
            return pixels
    with in_float32(vae):
        return vae.decode(latents.float())[0].to(half)


@contextmanager
def in_float32(vae: AutoencoderKL) -> Iterator[None]:
    """A VAE in half precision, in full inside the ``with`` block."""
    half = vae.dtype
    with quiet():  # diffusers warns of parts that should stay as they are, and names none
        vae.to(torch.float32)
    try:
        yield
    finally:
        with quiet():
            vae.to(half)


def call_arguments(pipe: DiffusionPipeline) -> dict[str, Any]:
    """What a pipeline's call takes, with the default of each, or None; one of decinb's takes its stock class's too."""
    classes = (pipe._stock, type(pipe)) if is_decidiffusion(pipe) else (type(pipe),)
    parameters = [one for cls in classes for one in inspect.signature(cls.__call__).parameters.values()]
    named = [one for one in parameters if one.name != "self" and one.kind not in (one.VAR_POSITIONAL, one.VAR_KEYWORD)]
    return {one.name: None if one.default is one.empty else one.default for one in named}


def takes(pipe: DiffusionPipeline, name: str) -> bool:
    """Whether a pipeline's call has an argument of this name."""
    return name in call_arguments(pipe)


def defaults(pipe: DiffusionPipeline) -> dict[str, Any]:
    """What a pipeline takes where a call leaves it out: its strength, guidance scale, steps and guidance rescale.

    A pipeline without strength or guidance rescale has 1 and 0 of them: it forgets its input, and rescales nothing.
    """
    steps = getattr(pipe, "deci_default_number_of_iterations", 30)
    without = {"strength": 1.0, "guidance_scale": 1.0, "num_inference_steps": steps, "guidance_rescale": 0.0}
    own = call_arguments(pipe)
    return {name: value if own.get(name) is None else own[name] for name, value in without.items()}


def check_pipe(pipe: Any) -> None:
    """Refuse what is no pipeline."""
    if not isinstance(pipe, DiffusionPipeline):
        raise InputError(f"pipe must be a pipeline, as load_pipeline gives it, got {validation.short_repr(pipe)}")


def _check_taken(pipe: DiffusionPipeline, cell: Cell, where: str) -> None:
    """Refuse an argument that the call of a pipeline would never see, and a picture that is none."""
    for name in cell:
        if name != "seed" and not takes(pipe, name):
            raise InputError(f"{where}{name} must be left out: the call of a {type(pipe).__name__} takes none")
    if "image" in cell:
        check_image(pipe, cell["image"], where)


def check_image(pipe: DiffusionPipeline, image: Source | None, where: str = "") -> None:
    """Refuse a picture that nothing is made of, and none where something is."""
    if image is None and takes(pipe, "image"):
        told = "a sample's name, a path, a URL, bytes, an array or a PIL image"
        raise InputError(f"{where}image must be {told}, got NoneType: a {type(pipe).__name__} makes images from images")
    if image is not None and not takes(pipe, "image"):
        raise InputError(f"{where}image must be None: a {type(pipe).__name__} makes images from text alone")


def _guidance_rescale(pipe: DiffusionPipeline, value: float) -> float:
    value = validation.fraction(value, "guidance_rescale")
    if value and kind_of(pipe) is None and not takes(pipe, "guidance_rescale"):
        raise InputError(f"guidance_rescale must be 0: the call of a {type(pipe).__name__} takes none")
    return value


def lost_words(pipe: DiffusionPipeline, words: str) -> str:
    """The end of a prompt that a pipeline's text encoder does not read; of several, the one that reads least."""
    tokenizers = [part for part in pipe.components.values() if isinstance(part, CLIPTokenizer)]
    return max((validation.lost_words(words, one) for one in tokenizers), key=len, default="")


def count_calls(pipe: DiffusionPipeline, jobs: Sequence[Job]) -> list[int]:
    """How many U-Net calls each job takes alone; refuses one that the scheduler cannot run."""
    if kind_of(pipe) is None:  # its own call sets its scheduler in its own way
        return [validation.steps_run(job.num_inference_steps, job.strength) for job in jobs]
    calls: dict[tuple[int, int], int] = {}
    for i, job in enumerate(jobs):
        steps = job.num_inference_steps, job.skipped
        if steps not in calls:
            try:
                calls[steps] = len(job.schedule(pipe.scheduler, pipe._execution_device)[1])
            except Exception as error:
                told = f"{job.num_inference_steps} steps at strength {job.strength:g}"
                name = type(pipe.scheduler).__name__
                raise InputError(f"cell {i}: {name} cannot run {told}: {' '.join(str(error).split())}") from error
    return [calls[job.num_inference_steps, job.skipped] for job in jobs]
