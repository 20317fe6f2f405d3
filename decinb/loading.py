"""Loading a model, ready to run: known ones by name, others from a folder or the hub.

Every part is built by a class of diffusers, of transformers or of decinb. No code comes from a model's folder or from
the hub, whatever its files say. Parts are loaded strictly: files are whole, tensors complete, numbers numbers.
"""

import difflib
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline

from decinb import models
from decinb.checkpoints import hub
from decinb.checkpoints.components import (
    Contents,
    Files,
    Part,
    check_tokenizers,
    contents,
    read_part,
)
from decinb.checkpoints.integrity import check_file, loaded_bytes
from decinb.checkpoints.tasks import _check_complete, _class_for, _class_of_known, _for_task, _make
from decinb.errors import InputError, ModelError
from decinb.models import IMAGE_TO_IMAGE, MODELS, PUBLISHED, TASKS, Model
from decinb.utils import acceleration, validation
from decinb.utils.device import choose_device, choose_dtype
from decinb.utils.memory import total_memory
from decinb.utils.quiet import quiet

AUTO_TIMEOUT = 3.0  # seconds of silence from the hub before the bundled model is taken instead
BESIDE_WEIGHTS = 1.15  # memory in all, for each byte of weights: what runs needs room too


Places = list[tuple[str, Path]]
"""The folders of a model, each with what the names of its parts begin with in the pipeline: ``""`` is the first's."""


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
            pipelines of diffusers know. A pipeline that is loaded already gives its parts, as they are and where they
            are, to one of another task, and nothing is printed.
            None takes the published checkpoint on a CUDA GPU where it is cached or can be downloaded, and ``tiny``
            everywhere else; or what the environment variable ``DECINB_MODEL`` names.
        device: None takes CUDA (under ``accelerate launch`` the process's own), else Apple's MPS, else the CPU.
        dtype: ``torch.float16`` or ``"fp16"``, and so on. None takes float16 on CUDA and float32 elsewhere.
        compile: turn on what is faster on the device and keeps the pictures, but for rounding; see
            ``decinb.utils.acceleration``.
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
    task = validation.choice(task, "task", TASKS)
    if isinstance(model, DiffusionPipeline):
        if device is not None or dtype is not None or compile:
            raise InputError(
                "device, dtype and compile are of loading, and this pipeline is loaded: its parts are shared as they "
                "are; move them with pipe.to(...), or load the model by its name"
            )
        return _for_task(model, task)
    device = choose_device(device)
    dtype = choose_dtype(dtype, device)
    name, places, why = _find(model, device, allow_pickle, task, dtype)
    pipe = _load(name, places, task, device, dtype, allow_pickle).to(device)
    if device.type == "cpu":
        acceleration.keep_freed_memory()
    tuned = f", {acceleration.tune(pipe)}" if compile else ""
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
        The folder with the model, or with its first parts where they come from several places. ``load_pipeline`` finds
        all of them by the model's name.

    Raises:
        InputError: there is no such name.
        ModelError: the model cannot be had, with the true cause, or arrives damaged twice.
    """
    if not (isinstance(model, str) and (model in MODELS or hub.is_model_id(model))):
        raise InputError(
            f"model: give one of {', '.join(map(repr, MODELS))} or a hub id 'owner/name', "
            f"got {validation.short_repr(model)}"
        )
    name = _known_name(model)
    return _places(name, MODELS.get(name) or _model_on_hub(name), allow_pickle, fresh=True)[0][1]


def is_here(model: Model) -> bool:
    """Whether a known model, or a copy of it, can be loaded without a network."""
    return all(any(_here(one) for one in copies) for _, copies in _sources(model))


def takes_published() -> bool:
    """Whether published models are meant: on a CUDA GPU, unless the environment variable ``DECINB_MODEL`` names one."""
    return torch.cuda.is_available() and not os.environ.get("DECINB_MODEL")


def fits(model: Model, device: str | torch.device | None = None, dtype: str | torch.dtype | None = None) -> bool:
    """Whether a known model fits into the memory of a device; device and dtype as for ``load_pipeline``."""
    device = choose_device(device)
    there = total_memory(device)
    return there is None or _needed(model, choose_dtype(dtype, device)) <= there


def _model_on_hub(name: str) -> Model:
    """What is known of a model of which only the id is known."""
    return Model(name, "a model on the hub", 0)


def _known_name(name: str) -> str:
    """The name of the known model that lies under an id, or what was given: an id is the model's other name."""
    return next((known for known, model in MODELS.items() if model.source == name), name)


def _find(
    model: str | Path | None,
    device: torch.device,
    allow_pickle: bool = False,
    task: str = IMAGE_TO_IMAGE,
    dtype: torch.dtype = torch.float32,
) -> tuple[str, Places, str]:
    """From what a user calls a model to its name, where its parts lie, and why it was taken."""
    if model is None and os.environ.get("DECINB_MODEL"):
        name, places, _ = _find(os.environ["DECINB_MODEL"], device, allow_pickle, task, dtype)
        return name, places, "as DECINB_MODEL says"
    if model is None:
        why = "no CUDA GPU is used"
        if device.type == "cuda":
            try:
                _check_room(PUBLISHED, _needed(MODELS[PUBLISHED], dtype), device, dtype)
                return PUBLISHED, _places(PUBLISHED, MODELS[PUBLISHED], timeout=AUTO_TIMEOUT), "a CUDA GPU is used"
            except ModelError as error:
                why = str(error)
        return "tiny", _places("tiny", MODELS["tiny"]), why

    if not isinstance(model, (str, Path)):
        raise InputError(f"model: give a name, a folder or a hub id, got {validation.short_repr(model)}")
    name, asked = str(model), "as asked"
    if name not in MODELS and name and (folder := Path(model).expanduser()).is_dir():
        return name, [("", folder)], asked
    name = _known_name(name)
    if known := MODELS.get(name):
        _class_of_known(name, task)
        _check_room(name, _needed(known, dtype), device, dtype)
        return name, _places(name, known, allow_pickle), asked
    if isinstance(model, Path) or model.startswith((".", "/", "~")) or "\\" in model or model.count("/") > 1:
        raise InputError(f"model: folder not found: {name!r}")
    if hub.is_model_id(name):

        def check(found: Contents) -> None:
            _check_complete(_class_for(found, task, name), found.parts, name)

        try:
            return name, _places(name, _model_on_hub(name), allow_pickle, check=check), asked
        except hub.NotFoundError as error:
            raise ModelError(f"{error} (and there is no folder {name!r} here)") from error
    close = difflib.get_close_matches(name.lower(), MODELS, n=1)
    hint = f"did you mean {close[0]!r}? Else " if close else ""
    names = ", ".join(map(repr, MODELS))
    raise InputError(
        f"model: {validation.short_repr(name)} is not known; {hint}give one of {names}, a folder, "
        "or a hub id 'owner/name'"
    )


# --- where it lies ----------------------------------------------------------------------------------------------------


def _sources(model: Model) -> list[tuple[str, list[Model]]]:
    """The places of a model's parts: what their names begin with, and the source there with copies of it."""
    copies = [replace(model, source=mirror) for mirror in model.mirrors]
    return [("", [model, *copies]), *((start, [replace(model, source=at)]) for start, at in model.extra_sources)]


def _places(
    name: str,
    model: Model,
    allow_pickle: bool = False,
    timeout: float | None = None,
    fresh: bool = False,
    check: Callable[[Contents], None] | None = None,
) -> Places:
    """Where the parts of a model lie; from the hub where they are not here yet, or, ``fresh``, newer there.

    A copy takes the place of a source that is gone, and of one that is not here where the copy is. ``check`` may refuse
    the model once its settings are known, before its weights are fetched.
    """

    def fetch(one: Model) -> Path:
        if isinstance(one.source, Path):
            return one.source
        if not hub.is_model_id(one.source):
            raise InputError(
                f"model: the source of {name!r}, {one.source!r}, is no hub id 'owner/name'; give a folder as a "
                "pathlib.Path"
            )
        return hub.fetch(one.source, one.revision, _chooser(one, allow_pickle, check), timeout, fresh)

    def place(source: Model, *copies: Model) -> Path:
        if not fresh and copies and not _here(source) and (cached := next(filter(_here, copies), None)):
            return fetch(cached)
        try:
            return fetch(source)
        except hub.NotFoundError as gone:
            if name not in MODELS:
                raise
            refused = [str(gone)]
            for copy in copies:
                try:
                    folder = fetch(copy)
                except ModelError as error:
                    refused.append(str(error))
                    continue
                validation.warn(f"{name}: {source.source} is gone from the hub; its copy {copy.source} is used")
                return folder
            edit = f"if it has moved, edit {models.line_of(str(source.source))}"
            raise ModelError(f"{name}: {'; '.join(refused)}; {edit}") from gone

    return [(start, place(*copies)) for start, copies in _sources(model)]


def _here(model: Model) -> bool:
    return isinstance(model.source, Path) or hub.cached(str(model.source), model.revision, _chooser(model)) is not None


def _chooser(model: Model, allow_pickle: bool = False, check: Callable[[Contents], None] | None = None) -> hub.Choose:
    """What picks the files of a model that are used, of all that lie there."""

    def choose(names: list[str], read: Callable[[str], Path]) -> list[str]:
        found = contents(Files(str(model.source), names, read), allow_pickle or model.allow_pickle, model.variant)
        if check:
            check(found)
        return found.files

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
        f"{needed / 1e9:.1f} GB, and {device} has {there / 1e9:.1f} GB{lower}"
    )


# --- what does the task -----------------------------------------------------------------------------------------------


# --- from files to a pipeline -----------------------------------------------------------------------------------------


def _load(
    name: str, places: Places, task: str, device: torch.device, dtype: torch.dtype, allow_pickle: bool
) -> DiffusionPipeline:
    """A pipeline from the first place, and from further ones for what it lacks."""
    known = MODELS.get(name)
    index: dict[str, Any] = {}
    found: dict[str, tuple[Path, Part]] = {}
    for start, folder in places:
        held = contents(
            Files.of(folder),
            allow_pickle or (known is not None and known.allow_pickle),
            known.variant if known else None,
        )
        index = index or held.index
        for component, part in held.parts.items():
            found.setdefault(start + component, (folder, part))
    where = str(places[0][1])
    parts = {component: part for component, (_, part) in found.items()}
    cls = _class_of_known(name, task) if known else _class_for(Contents(parts, index), task, where)
    _check_complete(cls, parts, where)

    from_hub = isinstance(known.source, str) if known else not Path(name).expanduser().is_dir()
    repair = f"decinb.download({name!r}) fetches it anew" if from_hub else "bring it anew from where it came from"
    weights = [(component, folder / file) for component, (folder, part) in found.items() for file in part.weights]
    if pickles := [f"{file.parent.name}/{file.name}" for _, file in weights if file.suffix == ".bin"]:
        validation.warn(f"{name} has no safetensors for {', '.join(pickles)}: read as plain tensors only")
    for component, file in weights:
        check_file(component, file, repair)
    _check_room(name, BESIDE_WEIGHTS * sum(loaded_bytes(file, dtype) for _, file in weights), device, dtype)

    with quiet():
        components = {
            component: read_part(component, part, folder, dtype) for component, (folder, part) in found.items()
        }
        check_tokenizers(components, where)
        pipe = _make(cls, components, index, where)
    pipe.register_to_config(_name_or_path=name)
    return pipe
