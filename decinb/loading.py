"""Loading a model, ready to run: known ones by name, others from a folder or the hub.

Every part is built by a class of diffusers, of transformers or of decinb. No code comes from a model's folder or from
the hub, whatever its files say. Parts are loaded strictly: files are whole, tensors complete, numbers numbers.
"""

import difflib
import inspect
import os
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from decinb import allocator, hub, inputs, models, tuning
from decinb.errors import InputError, ModelError
from decinb.kinds import kind_of
from decinb.memory import total_memory
from decinb.models import IMAGE_TO_IMAGE, MODELS, PUBLISHED, TASKS, TEXT_TO_IMAGE, Model
from decinb.parts import INCOMPLETE, Contents, Files, Part, blaming, check_tokenizers, contents, read_part
from decinb.quiet import quiet
from decinb.weights import check_file, loaded_bytes

with quiet():  # importing these tells of optional libraries that are not needed here
    import diffusers
    from diffusers import DiffusionPipeline
    from diffusers.pipelines import auto_pipeline

    from decinb import pipeline
    from decinb.unet_nas import UNetNAS

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
        if device is not None or dtype is not None or compile:
            raise InputError(
                "device, dtype and compile are of loading, and this pipeline is loaded: its parts are shared as they "
                "are; move them with pipe.to(...), or load the model by its name"
            )
        return _for_task(model, task)
    device = _device(device)
    dtype = _dtype(dtype, device)
    name, places, why = _find(model, device, allow_pickle, task, dtype)
    pipe = _load(name, places, task, device, dtype, allow_pickle).to(device)
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
        The folder with the model, or with its first parts where they come from several places. ``load_pipeline`` finds
        all of them by the model's name.

    Raises:
        InputError: there is no such name.
        ModelError: the model cannot be had, with the true cause, or arrives damaged twice.
    """
    if not (isinstance(model, str) and (model in MODELS or hub.is_model_id(model))):
        raise InputError(
            f"model: give one of {', '.join(map(repr, MODELS))} or a hub id 'owner/name', got {inputs.told(model)}"
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
    device = _device(device)
    there = total_memory(device)
    return there is None or _needed(model, _dtype(dtype, device)) <= there


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
        raise InputError(f"dtype: {inputs.told(dtype)} cannot be used; give one of {', '.join(DTYPES)} or None")
    if found == torch.float16 and device.type == "cpu":
        inputs.warn(
            "float16 was asked for on the CPU, where one convolution takes hundreds of times longer: float32 is used"
        )
        return torch.float32
    return found


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
                return PUBLISHED, _places(PUBLISHED, MODELS[PUBLISHED], timeout=IMPATIENT), "a CUDA GPU is used"
            except ModelError as error:
                why = str(error)
        return "tiny", _places("tiny", MODELS["tiny"]), why

    if not isinstance(model, (str, Path)):
        raise InputError(f"model: give a name, a folder or a hub id, got {inputs.told(model)}")
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
        f"model: {inputs.told(name)} is not known; {hint}give one of {names}, a folder, or a hub id 'owner/name'"
    )


# --- where it lies ----------------------------------------------------------------------------------------------------


def _sources(model: Model) -> list[tuple[str, list[Model]]]:
    """The places of a model's parts: what their names begin with, and the source there with copies of it."""
    copies = [replace(model, source=mirror) for mirror in model.mirrors]
    return [("", [model, *copies]), *((start, [replace(model, source=at)]) for start, at in model.further)]


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
                inputs.warn(f"{name}: {source.source} is gone from the hub; its copy {copy.source} is used")
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


def _class_of_known(name: str, task: str) -> type[DiffusionPipeline]:
    """The pipeline class that a known model's entry names for a task.

    Raises:
        InputError: it names none.
    """
    named = MODELS[name].pipelines
    if task not in named:
        raise InputError(f"task: {name} cannot do {task!r}, only {', '.join(map(repr, named))}")
    return getattr(pipeline, named[task], None) or getattr(diffusers, named[task])


def _class_for(found: Contents, task: str, where: str) -> type[DiffusionPipeline]:
    """The pipeline class that does a task with the parts of a model that is not known by name.

    Raises:
        InputError: none does.
        ModelError: the index names a pipeline that diffusers does not have.
    """
    depth = "depth_estimator" in found.parts
    if "unet" in found.parts and found.parts["unet"].cls is UNetNAS:
        base = pipeline.DeciDiffusionDepth2ImgPipeline if depth else pipeline.DeciDiffusionImg2ImgPipeline
        cls = base if task == IMAGE_TO_IMAGE else None if depth else pipeline.DeciDiffusionPipeline
    else:
        named = str(found.index.get("_class_name"))
        base = getattr(diffusers, named, None)
        if not (isinstance(base, type) and issubclass(base, DiffusionPipeline)):
            raise ModelError(
                f"{where} asks for the pipeline {inputs.told(named)}, which diffusers {diffusers.__version__} does not "
                "have: no code of a model's own is run; take a model that it knows"
            )
        auto = {
            IMAGE_TO_IMAGE: auto_pipeline.AUTO_IMAGE2IMAGE_PIPELINES_MAPPING,
            TEXT_TO_IMAGE: auto_pipeline.AUTO_TEXT2IMAGE_PIPELINES_MAPPING,
        }[task]
        cls = auto_pipeline._get_task_class(auto, base.__name__, throw_error_if_not_exist=False)
        if cls is None and _does(base, task):  # the auto pipelines do not know it, but it does the task itself
            cls = base
        if task == TEXT_TO_IMAGE and found.index.get("requires_aesthetics_score"):
            cls = None  # a refiner: its U-Net is told other numbers than text to image gives
    if cls is None:
        who = where if where == base.__name__ else f"{where}, a {base.__name__},"
        raise InputError(f"task: {who} cannot do {task!r}; take another task, or a model that does it")
    return cls


def _does(cls: type[DiffusionPipeline], task: str) -> bool:
    """Whether a call of a class takes what a task gives, and no more, and makes pictures."""
    takes = inspect.signature(cls.__call__).parameters
    return "prompt" in takes and ("image" in takes) == (task == IMAGE_TO_IMAGE) and "num_frames" not in takes


def _check_complete(cls: type[DiffusionPipeline], parts: Mapping[str, Any], where: str) -> None:
    """Refuse a model that lacks a part without which a class cannot run."""
    expected, _ = cls._get_signature_keys(cls)
    optional = {name for name, it in inspect.signature(cls.__init__).parameters.items() if it.default is None}
    if lacking := sorted(set(expected) - set(parts) - optional - set(cls._optional_components)):
        raise ModelError(f"{where} has no {', '.join(lacking)}, which {cls.__name__} needs: {INCOMPLETE}")


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
        inputs.warn(f"{name} has no safetensors for {', '.join(pickles)}: read as plain tensors only")
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


def _make(
    cls: type[DiffusionPipeline], components: Mapping[str, Any], settings: Mapping[str, Any], where: str
) -> DiffusionPipeline:
    """A pipeline of a class, from parts and from what an index, or a pipeline's config, says beside them."""
    given = {name: value for name, value in settings.items() if not isinstance(value, (list, tuple))} | dict(components)
    expected, _ = cls._get_signature_keys(cls)
    given = dict.fromkeys(expected) | given
    takes = inspect.signature(cls.__init__).parameters
    with blaming(f"{where}: {cls.__name__} cannot be made of its parts"):
        made = cls(**{name: value for name, value in given.items() if name in takes})
    if kind := kind_of(made):  # a U-Net for inpainting sees the mask and the picture too
        sees, gives = made.unet.config.in_channels, made.vae.config.latent_channels + kind.beside_channels
        if sees != gives:
            raise ModelError(
                f"{where}: its U-Net sees {sees} channels, and {cls.__name__} gives it {gives}: it was made for "
                "another task; take another model"
            )
    return made


def _for_task(pipe: DiffusionPipeline, task: str) -> DiffusionPipeline:
    """A pipeline for a task, of the same parts; the same pipeline if it does the task already."""
    components = {name: part for name, part in pipe.components.items() if part is not None}
    stock = next(cls for cls in type(pipe).__mro__ if getattr(diffusers, cls.__name__, None) is cls)
    settings = {**pipe.config, "_class_name": stock.__name__}
    found = Contents({name: Part(type(part), []) for name, part in components.items()}, settings)
    cls = _class_for(found, task, type(pipe).__name__)
    if isinstance(pipe, cls):
        return pipe
    _check_complete(cls, components, type(pipe).__name__)
    with quiet():
        made = _make(cls, components, settings, type(pipe).__name__)
    if name := pipe.config.get("_name_or_path"):
        made.register_to_config(_name_or_path=name)
    return made
