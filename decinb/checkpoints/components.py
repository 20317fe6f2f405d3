"""What a model's files hold: its parts, the class of each and the files it is made of, and a part read from them.

A class comes from diffusers, transformers or decinb, whatever the files say. Which files are used is known from their
names and a few small settings, so that a model can be refused before its weights are fetched or read.
"""

import json
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
    CLIPTextModel,
    CLIPTokenizer,
    FeatureExtractionMixin,
    ImageProcessingMixin,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    ProcessorMixin,
)

from decinb.checkpoints import hub
from decinb.checkpoints.integrity import check_numbers
from decinb.errors import ModelError
from decinb.unet_nas import UNetNAS, refuse_partial
from decinb.utils import validation
from decinb.utils.quiet import quiet

INDEX = "model_index.json"
INCOMPLETE = "the model is incomplete; fetch it anew, or take another copy of it"

DECIDIFFUSION: dict[str, type] = {
    "unet": UNetNAS,
    "vae": AutoencoderKL,
    "text_encoder": CLIPTextModel,
    "tokenizer": CLIPTokenizer,
    "scheduler": DDIMScheduler,
}
"""The parts of DeciDiffusion. Its own index asks for code from its repository, so it is not read."""

PROCESSORS = (PreTrainedTokenizerBase, ImageProcessingMixin, FeatureExtractionMixin, ProcessorMixin)
KINDS = (ModelMixin, PreTrainedModel, SchedulerMixin, *PROCESSORS)
"""What a part can be. transformers' Auto classes are none of these: they look for code beside the weights."""


@dataclass(frozen=True)
class Files:
    """The files of a model, in a folder or on the hub.

    Args:
        where: the folder or the id, for messages.
        names: all of them, ``unet/config.json``.
        read: from a name to the file; from the hub it is fetched.
    """

    where: str
    names: list[str]
    read: Callable[[str], Path]

    @classmethod
    def of(cls, folder: Path) -> "Files":
        """Those of a folder."""
        return cls(str(folder), hub.names_in(folder), folder.joinpath)

    def need(self, name: str) -> str:
        """The name, if there is such a file.

        Raises:
            ModelError: there is none.
        """
        if name not in self.names:
            raise ModelError(f"{self.where} has no {name}: {INCOMPLETE}")
        return name

    def json(self, name: str) -> dict[str, Any]:
        """What a small file says.

        Raises:
            ModelError: there is none, or it is no JSON.
        """
        return read_json(self.read(self.need(name)))


@dataclass(frozen=True)
class Part:
    """A part of a pipeline.

    Args:
        cls: its class, one of ``KINDS``.
        files: the names of the files that it is made of, settings first.
        variant: of its weights, as ``"fp16"``.
    """

    cls: type
    files: list[str]
    variant: str | None = None

    @property
    def weights(self) -> list[str]:
        """The files of numbers, without the list of them."""
        return [file for file in self.files if file.endswith((".safetensors", ".bin"))]


@dataclass(frozen=True)
class Contents:
    """What a model's files hold: its parts by name, and what its index says, nothing where it is not read."""

    parts: dict[str, Part]
    index: dict[str, Any]

    @property
    def files(self) -> list[str]:
        """The names of all files that are used."""
        return [*([INDEX] if self.index else []), *(name for part in self.parts.values() for name in part.files)]


def contents(files: Files, allow_pickle: bool = False, variant: str | None = None) -> Contents:
    """Find the parts of a model.

    Args:
        files: those there are.
        allow_pickle: take weights that exist as ``.bin`` only.
        variant: of the weights, preferred where there is one.

    Raises:
        ModelError: it is no model of diffusers, a file is missing, or a class is none that is installed here.
    """
    has_flexible = any(name.startswith("flexible_unet/") for name in files.names)
    if has_flexible or _is_plain_decidiffusion(files):
        index, classes = {}, DECIDIFFUSION
    elif INDEX in files.names:
        index = files.json(INDEX)
        classes = _classes(index, files.where)
    else:
        raise ModelError(
            f"{files.where} has no flexible_unet and no {INDEX}: it is no model of diffusers; give the folder, or the "
            f"id, in which {INDEX} lies"
        )
    found = {}
    for name, cls in classes.items():
        folder = "flexible_unet" if name == "unet" and has_flexible else name
        if issubclass(cls, nn.Module):
            found[name] = _network(files, folder, cls, allow_pickle, variant)
        else:
            found[name] = Part(cls, _settings(files, folder, cls))
    return Contents(found, index)


def read_part(name: str, part: Part, folder: Path, dtype: torch.dtype) -> Any:
    """Read one part from a folder, with all of its numbers.

    Raises:
        ModelError: its files are damaged, or tensors are missing, extra, of another shape, or no numbers.
    """
    where = (folder / part.files[0]).parent
    if issubclass(part.cls, SchedulerMixin):
        return _scheduler(folder / part.files[0], part.cls)
    if not issubclass(part.cls, nn.Module):
        with blaming(f"{name}: cannot be loaded from {where}"):
            return part.cls.from_pretrained(str(where), local_files_only=True)
    pickled = part.weights[0].endswith(".bin")
    # What a library says of a refused pickle is how to run its code after all: that is left out.
    reason = "the .bin is damaged, or more than plain tensors, or torch is older than 2.6" if pickled else None
    with blaming(f"{name}: cannot be loaded from {where}", reason):
        loaded, info = part.cls.from_pretrained(
            str(where),
            local_files_only=True,
            use_safetensors=not pickled,
            variant=part.variant,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # they are in the info instead, by name
            dtype=dtype,
        )
    refuse_partial(info, where)
    check_numbers(name, loaded, where)
    return loaded


def check_tokenizers(components: Mapping[str, Any], where: str) -> None:
    """Refuse a tokenizer that gives its text encoder tokens, or lengths, that it does not know.

    Raises:
        ModelError: naming both sizes.
    """
    for name, tokenizer in components.items():
        encoder = components.get(name.replace("tokenizer", "text_encoder"))
        if not isinstance(tokenizer, CLIPTokenizer) or encoder is None:
            continue
        config = encoder.config
        if len(tokenizer) != config.vocab_size or tokenizer.model_max_length > config.max_position_embeddings:
            raise ModelError(
                f"{name}: that of {where} knows {len(tokenizer)} tokens, {tokenizer.model_max_length} a text, the text "
                f"encoder {config.vocab_size} tokens, {config.max_position_embeddings} a text: they do not belong "
                "together; bring both from one model"
            )


def read_json(path: Path) -> dict[str, Any]:
    """What a file of settings says.

    Raises:
        ModelError: it is no JSON, or no table.
    """
    with blaming(f"{path} is not valid JSON"):
        found = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(found, dict):
        raise ModelError(f"{path} is no table but {validation.short_repr(found)}")
    return found


@contextmanager
def blaming(part: str, reason: str | None = None) -> Iterator[None]:
    """Turn what a library raises inside into a ModelError: the part, then the reason given or the library's own."""
    try:
        yield
    except ModelError:
        raise
    except Exception as error:
        if reason is not None:
            raise ModelError(f"{part}: {reason}") from None
        raise ModelError(f"{part}: {' '.join(str(error).split())}") from error


# --- which classes ----------------------------------------------------------------------------------------------------


def _is_plain_decidiffusion(files: Files) -> bool:
    """Whether it is as decinb saves the five parts of DeciDiffusion; with an estimator of depth its index is read."""
    if "unet/config.json" not in files.names or any(name.startswith("depth_estimator/") for name in files.names):
        return False
    return "configurations" in files.json("unet/config.json")


def _classes(index: Mapping[str, Any], where: str) -> dict[str, type]:
    """The class of every part that an index lists: one that is installed here, or an error."""
    return {
        name: _class(name, *map(str, entry), where)
        for name, entry in index.items()
        if not name.startswith("_") and isinstance(entry, list) and len(entry) == 2 and entry[1] is not None
    }


def _class(name: str, library: str, cls: str, where: str) -> type:
    if library in ("decinb", "decinb.unet_nas") and cls == UNetNAS.__name__:
        return UNetNAS
    home: Any = {"diffusers": diffusers, "transformers": transformers}.get(library)
    if home is None and library.isidentifier():
        home = getattr(diffusers.pipelines, library, None)  # a checker lies with its pipeline
        if not (isinstance(home, ModuleType) and home.__name__ == f"diffusers.pipelines.{library}"):
            home = None
    if home is None:
        raise ModelError(
            f"{name}: {where} asks for {cls!r} of {library!r}, which is not a part of diffusers: no code of a model's "
            "own is run; take a model that diffusers knows"
        )
    with quiet():
        # What prepared pictures was a FeatureExtractor when older models were published.
        found = getattr(home, cls, None) or getattr(home, cls.replace("FeatureExtractor", "ImageProcessor"), None)
    if not isinstance(found, type):
        raise ModelError(
            f"{name}: {library} {_version(library)} has no {cls!r}, which {where} asks for: take a model that it knows"
        )
    if not issubclass(found, KINDS):
        raise ModelError(
            f"{name}: {where} asks for {cls!r} of {library!r}, which is neither a network nor a scheduler, a tokenizer "
            "or an image processor; take a model that diffusers knows"
        )
    return found


def _version(library: str) -> str:
    return (transformers if library == "transformers" else diffusers).__version__


# --- which files ------------------------------------------------------------------------------------------------------


def _network(files: Files, folder: str, cls: type, allow_pickle: bool, variant: str | None) -> Part:
    """A network: safetensors before pickles, the wanted variant before the plain one."""
    settings = files.need(f"{folder}/config.json")
    config = files.json(settings)
    if cls is UNetNAS and "configurations" not in config:
        raise ModelError(
            f"{files.where} has no flexible_unet, and its {folder} is no U-Net-NAS: it is not a DeciDiffusion model"
        )
    if any("/" in kernel for kernel in _kernels(config)):  # transformers would fetch that, and run it
        raise ModelError(f"{folder}: {files.where} asks for code from the hub, {_kernels(config)[0]!r}: none is run")
    if f"{folder}/adapter_config.json" in files.names:  # transformers would go to the model that it names
        raise ModelError(
            f"{folder}: {files.where} holds an adapter, not a model: load the model that it is for, then the adapter "
            "with the pipeline's load_lora_weights"
        )
    stem = "model" if issubclass(cls, PreTrainedModel) else "diffusion_pytorch_model"
    pickle_stem = "pytorch_model" if issubclass(cls, PreTrainedModel) else "diffusion_pytorch_model"
    for start, ending in ((stem, "safetensors"), (pickle_stem, "bin")):
        for kind in dict.fromkeys((variant, None, "fp16")):
            whole = f"{folder}/{start}.{kind}.{ending}" if kind else f"{folder}/{start}.{ending}"
            index = f"{folder}/{start}.{ending}.index" + (f".{kind}.json" if kind else ".json")
            if whole not in files.names and index not in files.names:
                continue
            if ending == "bin" and not allow_pickle:
                raise ModelError(
                    f"{folder}: {files.where} has no safetensors but {whole}, a pickle, which can hold code: look for "
                    "a copy in safetensors, or give load_pipeline allow_pickle=True to read plain tensors from it"
                )
            weights = [whole]
            if whole not in files.names:
                weights = [index, *(files.need(f"{folder}/{shard}") for shard in _shards(files.read(index)))]
            return Part(cls, [settings, *weights], kind)
    raise ModelError(f"{files.where} has no {folder}/{stem}.safetensors, and nothing in its place: {INCOMPLETE}")


def _kernels(config: Any) -> list[str]:
    """What a configuration, or one inside it, names to compute attention by."""
    if not isinstance(config, dict):
        return []
    own = [str(value) for key, value in config.items() if key.endswith("attn_implementation")]
    return own + [kernel for value in config.values() for kernel in _kernels(value)]


def _shards(index: Path) -> list[str]:
    with blaming(f"{index} lists no shards"):
        return sorted({str(name) for name in read_json(index)["weight_map"].values()})


def _settings(files: Files, folder: str, cls: type) -> list[str]:
    """The files of a part without weights: a scheduler, a tokenizer, what prepares a picture."""
    if issubclass(cls, SchedulerMixin):
        return [files.need(f"{folder}/scheduler_config.json")]
    if issubclass(cls, CLIPTokenizer):
        words = ["tokenizer.json"] if f"{folder}/tokenizer.json" in files.names else ["vocab.json", "merges.txt"]
        needed = [files.need(f"{folder}/{name}") for name in ("tokenizer_config.json", *words)]
        extras = [f"{folder}/special_tokens_map.json", f"{folder}/added_tokens.json"]
        return [*needed, *(name for name in extras if name in files.names)]
    tokenizer = issubclass(cls, PreTrainedTokenizerBase)
    first = files.need(f"{folder}/{'tokenizer_config.json' if tokenizer else 'preprocessor_config.json'}")
    endings = (".json", ".txt", ".model")
    return [first, *(n for n in files.names if n.startswith(f"{folder}/") and n.endswith(endings) and n != first)]


def _scheduler(path: Path, otherwise: type[SchedulerMixin]) -> SchedulerMixin:
    """The scheduler that its own settings name, which is not always the one in the index."""
    config = read_json(path)
    named = config.get("_class_name", otherwise.__name__)
    cls = getattr(diffusers, str(named), None)
    if not (isinstance(cls, type) and issubclass(cls, SchedulerMixin)):
        validation.warn(f"scheduler: diffusers has no {named!r}; {otherwise.__name__} takes its place")
        cls = otherwise
    with blaming(f"scheduler: cannot be made from {path}"):
        return cls.from_config(config)
