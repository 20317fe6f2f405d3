"""The DeciDiffusion pipelines: diffusers' own with a U-Net-NAS, the publisher's defaults, and input validation.

There is one for each task. They share their components: ``from_pipe`` and ``load_pipeline(pipe, task=...)`` make one
pipeline from another without loading anything twice.
"""

import copy
import inspect
import json
import math
import warnings
from collections.abc import Callable
from functools import wraps
from typing import Any

import diffusers
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
from decinb.models import defaults_of, image_size
from decinb.unet_nas import UNetNAS
from decinb.utils import validation
from decinb.utils.locks import pipeline_lock
from decinb.utils.quiet import quiet

OUTPUT_TYPES = ("pil", "np", "pt", "latent")
BATCHED = ("image", "prompt", "negative_prompt", "prompt_embeds", "negative_prompt_embeds", "depth_map")
"""The arguments that are given once for all images of a call, or once for each."""
DEPRECATED = ("callback", "callback_steps")
"""Older arguments that diffusers still takes, among its ``**kwargs``."""
DEFAULT_STEPS = 30
DEFAULT_GUIDANCE_RESCALE = 0.7


def _arguments_of(stock: type[DiffusionPipeline], **defaults: Any) -> Callable[[Callable[..., Any]], Any]:
    """Decorate a ``__call__``: it gets the arguments of a diffusers pipeline's call, all of them as one dict.

    Their names, their order and their defaults are those of diffusers, except for the ``defaults`` given here. Help and
    completion in notebooks show them. Where the pipeline's model has defaults of its own, a call uses those.
    """
    theirs = inspect.signature(stock.__call__).parameters.values()
    own = inspect.Signature([one.replace(default=defaults.get(one.name, one.default)) for one in theirs])
    names = [name for name, one in own.parameters.items() if name != "self" and one.kind is not one.VAR_KEYWORD]
    allowed = [*names, *DEPRECATED] if len(names) + 1 < len(own.parameters) else names

    def decorate(call: Callable[..., Any]) -> Any:
        @wraps(call)
        def __call__(self: Any, *args: Any, **kwargs: Any) -> Any:
            validation.known(kwargs, allowed)
            bound = own.bind(self, *args, **kwargs)
            for name, value in defaults_of(self).items():
                bound.arguments.setdefault(name, value)
            bound.apply_defaults()
            return call(self, {name: bound.arguments[name] for name in names} | bound.arguments.get("kwargs", {}))

        __call__.__signature__ = own
        return __call__

    return decorate


class _DeciDiffusion:
    """What all DeciDiffusion pipelines add to the diffusers pipeline that they also inherit from.

    A call validates each argument, then brings all of them to the same number of images, then warns about settings
    that may surprise, and then runs the call of diffusers.
    """

    deci_default_number_of_iterations = DEFAULT_STEPS
    """The publisher's default of ``num_inference_steps``."""
    deci_default_guidance_rescale = DEFAULT_GUIDANCE_RESCALE
    """The publisher's default of ``guidance_rescale``, which only text to image takes."""

    @property
    def image_size(self) -> int:
        """Height and width in pixels of the images that the model was trained on."""
        return image_size(self)

    @classmethod
    def from_pipe(cls, pipeline: DiffusionPipeline, **kwargs: Any) -> Any:
        """Create a pipeline from the components of another, as in diffusers, but silently and with the same dtype.

        diffusers alone would convert the shared components to float32.
        """
        if not kwargs.keys() & {"dtype", "torch_dtype"}:
            is_old = diffusers.__version__.startswith("0.39.")
            kwargs["torch_dtype" if is_old else "dtype"] = pipeline.dtype
        with quiet():
            return super().from_pipe(pipeline, **kwargs)

    def encode_prompt(self, *args: Any, **kwargs: Any) -> Any:
        """Encode a prompt as diffusers does, but silently: the call has already warned if it is too long."""
        encoder, pipe = self.text_encoder, self
        if encoder is not None and not hasattr(encoder, "text_model"):
            pipe = copy.copy(self)  # the text encoder itself may be in use by another thread
            vars(pipe)["text_encoder"] = _WithTextModel(encoder)
        with quiet():
            return super(_DeciDiffusion, pipe).encode_prompt(*args, **kwargs)

    def to_json_string(self) -> str:
        """Return the configuration for ``model_index.json``, under the class name that diffusers itself can load."""
        index = json.loads(super().to_json_string())
        index["_class_name"] = self._stock.__name__
        return json.dumps(index, indent=2, sort_keys=True) + "\n"

    @property
    def _stock(self) -> type[DiffusionPipeline]:
        """The pipeline class of diffusers that this one is built on."""
        mro = type(self).__mro__
        return mro[mro.index(_DeciDiffusion) + 1]

    def _checked_call(self, arguments: dict[str, Any]) -> Any:
        """Run the call of diffusers once all of its arguments are known to be valid."""
        self._check_components(arguments)
        arguments = self._broadcast(self._validate(arguments))
        self._warn(arguments)
        return self._run(arguments)

    def _check_components(self, arguments: dict[str, Any]) -> None:
        """Refuse a call that needs a component which the pipeline does not have."""
        needed = ["vae", "unet", "scheduler"]
        guided = validation.guidance_scale(arguments["guidance_scale"]) > 1
        if arguments["prompt_embeds"] is None or (guided and arguments["negative_prompt_embeds"] is None):
            needed += ["text_encoder", "tokenizer"]
        if missing := [name for name in needed if getattr(self, name, None) is None]:
            raise InputError(f"this pipeline has no {' and no '.join(missing)}: set it, as in pipe.{missing[0]} = ...")
        if getattr(self.unet, "encoder_hid_proj", None) is None:
            for name in ("ip_adapter_image", "ip_adapter_image_embeds"):
                if arguments.get(name) is not None:
                    raise InputError(f"{name} must be left out: {type(self.unet).__name__} takes no image prompts here")

    def _validate(self, arguments: dict[str, Any]) -> dict[str, Any]:
        """Return the arguments with each of them validated by itself; prompts become lists."""
        valid = dict(arguments)
        valid["num_inference_steps"] = self._validate_steps(arguments)
        valid["guidance_scale"] = validation.guidance_scale(arguments["guidance_scale"])
        valid["num_images_per_prompt"] = validation.count(arguments["num_images_per_prompt"], "num_images_per_prompt")
        valid["eta"] = validation.fraction(arguments["eta"], "eta")
        valid["output_type"] = validation.choice(arguments["output_type"], "output_type", OUTPUT_TYPES)
        valid["clip_skip"] = self._validate_clip_skip(arguments["clip_skip"])
        more = arguments["cross_attention_kwargs"]
        if more is not None and not (isinstance(more, dict) and all(isinstance(name, str) for name in more)):
            raise InputError(
                "cross_attention_kwargs must be a dict with strings as keys, such as {'scale': 0.5}, "
                f"got {validation.short_repr(more)}"
            )
        for name in ("callback", "callback_on_step_end"):
            if arguments.get(name) is not None and not callable(arguments[name]):
                raise InputError(f"{name} must be a function, got {validation.short_repr(arguments[name])}")
        name, allowed = "callback_on_step_end_tensor_inputs", self._callback_tensor_inputs
        wanted = arguments.get(name)
        if wanted is not None and not (
            isinstance(wanted, (list, tuple)) and all(isinstance(one, str) and one in allowed for one in wanted)
        ):
            given = validation.short_repr(wanted)
            raise InputError(f"{name} must be a list of some of {', '.join(allowed)}, got {given}")
        if arguments.get("callback") is not None:
            valid["callback_steps"] = validation.count(arguments.get("callback_steps") or 1, "callback_steps")
        return valid | self._validate_prompts(arguments)

    def _validate_steps(self, arguments: dict[str, Any]) -> int:
        """Return the number of steps: that of a custom schedule if there is one."""
        given = [name for name in ("timesteps", "sigmas") if arguments.get(name) is not None]
        if not given:
            steps = arguments["num_inference_steps"]
            if steps is None:
                steps = defaults_of(self).get("num_inference_steps", self.deci_default_number_of_iterations)
            return validation.num_inference_steps(steps)
        if len(given) > 1:
            raise InputError("timesteps and sigmas are two ways to give one schedule: leave out one of them")
        (name,) = given
        if name not in inspect.signature(self.scheduler.set_timesteps).parameters:
            raise InputError(f"{name} must be left out: {type(self.scheduler).__name__} takes no custom {name}")
        return validation.num_inference_steps(len(validation.bounded_list(arguments[name], name, validation.MAX_STEPS)))

    def _validate_clip_skip(self, value: Any) -> int | None:
        """Return how many of the text encoder's last layers to skip."""
        if value is None or self.text_encoder is None:
            return None
        return validation.integer(value, "clip_skip", 0, self.text_encoder.config.num_hidden_layers)

    def _validate_prompts(self, arguments: dict[str, Any]) -> dict[str, Any]:
        """Return the prompts that are given as lists, and the embeddings that are given as tensors."""
        valid: dict[str, Any] = {}
        for name in ("prompt", "negative_prompt"):
            if arguments[name] is not None and arguments[f"{name}_embeds"] is not None:
                raise InputError(f"{name} and {name}_embeds are two ways to give one text: leave out one of them")
        if arguments["prompt"] is not None or arguments["prompt_embeds"] is None:
            valid["prompt"] = validation.texts(arguments["prompt"], "prompt")
        if arguments["negative_prompt"] is not None:
            valid["negative_prompt"] = validation.texts(arguments["negative_prompt"], "negative_prompt")
        width = self.unet.config.get("configurations", self.unet.config)["cross_attention_dim"]
        given = [name for name in ("prompt_embeds", "negative_prompt_embeds") if arguments[name] is not None]
        embeds = {name: validation.embeds(arguments[name], name, width) for name in given}
        if len({value.shape[1] for value in embeds.values()}) > 1:
            shapes = " and ".join(f"{name} {tuple(value.shape)}" for name, value in embeds.items())
            raise InputError(
                f"prompt_embeds and negative_prompt_embeds must have the same number of tokens, got {shapes}"
            )
        return valid | embeds

    def _validate_image(self, arguments: dict[str, Any], exact: bool = True) -> dict[str, Any]:
        """Return the validated arguments of image to image; images become a list, latents and floats stay a tensor."""
        strength = validation.strength(arguments["strength"])
        validation.steps_run(arguments["num_inference_steps"], strength)
        image = validation.latents(arguments["image"], self.vae.config.latent_channels)
        if image is None:
            image = load_images(arguments["image"], self.vae_scale_factor, exact)
        return {"strength": strength, "image": image}

    def _broadcast(self, arguments: dict[str, Any]) -> dict[str, Any]:
        """Return the arguments with equally many images and prompts: a single one is repeated.

        A single image is left to diffusers, which encodes it once, so that a generator gives what it gives there.
        """
        batched = {name: arguments[name] for name in BATCHED if arguments.get(name) is not None}
        size = validation.batch_size(**{name: len(values) for name, values in batched.items()})
        number = size * arguments["num_images_per_prompt"]
        validation.generators(arguments["generator"], number)
        if (latents := arguments.get("latents")) is not None and len(latents) != number:
            raise InputError(f"latents must have one row for each of the {number} images, got {len(latents)}")
        repeated = {name: _repeat(values, len(values) if name == "image" else size) for name, values in batched.items()}
        return arguments | repeated

    def _warn(self, arguments: dict[str, Any]) -> None:
        """Warn about settings that can run, but may surprise."""
        scale, steps = arguments["guidance_scale"], arguments["num_inference_steps"]
        prompts = {name: _distinct(arguments[name]) for name in ("prompt", "negative_prompt")}
        notes = [validation.high_guidance(scale)]
        if _custom_schedule(arguments) is None:
            notes.append(validation.late_start(steps, self.scheduler))
        if scale <= 1:
            notes += [validation.unused_negative(scale)] if any(prompts.pop("negative_prompt")) else []
        for name, texts in prompts.items():
            cut = [validation.lost_words(text, self.tokenizer) for text in texts]
            notes += [validation.lost(name, words) for words in cut if words]
        for note in filter(None, notes):
            validation.warn(note)

    def _run(self, arguments: dict[str, Any]) -> Any:
        """Run the call of diffusers, one thread at a time; raise a ModelError instead of returning a black image."""
        callback = arguments.get("callback_on_step_end")
        wanted = (
            getattr(callback, "tensor_inputs", None)
            or arguments.get("callback_on_step_end_tensor_inputs")
            or ["latents"]
        )
        finite: list[Tensor] = []  # one flag a step, read only at the end so that a GPU need not wait
        decoded: list[Tensor] = []

        def check_step(pipe: Any, step: int, timestep: Any, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
            changed = callback(pipe, step, timestep, {name: tensors[name] for name in wanted}) if callback else None
            finite.append({**tensors, **(changed or {})}["latents"].isfinite().all())
            return changed or {}

        def check_pixels(decoder: nn.Module, args: Any, pixels: Tensor) -> Tensor:
            decoded.append(pixels.isfinite().all())
            return pixels.nan_to_num()

        checks = {"callback_on_step_end": check_step, "callback_on_step_end_tensor_inputs": [*wanted, "latents"]}
        with pipeline_lock(self), warnings.catch_warnings():
            warnings.filterwarnings("ignore", "You have passed .* initial images", FutureWarning)  # allowed here
            # A ConsistencyDecoderVAE has no decoder of this name; its pixels are not checked.
            hook = getattr(self.vae, "decoder", self.vae).register_forward_hook(check_pixels)
            try:
                output = super().__call__(**{**arguments, **checks})
            except ValueError as error:
                if "more than 1 value per channel" in str(error):  # group norms that have one value in each group
                    raise InputError(
                        "image is too small for the group norms of this model: use a larger one"
                    ) from error
                raise
            finally:
                hook.remove()
        if not all(finite) or not all(decoded):
            first = next((step for step, is_finite in enumerate(finite, 1) if not is_finite), None)
            after = f"the VAE's decoder returned NaN or infinity, after step {len(finite)} of {len(finite)}"
            cause = f"the U-Net or guidance gave NaN or infinity at step {first} of {len(finite)}" if first else after
            raise ModelError(
                f"no image was made: {cause}; lower guidance_scale, or load the model with dtype='float32'"
            )
        return output


class _WithoutSafetyChecker(_DeciDiffusion):
    """A constructor without a safety checker by default: DeciDiffusion was published without one."""

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
    """Pipeline for text-guided image to image with DeciDiffusion.

    It inherits from [`StableDiffusionImg2ImgPipeline`], with the publisher's default of 30 steps and without a safety
    checker. ``save_pretrained`` writes an ordinary diffusers folder. This class loads it again, and so do
    ``DiffusionPipeline`` and ``AutoPipelineForImage2Image`` once decinb is imported.
    """

    @_arguments_of(StableDiffusionImg2ImgPipeline, num_inference_steps=DEFAULT_STEPS)
    def __call__(self, arguments: dict[str, Any]) -> Any:
        """Generate images from images and prompts.

        One image serves for several prompts, and one prompt for several images. The arguments are those of
        ``StableDiffusionImg2ImgPipeline.__call__``; it also describes those that are not listed here.

        Args:
            prompt: at most 4,000 characters; a text encoder reads 75 tokens, about 300 characters.
            image: whatever ``load_image`` takes, a list of such images of the same size, a tensor (images, channels,
                height, width) or array (images, height, width, channels), or latents (images, 4, height / 8, width / 8)
                from a call with ``output_type="latent"``. Floats, from 0 to 1, are not rounded. Sides are cropped to
                multiples of the VAE's factor, 8 in most models, which is also the smallest side.
            strength: how much of the image to replace: above 0, at most 1.
            num_inference_steps: the steps for a strength of 1, 1 to 999. Defaults to 30.

        Returns:
            What ``StableDiffusionImg2ImgPipeline.__call__`` returns.

        Raises:
            InputError: an argument is unknown or cannot be used; the message says what is allowed.
            ModelError: the model gave NaN or infinity.
        """
        return self._checked_call(arguments)

    def _validate(self, arguments: dict[str, Any]) -> dict[str, Any]:
        valid = super()._validate(arguments)
        return valid | self._validate_image(valid)


DeciDiffusionPipeline_img2img = DeciDiffusionImg2ImgPipeline
"""The guide's name for the class."""


class DeciDiffusionPipeline(_WithoutSafetyChecker, StableDiffusionPipeline):
    """Pipeline for text to image with DeciDiffusion.

    It inherits from [`StableDiffusionPipeline`], with the publisher's defaults of 30 steps and a guidance rescale of
    0.7, and without a safety checker.
    """

    @_arguments_of(
        StableDiffusionPipeline, num_inference_steps=DEFAULT_STEPS, guidance_rescale=DEFAULT_GUIDANCE_RESCALE
    )
    def __call__(self, arguments: dict[str, Any]) -> Any:
        """Generate images from prompts.

        The arguments are those of ``StableDiffusionPipeline.__call__``; it also describes those that are not listed
        here.

        Args:
            prompt: at most 4,000 characters; a text encoder reads 75 tokens, about 300 characters.
            height, width: of the images in pixels, multiples of 8 up to 2048. Default to ``image_size``.
            num_inference_steps: 1 to 999. Defaults to 30.
            guidance_rescale: how far to rescale the guided prediction to the spread of the unguided one, 0 to 1
                (https://huggingface.co/papers/2305.08891). Defaults to 0.7.

        Returns:
            What ``StableDiffusionPipeline.__call__`` returns.

        Raises:
            InputError: an argument is unknown or cannot be used; the message says what is allowed.
            ModelError: the model gave NaN or infinity.
        """
        return self._checked_call(arguments)

    def _validate(self, arguments: dict[str, Any]) -> dict[str, Any]:
        valid = super()._validate(arguments)
        valid["guidance_rescale"] = validation.fraction(arguments["guidance_rescale"], "guidance_rescale")
        multiple = math.lcm(validation.MULTIPLE, self.vae_scale_factor)
        sides = [name for name in ("height", "width") if arguments[name] is not None]
        if arguments["latents"] is not None:
            channels = self.unet.config.in_channels
            if validation.latents(arguments["latents"], channels, "latents") is None:
                given = arguments["latents"]
                got = tuple(given.shape) if torch.is_tensor(given) else validation.short_repr(given)
                raise InputError(f"latents must be a float tensor (images, {channels}, height, width), got {got}")
        return valid | {name: validation.side(arguments[name], name, multiple) for name in sides}


class DeciDiffusionDepth2ImgPipeline(_DeciDiffusion, StableDiffusionDepth2ImgPipeline):
    """Pipeline for depth-guided image to image with a U-Net-NAS whose fifth input channel is the depth of the image.

    It inherits from [`StableDiffusionDepth2ImgPipeline`], with a default of 30 steps.
    """

    @_arguments_of(StableDiffusionDepth2ImgPipeline, num_inference_steps=DEFAULT_STEPS)
    def __call__(self, arguments: dict[str, Any]) -> Any:
        """Generate images from images, their depth, and prompts.

        The arguments are those of ``StableDiffusionDepth2ImgPipeline.__call__``; it also describes those that are not
        listed here.

        Args:
            prompt: at most 4,000 characters; a text encoder reads 75 tokens, about 300 characters.
            image: whatever ``load_image`` takes, or a list of such images of the same size.
            depth_map: a float tensor (images, height, width) of any size, larger where it is nearer. By default the
                pipeline's depth estimator makes it from the image.
            strength: how much of the image to replace: above 0, at most 1.
            num_inference_steps: the steps for a strength of 1, 1 to 999. Defaults to 30.

        Returns:
            What ``StableDiffusionDepth2ImgPipeline.__call__`` returns.

        Raises:
            InputError: an argument is unknown or cannot be used; the message says what is allowed.
            ModelError: the model gave NaN or infinity.
        """
        return self._checked_call(arguments)

    def prepare_depth_map(self, *args: Any, **kwargs: Any) -> Tensor:
        """Prepare the depth as diffusers does, without torch's warning about half precision on the CPU."""
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "In CPU autocast", UserWarning)
            return super().prepare_depth_map(*args, **kwargs)

    def _validate(self, arguments: dict[str, Any]) -> dict[str, Any]:
        valid = super()._validate(arguments)
        valid |= self._validate_image(valid, exact=False)
        if torch.is_tensor(valid["image"]):
            raise InputError("image must not be latents here: depth is estimated from pixels")
        if valid["image"][0].size == (self.vae_scale_factor,) * 2:
            raise InputError(
                f"image must be larger than {self.vae_scale_factor} x {self.vae_scale_factor} pixels: the depth of a "
                "single latent pixel is constant"
            )
        if arguments["depth_map"] is not None:
            valid["depth_map"] = validation.depth_map(arguments["depth_map"])
        return valid


# diffusers' auto pipelines look the classes up here, in from_pipe and from_pretrained.
auto_pipeline.AUTO_IMAGE2IMAGE_PIPELINES_MAPPING["decidiffusion"] = DeciDiffusionImg2ImgPipeline
auto_pipeline.AUTO_TEXT2IMAGE_PIPELINES_MAPPING["decidiffusion"] = DeciDiffusionPipeline


def is_decidiffusion(pipe: DiffusionPipeline) -> bool:
    """Return whether a pipeline is one of the above, whose calls validate their arguments themselves."""
    return isinstance(pipe, _DeciDiffusion)


def _custom_schedule(arguments: dict[str, Any]) -> Any:
    """Return the timesteps or sigmas that a call gives; None if it leaves the schedule to the scheduler."""
    return arguments.get("sigmas") if arguments.get("timesteps") is None else arguments["timesteps"]


class _WithTextModel:
    """A text encoder of transformers 5 with the attribute ``text_model``, where diffusers looks for its last norm."""

    def __init__(self, text_encoder: nn.Module):
        self.text_model = text_encoder

    def __getattr__(self, name: str) -> Any:
        return getattr(self.text_model, name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.text_model(*args, **kwargs)


def _repeat(values: Any, size: int) -> Any:
    """Repeat values until there are ``size`` of them; a list of one item becomes that item."""
    if torch.is_tensor(values):
        return values.expand(size, *values.shape[1:])
    return values[0] if size == 1 else values * (size // len(values))


def _distinct(texts: str | list[str] | None) -> list[str]:
    """Return the distinct texts of an argument that is one text, a list of texts or None."""
    return list(dict.fromkeys([texts] if isinstance(texts, str) else texts or []))
