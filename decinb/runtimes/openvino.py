"""Run a U-Net on the CPU with OpenVINO: what calls it, and everything around it, stays as it is.

``attach`` replaces the ``forward`` of the network. Hooks on the network itself run as before. Calls that OpenVINO
cannot make, because something inside the network was changed, run in PyTorch, and a warning says so once.

A graph is made again when the network is no longer what it was made from. Every call compares the modules with their
attributes, and the address, the version and one value of each weight. The first call of each run also compares all
values, because a change through ``tensor.data`` leaves no other trace, and looks for code that was replaced.
"""

import functools
import inspect
import math
import operator
import threading
from time import perf_counter
from typing import Any

import numpy as np
import torch
from diffusers import DiffusionPipeline
from diffusers.models.attention_processor import AttnProcessor2_0
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel, UNet2DConditionOutput
from torch import Tensor, nn

from decinb.errors import InputError
from decinb.runtimes.graph import (
    APART,
    BOOKKEEPING,
    attributes,
    design_hash,
    fill,
    fixed_sides,
    foreign_code,
    import_openvino,
    is_installed,
    is_plain,
    read_graph,
)
from decinb.utils import validation
from decinb.utils.threads import most_threads

TORCH = "torch"
EIGHT_BITS = "openvino-bfloat16, int8 weights"
"""A runtime for ``attach`` alone, to compare: matrices take a quarter of the memory.

OpenVINO may round what they are multiplied with to 8 bits too.
"""

PRECISIONS = {"openvino": "f32", "openvino-bfloat16": "bf16", EIGHT_BITS: "bf16"}
NAMES = {"openvino": "OpenVINO", "openvino-bfloat16": "OpenVINO, bfloat16"}
RUNTIMES = (TORCH, *NAMES)
"""What a U-Net can run in. ``openvino-bfloat16`` multiplies in bfloat16 where the processor can, which shows."""

PAUSE = 0.5  # seconds between two calls, after which someone may have changed something
CHUNK = 2**16  # weights that are compared at once: they stay in the cache of a processor


def check(runtime: str, device: torch.device, dtype: torch.dtype, compile: bool = False) -> str:
    """Return a valid runtime.

    Raises:
        InputError: there is no such runtime, OpenVINO is not installed, or it cannot be combined with the others.
    """
    runtime = validation.choice(runtime, "runtime", RUNTIMES)
    if runtime == TORCH:
        return runtime
    if device.type != "cpu":
        raise InputError(f"runtime must be 'torch' on {device.type}, got {runtime!r}: OpenVINO is used on the CPU only")
    if dtype != torch.float32:
        raise InputError(
            f"dtype must be float32 with runtime={runtime!r}, got {str(dtype).removeprefix('torch.')}: "
            "runtime='openvino-bfloat16' runs the U-Net in bfloat16"
        )
    if compile:
        raise InputError(f"compile must be False with runtime={runtime!r}, which compiles the U-Net itself")
    if not is_installed():
        raise InputError(f"runtime={runtime!r} needs OpenVINO: pip install 'decinb[openvino]'")
    return runtime


def attach(network: nn.Module, runtime: str) -> None:
    """Run a network with OpenVINO from now on. The first call exports or reads its graph, and compiles it.

    Args:
        network: the U-Net of a pipeline, in float32 on the CPU.
        runtime: a key of ``PRECISIONS``.

    Raises:
        InputError: the network is not a U-Net that OpenVINO can run here.
    """
    if not (isinstance(network, UNet2DConditionModel) or _shares_latents(network)):
        name = "a pipeline without a U-Net" if network is None else type(network).__name__
        raise InputError(f"runtime must be 'torch' for {name}: OpenVINO runs the U-Nets of Stable Diffusion only")
    network.forward = _Forward(network, runtime)


def detach(network: nn.Module) -> None:
    """Run a network in PyTorch again."""
    if runtime_of(network) != TORCH:
        del network.forward


def runtime_of(network: nn.Module | None) -> str:
    """Return the runtime of a network."""
    forward = vars(network).get("forward") if isinstance(network, nn.Module) else None
    return forward.runtime if isinstance(forward, _Forward) else TORCH


def precision(pipe: DiffusionPipeline) -> str:
    """Return the number format that decides a pipeline's pixels: its dtype, or a runtime that computes in another.

    Inside ``torch.autocast``, the dtype that it converts to is named too.
    """
    runtime = runtime_of(getattr(pipe, "unet", None))
    names: list[Any] = [pipe.dtype if runtime in (TORCH, "openvino") else runtime]
    device = pipe._execution_device.type  # which an offloaded pipeline has too
    if torch.is_autocast_enabled(device):
        names.append(torch.get_autocast_dtype(device))
    return ", autocast to ".join(str(name).removeprefix("torch.") for name in names)


class _Forward:
    """The ``forward`` of a network, in OpenVINO."""

    def __init__(self, network: nn.Module, runtime: str):
        self.network, self.runtime, self.shares_latents = network, runtime, _shares_latents(network)
        self.structure = [(module, list(module._modules.values())) for module in network.modules()]
        self.warned: set[str] = set()
        self._start()

    def _start(self) -> None:
        """Start without a compiled graph."""
        functools.update_wrapper(self, type(self.network).forward)
        self.lock = threading.Lock()
        self.timestep, self.called = -math.inf, 0.0  # of the last call, and when it ended
        self.seen: list[tuple[nn.Module, list[nn.Module | None], Any, tuple[Any, ...], int]] = []  # see _is_as_seen
        self.foreign: list[str] = []  # names of code that is not a package's
        self.tables: list[dict[str, Tensor | None]] = []  # the parameters of each module that has some
        self.code: list[tuple[type, Any]] = []  # the class of each module, with its forward
        self.design = ""  # a hash of classes and attributes
        self.places: list[tuple[Any, ...]] = []  # addresses, strides and versions of the weights that were compiled
        self.views: list[np.ndarray] = []  # of their values
        self.firsts: list[int] = []  # their first values
        self.checksums: list[list[int]] = []
        self.requests: dict[str, Any] = {}  # compiled graphs, by the names and the sides of their inputs
        self.failures: dict[str, str] = {}  # why there is none

    def __getstate__(self) -> dict[str, Any]:
        """Leave out what cannot be copied; a copy compiles its graph again."""
        kept = ("network", "runtime", "shares_latents", "structure", "warned")
        return {name: vars(self)[name] for name in kept}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._start()

    def __call__(self, *args: Any, **kwargs: Any) -> UNet2DConditionOutput | tuple[Tensor]:
        bound = self._signature.bind(self.network, *args, **kwargs)
        arguments = {name: value for name, value in bound.arguments.items() if value is not None}
        returns_dict = arguments.pop("return_dict", True)
        del arguments["self"]
        if torch.is_grad_enabled() and any(weight.requires_grad for weight in self.network.parameters()):
            return type(self.network).forward(self.network, *args, **kwargs)  # as in training
        with self.lock:
            reason, predicted = self._predict(arguments)
        if predicted is None:
            if reason not in self.warned:
                self.warned.add(reason)
                validation.warn(f"the U-Net runs in PyTorch instead of OpenVINO while {reason}")
            return type(self.network).forward(self.network, *args, **kwargs)
        return UNet2DConditionOutput(sample=predicted) if returns_dict else (predicted,)

    @functools.cached_property
    def _signature(self) -> inspect.Signature:
        return inspect.signature(type(self.network).forward)

    def _predict(self, arguments: dict[str, Any]) -> tuple[str, Tensor | None]:
        """Return the prediction, or why the call must run in PyTorch."""
        if reason := self._why_not(arguments):
            self.timestep = -math.inf  # nothing was compared, so the next call does it
            return reason, None
        inputs = self._inputs(arguments)
        key = str(fixed_sides(inputs))
        try:
            self._notice_changes(inputs["timestep"])
            if self.foreign:
                return f"it uses code of your own, such as {self.foreign[0]}", None
            if key in self.failures:
                return self.failures[key], None
            if key not in self.requests:
                self.requests[key] = self._compile(inputs)
            return "", self._infer(self.requests[key], inputs)
        except Exception as error:  # whatever OpenVINO, its converter or the tracer may raise
            reason = f"OpenVINO cannot run it ({type(error).__name__}: {validation.short_repr(str(error))})"
            if key not in self.requests:
                self.failures[key] = reason
            return reason, None

    def _why_not(self, arguments: dict[str, Any]) -> str | None:
        """Return why a call must run in PyTorch, or None."""
        if nn.modules.module._global_forward_pre_hooks or nn.modules.module._global_forward_hooks:
            return "there is a hook on all modules"
        if torch.is_autocast_enabled("cpu"):
            return "torch.autocast is on"
        if not self._is_as_seen():
            if reason := self._why_not_inside():
                return reason
            self._note_modules()
        weight = next(self.network.parameters())
        if weight.device.type != "cpu" or weight.dtype != torch.float32:
            return f"its weights are {str(weight.dtype).removeprefix('torch.')} on {weight.device.type}"
        supported = ("sample", "timestep", "encoder_hidden_states", "latent_of", "added_cond_kwargs")
        if unknown := [name for name, value in arguments.items() if name not in supported and not _is_empty(value)]:
            return f"it is called with {unknown[0]}"
        return None

    def _inputs(self, arguments: dict[str, Any]) -> dict[str, Tensor]:
        """Return the tensors of a call by argument, with one timestep a row."""
        sample, text = arguments["sample"], arguments["encoder_hidden_states"]
        timestep = torch.as_tensor(arguments["timestep"]).to(torch.float32).expand(len(sample))
        inputs = {"sample": sample.to(torch.float32), "timestep": timestep, "encoder_hidden_states": text}
        if self.shares_latents:
            latent_of = arguments.get("latent_of")
            inputs["latent_of"] = torch.arange(len(sample)) if latent_of is None else latent_of
        for name, tensor in sorted(arguments.get("added_cond_kwargs", {}).items()):
            inputs[f"added_cond_kwargs.{name}"] = tensor
        return inputs

    def _why_not_inside(self) -> str | None:
        """Return why the network cannot run in OpenVINO as it is, or None."""
        for module, children in self.structure:
            inside = vars(module)
            if list(inside["_modules"].values()) != children:
                return "it has modules that were added after loading, such as LoRA"
            if module.training:
                return "it is in training mode"
            for name, value in attributes(module).items():
                if name not in APART and not is_plain(value):
                    return f"it has an attribute that OpenVINO cannot use, {name}"
            if module is self.network:
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
        self.seen = []
        for module, children in self.structure:
            inside = vars(module)
            read = operator.itemgetter("_modules", "_parameters", *(name for name in inside if name not in BOOKKEEPING))
            values = tuple(list(value) if isinstance(value, list) else value for value in read(inside))
            self.seen.append((module, children, read, values, len(inside)))
        self.tables = [module._parameters for module, _ in self.structure if module._parameters]
        self.code = self._code()
        self.design, before = design_hash(self.network), self.design
        if self.design != before:
            self._drop()

    def _code(self) -> list[tuple[type, Any]]:
        """Return the classes of the modules, and what they run."""
        return [(type(module), type(module).forward) for module, _ in self.structure]

    def _is_as_seen(self) -> bool:
        """Return whether the modules are as they were noted, in much less time than a hash takes."""
        for module, children, read, values, count in self.seen:
            inside = vars(module)
            try:
                if len(inside) != count or read(inside) != values or list(inside["_modules"].values()) != children:
                    return False
            except Exception:  # an attribute is gone, or cannot be compared
                return False
            if (inside["_forward_hooks"] or inside["_forward_pre_hooks"]) and module is not self.network:
                return False
        return bool(self.seen)

    def _notice_changes(self, timestep: Tensor) -> None:
        """Drop the compiled graphs if the network is no longer what they were made from.

        Within a run, timesteps decrease. So a call whose highest timestep is not below that of the call before, or that
        comes after a pause, may begin a run, and everything is compared.
        """
        before, self.timestep = self.timestep, float(timestep.max())
        starts = not self.timestep < before or perf_counter() - self.called > PAUSE
        if starts:
            self.foreign = foreign_code(self.network)
            if self._code() != self.code:
                self._note_modules()
        weights = [weight for table in self.tables for weight in table.values() if weight is not None]
        places = [(weight.data_ptr(), weight.stride(), _version(weight)) for weight in weights]
        if moved := places != self.places:
            self.places, self.views = places, list(map(_bits, weights))
            self._drop()
        firsts = [view.item(0) for view in self.views]
        if starts or moved or firsts != self.firsts:
            checksums = list(map(_checksums, self.views))
            if checksums != self.checksums:
                self._drop()
            self.firsts, self.checksums = firsts, checksums

    def _drop(self) -> None:
        """Drop the compiled graphs, and why there were none."""
        self.requests.clear()
        self.failures.clear()

    def _infer(self, request: Any, inputs: dict[str, Tensor]) -> Tensor:
        arrays = [tensor.detach().contiguous().numpy() for tensor in inputs.values()]
        predicted = torch.from_numpy(request.infer(arrays, share_inputs=True)[0])
        self.called = perf_counter()
        return predicted

    def _compile(self, inputs: dict[str, Tensor]) -> Any:
        graph = read_graph(self.network, inputs)
        fill(graph, self.network, eight_bits=self.runtime == EIGHT_BITS)
        settings = {
            "INFERENCE_PRECISION_HINT": PRECISIONS[self.runtime],
            "INFERENCE_NUM_THREADS": most_threads(),
            "NUM_STREAMS": 1,
            "ENABLE_CPU_PINNING": False,  # a pinned thread waits for its core beside a busy process
        }
        return import_openvino().Core().compile_model(graph, "CPU", settings).create_infer_request()


def _shares_latents(network: nn.Module | None) -> bool:
    """Return whether a network takes several texts for a latent, as U-Net-NAS does."""
    return network is not None and "latent_of" in inspect.signature(type(network).forward).parameters


def _is_empty(value: Any) -> bool:
    return isinstance(value, dict) and not value


def _version(weight: Tensor) -> int:
    return 0 if weight.is_inference() else weight._version  # inference tensors cannot change outside of inference mode


def _bits(weight: Tensor) -> np.ndarray:
    """Return a view of a weight's values in the order of memory, as integers: NaN is equal to no number."""
    extent = 1 + sum((side - 1) * step for side, step in zip(weight.shape, weight.stride(), strict=True))
    return weight.detach().as_strided((extent,), (1,)).numpy().view(np.int32)


@functools.cache
def _factors() -> np.ndarray:
    return np.random.Generator(np.random.PCG64(0)).integers(-(2**63), 2**63, CHUNK, dtype=np.int64) | 1


def _checksums(bits: np.ndarray) -> list[int]:
    """Return sums that change with the contents of a weight: of its values times random odd numbers, modulo 2**64."""
    pieces = [bits[i : i + CHUNK].astype(np.int64) for i in range(0, len(bits), CHUNK)]
    return [int(piece @ _factors()[: len(piece)]) for piece in pieces]
