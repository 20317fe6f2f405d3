"""Find the components of a model among its files, and load them.

Every class comes from diffusers, transformers or decinb, whatever the files say. File names and a few small
configurations show which files are needed, so a model can be rejected before its weights are downloaded or read.
"""

import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import diffusers
import torch
import transformers
from diffusers import AutoencoderKL, DDIMScheduler, ModelMixin, SchedulerMixin
from torch import nn
from transformers import (
    CLIPImageProcessor,
    CLIPTextModel,
    CLIPTokenizer,
    DPTImageProcessor,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from decinb.checkpoints import hub
from decinb.checkpoints.integrity import MAX_SMALL_FILE, bounded_by, check_finite, check_folder, tensor_sizes
from decinb.errors import ModelError, reason
from decinb.unet_nas import UNetNAS, refuse_partial
from decinb.utils import files as safe_files
from decinb.utils import validation
from decinb.utils.quiet import quiet

INDEX = "model_index.json"
INCOMPLETE = "the model is incomplete; download it again, or use another copy"
NO_REMOTE_CODE = "decinb runs no code from a model's repository; use a model that diffusers supports"

DECIDIFFUSION: dict[str, type] = {
    "unet": UNetNAS,
    "vae": AutoencoderKL,
    "text_encoder": CLIPTextModel,
    "tokenizer": CLIPTokenizer,
    "scheduler": DDIMScheduler,
}
"""The components of DeciDiffusion. Its own index refers to code in its repository, so it is not read."""

ALLOWED_CLASSES = (ModelMixin, PreTrainedModel, SchedulerMixin)
"""Base classes of a component. transformers' Auto classes have none of these: they can load code from a repository."""

PROCESSORS = {
    "BertTokenizer",
    "CLIPTokenizer",
    "GPT2Tokenizer",
    "GemmaTokenizer",
    "LlamaTokenizer",
    "PreTrainedTokenizer",
    "Qwen2Tokenizer",
    "T5Tokenizer",
    "XLMRobertaTokenizer",
    "BlipImageProcessor",
    "CLIPImageProcessor",
    "DPTImageProcessor",
    "SiglipImageProcessor",
    "ViTImageProcessor",
}
"""The tokenizers and image processors that are loaded, also as ``...Fast`` and ``...Pil``.

Others open files that their configurations name.
"""

SIZED = (CLIPImageProcessor, DPTImageProcessor)  # image processors whose numbers are all sizes of images, or small
MAX_CONFIG = 500_000  # bytes of a configuration; libraries copy one several times
MAX_PIXELS = 8192  # height and width that a configuration may name
MAX_LEVELS = 8  # of a network that halves the size of its input from level to level
MAX_COUNT = 10_000  # of layers, heads or labels: lists of them are made before a network is
MAX_NUMBER = 1_000_000  # in a configuration of diffusers, where only sizes are large
MAX_SPECIAL_TOKENS = 10_000  # of a tokenizer, which compares each with all others


@dataclass(frozen=True)
class Files:
    """The files of a model, in a folder or on the hub.

    Args:
        where: the folder or the hub id, for messages.
        names: all file names, such as ``"unet/config.json"``.
        read: return the local path of a file, given its name; on the hub, this downloads it.
    """

    where: str
    names: list[str]
    read: Callable[[str], Path]

    @classmethod
    def in_folder(cls, folder: Path) -> "Files":
        """Return the files of a local folder."""
        return cls(str(folder), hub.list_files(folder), folder.joinpath)

    def require(self, name: str) -> str:
        """Return ``name`` if there is such a file.

        Raises:
            ModelError: there is none.
        """
        if name not in self.names:
            raise ModelError(f"{self.where} has no {name}: {INCOMPLETE}")
        return name

    def json(self, name: str) -> dict[str, Any]:
        """Return the content of a JSON file.

        Raises:
            ModelError: there is no such file, or it holds no JSON object.
        """
        return read_json(self.read(self.require(name)))


@dataclass(frozen=True)
class Component:
    """A component of a pipeline, before it is loaded.

    Args:
        cls: its class, a subclass of one of ``ALLOWED_CLASSES``.
        files: the names of its files, the configuration first.
        variant: the variant of its weights, such as ``"fp16"``.
    """

    cls: type
    files: list[str]
    variant: str | None = None

    @property
    def weights(self) -> list[str]:
        """The names of its weight files, without the index of shards."""
        return [file for file in self.files if file.endswith((".safetensors", ".bin"))]


@dataclass(frozen=True)
class Contents:
    """The components of a model by name, and its ``model_index.json``, empty where that is not read."""

    components: dict[str, Component]
    index: dict[str, Any]

    @property
    def files(self) -> list[str]:
        """The names of all files that are used."""
        names = [name for component in self.components.values() for name in component.files]
        return [INDEX, *names] if self.index else names


def find_components(files: Files, allow_pickle: bool = False, variant: str | None = None) -> Contents:
    """Find the components of a model.

    Args:
        files: the files of the model.
        allow_pickle: accept weights that exist only as ``.bin``.
        variant: the variant of the weights to prefer, such as ``"fp16"``.

    Raises:
        ModelError: the files are not a diffusers model, one is missing, or a class is not available here.
    """
    has_flexible_unet = any(name.startswith("flexible_unet/") for name in files.names)
    if has_flexible_unet or _is_saved_decidiffusion(files):
        index, classes = {}, DECIDIFFUSION
    elif INDEX in files.names:
        index = files.json(INDEX)
        classes = _classes(index, files.where)
    else:
        raise ModelError(
            f"{files.where} has no flexible_unet and no {INDEX}: it is not a diffusers model; give the folder or hub "
            f"id that contains {INDEX}"
        )
    components = {}
    for name, cls in classes.items():
        folder = "flexible_unet" if name == "unet" and has_flexible_unet else name
        if issubclass(cls, nn.Module):
            components[name] = _network(files, folder, cls, allow_pickle, variant)
        else:
            components[name] = Component(cls, _configuration(files, folder, cls))
    return Contents(components, index)


def load_component(name: str, component: Component, folder: Path, dtype: torch.dtype) -> Any:
    """Load one component from the folder of its model.

    Args:
        name: the component's name in the pipeline, for messages.
        component: what to load.
        folder: the folder of the model.
        dtype: the dtype of a network's weights.

    Raises:
        ModelError: the files are damaged, or a tensor is missing, unexpected, of another shape, or not finite.
    """
    where = (folder / component.files[0]).parent
    check_folder(name, where)
    if issubclass(component.cls, SchedulerMixin):
        return _scheduler(folder / component.files[0], component.cls)
    if not issubclass(component.cls, nn.Module):
        return _without_weights(name, component, where)
    is_pickle = component.weights[0].endswith(".bin")
    # The library's own message about a rejected pickle explains how to run its code anyway, so it is not shown.
    why = "the .bin is damaged or holds more than plain tensors, or torch is older than 2.6" if is_pickle else None
    dtype_name = "torch_dtype" if issubclass(component.cls, ModelMixin) else "dtype"  # also for diffusers 0.39
    with as_model_error(f"{name}: cannot be loaded from {where}", why), hub.offline():
        sizes: dict[str, int] = {}
        for file in component.weights:
            sizes |= tensor_sizes(folder / file)
        with bounded_by(sizes, name, where):
            _try_without_memory(component.cls, where)
            model, info = component.cls.from_pretrained(
                str(where),
                local_files_only=True,
                use_safetensors=not is_pickle,
                variant=component.variant,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # they are listed in the info instead, and rejected below
                **{dtype_name: dtype},
            )
    refuse_partial(info, where)
    check_finite(name, model, where)
    return model


def _try_without_memory(cls: type, where: Path) -> None:
    """Create a network of diffusers on the meta device, where no configuration can take memory; errors are ignored.

    transformers itself does this before it loads weights. diffusers does it for parameters, but computes tables of
    positions and masks, which may be of any size.
    """
    if issubclass(cls, ModelMixin):
        try:
            with torch.device("meta"):
                cls.from_config(cls.load_config(str(where), local_files_only=True))
        except ModelError:
            raise
        except Exception:  # loading itself will say what is wrong
            return


def _without_weights(name: str, component: Component, where: Path) -> Any:
    """Return a tokenizer or an image processor."""
    with as_model_error(f"{name}: cannot be loaded from {where}"):
        config = read_json(where / Path(component.files[0]).name, MAX_SMALL_FILE)
        for key, value in _entries(config):
            if problem := _problem(key, value):
                raise ModelError(f"{name}: {where} asks for {problem}")
            if "special_tokens" in key or key in ("added_tokens_decoder", "extra_ids"):
                most = len(value) if isinstance(value, (list, dict)) else validation.largest_number(value)[1]
                if most > MAX_SPECIAL_TOKENS:
                    raise ModelError(
                        f"{name}: {key} in {where} is {most:,}, and at most {MAX_SPECIAL_TOKENS:,} is allowed"
                    )
        if issubclass(component.cls, SIZED):
            entry, number = validation.largest_number(config)
            if number > MAX_PIXELS:
                shown = validation.short_repr(number)
                raise ModelError(f"{name}: {entry} in {where} is {shown}, and at most {MAX_PIXELS} is allowed")
        with hub.offline(), warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # how transformers calls tokenizers before 0.23
            return component.cls.from_pretrained(str(where), local_files_only=True)


def check_tokenizers(components: Mapping[str, Any], where: str) -> None:
    """Check that each tokenizer has a maximum length, and each CLIP tokenizer fits its text encoder.

    Raises:
        ModelError: one does not; the message gives both sizes.
    """
    for name, tokenizer in components.items():
        if not isinstance(tokenizer, PreTrainedTokenizerBase):
            continue
        length = tokenizer.model_max_length
        if isinstance(length, bool) or not isinstance(length, (int, float)) or not length >= 1:
            raise ModelError(
                f"{name}: model_max_length in {where} must be a number of tokens, got {validation.short_repr(length)}"
            )
        encoder = components.get(name.replace("tokenizer", "text_encoder"))
        if not isinstance(tokenizer, CLIPTokenizer) or encoder is None:
            continue
        config = encoder.config
        if len(tokenizer) != config.vocab_size or length > config.max_position_embeddings:
            raise ModelError(
                f"{name}: the tokenizer of {where} has {len(tokenizer)} tokens and a maximum length of {length}, but "
                f"the text encoder has {config.vocab_size} tokens and a maximum length of "
                f"{config.max_position_embeddings}: they do not belong together; take both from one model"
            )


def read_json(path: Path, limit: int = MAX_CONFIG) -> dict[str, Any]:
    """Read a JSON object from a file of at most ``limit`` bytes.

    Raises:
        ModelError: the file is too large, not valid JSON, or not a JSON object.
    """
    with as_model_error(f"{path} is not valid JSON"):
        value = safe_files.read_json(path, limit)
    if not isinstance(value, dict):
        raise ModelError(f"{path} is not a JSON object but {validation.short_repr(value)}")
    return value


@contextmanager
def as_model_error(what: str, why: str | None = None) -> Iterator[None]:
    """Raise any error of the ``with`` block as a one-line ModelError.

    Args:
        what: the start of the message.
        why: the rest of the message; by default what the original error says.
    """
    try:
        yield
    except ModelError:
        raise
    except BaseException as error:
        # The tokenizers library, written in Rust, panics with an error of its own, which is not an Exception.
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        if why is not None:
            raise ModelError(f"{what}: {why}") from None
        raise ModelError(f"{what}: {reason(error)}") from error


# --- which classes ----------------------------------------------------------------------------------------------------


def _is_saved_decidiffusion(files: Files) -> bool:
    """Return whether these are DeciDiffusion's five components, as decinb saves them.

    A model with a depth estimator has more components, and a folder whose index lists no VAE has fewer, to be used with
    those of another folder; their indices are read instead.
    """
    if "unet/config.json" not in files.names or any(name.startswith("depth_estimator/") for name in files.names):
        return False
    if "vae/config.json" not in files.names and INDEX in files.names and "vae" not in files.json(INDEX):
        return False
    return "configurations" in files.json("unet/config.json")


def _classes(index: Mapping[str, Any], where: str) -> dict[str, type]:
    """Return the class of every component that an index lists."""
    return {
        name: _class(name, *map(str, entry), where)
        for name, entry in index.items()
        if not name.startswith("_") and isinstance(entry, list) and len(entry) == 2 and entry[1] is not None
    }


def _class(name: str, library: str, cls: str, where: str) -> type:
    """Return the installed class of a component; raise a ModelError if it is not an allowed one."""
    if library in ("decinb", "decinb.unet_nas") and cls == UNetNAS.__name__:
        return UNetNAS
    module: Any = {"diffusers": diffusers, "transformers": transformers}.get(library)
    if module is None and library.isidentifier():
        module = getattr(diffusers.pipelines, library, None)  # a safety checker is defined next to its pipeline
        if not (isinstance(module, ModuleType) and module.__name__ == f"diffusers.pipelines.{library}"):
            module = None
    if module is None:
        raise ModelError(f"{name}: {where} asks for {cls!r} of {library!r}, not a part of diffusers: {NO_REMOTE_CODE}")
    with quiet():
        # Image processors were called feature extractors when older models were published.
        newer = cls.replace("FeatureExtractor", "ImageProcessor")
        found = getattr(module, cls, None) or getattr(module, newer, None)
    if not isinstance(found, type):
        version = (transformers if library == "transformers" else diffusers).__version__
        raise ModelError(
            f"{name}: {where} asks for {cls!r}, which {library} {version} does not have: use a model that it supports"
        )
    if not issubclass(found, ALLOWED_CLASSES) and newer.removesuffix("Fast").removesuffix("Pil") not in PROCESSORS:
        raise ModelError(
            f"{name}: {where} asks for {cls!r} of {library!r}, which is neither a network nor a scheduler, nor one of "
            f"the tokenizers and image processors that decinb loads: {', '.join(sorted(PROCESSORS))}"
        )
    return found


# --- which files ------------------------------------------------------------------------------------------------------


def _network(files: Files, folder: str, cls: type, allow_pickle: bool, variant: str | None) -> Component:
    """Return a network with its weight files: safetensors before pickles, the variant before the plain weights."""
    configuration = files.require(f"{folder}/config.json")
    _check_network(files, folder, cls)
    is_transformers = issubclass(cls, PreTrainedModel)
    stem = "model" if is_transformers else "diffusion_pytorch_model"
    pickle_stem = "pytorch_model" if is_transformers else "diffusion_pytorch_model"
    for start, ending in ((stem, "safetensors"), (pickle_stem, "bin")):
        for kind in dict.fromkeys((variant, None, "fp16")):
            single = f"{folder}/{start}.{kind}.{ending}" if kind else f"{folder}/{start}.{ending}"
            shard_index = f"{folder}/{start}.{ending}.index" + (f".{kind}.json" if kind else ".json")
            if single not in files.names and shard_index not in files.names:
                continue
            if ending == "bin" and not allow_pickle:
                raise ModelError(
                    f"{folder}: {files.where} has no safetensors but {single}, a pickle, which can hold code: look for "
                    "a copy in safetensors, or pass allow_pickle=True to load_pipeline to read only plain tensors"
                )
            weights = [single]
            if single not in files.names:
                shards = _shards(files.read(shard_index))
                weights = [shard_index, *(files.require(f"{folder}/{shard}") for shard in shards)]
            return Component(cls, [configuration, *weights], kind)
    raise ModelError(f"{files.where} has no {folder}/{stem}.safetensors or other weights for it: {INCOMPLETE}")


def _check_network(files: Files, folder: str, cls: type) -> None:
    """Raise a ModelError if a network is not what its class loads, or would make transformers load something else."""
    config = files.json(f"{folder}/config.json")
    if cls is UNetNAS and "configurations" not in config:
        raise ModelError(
            f"{files.where} has no flexible_unet, and its {folder} is not a U-Net-NAS: it is not a DeciDiffusion model"
        )
    for key, value in _entries(config):
        if problem := _problem(key, value):
            raise ModelError(f"{folder}: {files.where} asks for {problem}")
    entry, number = validation.largest_number(config) if issubclass(cls, ModelMixin) else ("", 0)
    if number > MAX_NUMBER:
        shown = validation.short_repr(number)
        raise ModelError(f"{folder}: {entry} of {files.where} is {shown}, and at most {MAX_NUMBER:,} is allowed")
    if f"{folder}/adapter_config.json" in files.names:  # transformers would load the base model that it names
        raise ModelError(
            f"{folder}: {files.where} holds an adapter, not a model: load its base model, then add the adapter with "
            "the pipeline's load_lora_weights"
        )


def _problem(key: str, value: Any) -> str | None:
    """Return what an entry of a configuration asks for, if decinb refuses it."""
    shown = validation.short_repr(value)
    if key.endswith(("attn_implementation", "experts_implementation")) and "/" in str(value):
        return f"code from the hub, {shown}, which decinb does not run"
    if (key == "backbone" and value) or (key in ("use_timm_backbone", "use_pretrained_backbone") and value is True):
        return f"another model, {key} {shown}: save it with that model inside"
    if key.endswith("_files") and value:
        return f"other files of its choice, {key} {shown}: remove this entry"
    is_count = key.startswith("num_") and key.endswith(("layers", "heads", "labels", "blocks"))
    if is_count and validation.largest_number(value)[1] > MAX_COUNT:
        return f"too much: {key} is {shown}, and at most {MAX_COUNT:,} is allowed"
    if key == "quantization_config" and value:
        return "quantised weights (quantization_config), which decinb does not read: use weights of plain floats"
    if key in ("sample_size", "image_size") and validation.largest_number(value)[1] > MAX_PIXELS:
        return f"images that are too large: {key} is {shown}, and at most {MAX_PIXELS} is allowed"
    if key == "block_out_channels" and isinstance(value, list) and len(value) > MAX_LEVELS:
        return f"{len(value)} levels (block_out_channels), and at most {MAX_LEVELS} are allowed"
    return None


def _entries(config: Any) -> Iterator[tuple[str, Any]]:
    """Yield all entries of a configuration and of those nested in it."""
    for key, value in config.items() if isinstance(config, dict) else ():
        yield key, value
        yield from _entries(value)


def _shards(index: Path) -> list[str]:
    with as_model_error(f"{index} lists no shards"):
        return sorted({str(name) for name in read_json(index, safe_files.MAX_JSON)["weight_map"].values()})


def _configuration(files: Files, folder: str, cls: type) -> list[str]:
    """Return the files of a component without weights: a scheduler, a tokenizer, an image processor."""
    if issubclass(cls, SchedulerMixin):
        return [files.require(f"{folder}/scheduler_config.json")]
    if issubclass(cls, CLIPTokenizer):
        words = ["tokenizer.json"] if f"{folder}/tokenizer.json" in files.names else ["vocab.json", "merges.txt"]
        required = [files.require(f"{folder}/{name}") for name in ("tokenizer_config.json", *words)]
        optional = [f"{folder}/special_tokens_map.json", f"{folder}/added_tokens.json"]
        return [*required, *(name for name in optional if name in files.names)]
    is_tokenizer = issubclass(cls, PreTrainedTokenizerBase)
    first = files.require(f"{folder}/{'tokenizer_config.json' if is_tokenizer else 'preprocessor_config.json'}")
    endings = (".json", ".txt", ".model")
    return [first, *(n for n in files.names if n.startswith(f"{folder}/") and n.endswith(endings) and n != first)]


def _scheduler(path: Path, default: type[SchedulerMixin]) -> SchedulerMixin:
    """Return the scheduler that its own configuration names, which can differ from the one in the index."""
    config = read_json(path)
    name = config.get("_class_name", default.__name__)
    cls = getattr(diffusers, str(name), None)
    if not (isinstance(cls, type) and issubclass(cls, SchedulerMixin)):
        validation.warn(f"scheduler: diffusers has no {name!r}; {default.__name__} is used instead")
        cls = default
    with as_model_error(f"scheduler: cannot be created from {path}"):
        validation.scheduler_config(config)
        scheduler = cls.from_config(config)
        betas = getattr(scheduler, "betas", None)
        if torch.is_tensor(betas) and not betas.isfinite().all():
            raise ValueError("its betas are NaN or infinite")
        return scheduler
