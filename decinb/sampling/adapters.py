"""The adapters of Stable Diffusion's pipelines, whose jobs can be batched, and ``adapter_of``, which chooses one.

Each method does what the stock pipeline does at that stage, with the same random draws in the same order.
"""

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from diffusers import (
    AsymmetricAutoencoderKL,
    AutoencoderKL,
    AutoencoderTiny,
    DiffusionPipeline,
    SchedulerMixin,
    StableDiffusionDepth2ImgPipeline,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLImg2ImgPipeline,
    StableDiffusionXLPipeline,
)
from diffusers.models.attention_processor import Attention
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion_img2img import retrieve_latents
from diffusers.utils.torch_utils import randn_tensor
from PIL import Image
from torch import Tensor, nn

from decinb.errors import InputError, ModelError
from decinb.models import check_pipeline, height_and_width
from decinb.sampling.base import Adapter, Output
from decinb.sampling.batched import BatchedAdapter
from decinb.sampling.jobs import Conditioning, Job
from decinb.sampling.sequential import SequentialAdapter
from decinb.utils.origins import OURS
from decinb.utils.quiet import quiet


class ImageToImage(BatchedAdapter):
    """Stable Diffusion image to image. The other adapters override the stages in which they differ."""

    accepts_latents = True

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of latents."""
        return self.pipe.unet.dtype

    def latent_size(self, job: Job) -> tuple[int, int]:
        scale = self.pipe.vae_scale_factor
        return job.image.height // scale, job.image.width // scale

    # --- the start ---

    def preprocess(self, images: Image.Image | Sequence[Image.Image]) -> Tensor:
        """Return images as the VAE reads them: (images, 3, height, width), from -1 to 1."""
        return self.pipe.image_processor.preprocess(images).to(self.device, self.dtype)

    def encode(self, pixels: Tensor) -> Any:
        """Return what the VAE's encoder makes of pixels: an output that holds a distribution of latents."""
        return self.pipe.vae.encode(pixels)

    def encode_image(self, image: Image.Image) -> Any:
        return self.encode(self.preprocess(image))

    def scale(self, latents: Tensor) -> Tensor:
        """Convert latents from the VAE's scale to the U-Net's."""
        return self.pipe.vae.config.scaling_factor * latents

    def unscale(self, latents: Tensor) -> Tensor:
        """Convert latents from the U-Net's scale to the VAE's."""
        return latents / self.pipe.vae.config.scaling_factor

    def prepare_latents(
        self, job: Job, encoded: Any, scheduler: SchedulerMixin, timestep: Tensor, generator: torch.Generator
    ) -> Tensor:
        # The order matters: the VAE's sample is drawn before the noise.
        latents = self.scale(retrieve_latents(encoded, generator).to(self.dtype))
        noise = randn_tensor(latents.shape, generator=generator, device=latents.device, dtype=latents.dtype)
        return self.add_noise(scheduler, latents, noise, timestep)

    def add_noise(self, scheduler: SchedulerMixin, latents: Tensor, noise: Tensor, timestep: Tensor) -> Tensor:
        return scheduler.add_noise(latents, noise, timestep)

    # --- each step ---

    def encode_prompt(self, conditioning: Conditioning, size: tuple[int, int]) -> dict[str, Tensor]:
        with quiet():  # planning has already warned of truncated prompts
            text = self.pipe.encode_prompt(conditioning.text, self.device, 1, False)[0]
        return {"encoder_hidden_states": text}

    # --- the end ---

    def decode(self, latents: Tensor) -> Tensor:
        """Return the pixels of latents on the U-Net's scale, (images, 3, height, width), about -1 to 1."""
        return decode(self.pipe.vae, self.unscale(latents))

    def check_safety(self, pixels: Tensor) -> tuple[Tensor, list[bool]]:
        """Return pixels, black where a safety checker finds them unsafe, and whether it did."""
        if getattr(self.pipe, "safety_checker", None) is None:
            return pixels, [False] * len(pixels)
        pixels, unsafe = self.pipe.run_safety_checker(pixels, pixels.device, pixels.dtype)
        return pixels, [False] * len(pixels) if unsafe is None else list(map(bool, unsafe))

    @torch.no_grad()
    def decode_latents(self, latents: Tensor) -> list[tuple[Image.Image | None, bool]]:
        pixels = self.decode(latents)
        finite = pixels.isfinite().flatten(1).all(dim=1)
        pixels, unsafe = self.check_safety(torch.where(finite[:, None, None, None], pixels, 0))
        denormalize = [not flag for flag in unsafe]
        images = self.pipe.image_processor.postprocess(pixels, output_type="pil", do_denormalize=denormalize)
        rows = zip(images, finite.tolist(), unsafe, strict=True)
        return [(image, flag) if is_finite else (None, False) for image, is_finite, flag in rows]

    # --- the stock call ---

    def call(self, arguments: Mapping[str, Any], generator: torch.Generator) -> Output:
        latents = self.pipe(**arguments, generator=generator, output_type="latent").images
        if not latents.isfinite().all():
            raise ModelError(
                "no image was made: the U-Net or guidance gave NaN or infinity; lower guidance_scale, or load the "
                "model with dtype='float32'"
            )
        image, blacked_out = self.decode_latents(latents)[0]
        return Output(image, latents, blacked_out)


class TextToImage(ImageToImage):
    """Stable Diffusion text to image, which starts from noise alone."""

    accepts_latents = False

    def latent_size(self, job: Job) -> tuple[int, int]:
        height, width = height_and_width(self.pipe)
        return height // self.pipe.vae_scale_factor, width // self.pipe.vae_scale_factor

    def encode_image(self, image: None) -> None:
        return None

    def prepare_latents(
        self, job: Job, encoded: None, scheduler: SchedulerMixin, timestep: Tensor, generator: torch.Generator
    ) -> Tensor:
        shape = (1, self.pipe.unet.config.in_channels, *self.latent_size(job))
        noise = randn_tensor(shape, generator=generator, device=self.device, dtype=self.dtype)
        return self.add_noise(scheduler, noise, noise, timestep)

    def add_noise(self, scheduler: SchedulerMixin, latents: Tensor, noise: Tensor, timestep: Tensor) -> Tensor:
        return noise * scheduler.init_noise_sigma


class DepthToImage(ImageToImage):
    """Stable Diffusion 2 depth to image, whose U-Net sees the depth of the input in a fifth channel."""

    accepts_latents = False  # depth is estimated from an image
    extra_channels = 1

    def encode_image(self, image: Image.Image) -> tuple[Any, Tensor]:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "In CPU autocast", UserWarning)  # diffusers asks for half precision
            depth = self.pipe.prepare_depth_map(image, None, 1, False, self.dtype, self.device)
        return super().encode_image(image), depth

    def prepare_latents(
        self,
        job: Job,
        encoded: tuple[Any, Tensor],
        scheduler: SchedulerMixin,
        timestep: Tensor,
        generator: torch.Generator,
    ) -> Tensor:
        return super().prepare_latents(job, encoded[0], scheduler, timestep, generator)

    def extra_input(self, encoded: tuple[Any, Tensor]) -> Tensor:
        return encoded[1]


class ImageToImageXL(ImageToImage):
    """Stable Diffusion XL image to image: two text encoders, and a U-Net conditioned on image sizes too."""

    def negative(self, job: Job) -> Conditioning:
        as_zeros = job.negative_prompt is None and self.pipe.config.force_zeros_for_empty_prompt
        return Conditioning(None if as_zeros else job.negative_prompt or "", True)

    def encode(self, pixels: Tensor) -> Any:
        vae = self.pipe.vae
        if not vae.config.force_upcast or vae.dtype == torch.float32:
            return vae.encode(pixels)
        with in_float32(vae):  # in half precision it would overflow
            return vae.encode(pixels.float())

    def scale(self, latents: Tensor) -> Tensor:
        if (statistics := self._statistics(latents)) is None:
            return super().scale(latents)
        mean, deviation = statistics
        return (latents - mean) * self.pipe.vae.config.scaling_factor / deviation

    def unscale(self, latents: Tensor) -> Tensor:
        if (statistics := self._statistics(latents)) is None:
            return super().unscale(latents)
        mean, deviation = statistics
        return latents * deviation / self.pipe.vae.config.scaling_factor + mean

    def _statistics(self, latents: Tensor) -> tuple[Tensor, Tensor] | None:
        """Return the mean and standard deviation of every latent channel, if the VAE's config has them."""
        values = [getattr(self.pipe.vae.config, name, None) for name in ("latents_mean", "latents_std")]
        if None in values:
            return None
        mean, deviation = (torch.tensor(channels).view(1, -1, 1, 1).to(latents) for channels in values)
        return mean, deviation

    def encode_prompt(self, conditioning: Conditioning, size: tuple[int, int]) -> dict[str, Tensor]:
        with quiet():
            text, _, pooled, _ = self.pipe.encode_prompt(
                conditioning.text or "", device=self.device, num_images_per_prompt=1, do_classifier_free_guidance=False
            )
        if conditioning.text is None:
            text, pooled = torch.zeros_like(text), torch.zeros_like(pooled)
        positive, negative = self.time_ids(size, pooled)
        time_ids = (negative if conditioning.negative else positive).to(self.device)
        return {"encoder_hidden_states": text, "text_embeds": pooled, "time_ids": time_ids}

    def time_ids(self, size: tuple[int, int], pooled: Tensor) -> tuple[Tensor, Tensor]:
        """Return the embedded image sizes and aesthetic scores, for the prompt and for the negative prompt."""
        pixels = self._size_in_pixels(size)
        # 6.0 and 2.5 are the default aesthetic scores of the stock call.
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
            text_encoder_projection_dim=pooled.shape[-1],
        )

    def _size_in_pixels(self, size: tuple[int, int]) -> tuple[int, int]:
        height, width = (side * self.pipe.vae_scale_factor for side in size)
        return height, width

    def unet_arguments(self, encoded: Sequence[dict[str, Tensor]]) -> dict[str, Any]:
        rows = super().unet_arguments(encoded)
        return {"encoder_hidden_states": rows.pop("encoder_hidden_states"), "added_cond_kwargs": rows}

    def decode(self, latents: Tensor) -> Tensor:
        pixels = decode(self.pipe.vae, self.unscale(latents), in_full=self.pipe.vae.config.force_upcast)
        watermark = getattr(self.pipe, "watermark", None)
        return pixels if watermark is None else watermark.apply_watermark(pixels)


class TextToImageXL(ImageToImageXL, TextToImage):
    """Stable Diffusion XL text to image."""

    accepts_latents = False
    encode_image, prepare_latents = TextToImage.encode_image, TextToImage.prepare_latents

    def time_ids(self, size: tuple[int, int], pooled: Tensor) -> tuple[Tensor, Tensor]:
        pixels = self._size_in_pixels(size)
        time_ids = self.pipe._get_add_time_ids(
            pixels, (0, 0), pixels, dtype=pooled.dtype, text_encoder_projection_dim=pooled.shape[-1]
        )
        return time_ids, time_ids


BATCHED: dict[type[DiffusionPipeline], type[BatchedAdapter]] = {
    StableDiffusionPipeline: TextToImage,
    StableDiffusionImg2ImgPipeline: ImageToImage,
    StableDiffusionDepth2ImgPipeline: DepthToImage,
    StableDiffusionXLPipeline: TextToImageXL,
    StableDiffusionXLImg2ImgPipeline: ImageToImageXL,
}


PLAIN_VAES = (AutoencoderKL, AutoencoderTiny, AsymmetricAutoencoderKL)
DYNAMIC = ("torch.ao.nn.quantized.dynamic", "torch.ao.nn.intrinsic.quantized.dynamic")


def adapter_of(pipe: DiffusionPipeline, why: str | None = None) -> Adapter:
    """Return the adapter of a pipeline: batched for Stable Diffusion and its subclasses, else sequential.

    Args:
        pipe: the pipeline.
        why: what keeps it from being batched, in words, such as code of the user, which may treat a row of a batch
            differently from a call. The adapter is then sequential.

    Raises:
        InputError: ``pipe`` is not a diffusers pipeline, or lacks a component.
    """
    check_pipeline(pipe)
    for name in ("vae", "unet", "scheduler"):
        if name in pipe.components and pipe.components[name] is None:
            raise InputError(f"pipe.{name} is None: load the pipeline again")
    adapter = next((adapter for cls, adapter in BATCHED.items() if isinstance(pipe, cls)), None)
    why = why or (None if adapter is None else _why_not_batched(pipe))
    return SequentialAdapter(pipe, why) if adapter is None or why else adapter(pipe)


def _why_not_batched(pipe: DiffusionPipeline) -> str | None:
    """Return, in words, what makes a row of a batch differ from a call of its own; None if nothing does."""
    if type(pipe).__module__.partition(".")[0] not in ("diffusers", OURS):
        return f"{type(pipe).__name__} (not a class of diffusers or decinb, so its call may differ)"
    for name in ("unet", "vae"):
        part = getattr(pipe.components[name], "_orig_mod", pipe.components[name])  # of torch.compile
        if name == "vae" and type(part).__module__.startswith("diffusers.") and not isinstance(part, PLAIN_VAES):
            return f"vae ({type(part).__name__}, which may draw noise)"
        for module in part.modules() if isinstance(part, nn.Module) else ():
            if why := _mixes_rows(module):
                return f"{name} ({why})"
    return None


def _mixes_rows(module: nn.Module) -> str | None:
    """Return, in words, how a module lets the rows of a batch change each other; None if it does not."""
    if type(module).__module__.startswith(DYNAMIC):
        return "dynamic quantisation, which takes its range from the whole batch"
    if isinstance(module, nn.modules.batchnorm._BatchNorm) and (module.training or module.running_mean is None):
        return "batch norm, which takes its statistics from the whole batch"
    processor = type(vars(module).get("processor"))
    if processor.__module__.startswith("diffusers.") and (
        processor.__module__ != Attention.__module__ or processor.__name__.startswith("PAG")
    ):
        return f"{processor.__name__}, which may attend to other images of the batch"
    return None


def decode(vae: AutoencoderKL, latents: Tensor, in_full: bool = False) -> Tensor:
    """Return the pixels of latents on the VAE's scale, decoded again in float32 if half precision overflows.

    Args:
        in_full: decode a float16 VAE in float32 at once, as its config may ask for.
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
    """Convert a half-precision VAE to float32 inside the ``with`` block."""
    half = vae.dtype
    with quiet():  # diffusers warns that some modules should stay in float32, even if there are none
        vae.to(torch.float32)
    try:
        yield
    finally:
        with quiet():
            vae.to(half)
