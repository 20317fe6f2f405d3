"""Loading a model, ready to run: known ones by name, others from a folder or the hub.

Every part is built by a class of diffusers, of transformers or of decinb. No code comes from a model's folder or from
the hub, whatever its files say. Parts are loaded strictly: files are whole, tensors complete, numbers numbers.
"""

import difflib
import importlib
import inspect
import json
import os
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from decinb import allocator, hub, inputs, models, tuning
from decinb.errors import InputError, ModelError
from decinb.memory import total_memory
from decinb.models import IMAGE_TO_IMAGE, MODELS, PUBLISHED, TASKS, TEXT_TO_IMAGE, Model
from decinb.quiet import quiet
from decinb.weights import check_file, check_numbers, loaded_bytes

with quiet():  # importing these tells of optional libraries that are not needed here
    import diffusers
    import transformers
    from diffusers import (
        AutoencoderKL,
        AutoPipelineForImage2Image,
        AutoPipelineForText2Image,
        DDIMScheduler,
        DiffusionPipeline,
        SchedulerMixin,
    )
    from transformers import CLIPTextModel, CLIPTokenizer

    from decinb import pipeline
    from decinb.unet_nas import UNetNAS, refuse_partial

IMPATIENT = 3.0  # seconds of silence from the hub before the bundled model is taken instead
BESIDE_WEIGHTS = 1.15  # memory in all, for each byte of weights: what runs needs room too

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

INDEX = "model_index.json"

DECIDIFFUSION: dict[str, type] = {
    "unet": UNetNAS,
    "vae": AutoencoderKL,
    "text_encoder": CLIPTextModel,
    "tokenizer": CLIPTokenizer,
    "scheduler": DDIMScheduler,
}
"""The parts of DeciDiffusion. Its own index asks for code from its repository, so it is not read."""

AUTO = {IMAGE_TO_IMAGE: AutoPipelineForImage2Image, TEXT_TO_IMAGE: AutoPipelineForText2Image}


def load_pipeline(
    model: str | Path | DiffusionPipeline | None = None,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
    compile: bool = False,
    allow_pickle: bool = False,
    task: str = IMAGE_TO_IMAGE,
) -> DiffusionPipeline:
    """Load a model, ready to run, and print one line that says which, where, in which numbers, and why.

    Args:
        model: a name in ``MODELS``, a folder, or ``owner/name`` on the hub: DeciDiffusion, and all that the auto
            pipelines of diffusers know. A pipeline that is loaded already gives its parts to one of another task.
            None takes the published checkpoint on a CUDA GPU where it is cached or can be downloaded, and ``tiny``
            everywhere else; or what the environment variable ``DECINB_MODEL`` names.
        device: None takes CUDA (under ``accelerate launch`` the process's own), else Apple's MPS, else the CPU.
        dtype: ``torch.float16`` or ``"fp16"``, and so on. None takes float16 on CUDA and float32 elsewhere.
        compile: turn on what is faster on the device and keeps the pictures, but for rounding; see ``decinb.tuning``.
            It pays for long sweeps: the first call waits for the compiler.
        allow_pickle: read weights that exist as ``.bin`` only. They are read as plain tensors, and refused if they hold
            anything else. The published checkpoint has this permission by itself.
        task: ``"image-to-image"`` or ``"text-to-image"``.

    Returns:
        An ordinary diffusers pipeline. Images of ``image_size(pipe)`` pixels suit it best.

    Raises:
        InputError: the name is unknown, the folder is not there, the model cannot do the task, or the device or dtype
            cannot be used.
        ModelError: the model cannot be fetched, does not fit into the memory, or a part of it is missing, damaged or
            does not belong.
    """
    task = inputs.choice(task, "task", TASKS)
    if isinstance(model, DiffusionPipeline):
        return _for_task(model, task)
    device = _device(device)
    dtype = _dtype(dtype, device)
    name, folder, why = _find(model, device, allow_pickle, task, dtype)
    known = MODELS.get(name)
    further = [(start, _folder(replace(known, source=at))) for start, at in known.further] if known else []
    pipe = _load(name, [("", folder), *further], task, device, dtype, allow_pickle).to(device)
    if device.type == "cpu":
        allocator.keep_freed_memory()
    tuned = f", {tuning.tune(pipe)}" if compile else ""
    doing = "" if task == IMAGE_TO_IMAGE else f", {task}"
    print(f"decinb: {name} on {device}, {str(dtype).removeprefix('torch.')}{doing}{tuned} ({why})")
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
    known = MODELS.get(model) or _model_on_hub(model)
    for _, at in known.further:
        _folder(replace(known, source=at), allow_pickle=allow_pickle, fresh=True)
    return _folder(known, allow_pickle=allow_pickle, fresh=True)


def is_here(model: Model) -> bool:
    """Whether a model can be loaded without a network."""
    return all(_is_here(replace(model, source=at)) for at in (model.source, *(at for _, at in model.further)))


def fits(model: Model, device: str | torch.device | None = None, dtype: str | torch.dtype | None = None) -> bool:
    """Whether a known model fits into the memory of a device; device and dtype as for ``load_pipeline``."""
    device = _device(device)
    there = total_memory(device)
    return there is None or _needed(model, _dtype(dtype, device)) <= there


# --- where, in which numbers, and which -------------------------------------------------------------------------------


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
    return Model(name, "a model on the hub", 0)


def _find(
    model: str | Path | None,
    device: torch.device,
    allow_pickle: bool = False,
    task: str = IMAGE_TO_IMAGE,
    dtype: torch.dtype = torch.float32,
) -> tuple[str, Path, str]:
    """From what a user calls a model to its name, the folder it lies in, and why it was taken."""
    if model is None and os.environ.get("DECINB_MODEL"):
        name, folder, _ = _find(os.environ["DECINB_MODEL"], device, allow_pickle, task, dtype)
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
        _check_task(name, task)
        _check_room(name, _needed(known, dtype), device, dtype)
        return name, _folder_of(name, known, allow_pickle), asked
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


def _folder_of(name: str, known: Model, allow_pickle: bool) -> Path:
    """Where a known model lies; a copy of it takes its place where its id is no longer on the hub."""
    try:
        return _folder(known, allow_pickle=allow_pickle)
    except hub.NotFoundError as gone:
        refused = ""
        for mirror in known.mirrors:
            try:
                folder = _folder(replace(known, source=mirror), allow_pickle=allow_pickle)
            except ModelError as error:
                refused += f"; {error}"
                continue
            warnings.warn(f"{name}: {known.source} is gone from the hub; its copy {mirror} is used", stacklevel=4)
            return folder
        edit = f"if it has moved, edit {models.line_of(name)}, or give load_pipeline its new id"
        raise ModelError(f"{gone}{refused}; {edit}") from gone


def _is_here(model: Model) -> bool:
    return model.is_bundled or hub.cached(str(model.source), model.revision, _chooser(model)) is not None


def _folder(model: Model, timeout: float | None = None, allow_pickle: bool = False, fresh: bool = False) -> Path:
    """Where a model lies; from the hub where it is not here yet, or, ``fresh``, to see that all of it is right."""
    if isinstance(model.source, Path):
        return model.source
    return hub.fetch(model.source, model.revision, _chooser(model, allow_pickle), timeout, fresh)


def _chooser(model: Model, allow_pickle: bool = False) -> hub.Choose:
    def choose(names: list[str], read: Callable[[str], Path]) -> list[str]:
        found = _parts(names, read, str(model.source), allow_pickle or model.allow_pickle, model.variant)
        index = [INDEX] if any(part.listed for part in found.values()) else []
        return [*index, *(name for part in found.values() for name in part.files)]

    return choose


# --- what fits --------------------------------------------------------------------------------------------------------


def _needed(known: Model, dtype: torch.dtype) -> float:
    return 1e9 * known.memory * dtype.itemsize / torch.float16.itemsize * BESIDE_WEIGHTS


def _check_room(name: str, needed: float, device: torch.device, dtype: torch.dtype) -> None:
    """Refuse a model before it is fetched or read, if the device can never hold it."""
    there = total_memory(device)
    if there is None or needed <= there:
        return
    lower = dtype == torch.float32 and "; dtype='bfloat16' takes half of that" if needed / 2 <= there else ""
    raise ModelError(
        f"{name} is too large for this machine: as {str(dtype).removeprefix('torch.')} it needs about "
        f"{needed / 1e9:.1f} GB, and {device} has {there / 1e9:.1f} GB{lower or ''}"
    )


# --- what is in a folder ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Part:
    """A part of a pipeline: its class, and the files of it that are used, settings first, by their place in the model.

    ``listed`` tells whether it is the index of the model that names it.
    """

    cls: type
    files: list[str]
    listed: bool = True

    @property
    def is_model(self) -> bool:
        return issubclass(self.cls, nn.Module)

    @property
    def weights(self) -> list[str]:
        """The files of numbers, without the list of them."""
        return [file for file in self.files if file.endswith((".safetensors", ".bin"))]


def _parts(
    names: list[str], read: Callable[[str], Path], where: str, allow_pickle: bool, variant: str | None = None
) -> dict[str, Part]:
    """The parts of a model, from the names of its files: nothing is missing, and no other file is fetched."""
    if _is_decidiffusion(names, read):
        folder = "flexible_unet" if any(name.startswith("flexible_unet/") for name in names) else "unet"
        classes, folders, listed = DECIDIFFUSION, {"unet": folder}, False
    elif INDEX in names:
        classes, folders, listed = _classes(_json(read(INDEX)), where), {}, True
    else:
        raise ModelError(f"{where} has no flexible_unet and no {INDEX}: it is no model of diffusers")
    found = {}
    for name, cls in classes.items():
        folder = folders.get(name, name)
        if (
            cls is UNetNAS
            and listed
            and "configurations" not in _json(read(_need(names, where, f"{folder}/config.json")))
        ):
            raise ModelError(
                f"{where} has no flexible_unet, and its unet is no U-Net-NAS: it is not a DeciDiffusion model"
            )
        if issubclass(cls, nn.Module):
            files = _model_files(names, read, where, folder, cls, allow_pickle, variant)
        else:
            files = _setting_files(names, where, folder, cls)
        found[name] = Part(cls, files, listed)
    return found


def _is_decidiffusion(names: list[str], read: Callable[[str], Path]) -> bool:
    """Whether it is laid out as the published checkpoint, or as decinb saves one without further parts."""
    if any(name.startswith("flexible_unet/") for name in names):
        return True
    if "unet/config.json" not in names or any(name.startswith("depth_estimator/") for name in names):
        return False
    return "configurations" in _json(read("unet/config.json"))


def _classes(index: Mapping[str, Any], where: str) -> dict[str, type]:
    """The class of every part that an index lists: one that is installed here, or an error."""
    classes = {}
    for name, entry in index.items():
        if name.startswith("_") or not isinstance(entry, list) or len(entry) != 2 or entry[1] is None:
            continue
        library, cls = map(str, entry)
        if library in ("decinb", "decinb.unet_nas") and cls == UNetNAS.__name__:
            classes[name] = UNetNAS
            continue
        home: Any = {"diffusers": diffusers, "transformers": transformers}.get(library)
        if home is None and hasattr(diffusers.pipelines, library):  # a checker lies with its pipeline
            home = importlib.import_module(f"diffusers.pipelines.{library}")
        if home is None:
            raise ModelError(
                f"{name}: {where} asks for {cls!r} of {library!r}, which is not a part of diffusers: no code of a "
                "model's own is run"
            )
        with quiet():
            found = getattr(home, cls, None) or getattr(home, cls.replace("FeatureExtractor", "ImageProcessor"), None)
        if not isinstance(found, type):
            raise ModelError(
                f"{name}: {library} has no {cls!r}, which {where} asks for: it needs another version of it"
            )
        classes[name] = found
    return classes


def _need(names: list[str], where: str, name: str) -> str:
    if name not in names:
        raise ModelError(f"{where} has no {name}")
    return name


def _model_files(
    names: list[str],
    read: Callable[[str], Path],
    where: str,
    folder: str,
    cls: type,
    allow_pickle: bool,
    variant: str | None,
) -> list[str]:
    """The settings and weights of a network: safetensors before pickles, the wanted variant before the plain one."""
    from_transformers = issubclass(cls, transformers.PreTrainedModel)
    safe, pickled = (
        ("model.safetensors", "pytorch_model.bin")
        if from_transformers
        else ("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin")
    )
    for base in (safe, pickled):
        for kind in dict.fromkeys((variant, None, "fp16")):
            stem, _, ending = base.rpartition(".")
            whole = f"{folder}/{stem}.{kind}.{ending}" if kind else f"{folder}/{base}"
            index = f"{folder}/{base}.index.{kind}.json" if kind else f"{folder}/{base}.index.json"
            if whole not in names and index not in names:
                continue
            if whole.endswith(".bin") and not allow_pickle:
                raise ModelError(
                    f"{folder}: {where} has no safetensors but {whole}, a pickle, which can hold code: look for a copy "
                    "in safetensors, or give load_pipeline allow_pickle=True to read plain tensors from it"
                )
            weights = [whole]
            if whole not in names:
                shards = sorted({f"{folder}/{shard}" for shard in _shards(read(index))})
                weights = [index, *(_need(names, where, shard) for shard in shards)]
            return [_need(names, where, f"{folder}/config.json"), *weights]
    raise ModelError(f"{where} has no {folder}/{safe}, and nothing in its place")


def _setting_files(names: list[str], where: str, folder: str, cls: type) -> list[str]:
    """The files of a part that has no weights: a scheduler, a tokenizer, what prepares a picture."""

    def need(*wanted: str) -> list[str]:
        return [_need(names, where, f"{folder}/{name}") for name in wanted]

    if issubclass(cls, SchedulerMixin):
        return need("scheduler_config.json")
    if issubclass(cls, CLIPTokenizer):
        words = ["tokenizer.json"] if f"{folder}/tokenizer.json" in names else ["vocab.json", "merges.txt"]
        extras = (f"{folder}/special_tokens_map.json", f"{folder}/added_tokens.json")
        return [*need("tokenizer_config.json", *words), *(name for name in extras if name in names)]
    first = "tokenizer_config.json" if "Tokenizer" in cls.__name__ else "preprocessor_config.json"
    plain = [name for name in names if name.startswith(f"{folder}/") and name.endswith((".json", ".txt", ".model"))]
    return [*need(first), *(name for name in plain if name != f"{folder}/{first}")]


def _shards(index: Path) -> list[str]:
    with _blaming(f"{index} lists no shards"):
        return [str(name) for name in _json(index)["weight_map"].values()]


# --- from files to a pipeline -----------------------------------------------------------------------------------------


def _load(
    name: str,
    folders: Sequence[tuple[str, Path]],
    task: str,
    device: torch.device,
    dtype: torch.dtype,
    allow_pickle: bool,
) -> DiffusionPipeline:
    """A pipeline from a folder, and from further ones, whose parts' names begin with something, for what it lacks."""
    known = MODELS.get(name)
    allow_pickle = allow_pickle or (known is not None and known.allow_pickle)
    found: dict[str, tuple[Path, Part]] = {}
    for start, folder in folders:
        parts = _parts(
            hub.names_in(folder), folder.joinpath, str(folder), allow_pickle, known.variant if known else None
        )
        for component, part in parts.items():
            found.setdefault(start + component, (folder, part))

    from_hub = not known.is_bundled if known else not Path(name).is_dir()
    repair = f"decinb.download({name!r}) fetches it anew" if from_hub else "bring it anew from where it came from"
    weights = {component: [folder / file for file in part.weights] for component, (folder, part) in found.items()}
    if pickles := [
        f"{file.parent.name}/{file.name}" for files in weights.values() for file in files if file.suffix == ".bin"
    ]:
        warnings.warn(f"{name} has no safetensors for {', '.join(pickles)}: read as plain tensors only", stacklevel=3)
    for component, files in weights.items():
        for file in files:
            check_file(component, file, repair)
    needed = BESIDE_WEIGHTS * sum(loaded_bytes(file, dtype) for files in weights.values() for file in files)
    _check_room(name, needed, device, dtype)

    folder = folders[0][1]
    listed = any(part.listed for _, part in found.values())
    index = _json(folder / INDEX) if listed else {}
    with quiet():
        components = {component: _read(component, part, folder, dtype) for component, (folder, part) in found.items()}
        _check_tokenizers(components, folder)
        pipe = _assemble(components, index, task, name, str(folder))
    pipe.register_to_config(_name_or_path=name)
    return pipe


def _read(component: str, part: Part, folder: Path, dtype: torch.dtype) -> Any:
    """One part, with all of its numbers."""
    where = (folder / part.files[0]).parent
    if issubclass(part.cls, SchedulerMixin):
        return _scheduler(folder / part.files[0], part.cls)
    if not part.is_model:
        with _blaming(f"{component}: cannot be loaded from {where}"):
            return part.cls.from_pretrained(str(where), local_files_only=True)
    pickled = part.weights[0].endswith(".bin")
    # What a library says of a refused pickle is how to run its code after all: that is left out.
    reason = "the .bin is damaged, or more than plain tensors, or torch is older than 2.6" if pickled else None
    with _blaming(f"{component}: cannot be loaded from {where}", reason):
        loaded, info = part.cls.from_pretrained(
            str(where),
            local_files_only=True,
            use_safetensors=not pickled,
            variant=_variant(part.weights[0]),
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # they are in the info instead, by name
            **{"dtype" if issubclass(part.cls, transformers.PreTrainedModel) else "torch_dtype": dtype},
        )
    refuse_partial(info, where)
    check_numbers(component, loaded, where)
    return loaded


def _variant(weights: str) -> str | None:
    """What stands between the name of a file of weights and its ending."""
    return "fp16" if ".fp16" in Path(weights).name else None


def _check_tokenizers(components: Mapping[str, Any], folder: Path) -> None:
    """Refuse a tokenizer that gives its text encoder tokens, or lengths, that it does not know."""
    for name, tokenizer in components.items():
        encoder = components.get(name.replace("tokenizer", "text_encoder"))
        if not isinstance(tokenizer, CLIPTokenizer) or encoder is None:
            continue
        config = encoder.config
        if len(tokenizer) != config.vocab_size or tokenizer.model_max_length > config.max_position_embeddings:
            raise ModelError(
                f"{name}: {folder / name} knows {len(tokenizer)} tokens, {tokenizer.model_max_length} a text, the text "
                f"encoder {config.vocab_size} tokens, {config.max_position_embeddings} a text: they do not belong "
                "together"
            )


def _scheduler(path: Path, otherwise: type[SchedulerMixin] = DDIMScheduler) -> SchedulerMixin:
    config = _json(path)
    named = config.get("_class_name", otherwise.__name__)
    cls = getattr(diffusers, str(named), None)
    if not (isinstance(cls, type) and issubclass(cls, SchedulerMixin)):
        warnings.warn(f"scheduler: diffusers has no {named!r}; {otherwise.__name__} takes its place", stacklevel=5)
        cls = otherwise
    with _blaming(f"scheduler: cannot be made from {path}"):
        return cls.from_config(config)


def _assemble(
    components: Mapping[str, Any], index: Mapping[str, Any], task: str, name: str, where: str
) -> DiffusionPipeline:
    """A pipeline of the class that does the task, from parts and from what an index says beside them."""
    given = {key: None if isinstance(value, list) else value for key, value in index.items()} | dict(components)
    if wanted := _class_for(components, task, name):
        return _make(wanted, given, where)
    base = getattr(diffusers, str(index.get("_class_name")), None)
    if not (isinstance(base, type) and issubclass(base, DiffusionPipeline)):
        raise ModelError(f"{where} asks for the pipeline {index.get('_class_name')!r}, which diffusers does not have")
    made = _make(base, given, where)
    try:
        return AUTO[task].from_pipe(made)
    except ValueError:  # the auto pipelines do not know it: it may do the task itself
        if task == IMAGE_TO_IMAGE and "image" in inspect.signature(base.__call__).parameters:
            return made
        raise ModelError(f"{where} is a {base.__name__}, for which diffusers has no {task} pipeline") from None


def _class_for(components: Mapping[str, Any], task: str, name: str) -> type[DiffusionPipeline] | None:
    """The pipeline class of a known model, or of one with a U-Net-NAS; None where diffusers must find it."""
    if name in MODELS:
        named = MODELS[name].pipelines[task]
        return getattr(pipeline, named, None) or getattr(diffusers, named)
    if not isinstance(components.get("unet"), UNetNAS):
        return None
    if task == TEXT_TO_IMAGE:
        return pipeline.DeciDiffusionPipeline
    has_depth = components.get("depth_estimator") is not None
    return pipeline.DeciDiffusionDepth2ImgPipeline if has_depth else pipeline.DeciDiffusionImg2ImgPipeline


def _make(cls: type[DiffusionPipeline], given: Mapping[str, Any], where: str) -> DiffusionPipeline:
    parameters = inspect.signature(cls.__init__).parameters.values()
    for parameter in parameters:
        if parameter.name != "self" and parameter.default is parameter.empty and parameter.name not in given:
            raise ModelError(f"{where} has no {parameter.name}, which {cls.__name__} needs")
    with _blaming(f"{where}: {cls.__name__} cannot be made of its parts"):
        return cls(**{parameter.name: given[parameter.name] for parameter in parameters if parameter.name in given})


def _for_task(pipe: DiffusionPipeline, task: str) -> DiffusionPipeline:
    """A pipeline for another task, of the same parts."""
    name = str(pipe.config.get("_name_or_path"))
    _check_task(name, task)
    has_depth = pipe.components.get("depth_estimator") is not None
    if task == TEXT_TO_IMAGE and has_depth:
        raise InputError(f"task: {type(pipe).__name__} cannot do {task!r}: its U-Net must see a depth")
    index = {"_class_name": type(pipe).__name__} | {
        key: value for key, value in pipe.config.items() if not key.startswith("_") and key not in pipe.components
    }
    made = _assemble(pipe.components, index, task, name, type(pipe).__name__)
    made.register_to_config(_name_or_path=name)
    return made


def _check_task(name: str, task: str) -> None:
    if name in MODELS and task not in MODELS[name].pipelines:
        can = ", ".join(map(repr, MODELS[name].pipelines))
        raise InputError(f"task: {name} cannot do {task!r}, only {can}")


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
