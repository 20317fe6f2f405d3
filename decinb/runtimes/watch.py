"""Notice when a network is no longer what its graph was made from.

Every call compares the modules with their attributes, and the address, the version and one value of each weight. The
first call of each run also compares all values, because a change through ``tensor.data`` leaves no other trace, and
looks for code that was replaced.
"""

import hashlib
import json
import math
import operator
import sys
from time import perf_counter
from typing import Any

import numpy as np
import torch
from diffusers.models.attention_processor import AttnProcessor2_0
from torch import Tensor, nn

from decinb.utils.hashing import tensor_hash
from decinb.utils.origins import exchanged_functions, is_installed, module_of, replaced

PAUSE = 0.5  # seconds between two calls, after which someone may have changed something
BOOKKEEPING = {  # attributes that decide no output, or that are looked at in other ways
    *vars(nn.Module()),
    "_chunk_dim",  # with it, the same sums are made in parts
    "_chunk_size",
    "_diffusers_hook",
    "_gradient_checkpointing_func",
    "_hf_hook",
    "_hf_peft_config_loaded",
    "_is_hf_initialized",
    "_old_forward",
    "forward",
    "gradient_checkpointing",
    "hf_device_map",
    "peft_config",
} - {"training"}
APART = {"_internal_dict", "processor"}  # attributes that are no plain values: the configuration, and how to attend


class Watch:
    """Compares a network in float32 on the CPU with what it was at the call before.

    Attributes:
        foreign: the names of code that the network runs and that is not an installed package's.
        ended: when the last call ended, by ``perf_counter``; whoever makes the call sets it.
    """

    def __init__(self, network: nn.Module):
        self._network = network
        self._structure = [(module, list(module._modules.values())) for module in network.modules()]
        self._start()

    def _start(self) -> None:
        """Start without having seen anything but which modules there are."""
        self.foreign: list[str] = []
        self.ended = 0.0
        self._timestep = -math.inf  # of the last call
        self._seen: list[tuple[nn.Module, list[nn.Module | None], Any, tuple[Any, ...], int]] = []  # see _is_as_seen
        self._tables: list[dict[str, Tensor | None]] = []  # the parameters of each module that has some
        self._code: list[tuple[type, Any]] = []  # the class of each module, with its forward
        self._design = ""
        self._has_other_design = False  # since the last call
        self._places: list[tuple[Any, ...]] = []  # addresses, strides and versions of the weights
        self._views: list[np.ndarray] = []  # of their first values
        self._firsts: list[int] = []
        self._hashes: list[str] = []

    def __getstate__(self) -> dict[str, Any]:
        """Leave out what was seen, which is not true of a copy."""
        return {"_network": self._network, "_structure": self._structure}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._start()

    def obstacle(self) -> str | None:
        """Return why the network must run in PyTorch as it is now, in words, or None."""
        if nn.modules.module._global_forward_pre_hooks or nn.modules.module._global_forward_hooks:
            return "there is a hook on all modules"
        if torch.is_autocast_enabled("cpu"):
            return "torch.autocast is on"
        if not self._is_as_seen():
            if reason := self._obstacle_inside():
                return reason
            self._note_modules()
        return None

    def skip(self) -> None:
        """Note that a call was made without ``has_changed``: the next one compares everything."""
        self._timestep = -math.inf

    def has_changed(self, timestep: float) -> bool:
        """Return whether the network computes something else than at the call before.

        Within a run, timesteps decrease. So a call whose highest timestep is not below that of the call before, or that
        comes after a pause, may begin a run, and everything is compared.
        """
        starts = not timestep < self._timestep or perf_counter() - self.ended > PAUSE
        self._timestep = timestep
        if starts:
            self.foreign = _foreign_code(self._network)
            if self._read_code() != self._code:
                self._note_modules()
        changed, self._has_other_design = self._has_other_design, False
        weights = [weight for table in self._tables for weight in table.values() if weight is not None]
        places = [(weight.data_ptr(), weight.stride(), _version(weight)) for weight in weights]
        if moved := places != self._places:
            self._places, self._views = places, list(map(_first, weights))
        firsts = [view.item() for view in self._views]
        if starts or moved or firsts != self._firsts:
            hashes = list(map(tensor_hash, weights))
            changed = changed or moved or hashes != self._hashes
            self._firsts, self._hashes = firsts, hashes
        return changed

    def _obstacle_inside(self) -> str | None:
        for module, children in self._structure:
            inside = vars(module)
            if list(inside["_modules"].values()) != children:
                return "it has modules that were added after loading, such as LoRA"
            if module.training:
                return "it is in training mode"
            for name, value in _attributes(module).items():
                if name not in APART and not _is_plain(value):
                    return f"it has an attribute that OpenVINO cannot use, {name}"
            if module is self._network:
                continue
            if inside["_forward_hooks"] or inside["_forward_pre_hooks"]:
                return "modules inside it have hooks"
            if "forward" in inside:
                return "modules inside it have another forward"
            if "processor" in inside and type(inside["processor"]) is not AttnProcessor2_0:
                return "it has other attention processors"
        return None

    def _note_modules(self) -> None:
        """Note the modules as they are; what changes in them from now on shows in ``_is_as_seen``."""
        self._seen = []
        for module, children in self._structure:
            inside = vars(module)
            read = operator.itemgetter("_modules", "_parameters", *(name for name in inside if name not in BOOKKEEPING))
            values = tuple(list(value) if isinstance(value, list) else value for value in read(inside))
            self._seen.append((module, children, read, values, len(inside)))
        self._tables = [module._parameters for module, _ in self._structure if module._parameters]
        self._code = self._read_code()
        before, self._design = self._design, design_hash(self._network)
        self._has_other_design |= self._design != before

    def _read_code(self) -> list[tuple[type, Any]]:
        return [(type(module), type(module).forward) for module, _ in self._structure]

    def _is_as_seen(self) -> bool:
        """Return whether the modules are as they were noted, in much less time than a hash takes."""
        for module, children, read, values, count in self._seen:
            inside = vars(module)
            try:
                if len(inside) != count or read(inside) != values or list(inside["_modules"].values()) != children:
                    return False
            except Exception:  # an attribute is gone, or cannot be compared
                return False
            if (inside["_forward_hooks"] or inside["_forward_pre_hooks"]) and module is not self._network:
                return False
        return bool(self._seen)


def _attributes(module: nn.Module) -> dict[str, Any]:
    """Return what can decide the output of a module besides its tensors, its code, and the modules inside it."""
    return {name: value for name, value in vars(module).items() if name not in BOOKKEEPING and value is not None}


def _is_plain(value: Any) -> bool:
    """Return whether a value is a number, a text, a truth value, None, or a sequence of them."""
    if isinstance(value, (tuple, list)):
        return all(map(_is_plain, value))
    return isinstance(value, (bool, int, float, str, type(None)))


def design_hash(network: nn.Module) -> str:
    """Return a hash of the classes and plain attributes in a network, the same in every process."""
    digest = hashlib.sha256()
    for name, module in network.named_modules():
        cls, forward = type(module), type(module).forward
        code = [cls.__module__, cls.__qualname__, module_of(forward), getattr(forward, "__qualname__", "")]
        plain = [(key, value) for key, value in sorted(_attributes(module).items()) if key not in APART]
        digest.update(repr((name, code, plain)).encode())
        if config := vars(module).get("_internal_dict"):
            counted = {key: value for key, value in config.items() if not key.startswith("_")}
            digest.update(json.dumps(counted, sort_keys=True, default=str).encode())
    return digest.hexdigest()


def _foreign_code(network: nn.Module) -> list[str]:
    """Return the names of code that a network runs and that is not, or no longer, that of an installed package."""
    classes = {type(module) for module in network.modules()}
    classes |= {type(processor) for module in network.modules() if (processor := vars(module).get("processor"))}
    bases = {base for cls in classes for base in cls.__mro__ if base is not object}
    found = sorted(base.__qualname__ for base in bases if not is_installed(base.__module__))
    found += exchanged_functions()
    modules = {sys.modules.get(base.__module__) for base in bases} - {None}
    owners = {*bases, *modules, nn.functional, torch, Tensor}
    return found + sorted(f"{owner.__name__}.{name}" for owner in owners for name in replaced(owner))


def _version(weight: Tensor) -> int:
    return 0 if weight.is_inference() else weight._version  # inference tensors cannot change outside of inference mode


def _first(weight: Tensor) -> np.ndarray:
    """Return a view of a weight's first value, as an integer: NaN is equal to no number."""
    return weight.detach().as_strided((1,), (1,)).numpy().view(np.int32)
