"""The pipelines around a U-Net-NAS: diffusers' own, with the publisher's defaults and a door that says what is wrong.

One for each task. They are made of the same parts, which ``from_pipe`` and ``load_pipeline(pipe, task=...)`` hand from
one to the other: nothing is loaded twice.
"""

import inspect
import json
import warnings
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    DiffusionPipeline,
    SchedulerMixin,
    StableDiffusionDepth2ImgPipeline,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionPipeline,
)
from diffusers.pipelines import auto_pipeline
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTokenizer

from decinb.errors import InputError, ModelError
from decinb.images import load_images
from decinb.models import image_size
from decinb.unet_nas import UNetNAS
from decinb.utils import validation
from decinb.utils.locks import pipeline_lock
from decinb.utils.quiet import quiet


class _DeciDiffusion:
    """What all of them add to diffusers' pipeline, which comes after this class in the order of their bases."""

    deci_default_number_of_iterations = 30
    deci_default_guidance_rescale = 0.7
    """The publisher's defaults. The second is of text to image: image to image has no such argument."""

    @property
    def image_size(self) -> int:
        """Height and width in pixels of the images that the model was trained on."""
        return image_size(self)

    @classmethod
    def from_pipe(cls, pipeline: DiffusionPipeline, **kwargs: Any) -> Any:
        """As diffusers does, but without a word, and the shared parts keep their dtype: its own makes them float32."""
        if "torch_dtype" not in kwargs:
            kwargs.setdefault("dtype", pipeline.dtype)
        with quiet():
            return super().from_pipe(pipeline, **kwargs)

    def encode_prompt(self, *args: Any, **kwargs: Any) -> Any:
        """As diffusers does, which logs page after page of a long prompt: what is cut off was told at the door."""
        with quiet():
            return super().encode_prompt(*args, **kwargs)

    def to_json_string(self) -> str:
        """The config, for the saved index. It names diffusers' class: its own loaders know no other."""
        index = json.loads(super().to_json_string())
        index["_class_name"] = self._stock.__name__
        return json.dumps(index, indent=2, sort_keys=True) + "\n"

    @property
    def _stock(self) -> type[DiffusionPipeline]:
        """The class of diffusers that this one goes by."""
        mro = type(self).__mro__
        return mro[mro.index(_DeciDiffusion) + 1]

    def _checked_call(self, *given: Any, **named: Any) -> Any:
        """The stock call, with arguments that can run, and with what it leaves out filled in."""
        signature = inspect.signature(self._stock.__call__)
        arguments = [name for name in signature.parameters if name not in ("self", "kwargs")]
        validation.known(named, arguments)
        bound = signature.bind(self, *given, **named)
        bound.apply_defaults()
        return self._watched(**self._understood({name: bound.arguments[name] for name in arguments}))

    def _understood(self, given: dict[str, Any]) -> dict[str, Any]:
        """The arguments of a call as plain values that can run, with a warning of what will surprise."""
        # A schedule of the user's own, where the task takes one.
        own = given.get("sigmas") if given.get("timesteps") is None else given["timesteps"]
        steps = given["num_inference_steps"] if own is None else len(own)
        steps = validation.num_inference_steps(self.deci_default_number_of_iterations if steps is None else steps)
        scale = validation.guidance_scale(given["guidance_scale"])
        per_prompt = validation.count(given["num_images_per_prompt"], "num_images_per_prompt")
        read: dict[str, list[Any]] = {}
        plain: dict[str, Any] = {}
        if "image" in given:
            plain["strength"] = validation.strength(given["strength"])
            validation.steps_run(steps, plain["strength"])
            latents = validation.latents(given["image"], self.vae.config.latent_channels)
            if latents is not None and "depth_map" in given:
                raise InputError("image must be a picture here, not latents: its depth is seen in it")
            read["image"] = load_images(given["image"]) if latents is None else list(latents.split(1))
        else:
            plain |= {
                name: validation.side(given[name], name) for name in ("height", "width") if given[name] is not None
            }
            plain["guidance_rescale"] = validation.fraction(given["guidance_rescale"], "guidance_rescale")
        for name in ("prompt", "negative_prompt"):
            if given[name] is not None or (name == "prompt" and given["prompt_embeds"] is None):
                read[name] = validation.texts(given[name], name)
        embeds = [name for name in ("prompt_embeds", "negative_prompt_embeds") if given[name] is not None]
        width = self.unet.config.get("configurations", self.unet.config)["cross_attention_dim"]
        for name in embeds:
            plain[name] = validation.embeds(given[name], name, width)
        if len({tuple(given[name].shape[1:]) for name in embeds}) > 1:
            shapes = " and ".join(f"{name} {tuple(given[name].shape)}" for name in embeds)
            raise InputError(
                f"prompt_embeds and negative_prompt_embeds must have as many tokens of one width, got {shapes}"
            )
        lengths = {name: len(values) for name, values in read.items()} | {name: len(given[name]) for name in embeds}
        if given.get("depth_map") is not None:
            lengths["depth_map"] = len(validation.depth_map(given["depth_map"]))
        most = validation.together(**lengths)
        validation.generators(given["generator"], most * per_prompt)

        notes = [validation.high_guidance(scale)]
        if own is None:
            notes.append(validation.late_start(steps, self.scheduler))
        if scale <= 1 and any(read.get("negative_prompt", [])):
            notes.append(validation.unused_negative(scale))
        for name in ("prompt", "negative_prompt") if scale > 1 else ("prompt",):
            for words in dict.fromkeys(read.get(name, [])):
                if lost := validation.lost_words(words, self.tokenizer):
                    notes.append(validation.lost(name, lost))
        for note in filter(None, notes):
            validation.warn(note)

        for name, values in read.items():
            as_many = values * (most // len(values))
            plain[name] = torch.cat(as_many) if torch.is_tensor(values[0]) else values[0] if most == 1 else as_many
        return given | {
            **plain,
            **{name: plain[name].expand(most, -1, -1) for name in embeds},
            "guidance_scale": scale,
            "num_inference_steps": steps,
            "num_images_per_prompt": per_prompt,
            "eta": validation.fraction(given["eta"], "eta"),
            "output_type": validation.choice(given["output_type"], "output_type", ("pil", "np", "pt", "latent")),
        }

    def _watched(self, **named: Any) -> Any:
        """The stock call, one thread at a time, and with an error where it would make NaN a black picture."""
        theirs = named.get("callback_on_step_end")
        wanted = (
            getattr(theirs, "tensor_inputs", None) or named.get("callback_on_step_end_tensor_inputs") or ["latents"]
        )
        finite: list[Tensor] = []  # a flag a step, read at the end: until then a GPU need not wait
        decoded: list[Tensor] = []

        def watch(pipe: Any, step: int, timestep: Any, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
            changed = theirs(pipe, step, timestep, {name: tensors[name] for name in wanted}) if theirs else None
            finite.append({**tensors, **(changed or {})}["latents"].isfinite().all())
            return changed or {}

        def look(decoder: nn.Module, given: Any, pixels: Tensor) -> Tensor:
            decoded.append(pixels.isfinite().all())
            return pixels.nan_to_num()

        with pipeline_lock(self):
            hook = self.vae.decoder.register_forward_hook(look)
            try:
                watched = {"callback_on_step_end": watch, "callback_on_step_end_tensor_inputs": [*wanted, "latents"]}
                made = super().__call__(**{**named, **watched})
            finally:
                hook.remove()
        if not all(finite) or not all(decoded):
            lost = next((step for step, fine in enumerate(finite, 1) if not fine), None)
            where = f"the U-Net or its guidance, at step {lost}" if lost else "the VAE's decoder, after step"
            where += f" of {len(finite)}" if lost else f" {len(finite)} of {len(finite)}"
            raise ModelError(
                f"no picture was made, only NaN or infinity, by {where}: lower guidance_scale, or load_pipeline with "
                "dtype='float32'"
            )
        return made


class _WithoutSafetyChecker(_DeciDiffusion):
    """The constructor of the two that have room for a safety checker, which DeciDiffusion was published without."""

    def __init__(
        self,
        vae: AutoencoderKL,
        text_encoder: CLIPTextModel,
        tokenizer: CLIPTokenizer,
        unet: UNetNAS,
        scheduler: SchedulerMixin,
        safety_checker: nn.Module | None = None,
        feature_extractor: Any = None,
        image_encoder: nn.Module | None = None,
        requires_safety_checker: bool = False,
    ):
        super().__init__(
            vae=vae,
            text_encoder=text_encoder,
            tokenizer=tokenizer,
            unet=unet,
            scheduler=scheduler,
            safety_checker=safety_checker,
            feature_extractor=feature_extractor,
            image_encoder=image_encoder,
            requires_safety_checker=requires_safety_checker,
        )


class DeciDiffusionImg2ImgPipeline(_WithoutSafetyChecker, StableDiffusionImg2ImgPipeline):
    """Image to image with DeciDiffusion: diffusers' own pipeline, the publisher's defaults, no safety checker.

    What it saves is an ordinary diffusers folder: this class loads it again, and so do, once decinb is imported,
    ``DiffusionPipeline`` and ``AutoPipelineForImage2Image``.
    """

    def __call__(
        self,
        prompt: str | list[str] | None = None,
        image: Any = None,
        strength: float = 0.8,
        num_inference_steps: int | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        """As ``StableDiffusionImg2ImgPipeline``, with 30 for ``num_inference_steps`` where none is given.

        Pictures are read as ``load_image`` reads them, so a path or an array will do, and are cut to a multiple of 8.
        Latents, (images, 4, height / 8, width / 8), are taken as another pipeline with ``output_type="latent"`` gave
        them. One prompt serves for several pictures, and one picture for several prompts.

        Raises:
            InputError: an argument cannot be used, or its name is not known; the message says what is allowed.
            ModelError: NaN or infinity came out.
        """
        return self._checked_call(prompt, image, strength, num_inference_steps, *args, **kwargs)


DeciDiffusionPipeline_img2img = DeciDiffusionImg2ImgPipeline
"""The name that the guide gives the class."""


class DeciDiffusionPipeline(_WithoutSafetyChecker, StableDiffusionPipeline):
    """Text to image with DeciDiffusion: diffusers' own pipeline, the publisher's defaults, no safety checker."""

    def __call__(
        self,
        prompt: str | list[str] | None = None,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int | None = None,
        *args: Any,
        guidance_rescale: float = _DeciDiffusion.deci_default_guidance_rescale,
        **kwargs: Any,
    ) -> Any:
        """As ``StableDiffusionPipeline``, with 30 steps and a guidance rescale of 0.7 where they are not given.

        ``height`` and ``width`` are in pixels, multiples of 8 from 64 to 2048; by default what the model knows.

        Raises:
            InputError: an argument cannot be used, or its name is not known; the message says what is allowed.
            ModelError: NaN or infinity came out.
        """
        kwargs["guidance_rescale"] = guidance_rescale
        return self._checked_call(prompt, height, width, num_inference_steps, *args, **kwargs)


class DeciDiffusionDepth2ImgPipeline(_DeciDiffusion, StableDiffusionDepth2ImgPipeline):
    """Depth to image with a U-Net-NAS that sees the depth of the input in a fifth channel."""

    def __call__(
        self,
        prompt: str | list[str] | None = None,
        image: Any = None,
        depth_map: Tensor | None = None,
        strength: float = 0.8,
        num_inference_steps: int | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        """As ``StableDiffusionDepth2ImgPipeline``, with 30 for ``num_inference_steps`` where none is given.

        ``depth_map`` is (images, height, width) of any size, larger where it is nearer; without one, the model's own
        estimator looks at the picture.

        Raises:
            InputError: an argument cannot be used, or its name is not known; the message says what is allowed.
            ModelError: NaN or infinity came out.
        """
        return self._checked_call(prompt, image, depth_map, strength, num_inference_steps, *args, **kwargs)

    def prepare_depth_map(self, *args: Any, **kwargs: Any) -> Tensor:
        """As diffusers does, which asks for half precision on any device, and for float32 where that is meant."""
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "In CPU autocast", UserWarning)
            return super().prepare_depth_map(*args, **kwargs)


# The auto pipelines of diffusers find them by their names here, when one hands its parts to the other.
auto_pipeline.AUTO_IMAGE2IMAGE_PIPELINES_MAPPING["decidiffusion"] = DeciDiffusionImg2ImgPipeline
auto_pipeline.AUTO_TEXT2IMAGE_PIPELINES_MAPPING["decidiffusion"] = DeciDiffusionPipeline


def is_decidiffusion(pipe: DiffusionPipeline) -> bool:
    """Whether it is one of the pipelines above, whose calls look at their arguments themselves."""
    return isinstance(pipe, _DeciDiffusion)
