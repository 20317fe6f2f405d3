"""Run a U-Net on the CPU with OpenVINO: what calls it, and everything around it, stays as it is.

``attach`` replaces the ``forward`` of the network. Hooks on the network itself run as before. Calls that OpenVINO
cannot make, because something inside the network was changed, run in PyTorch, and a warning says so once. When the
network is no longer what its graph was made from, the graph is made again.
"""

import functools
import inspect
import threading
from time import perf_counter
from typing import Any

import torch
from diffusers import DiffusionPipeline
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel, UNet2DConditionOutput
from torch import Tensor, nn

from decinb.errors import InputError
from decinb.runtimes.graph import fill, fixed_sides, import_openvino, is_installed, read_graph
from decinb.runtimes.watch import Watch
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


AUTOCAST = ", autocast to "
"""What stands between two dtypes in a ``precision``."""


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
    return AUTOCAST.join(str(name).removeprefix("torch.") for name in names)


class _Forward:
    """The ``forward`` of a network, in OpenVINO."""

    def __init__(self, network: nn.Module, runtime: str):
        self.network, self.runtime, self.shares_latents = network, runtime, _shares_latents(network)
        self.watch = Watch(network)
        self.warned: set[str] = set()
        self._start()

    def _start(self) -> None:
        """Start without a compiled graph."""
        functools.update_wrapper(self, type(self.network).forward)
        self.lock = threading.Lock()
        self.requests: dict[str, Any] = {}  # compiled graphs, by the names and the sides of their inputs
        self.failures: dict[str, str] = {}  # why there is none

    def __getstate__(self) -> dict[str, Any]:
        """Leave out what cannot be copied; a copy compiles its graph again."""
        kept = ("network", "runtime", "shares_latents", "watch", "warned")
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
            self.watch.skip()
            return reason, None
        inputs = self._inputs(arguments)
        key = str(fixed_sides(inputs))
        try:
            if self.watch.has_changed(float(inputs["timestep"].max())):
                self.requests.clear()
                self.failures.clear()
            if self.watch.foreign:
                return f"it uses code of your own, such as {self.watch.foreign[0]}", None
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
        if reason := self.watch.obstacle():
            return reason
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

    def _infer(self, request: Any, inputs: dict[str, Tensor]) -> Tensor:
        arrays = [tensor.detach().contiguous().numpy() for tensor in inputs.values()]
        predicted = torch.from_numpy(request.infer(arrays, share_inputs=True)[0])
        self.watch.ended = perf_counter()
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
