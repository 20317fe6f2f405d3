"""The image-to-image pipeline around a U-Net-NAS, the models it is known to run, and how one is loaded.

Loading builds every part with a class named here. No code comes from a model's folder or from the hub, whatever its
files say.
"""

import difflib
import inspect
import json
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from decinb import allocator, hub, inputs, tuning
from decinb.errors import InputError, ModelError
from decinb.images import load_images
from decinb.locks import turn
from decinb.quiet import quiet
from decinb.weights import check_file, check_numbers

with quiet():  # importing these tells of optional libraries that are not needed here
    import diffusers
    from diffusers import AutoencoderKL, DDIMScheduler, SchedulerMixin, StableDiffusionImg2ImgPipeline
    from transformers import CLIPTextModel, CLIPTokenizer

    from decinb.unet_nas import UNetNAS, refuse_partial

SIGNATURE = inspect.signature(StableDiffusionImg2ImgPipeline.__call__)
ARGUMENTS = [name for name in SIGNATURE.parameters if name not in ("self", "kwargs")]
"""What a call of the pipeline takes."""


class DeciDiffusionImg2ImgPipeline(StableDiffusionImg2ImgPipeline):
    """Image to image with DeciDiffusion: diffusers' own pipeline, the publisher's defaults, no safety checker.

    What it saves is an ordinary diffusers folder: this class loads it again, and so do, once decinb is imported,
    ``DiffusionPipeline`` and ``AutoPipelineForImage2Image``.
    """

    deci_default_number_of_iterations = 30
    deci_default_guidance_rescale = 0.7
    """The publisher's default for text to image. Kept for the guide's sake: image to image has no such argument."""

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
        One prompt serves for several pictures, and one picture for several prompts.

        Raises:
            InputError: an argument cannot be used, or its name is not known; the message says what is allowed.
        """
        inputs.known(kwargs, ARGUMENTS)
        bound = SIGNATURE.bind(self, prompt, image, strength, num_inference_steps, *args, **kwargs)
        bound.apply_defaults()
        return self._watched(**self._understood({name: bound.arguments[name] for name in ARGUMENTS}))

    def _understood(self, given: dict[str, Any]) -> dict[str, Any]:
        """The arguments of a call as plain values that can run, with a warning of what will surprise."""
        own = given["sigmas"] if given["timesteps"] is None else given["timesteps"]  # a schedule of the user's own
        steps = given["num_inference_steps"] if own is None else len(own)
        steps = inputs.num_inference_steps(self.deci_default_number_of_iterations if steps is None else steps)
        strength, scale = inputs.strength(given["strength"]), inputs.guidance_scale(given["guidance_scale"])
        inputs.steps_run(steps, strength)
        per_prompt = inputs.number_of(given["num_images_per_prompt"], "num_images_per_prompt")
        read: dict[str, list[Any]] = {"image": load_images(given["image"])}
        for name in ("prompt", "negative_prompt"):
            if given[name] is not None or (name == "prompt" and given["prompt_embeds"] is None):
                read[name] = inputs.texts(given[name], name)
        embeds = [name for name in ("prompt_embeds", "negative_prompt_embeds") if given[name] is not None]
        lengths = {name: len(values) for name, values in read.items()} | {name: len(given[name]) for name in embeds}
        most = inputs.together(**lengths)
        inputs.generators(given["generator"], most * per_prompt)

        notes = [inputs.high_guidance(scale)]
        if own is None:
            notes.append(inputs.late_start(steps, self.scheduler))
        if scale <= 1 and any(read.get("negative_prompt", [])):
            notes.append(inputs.unused_negative(scale))
        for name in ("prompt", "negative_prompt") if scale > 1 else ("prompt",):
            for words in dict.fromkeys(read.get(name, [])):
                if lost := inputs.lost_words(words, self.tokenizer):
                    notes.append(inputs.lost(name, lost))
        for note in filter(None, notes):
            inputs.warn(note)

        return given | {
            **{name: values[0] if most == 1 else values * (most // len(values)) for name, values in read.items()},
            **{name: given[name].expand(most, -1, -1) for name in embeds},
            "strength": strength,
            "guidance_scale": scale,
            "num_inference_steps": steps,
            "num_images_per_prompt": per_prompt,
            "eta": inputs.share(given["eta"], "eta"),
            "output_type": inputs.choice(given["output_type"], "output_type", ("pil", "np", "pt", "latent")),
        }

    def encode_prompt(self, *args: Any, **kwargs: Any) -> Any:
        """As diffusers does, which logs page after page of a long prompt: what is cut off was told at the door."""
        with quiet():
            return super().encode_prompt(*args, **kwargs)

    def _watched(self, **named: Any) -> Any:
        """The stock call, one thread at a time, and with an error where it would make NaN a black picture."""
        theirs = named.get("callback_on_step_end")
        wanted = (
            getattr(theirs, "tensor_inputs", None) or named.get("callback_on_step_end_tensor_inputs") or ["latents"]
        )
        finite: list[torch.Tensor] = []  # a flag a step, read at the end: until then a GPU need not wait

        def watch(pipe: Any, step: int, timestep: Any, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
            changed = theirs(pipe, step, timestep, {name: tensors[name] for name in wanted}) if theirs else None
            finite.append({**tensors, **(changed or {})}["latents"].isfinite().all())
            return changed or {}

        with turn(self):
            self._decoded_finite = True
            watched = {"callback_on_step_end": watch, "callback_on_step_end_tensor_inputs": [*wanted, "latents"]}
            made = super().__call__(**{**named, **watched})
            decoded_finite = self._decoded_finite
        if not decoded_finite or not all(finite):
            lost = next((step for step, fine in enumerate(finite, 1) if not fine), None)
            where = f"the U-Net or its guidance, at step {lost}" if lost else "the VAE's decoder, after step"
            where += f" of {len(finite)}" if lost else f" {len(finite)} of {len(finite)}"
            raise ModelError(
                f"no picture was made, only NaN or infinity, by {where}: lower guidance_scale, or load_pipeline with "
                "dtype='float32'"
            )
        return made

    def run_safety_checker(self, image: Any, device: torch.device, dtype: torch.dtype) -> tuple[Any, list[bool] | None]:
        """As in diffusers; every decoded picture comes by here, so this is also where it is seen whether it is one."""
        if torch.is_tensor(image):
            self._decoded_finite = bool(image.isfinite().all())
            image = image.nan_to_num()
        return super().run_safety_checker(image, device, dtype)

    @property
    def image_size(self) -> int:
        """Height and width in pixels of the images that the model was trained on."""
        return self.unet.config.sample_size * self.vae_scale_factor

    def to_json_string(self) -> str:
        """The config, for the saved index. It names diffusers' class: its own loaders know no other."""
        index = json.loads(super().to_json_string())
        index["_class_name"] = StableDiffusionImg2ImgPipeline.__name__
        return json.dumps(index, indent=2, sort_keys=True) + "\n"


DeciDiffusionPipeline_img2img = DeciDiffusionImg2ImgPipeline
"""The name that the guide gives the class."""


@dataclass(frozen=True)
class Model:
    """A known model: its folder or hub id, what it is, its images' side in pixels, and something to try it on.

    ``allow_pickle`` is the permission of ``load_pipeline``, given once for a model that is known to need it.
    """

    source: Path | str
    about: str
    image_size: int
    example_image: str
    example_prompt: str
    revision: str | None = None
    allow_pickle: bool = False


MODELS: dict[str, Model] = {
    "tiny": Model(
        Path(__file__).parent / "tiny" / "model",
        "small U-Net-NAS for drawn scenes, bundled",
        128,
        "day",
        "a painting of a blue house, round trees and mountains on snow at night",
    ),
    "decidiffusion-v1-0": Model(
        "Deci/DeciDiffusion-v1-0",
        "the published checkpoint, 1.02 billion parameters",
        512,
        "valley",
        "A cute baby dragon with blue and green scales, artstation painting",  # the guide's own
        allow_pickle=True,  # of 2023, when parts were still published as .bin alone; safetensors win where they exist
    ),
}

PUBLISHED = "decidiffusion-v1-0"
IMPATIENT = 3.0  # seconds of silence from the hub before the bundled model is taken instead

DTYPES = {
    "float16": torch.float16,
    "fp16": torch.float16,
    "half": torch.float16,
    "bfloat16": torch.bfloat16,
    "bf16": torch.bfloat16,
    "float32": torch.float32,
    "fp32": torch.float32,
    "float": torch.float32,
}


def load_pipeline(
    model: str | Path | None = None,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
    compile: bool = False,
    allow_pickle: bool = False,
) -> DeciDiffusionImg2ImgPipeline:
    """Load a model, ready to run, and print one line that says which, where, in which numbers, and why.

    Args:
        model: a name in ``MODELS``, a folder, or ``owner/name`` on the hub. None takes the published checkpoint
            on a CUDA GPU where it is cached or can be downloaded, and ``tiny`` everywhere else; or what the environment
            variable ``DECINB_MODEL`` names.
        device: None takes CUDA (under ``accelerate launch`` the process's own), else Apple's MPS, else the CPU.
        dtype: ``torch.float16`` or ``"fp16"``, and so on. None takes float16 on CUDA and float32 elsewhere.
        allow_pickle: read weights that exist as ``.bin`` only. They are read as plain tensors, and refused if they hold
            anything else. The published checkpoint has this permission by itself.
        compile: turn on what is faster on the device and keeps the pictures, but for rounding; see ``decinb.tuning``.
            It pays for long sweeps: the first call waits for the compiler.

    Returns:
        An ordinary diffusers pipeline. Images of ``image_size`` pixels suit it best.

    Raises:
        InputError: the name is unknown, the folder is not there, or the device or dtype cannot be used.
        ModelError: the model cannot be fetched, or a part of it is missing, damaged or does not fit.
    """
    device = _device(device)
    dtype = _dtype(dtype, device)
    name, folder, why = _find(model, device, allow_pickle)
    pipe = _load(folder, name, dtype, _may_pickle(name, allow_pickle)).to(device)
    if device.type == "cpu":
        allocator.keep_freed_memory()
    tuned = f", {tuning.tune(pipe)}" if compile else ""
    print(f"decinb: {name} on {device}, {str(dtype).removeprefix('torch.')}{tuned} ({why})")
    return pipe


def download(model: str = PUBLISHED, allow_pickle: bool = False) -> Path:
    """Fetch a model ahead of its use, for a room without network. Run again, it goes on where it stopped.

    The hub is asked for the newest version, and every file, new or already here, is compared with the SHA-256 that the
    hub gives for it; what differs is fetched again.

    Args:
        model: a name in ``MODELS``, or ``owner/name`` on the hub.
        allow_pickle: as for ``load_pipeline``.

    Returns:
        The folder with the model. ``load_pipeline`` takes it, and finds it by the model's name as well.

    Raises:
        InputError: there is no such name.
        ModelError: the model cannot be had, with the true cause, or arrives damaged twice.
    """
    if not (isinstance(model, str) and (model in MODELS or hub.is_model_id(model))):
        raise InputError(f"model: give one of {', '.join(map(repr, MODELS))} or a hub id 'owner/name', got {model!r}")
    return _folder(MODELS.get(model) or _model_on_hub(model), allow_pickle=allow_pickle, fresh=True)


def example(pipe: DeciDiffusionImg2ImgPipeline) -> tuple[str, str]:
    """A sample's name and a prompt to try a pipeline on: those of the known model whose images are nearest in size."""
    known = min(MODELS.values(), key=lambda model: abs(model.image_size - pipe.image_size))
    return known.example_image, known.example_prompt


def _device(device: str | torch.device | None) -> torch.device:
    has_cuda, has_mps = torch.cuda.is_available(), torch.backends.mps.is_available()
    if device is None:
        if has_cuda and "LOCAL_RANK" in os.environ:  # one of several processes, each with a GPU of its own
            return torch.device("cuda", int(os.environ["LOCAL_RANK"]) % torch.cuda.device_count())
        return torch.device("cuda" if has_cuda else "mps" if has_mps else "cpu")
    try:
        found = torch.device(device)
    except (RuntimeError, TypeError):
        raise InputError(f"device: {device!r} is not a device; give 'cuda', 'mps', 'cpu' or None") from None
    if (found.type == "mps" and not has_mps) or (
        found.type == "cuda" and not (has_cuda and (found.index or 0) < torch.cuda.device_count())
    ):
        raise InputError(f"device: {device!r} was asked for, but torch finds none here; give 'cpu' or None")
    return found


def _dtype(dtype: str | torch.dtype | None, device: torch.device) -> torch.dtype:
    if dtype is None:
        # On MPS half precision still overflows to black images with some releases of macOS and torch.
        return torch.float16 if device.type == "cuda" else torch.float32
    found = DTYPES.get(str(dtype).removeprefix("torch.").lower())
    if found is None:
        raise InputError(f"dtype: {dtype!r} cannot be used; give one of {', '.join(DTYPES)} or None")
    if found == torch.float16 and device.type == "cpu":
        warnings.warn(
            "float16 was asked for on the CPU, where one convolution takes hundreds of times longer: float32 is used",
            stacklevel=3,
        )
        return torch.float32
    return found


def _model_on_hub(name: str) -> Model:
    return Model(name, "a model on the hub", 0, "", "")


def _may_pickle(name: str, allowed: bool) -> bool:
    return allowed or (name in MODELS and MODELS[name].allow_pickle)


def _find(model: str | Path | None, device: torch.device, allow_pickle: bool = False) -> tuple[str, Path, str]:
    """From what a user calls a model to its name, the folder it lies in, and why it was taken."""
    if model is None and os.environ.get("DECINB_MODEL"):
        name, folder, _ = _find(os.environ["DECINB_MODEL"], device, allow_pickle)
        return name, folder, "as DECINB_MODEL says"
    if model is None:
        why = "no CUDA GPU is used"
        if device.type == "cuda":
            try:
                known = MODELS[PUBLISHED]
                return PUBLISHED, _folder(known, IMPATIENT), "a CUDA GPU is used"
            except ModelError as error:
                why = str(error)
        return "tiny", _folder(MODELS["tiny"]), why

    if not isinstance(model, (str, Path)):
        raise InputError(f"model: give a name, a folder or a hub id, got {model!r}")
    name, asked = str(model), "as asked"
    if known := MODELS.get(name):
        return name, _folder(known, allow_pickle=allow_pickle), asked
    if name and (folder := Path(model).expanduser()).is_dir():
        return name, folder, asked
    if isinstance(model, Path) or model.startswith((".", "/", "~")) or "\\" in model or model.count("/") > 1:
        raise InputError(f"model: folder not found: {name!r}")
    if hub.is_model_id(name):
        try:
            return name, _folder(_model_on_hub(name), allow_pickle=allow_pickle), asked
        except ModelError as error:
            raise ModelError(f"{error} (and there is no folder {name!r} here)") from error
    close = difflib.get_close_matches(name.lower(), MODELS, n=1)
    hint = f"did you mean {close[0]!r}? Else " if close else ""
    names = ", ".join(map(repr, MODELS))
    raise InputError(f"model: {name!r} is not known; {hint}give one of {names}, a folder, or a hub id 'owner/name'")


def is_here(model: Model) -> bool:
    """Whether a model can be loaded without a network."""
    return isinstance(model.source, Path) or hub.cached(model.source, model.revision, _chooser(model)) is not None


def _folder(model: Model, timeout: float | None = None, allow_pickle: bool = False, fresh: bool = False) -> Path:
    """Where a model lies; from the hub where it is not here yet, or, ``fresh``, to see that all of it is right."""
    if isinstance(model.source, Path):
        return model.source
    return hub.fetch(model.source, model.revision, _chooser(model, allow_pickle), timeout, fresh)


def _chooser(model: Model, allow_pickle: bool = False) -> hub.Choose:
    def choose(names: list[str], read: Callable[[str], Path]) -> list[str]:
        files = _files(names, read, str(model.source), allow_pickle or model.allow_pickle)
        return [name for used in files.values() for name in used]

    return choose


def _files(names: list[str], read: Callable[[str], Path], where: str, allow_pickle: bool) -> dict[str, list[str]]:
    """The files of a model that are used, by component, config first: none is missing, and no other is fetched."""

    def need(name: str) -> str:
        if name not in names:
            raise ModelError(f"{where} has no {name}")
        return name

    def model(folder: str, safe: str, pickled: str) -> list[str]:
        for whole in (f"{folder}/{safe}", f"{folder}/{pickled}"):
            index = f"{whole}.index.json"
            if whole not in names and index not in names:
                continue
            if whole.endswith(".bin") and not allow_pickle:
                raise ModelError(
                    f"{folder}: {where} has no safetensors but {whole}, a pickle, which can hold code: look for a copy "
                    "in safetensors, or give load_pipeline allow_pickle=True to read plain tensors from it"
                )
            weights = [whole]
            if whole not in names:
                weights = [index, *map(need, sorted({f"{folder}/{shard}" for shard in _shards(read(index))}))]
            return [need(f"{folder}/config.json"), *weights]
        raise ModelError(f"{where} has no {folder}/{safe}, and nothing in its place")

    unet = "flexible_unet" if any(name.startswith("flexible_unet/") for name in names) else "unet"
    if unet == "unet" and not ("unet/config.json" in names and "configurations" in _json(read("unet/config.json"))):
        raise ModelError(f"{where} has no flexible_unet, and no unet saved by decinb: it is not a DeciDiffusion model")
    words = ["tokenizer.json"] if "tokenizer/tokenizer.json" in names else ["vocab.json", "merges.txt"]
    extras = ["tokenizer/special_tokens_map.json", "tokenizer/added_tokens.json"]
    return {
        "unet": model(unet, "diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin"),
        "vae": model("vae", "diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin"),
        "text_encoder": model("text_encoder", "model.safetensors", "pytorch_model.bin"),
        "tokenizer": [
            *(need(f"tokenizer/{name}") for name in ("tokenizer_config.json", *words)),
            *(name for name in extras if name in names),
        ],
        "scheduler": [need("scheduler/scheduler_config.json")],
    }


def _shards(index: Path) -> list[str]:
    with _blaming(f"{index} lists no shards"):
        return [str(name) for name in _json(index)["weight_map"].values()]


def _load(folder: Path, name: str, dtype: torch.dtype, allow_pickle: bool) -> DeciDiffusionImg2ImgPipeline:
    files = _files(hub.names_in(folder), folder.joinpath, str(folder), allow_pickle)
    if pickles := [file for used in files.values() for file in used if file.endswith(".bin")]:
        warnings.warn(f"{name} has no safetensors for {', '.join(pickles)}: read as plain tensors only", stacklevel=3)
    from_hub = isinstance(MODELS[name].source, str) if name in MODELS else not Path(name).is_dir()
    repair = f"decinb.download({name!r}) fetches it anew" if from_hub else "bring it anew from where it came from"

    def model(component: str, cls: type, **dtype_option: torch.dtype) -> nn.Module:
        config, *weights = files[component]
        for file in weights:
            if not file.endswith(".json"):
                check_file(component, folder / file, repair)
        where, pickled = (folder / config).parent, ".bin" in weights[0]
        # What a library says of a refused pickle is how to run its code after all: that is left out.
        reason = "the .bin is damaged, or more than plain tensors, or torch is older than 2.6" if pickled else None
        with _blaming(f"{component}: cannot be loaded from {where}", reason):
            loaded, info = cls.from_pretrained(
                str(where),
                local_files_only=True,
                use_safetensors=not pickled,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # they are in the info instead, by name
                **dtype_option,
            )
        refuse_partial(info, where)
        check_numbers(component, loaded, where)
        return loaded

    with quiet():
        unet = model("unet", UNetNAS, torch_dtype=dtype)
        vae = model("vae", AutoencoderKL, torch_dtype=dtype)
        text_encoder = model("text_encoder", CLIPTextModel, dtype=dtype)
        tokenizer = _tokenizer(folder / "tokenizer", text_encoder)
        scheduler = _scheduler(folder / "scheduler" / "scheduler_config.json")
    pipe = DeciDiffusionImg2ImgPipeline(vae, text_encoder, tokenizer, unet, scheduler)
    pipe.register_to_config(_name_or_path=name)
    return pipe


def _tokenizer(folder: Path, text_encoder: CLIPTextModel) -> CLIPTokenizer:
    with _blaming(f"tokenizer: cannot be loaded from {folder}"):
        tokenizer = CLIPTokenizer.from_pretrained(folder, local_files_only=True)
    config = text_encoder.config
    if len(tokenizer) != config.vocab_size or tokenizer.model_max_length > config.max_position_embeddings:
        raise ModelError(
            f"tokenizer: {folder} knows {len(tokenizer)} tokens, {tokenizer.model_max_length} a text, the text encoder "
            f"{config.vocab_size} tokens, {config.max_position_embeddings} a text: they do not belong together"
        )
    return tokenizer


def _scheduler(path: Path) -> SchedulerMixin:
    config = _json(path)
    named = config.get("_class_name", DDIMScheduler.__name__)
    cls = getattr(diffusers, str(named), None)
    if not (isinstance(cls, type) and issubclass(cls, SchedulerMixin)):
        warnings.warn(f"scheduler: diffusers has no {named!r}; DDIMScheduler takes its place", stacklevel=4)
        cls = DDIMScheduler
    with _blaming(f"scheduler: cannot be made from {path}"):
        return cls.from_config(config)


def _json(path: Path) -> dict[str, Any]:
    with _blaming(f"{path} is not valid JSON"):
        return dict(json.loads(path.read_text(encoding="utf-8")))


@contextmanager
def _blaming(part: str, reason: str | None = None) -> Iterator[None]:
    """Turn what a library raises inside into a ModelError: the part, then the reason given or the library's own."""
    try:
        yield
    except ModelError:
        raise
    except Exception as error:
        if reason is not None:
            raise ModelError(f"{part}: {reason}") from None
        raise ModelError(f"{part}: {' '.join(str(error).split())}") from error
