"""A hash of everything in a pipeline that decides its images: two pipelines with equal hashes make equal images.

It covers every byte of every tensor, all configurations and plain attributes, adapters with their scales, attention
processors and tokenizers. What only decides where or how fast a network runs does not count: devices, offloading,
``torch.compile``, memory layout, sliced attention. What cannot be hashed, such as a user's hook, is listed, so that
images made with it are never taken for finished.

No weight is cached, because a change through ``tensor.data`` leaves no trace that a cache could look at. Hashing reads
each weight once, at about the speed of memory: two seconds for a billion float32 parameters. For the bundled model it
takes about 0.1 s, most of it to visit some 600 modules.
"""

import functools
import hashlib
import inspect
import json
import numbers
import sys
from collections.abc import Mapping
from contextlib import suppress
from enum import Enum
from types import BuiltinFunctionType, FunctionType, MethodType, ModuleType
from typing import Any, NamedTuple

import numpy as np
import torch
import transformers
from diffusers import DiffusionPipeline, SchedulerMixin
from diffusers.configuration_utils import FrozenDict
from PIL import Image
from torch import Tensor, nn
from torch.overrides import _get_current_function_mode_stack
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack
from transformers import PretrainedConfig, PreTrainedTokenizerBase
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from decinb.utils import validation
from decinb.utils.hashing import tensor_hash
from decinb.utils.origins import OURS, exchanged_functions, is_installed, module_of, replaced

# Attributes that do not decide what a network computes.
BOOKKEEPING = {
    "_class_name",
    "_commit_hash",
    "_diffusers_version",
    "_gradient_checkpointing_func",
    "_is_hf_initialized",
    "_name_or_path",
    "_use_default_values",
    "gradient_checkpointing",
    "hf_device_map",
    "name_or_path",
    "requires_safety_checker",  # the checker itself counts
    "use_slicing",  # one image after the other, or one head: the same sums
}
OF_MODULES = {
    *BOOKKEEPING,
    *vars(nn.Module()),
    "_compiled_call_impl",
    "_is_torch_compile",  # torch.compile
    "_diffusers_hook",
    "_hf_hook",
    "_old_forward",  # accelerate's hooks
    "_output_capturing_hooks_installed",  # of the observer below
    "forward",
    "peft_config",  # what peft made its layers from, which are covered themselves
} - {"training"}
OF_PEFT = OF_MODULES | {"kwargs"}  # where its layers were created
OF_CONFIGS = {  # the dtype of the tensors counts
    *BOOKKEEPING,
    "architectures",
    "dtype",
    "torch_dtype",
    "transformers_version",
}
OF_TOKENIZERS = {
    *BOOKKEEPING,
    "_in_target_context_manager",
    "deprecation_warnings",
    "files_loaded",
    "init_inputs",
    "init_kwargs",
    "merges_file",
    "verbose",
    "vocab_file",
}
NEUTRAL_HOOKS = {  # of accelerate and diffusers: they move tensors between devices
    "AlignDevicesHook",
    "CpuOffload",
    "GroupOffloadingHook",
    "LayerExecutionTrackerHook",
    "LazyPrefetchGroupOffloadingHook",
}
PLAIN_HOOKS = {"LayerwiseCastingHook", "PeftInputAutocastDisableHook"}  # their attributes say all that they do
OBSERVER = "transformers.utils.output_capturing"  # its hooks stay after a call that asks for hidden states
SAME_ATTENTION = {  # different orders of the same sums
    "AttnProcessor",
    "AttnProcessor2_0",
    "SlicedAttnProcessor",
    "XFormersAttnProcessor",
}


DEFAULT_PRECISION = {
    "matmul": "highest",
    "mkldnn.matmul": "ieee",
    "mkldnn.conv": "ieee",
    "cuda.matmul": "ieee",
    "cudnn.conv": "tf32",
}
LIBRARIES = (torch, torch.Tensor, nn.functional, np, Image, Image.Image)
"""What all pipelines compute with. A function of the user in one of these is noted."""

SILENT = {"progress_bar", "set_progress_bar_config"}
"""Methods of pipelines that compute nothing, and may be replaced."""

SCALE_DIGITS = 12
"""The digits of an adapter's scale that count. A call with a scale of its own multiplies it and divides it again."""

_json = json.JSONEncoder(default=str)
CODE = (FunctionType, BuiltinFunctionType, MethodType, functools.partial)
COMMON = {bool, int, str, type(None)}  # types of most values; not float, because 0.0 equals -0.0 in a cache


@functools.lru_cache(maxsize=2**14, typed=True)
def _encode(*words: Any) -> bytes:
    """Return words as JSON; most of the thousands in a pipeline are equal to earlier ones."""
    return _json.encode(words).encode()


class Fingerprint(NamedTuple):
    """The hashes of a pipeline.

    Args:
        components: a hash for each component, and for what lies outside of them, by name.
        unknown: what could not be hashed, in words.
    """

    components: dict[str, str]
    unknown: list[str]


@torch.no_grad()
def fingerprint(pipe: DiffusionPipeline) -> Fingerprint:
    """Return the hashes of a pipeline, without its scheduler, which records describe by class and configuration."""
    own = {name: value for name, value in vars(pipe).items() if not name.startswith("_") or isinstance(value, CODE)}
    components = {name: own.pop(name, None) for name in sorted(pipe.components)}
    methods = [name for name in own if name not in SILENT and callable(getattr(type(pipe), name, None))]
    own = {name: value for name, value in own.items() if name not in methods}
    config = FrozenDict({name: value for name, value in pipe.config.items() if name not in components})
    # A subclass of one's own may do anything; those of diffusers and decinb share the stages that decide an image.
    custom = type(pipe).__module__.partition(".")[0] not in ("diffusers", OURS)
    parts = {
        **{name: part for name, part in components.items() if name != "scheduler" and part is not None},
        "pipeline": {**own, "class": type(pipe) if custom else None, "config": config},
        **({"precision": precision} if (precision := _precision()) else {}),
    }
    hashes, unknown, code = {}, _everywhere(), set[type | ModuleType]()
    unknown += [f"pipeline.{name} (another method)" for name in methods]  # a packed sweep would not call it
    for name, part in parts.items():
        hasher = _Hasher(code)
        if isinstance(part, nn.Module) and _is_on_disk(part):
            unknown.append(f"{name} (weights offloaded to disk)")
        else:
            hasher.add(part, name)
        if part is parts["pipeline"]:
            hasher.check_code(type(pipe), name)
        hashes[name] = hasher.digest.hexdigest()[:16]
        unknown += hasher.unknown
    return Fingerprint(hashes, list(dict.fromkeys(unknown)))


def _everywhere() -> list[str]:
    """Return what the user has put in the way of all networks, in words."""
    hooks = [*nn.modules.module._global_forward_pre_hooks, *nn.modules.module._global_forward_hooks]
    registered = {**transformers.AttentionInterface._global_mapping, **ALL_ATTENTION_FUNCTIONS._local_mapping}
    attention = [name for name, function in registered.items() if not is_installed(module_of(function))]
    modes = [*_get_current_function_mode_stack(), *_get_current_dispatch_mode_stack()]
    own = [type(mode).__name__ for mode in modes if not is_installed(type(mode).__module__)]
    patched = exchanged_functions() + [f"{owner.__name__}.{name}" for owner in LIBRARIES for name in replaced(owner)]
    return [
        *(["a hook on all modules"] if hooks else []),
        *(f"a mode of torch, {name}" for name in own),
        *(f"attention of your own, {name}" for name in attention),
        *(f"another {name}" for name in dict.fromkeys(patched)),
    ]


def _precision() -> dict[str, str]:
    """Return the settings of torch for the precision of float32 sums that are not the default."""
    found = {}
    with suppress(RuntimeError):  # torch refuses to tell where one of the settings below was changed
        found["matmul"] = torch.get_float32_matmul_precision()
    for name in DEFAULT_PRECISION.keys() - {"matmul"}:  # from torch 2.9 on
        backend, _, operation = name.partition(".")
        found[name] = getattr(getattr(getattr(torch.backends, backend), operation, None), "fp32_precision", "none")
    return {name: found[name] for name in sorted(found) if found[name] not in (DEFAULT_PRECISION[name], "none")}


def scheduler_code(scheduler: SchedulerMixin) -> list[str]:
    """Return the class of a scheduler, in words, if its name does not tell what it computes."""
    hasher = _Hasher(set())
    hasher.add(type(scheduler), "scheduler")
    return hasher.unknown


def stamp(pipe: DiffusionPipeline) -> list[Any]:
    """Return values that most changes of a pipeline change too: a check that costs far less than a fingerprint."""
    modules = [module for part in pipe.components.values() if isinstance(part, nn.Module) for module in part.modules()]
    found: list[Any] = [id(part) for part in pipe.components.values() if not isinstance(part, SchedulerMixin)]
    for module in modules:
        own = vars(module)
        found += [
            id(own.get("forward")),
            id(own.get("processor")),
            [*own["_forward_hooks"], *own["_forward_pre_hooks"]],
        ]
        # Compiled by TorchScript, it has no tensors among its attributes.
        for tensor in (*own.get("_parameters", {}).values(), *own.get("_buffers", {}).values()):
            found += [id(tensor), 0 if tensor is None or tensor.is_inference() else tensor._version]
    return found


@torch.no_grad()
def parameters_hash(pipe: DiffusionPipeline) -> str:
    """Return a hash of what no call of a pipeline changes: all parameters, and whether a part works in tiles."""
    digest = hashlib.sha256()
    for name, part in sorted(pipe.components.items()):
        if isinstance(part, nn.Module) and not _is_on_disk(part):
            digest.update(f"{name} {getattr(part, 'use_tiling', None)}".encode())
            for parameter in part.parameters():
                with suppress(Exception):  # meta, sparse: the fingerprint has noted it
                    digest.update(tensor_hash(parameter.as_subclass(Tensor)).encode())
    return digest.hexdigest()


def _is_on_disk(part: nn.Module) -> bool:
    """Return whether diffusers keeps weights of a network on disk, and arbitrary values in their place."""
    registries = [vars(module).get("_diffusers_hook") for module in part.modules()]
    hooks = [hook for registry in registries if registry for hook in registry.hooks.values()]
    return any(getattr(getattr(hook, "group", None), "offload_to_disk_path", None) for hook in hooks)


@torch.no_grad()
def sampled_hash(pipe: DiffusionPipeline) -> str:
    """Return the hash of some 61 values of every tensor, by which the first version of decinb knew a pipeline."""
    digest = hashlib.sha256()
    for part, module in sorted(pipe.components.items()):
        if isinstance(module, nn.Module):
            tensors = dict(module.named_parameters()) | dict(module.named_buffers())
            few = [tensor.flatten()[:: max(1, tensor.numel() // 61)].float() for tensor in tensors.values()]
            digest.update(f"{part} {[(name, *tensor.shape) for name, tensor in tensors.items()]}".encode())
            digest.update(torch.cat(few).cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


def _encode_plain(value: Any) -> bytes:
    """Return a number, a text, a truth value or None as bytes."""
    if isinstance(value, (bool, str, bytes, type(None))):
        return _encode(type(value).__name__, str(value))
    return _encode("number", repr(_plain_number(value)))


_encode_common = functools.lru_cache(maxsize=2**14, typed=True)(_encode_plain)


class _Hasher:
    """Adds values of any kind to a hash, and notes those that it cannot add.

    Args:
        code: the classes and modules that were checked already, each of which is noted once.
    """

    def __init__(self, code: set[type | ModuleType]) -> None:
        self.digest = hashlib.sha256()
        self.unknown: list[str] = []
        self._code = code
        self._inside: set[int] = set()  # ids of the objects that are being added, since objects may form circles

    def token(self, *words: Any) -> None:
        self.digest.update(_encode(*words))

    def add(self, value: Any, where: str) -> None:
        """Add a value; ``where`` is what to call it if that fails."""
        if type(value) in COMMON:
            self.digest.update(_encode_common(value))
            return
        value = getattr(value, "_orig_mod", value) if isinstance(value, nn.Module) else value  # of torch.compile
        if isinstance(value, Enum):
            self.token(type(value).__name__, value.name)
        elif isinstance(value, (bool, str, bytes, type(None), numbers.Number, np.generic)):
            self.digest.update(_encode_plain(value))
        elif isinstance(value, (torch.dtype, torch.memory_format, torch.layout)):
            self.token(str(value))
        elif isinstance(value, torch.device):
            self.token("device")
        elif id(value) in self._inside:
            self.token("again")
        else:
            self._inside.add(id(value))
            self._add_object(value, where)
            self._inside.remove(id(value))

    def _add_object(self, value: Any, where: str) -> None:
        if isinstance(value, nn.Module):
            self._add_module(value, where)
        elif isinstance(value, SchedulerMixin):  # its other attributes are the state of the last call
            self._add_name(type(value), where)
            self.add(value.config, f"{where}.config")
        elif isinstance(value, DiffusionPipeline):  # inside a combined pipeline
            self._add_name(type(value), where)
            self.add({name: one for name, one in vars(value).items() if not name.startswith("_")}, where)
        elif isinstance(value, Tensor):
            self._add_tensor(value, where)
        elif isinstance(value, np.ndarray) and value.dtype != object:
            self.token("array", value.dtype.str, value.shape, hashlib.sha256(value.tobytes()).hexdigest())
        elif isinstance(value, Mapping):
            ignored = BOOKKEEPING if isinstance(value, FrozenDict) else set()  # a configuration
            counted = sorted((key for key in value if key not in ignored), key=str)
            self._add_names(counted, where)
            for key in counted:
                self.add(value[key], f"{where}.{key}")
        elif isinstance(value, (list, tuple)):
            self.token("list", len(value))
            for i, item in enumerate(value):
                self.add(item, f"{where}[{i}]")
        elif isinstance(value, (set, frozenset)):
            self._add_names(sorted(value, key=str), where)
        elif isinstance(value, type):
            self._add_name(value, where)
        elif isinstance(value, CODE):
            self._add_function(value, where)
        elif isinstance(value, PretrainedConfig):
            self._add_name(type(value), where)
            self._add_attributes(value, where, OF_CONFIGS)
        elif isinstance(value, PreTrainedTokenizerBase):
            self._add_name(type(value), where)
            self._add_attributes(value, where, OF_TOKENIZERS)
        elif type(value).__module__ == "tokenizers":
            self._add_rust(value, where)
        elif hasattr(value, "serialized_model_proto"):  # sentencepiece
            self.add(value.serialized_model_proto(), where)
        elif type(value).__name__ in SAME_ATTENTION and type(value).__module__.startswith("diffusers."):
            self.token("attention")
            self.check_code(type(value), where)
        elif hasattr(value, "__dict__"):
            self._add_name(type(value), where)
            self._add_attributes(value, where, BOOKKEEPING)
        else:
            self._cannot(where, type(value).__name__)

    def _cannot(self, where: str, what: str) -> None:
        self.token("unknown")
        self.unknown.append(f"{where} ({what})")

    def _add_names(self, names: list[Any], where: str) -> None:
        """Add the keys of a mapping or the items of a set; an object's words may hold its address."""
        if not all(isinstance(name, (str, int, float, tuple, type(None), torch.dtype)) for name in names):
            self._cannot(where, "its keys are objects")
        self.token("names", tuple(map(str, names)))

    def _add_attributes(self, value: Any, where: str, ignored: set[str]) -> None:
        self.add({name: one for name, one in vars(value).items() if name not in ignored}, where)

    def _add_name(self, value: Any, where: str) -> None:
        """Add a class or function of an installed package, by its name; what the user wrote can change."""
        module, name = getattr(value, "__module__", None) or "builtins", getattr(value, "__qualname__", "")
        found: Any = sys.modules.get(module)
        for part in name.split("."):
            found = getattr(found, part, None)
        found = getattr(found, "__func__", found)  # of a class method
        same = found is value or getattr(found, "__wrapped__", found) is value
        if not same or not is_installed(module):
            self._cannot(where, validation.short_repr(name or value))
        else:
            self.token(module, name)
            if isinstance(value, type):
                self.check_code(value, where)

    def check_code(self, cls: type, where: str) -> None:
        """Note the functions that the user has replaced in a class and its bases, or in the modules of these."""
        new = [base for base in cls.__mro__ if base not in self._code and is_installed(base.__module__)]
        self._code.update(new)
        owners: list[type | ModuleType] = list(new)
        for name in {base.__module__ for base in new if base is not object}:
            module = sys.modules.get(name)
            if module is None or module in self._code:
                continue
            self._code.add(module)
            classes = [one for one in list(vars(module).values()) if isinstance(one, type)]
            package = name.partition(".")[0]
            owners += [module, *(one for one in classes if one.__module__.partition(".")[0] == package)]
        for owner in dict.fromkeys(owners):
            for name in replaced(owner):
                self._cannot(where, f"another {owner.__name__}.{name}")

    def _add_function(self, value: Any, where: str) -> None:
        value = getattr(value, "_torchdynamo_orig_callable", value)
        if isinstance(value, functools.partial):
            self.add([value.func, list(value.args), value.keywords], where)
        elif isinstance(value, MethodType):
            self.add(value.__func__, where)
            self.add(value.__self__, where)
        elif isinstance(value, BuiltinFunctionType) and value.__module__ is None:
            self.token(value.__qualname__)
        elif "<locals>" in value.__qualname__ and isinstance(value, FunctionType) and is_installed(module_of(value)):
            self.token(module_of(value), value.__qualname__)
            self.add([value.__defaults__, value.__kwdefaults__, inspect.getclosurevars(value).nonlocals], where)
        else:
            self._add_name(value, where)

    def _add_rust(self, value: Any, where: str) -> None:
        """Add an object of tokenizers, which can be written as JSON or pickled; without the state of the last call."""
        try:
            if hasattr(value, "to_str"):
                text = json.loads(value.to_str())
                counted = {name: part for name, part in text.items() if name not in ("truncation", "padding")}
                self.digest.update(_json.encode([counted]).encode())
            else:
                self.token(type(value).__name__, str(value.__getstate__()))
        except Exception:
            self._cannot(where, type(value).__name__)

    def _add_tensor(self, tensor: Tensor, where: str) -> None:
        self.token(str(tensor.dtype), tuple(tensor.shape))
        try:
            if type(tensor) not in (Tensor, nn.Parameter, nn.Buffer):  # quantised: some say more in their attributes
                self._add_name(type(tensor), where)
                names, _ = tensor.__tensor_flatten__() if hasattr(tensor, "__tensor_flatten__") else ([], None)
                self.add({name: getattr(tensor, name) for name in names} or vars(tensor), where)
                if names:
                    return
            self.token(tensor_hash(tensor.as_subclass(Tensor)))
        except Exception as error:  # meta, sparse, and what others may invent
            self._cannot(where, validation.short_repr(str(error)))

    def _add_module(self, module: nn.Module, where: str) -> None:
        own = vars(module)
        if isinstance(module, torch.jit.ScriptModule):  # its code and its tensors are not in its attributes
            return self._cannot(where, type(module).__name__)
        self._add_name(type(module), where)
        for kind in ("_forward_pre_hooks", "_forward_hooks"):
            for hook in own[kind].values():
                self._add_torch_hook(hook, where)
        self._add_forward(module, where)
        if module.training and _drops_out(module):
            self._cannot(where.partition(".")[0], "dropout in training mode")  # once for all modules
        stored = getattr(own.get("_hf_hook"), "weights_map", None)  # where accelerate keeps what it has offloaded
        for name, tensor in (own["_parameters"] | own["_buffers"]).items():
            self.token(name)
            offloaded = tensor is not None and tensor.is_meta and stored is not None
            self.add(stored[name] if offloaded else tensor, f"{where}.{name}")
        of_peft = type(module).__module__.startswith("peft.")
        ignored = OF_PEFT if of_peft else OF_MODULES
        attributes = {name: one for name, one in own.items() if name not in ignored}
        if of_peft and isinstance(scales := own.get("scaling"), dict):
            attributes["scaling"] = {name: significant(scale, SCALE_DIGITS) for name, scale in scales.items()}
        self.add(attributes, where)
        for name, child in own["_modules"].items():
            self.token(name)
            self.add(child, f"{where}.{name}")

    def _add_torch_hook(self, hook: Any, where: str) -> None:
        module = getattr(hook, "__module__", None) or ""
        if module.partition(".")[0] != OURS and module != OBSERVER:
            self._cannot(where, f"a hook, {getattr(hook, '__qualname__', type(hook).__name__)}")

    def _add_forward(self, module: nn.Module, where: str) -> None:
        """Add what replaces a module's ``forward``: hooks of accelerate and diffusers, a compiler, anything else."""
        own = vars(module)
        forward = own.get("forward")
        accelerate_hook, registry = own.get("_hf_hook"), own.get("_diffusers_hook")
        hooks = list(getattr(accelerate_hook, "hooks", [accelerate_hook] if accelerate_hook else []))
        hooks += list(registry.hooks.values()) if registry else []
        for hook in hooks:
            name = type(hook).__name__
            if type(hook).__module__.partition(".")[0] not in ("accelerate", "diffusers"):
                self._cannot(where, f"a hook, {name}")
            elif name in PLAIN_HOOKS:
                self.token(name)
                self._add_attributes(hook, where, BOOKKEEPING | {"fn_ref"})
            elif name not in NEUTRAL_HOOKS:
                self._cannot(where, f"a hook, {name}")
        for one in (forward, own.get("_old_forward")):  # the second is what accelerate's hook calls
            ours = type(one).__module__.partition(".")[0] == OURS  # a runtime: records name one that changes pixels
            if one is not None and not ours and not _leads_to(one, module, wrapped=bool(hooks)):
                self._cannot(where, "a forward of its own")


def _drops_out(module: nn.Module) -> bool:
    """Return whether a module sets random values to 0 in training mode."""
    names = ("p",) if isinstance(module, nn.modules.dropout._DropoutNd) else ("dropout", "drop_prob")
    return any(isinstance(rate := vars(module).get(name), float) and rate > 0 for name in names)


def _leads_to(forward: Any, module: nn.Module, wrapped: bool) -> bool:
    """Return whether a module's ``forward`` is its class's, beneath a compiler and, if ``wrapped``, beneath hooks."""
    while forward is not None:
        if getattr(forward, "__func__", None) is type(module).forward and forward.__self__ is module:
            return True
        of_hooks = wrapped and module_of(forward).partition(".")[0] in ("accelerate", "diffusers")
        beneath = getattr(forward, "__wrapped__", None) if of_hooks else None
        forward = getattr(forward, "_torchdynamo_orig_callable", beneath)
    return False


def significant(value: Any, digits: int) -> Any:
    """Return a float with this many significant digits, and anything else as it is."""
    return float(f"{value:.{digits}g}") if isinstance(value, float) else value


def _plain_number(value: Any) -> Any:
    """Return a number of Python, since files keep no others: 1, 1.0 and ``np.float32(1)`` are the same."""
    value = value.item() if isinstance(value, np.generic) else value
    return float(value) if isinstance(value, int) and abs(value) < 2**53 else value
