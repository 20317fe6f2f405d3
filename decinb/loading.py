"""Load a model as a ready pipeline, from a known name, a folder or the hub.

``load_pipeline`` identifies a model, locates its files, checks them, loads its components and assembles the pipeline.
Every class comes from diffusers, transformers or decinb; no code from a model's files is ever run.
"""

import difflib
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, overload

import torch
from diffusers import DiffusionPipeline

from decinb.checkpoints import hub, sources
from decinb.checkpoints.components import Component, Contents, Files, check_tokenizers, find_components, load_component
from decinb.checkpoints.integrity import check_file, loaded_bytes
from decinb.checkpoints.sources import Locations, locate
from decinb.checkpoints.tasks import assemble, check_complete, known_pipeline_class, pipeline_class, switch_task
from decinb.errors import InputError, ModelError
from decinb.models import IMAGE_TO_IMAGE, MODELS, PUBLISHED, TASKS, KnownName, Model
from decinb.runtimes import openvino
from decinb.utils import acceleration, validation
from decinb.utils.device import choose_device, choose_dtype
from decinb.utils.memory import total_memory
from decinb.utils.quiet import quiet
from decinb.utils.threads import adapt_threads

AUTO_TIMEOUT = 3.0  # seconds of silence from the hub after which the bundled model is used instead
MEMORY_FACTOR = 1.15  # memory that a pipeline needs, in multiples of its weights


def load_pipeline(
    model: str | Path | DiffusionPipeline | None = None,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
    compile: bool = False,
    allow_pickle: bool = False,
    task: str = IMAGE_TO_IMAGE,
    runtime: str = openvino.TORCH,
) -> DiffusionPipeline:
    """Load a model as a ready pipeline, and print one line that says what was loaded, where, and why.

    Args:
        model: a name in ``MODELS``, a folder, or ``owner/name`` on the hub: DeciDiffusion, or any model that the auto
            pipelines of diffusers support. A ``Path`` is always a folder, also if it is called like a known model.
            Given a loaded pipeline, return one for another task that shares its components, and print nothing.
            None uses the environment variable ``DECINB_MODEL`` if it is set; else the published checkpoint on a CUDA
            GPU if it is cached or can be downloaded; else ``tiny``.
        device: None uses CUDA (under ``accelerate launch`` the GPU of the process), else Apple's MPS, else the CPU.
        dtype: such as ``torch.float16`` or ``"fp16"``. None uses float16 on CUDA and float32 elsewhere.
        compile: turn on what is faster on the device and changes images only by rounding; see
            ``decinb.utils.acceleration``. It pays off for long sweeps: the first call waits for the compiler.
        allow_pickle: read weights that exist only as ``.bin``. They are read as plain tensors only, and rejected if
            they hold anything else. The published checkpoint does not need this argument.
        task: ``"image-to-image"`` or ``"text-to-image"``.
        runtime: ``"torch"``, or ``"openvino"`` to run the U-Net with OpenVINO on the CPU, which is faster for single
            images and changes them only by rounding. ``"openvino-bfloat16"`` is faster still where the
            processor multiplies bfloat16, and its rounding shows. See ``decinb.runtimes.openvino``.

    Returns:
        An ordinary diffusers pipeline. It works best on images of ``image_size(pipe)`` pixels.

    Raises:
        InputError: the model is unknown, its folder does not exist, it cannot do the task, or the device or dtype is
            not available.
        ModelError: the model cannot be downloaded, does not fit into memory, or a component is missing, damaged or
            does not match the others.
    """
    task = validation.choice(task, "task", TASKS)
    compile = validation.flag(compile, "compile")
    if isinstance(model, DiffusionPipeline):
        if device is not None or dtype is not None or compile or runtime != openvino.TORCH:
            raise InputError(
                "device, dtype, compile and runtime apply when a model is loaded, but this pipeline is already loaded: "
                "move it with pipe.to(...), or load the model by its name"
            )
        return switch_task(model, task)

    device = choose_device(device)
    dtype = choose_dtype(dtype, device)
    runtime = openvino.check(runtime, device, dtype, compile)
    found = _find(model, task, device, dtype, allow_pickle)
    pipe = _load(found, task, device, dtype, allow_pickle).to(device)
    if device.type == "cpu":
        acceleration.keep_freed_memory()
        network = getattr(pipe, "unet", None) or getattr(pipe, "transformer", None)
        if runtime == openvino.TORCH and network is not None:
            adapt_threads(network)

    details = [f"{found.name} on {device}", str(dtype).removeprefix("torch.")]
    if task != IMAGE_TO_IMAGE:
        details.append(task)
    if compile:
        details.append(acceleration.tune(pipe))
    if runtime != openvino.TORCH:
        openvino.attach(getattr(pipe, "unet", None), runtime)
        details.append(f"U-Net in {openvino.NAMES[runtime]}")
    print(f"decinb: {', '.join(details)} ({found.reason})")
    return pipe


@overload
def download(model: str = ..., allow_pickle: bool = ..., *, dry_run: Literal[False] = ...) -> Path: ...
@overload
def download(model: str = ..., allow_pickle: bool = ..., *, dry_run: Literal[True]) -> dict[str, int]: ...
def download(model: str = PUBLISHED, allow_pickle: bool = False, *, dry_run: bool = False) -> Path | dict[str, int]:
    """Download a model for later use without a network; interrupted downloads resume.

    The hub is asked for the newest version, or for the commit that a known model is pinned to. Every file, new or
    cached, is compared with the hash that the hub gives for it, and downloaded again if it differs.

    Args:
        model: a name in ``MODELS``, or ``owner/name`` on the hub.
        allow_pickle: as for ``load_pipeline``.
        dry_run: download nothing but small configurations; print what would be downloaded, and how large it is.

    Returns:
        With ``dry_run``, the files that are missing, as ``owner/name/file``, each with its size in bytes. Otherwise the
        folder of the model, or of its first components if they come from several sources. ``load_pipeline`` finds
        all of them by the model's name.

    Raises:
        InputError: the model is not a known name or a hub id.
        ModelError: the model cannot be downloaded, or is damaged on arrival twice; the message says why.
    """
    if not (isinstance(model, str) and (model in MODELS or hub.is_model_id(model))):
        raise InputError(
            f"model: give one of {', '.join(map(repr, MODELS))} or a hub id 'owner/name', "
            f"got {validation.short_repr(model)}"
        )
    name = _known_name(model)
    if dry_run:
        missing = sources.list_missing(name, MODELS.get(name) or _hub_model(name), allow_pickle)
        print(f"decinb: {name} would download {len(missing)} files, {sum(missing.values()) / 1e9:.2f} GB")
        return missing
    return locate(name, MODELS.get(name) or _hub_model(name), allow_pickle, refresh=True)[0][1]


def is_here(model: Model) -> bool:
    """Return whether a known model can be loaded without a network."""
    return sources.is_local(model)


def takes_published() -> bool:
    """Return whether to use published models: on a CUDA GPU, unless the environment sets ``DECINB_MODEL``."""
    return torch.cuda.is_available() and not os.environ.get("DECINB_MODEL")


def fits(model: Model, device: str | torch.device | None = None, dtype: str | torch.dtype | None = None) -> bool:
    """Return whether a known model fits into the memory of a device; arguments as for ``load_pipeline``."""
    device = choose_device(device)
    available = total_memory(device)
    return available is None or _required_memory(model, choose_dtype(dtype, device)) <= available


# --- which model, and where its files are -----------------------------------------------------------------------------


@dataclass(frozen=True)
class _Found:
    """A model whose files are on this machine, and why it was chosen."""

    name: str
    model: Model
    locations: Locations
    reason: str


def _find(model: str | Path | None, task: str, device: torch.device, dtype: torch.dtype, allow_pickle: bool) -> _Found:
    """Choose the model, and locate or download its files."""
    if model is not None:
        return _find_named(model, "as requested", task, device, dtype, allow_pickle)
    if named := os.environ.get("DECINB_MODEL"):
        return _find_named(named, "set by DECINB_MODEL", task, device, dtype, allow_pickle)
    reason = "no CUDA GPU is used"
    if device.type == "cuda":
        published = MODELS[PUBLISHED]
        try:
            _check_memory(PUBLISHED, _required_memory(published, dtype), device, dtype)
            locations = locate(PUBLISHED, published, timeout=AUTO_TIMEOUT)
            return _Found(PUBLISHED, published, locations, "a CUDA GPU is used")
        except ModelError as error:
            reason = str(error)
    return _Found("tiny", MODELS["tiny"], locate("tiny", MODELS["tiny"]), reason)


def _find_named(
    model: str | Path, reason: str, task: str, device: torch.device, dtype: torch.dtype, allow_pickle: bool
) -> _Found:
    """Locate or download a model, unless what is known about it already shows that it cannot be used."""
    name, entry = _identify(model)
    if name in MODELS:
        known_pipeline_class(name, task)
        _check_memory(name, _required_memory(entry, dtype), device, dtype)
        return _Found(name, entry, locate(name, entry, allow_pickle), reason)

    def check(contents: Contents) -> None:
        check_complete(pipeline_class(contents, task, name), contents.components, name)

    try:
        return _Found(name, entry, locate(name, entry, allow_pickle, check=check), reason)
    except hub.NotFoundError as error:
        raise ModelError(f"{error} (and there is no folder {name!r} here)") from error


def _identify(model: str | Path) -> tuple[str, Model]:
    """Return the name and the entry of a known model, a folder, or a model on the hub.

    Raises:
        InputError: it is none of these.
    """
    if not isinstance(model, (str, Path)):
        raise InputError(f"model: give a name, a folder or a hub id, got {validation.short_repr(model)}")
    name = str(model)
    known = None if isinstance(model, Path) else MODELS.get(_known_name(name))
    if (name and name not in MODELS) or isinstance(model, Path):
        folder = validation.path(model, "model")
        if folder.is_dir():
            return _folder_name(name), Model(folder, "a model in a folder", image_size=0)
    if known is not None:
        return _known_name(name), known
    if isinstance(model, Path) or name.startswith((".", "/", "~")) or "\\" in name or name.count("/") > 1:
        raise InputError(f"model: folder not found: {validation.short_repr(name)}")
    if hub.is_model_id(name):
        return name, _hub_model(name)
    closeness = {known: difflib.SequenceMatcher(None, known, name.lower()).ratio() for known in MODELS}
    close = max(closeness, key=closeness.__getitem__)  # of several, the first
    hint = f"did you mean {close!r}? Otherwise " if closeness[close] >= 0.6 else ""
    raise InputError(
        f"model: {validation.short_repr(name)} is not known; {hint}give one of {', '.join(map(repr, MODELS))}, a "
        "folder, or a hub id 'owner/name'"
    )


def _folder_name(name: str) -> str:
    """Return what to call a folder, so that nobody takes it for a known model of the same name."""
    return os.path.join(os.curdir, name) if name in MODELS else name


def _known_name(name: str) -> str:
    """Return the name of the known model that has this hub id, else the name itself."""
    return next((known for known, model in MODELS.items() if model.source == name), name)


def _hub_model(name: str) -> Model:
    return Model(name, "a model on the hub", image_size=0)


# --- from files to a pipeline -----------------------------------------------------------------------------------------


def _load(found: _Found, task: str, device: torch.device, dtype: torch.dtype, allow_pickle: bool) -> DiffusionPipeline:
    """Check the files of a model, load its components, and assemble the pipeline."""
    where = str(found.locations[0][1])
    contents, folders = _read_contents(found, allow_pickle)
    is_known = found.name in MODELS
    cls = known_pipeline_class(found.name, task) if is_known else pipeline_class(contents, task, where)
    check_complete(cls, contents.components, where)
    _check_weights(found, contents, folders, device, dtype)
    with quiet():
        components = {
            name: load_component(name, component, folders[name], dtype)
            for name, component in contents.components.items()
        }
        check_tokenizers(components, where)
        pipe = assemble(cls, components, contents.index, where)
    pipe.register_to_config(_name_or_path=KnownName(found.name) if is_known else found.name)
    return pipe


def _read_contents(found: _Found, allow_pickle: bool) -> tuple[Contents, dict[str, Path]]:
    """Return the components of a model and the folder of each; where two folders have one, take the first."""
    model = found.model
    index: dict[str, Any] = {}
    components: dict[str, Component] = {}
    folders: dict[str, Path] = {}
    for prefix, folder in found.locations:
        contents = find_components(Files.in_folder(folder), allow_pickle or model.allow_pickle, model.variant)
        index = index or contents.index
        for name, component in contents.components.items():
            if prefix + name not in components:
                components[prefix + name] = component
                folders[prefix + name] = folder
    return Contents(components, index), folders


def _check_weights(
    found: _Found, contents: Contents, folders: dict[str, Path], device: torch.device, dtype: torch.dtype
) -> None:
    """Check that all weight files are intact and fit into memory, and warn if some are pickles."""
    weights = [
        (name, folders[name] / file) for name, component in contents.components.items() for file in component.weights
    ]
    if pickles := [f"{file.parent.name}/{file.name}" for _, file in weights if file.suffix == ".bin"]:
        validation.warn(f"{found.name} has no safetensors for {', '.join(pickles)}: read as plain tensors only")
    is_folder = isinstance(found.model.source, Path)
    repair = "copy it from its source again" if is_folder else f"decinb.download({found.name!r}) downloads it again"
    for name, file in weights:
        check_file(name, file, repair)
    required = MEMORY_FACTOR * sum(loaded_bytes(file, dtype) for _, file in weights)
    _check_memory(found.name, required, device, dtype)


# --- memory -----------------------------------------------------------------------------------------------------------


def _required_memory(model: Model, dtype: torch.dtype) -> float:
    """Return about how many bytes a known model needs; ``Model.memory`` is in GB as float16."""
    return 1e9 * model.memory * dtype.itemsize / torch.float16.itemsize * MEMORY_FACTOR


def _check_memory(name: str, required: float, device: torch.device, dtype: torch.dtype) -> None:
    """Raise a ModelError if a model needs more memory than a device has in total."""
    available = total_memory(device)
    if available is None or required <= available:
        return
    half_fits = dtype == torch.float32 and required / 2 <= available
    raise ModelError(
        f"{name} is too large for this machine: as {str(dtype).removeprefix('torch.')} it needs about "
        f"{required / 1e9:.1f} GB, and {device} has {available / 1e9:.1f} GB"
        + ("; dtype='bfloat16' needs half of that" if half_fits else "")
    )
