"""Run a U-Net on the CPU with OpenVINO: what calls it, and everything around it, stays as it is.

``attach`` replaces the ``forward`` of the network. Hooks on the network itself run as before. Calls that OpenVINO
cannot make, because something inside the network was changed, run in PyTorch, and a warning says so once.
"""

import functools
import inspect
import threading
from typing import Any

import torch
from diffusers import DiffusionPipeline
from diffusers.models.attention_processor import AttnProcessor2_0
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel, UNet2DConditionOutput
from torch import Tensor, nn

from decinb.errors import InputError
from decinb.runtimes.graph import fill, import_openvino, is_installed, read_graph
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
    if runtime not in (TORCH, "openvino"):
        return runtime
    names, device = [pipe.dtype], pipe._execution_device.type  # which an offloaded pipeline has too
    if torch.is_autocast_enabled(device):
        names.append(torch.get_autocast_dtype(device))
    return ", autocast to ".join(str(name).removeprefix("torch.") for name in names)


class _Forward:
    """The ``forward`` of a network, in OpenVINO."""

    def __init__(self, network: nn.Module, runtime: str):
        self.network, self.runtime, self.shares_latents = network, runtime, _shares_latents(network)
        self.structure = [(module, list(module._modules.values())) for module in network.modules()]
        self.parameters: list[tuple[int, int]] = []  # addresses and versions of the weights that were compiled
        self.requests: dict[tuple[str, ...], Any] = {}  # compiled graphs, by their inputs
        self.warned: set[str] = set()
        self.lock = threading.Lock()
        functools.update_wrapper(self, type(network).forward)

    def __getstate__(self) -> dict[str, Any]:
        """Leave out what cannot be copied; a copy compiles its graph again."""
        return {**vars(self), "parameters": [], "requests": {}, "lock": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state, lock=threading.Lock())

    def __call__(self, *args: Any, **kwargs: Any) -> UNet2DConditionOutput | tuple[Tensor]:
        bound = self._signature.bind(self.network, *args, **kwargs)
        arguments = {name: value for name, value in bound.arguments.items() if value is not None}
        returns_dict = arguments.pop("return_dict", True)
        del arguments["self"]
        if torch.is_grad_enabled() and any(weight.requires_grad for weight in self.network.parameters()):
            return type(self.network).forward(self.network, *args, **kwargs)  # as in training
        if reason := self._why_not(arguments):
            if reason not in self.warned:
                self.warned.add(reason)
                validation.warn(f"the U-Net runs in PyTorch instead of OpenVINO while {reason}")
            return type(self.network).forward(self.network, *args, **kwargs)
        predicted = self._infer(self._inputs(arguments))
        return UNet2DConditionOutput(sample=predicted) if returns_dict else (predicted,)

    @functools.cached_property
    def _signature(self) -> inspect.Signature:
        return inspect.signature(type(self.network).forward)

    def _why_not(self, arguments: dict[str, Any]) -> str | None:
        """Return why a call must run in PyTorch, or None."""
        for module, children in self.structure:
            inside = vars(module)
            if list(inside["_modules"].values()) != children:
                return "it has modules that were added after loading, such as LoRA"
            if module is self.network:
                continue
            if inside["_forward_hooks"] or inside["_forward_pre_hooks"]:
                return "modules inside it have hooks"
            if "forward" in inside:
                return "modules inside it have another forward"
            if "processor" in inside and type(inside["processor"]) is not AttnProcessor2_0:
                return "it has other attention processors"
        if self.network.training:
            return "it is in training mode"
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

    def _infer(self, inputs: dict[str, Tensor]) -> Tensor:
        weights = [weight for module, _ in self.structure for weight in module._parameters.values()]
        parameters = [(weight.data_ptr(), _version(weight)) for weight in weights if weight is not None]
        with self.lock:
            if parameters != self.parameters:  # others were loaded into the network
                self.requests.clear()
                self.parameters = parameters
            request = self.requests.get(tuple(inputs))
            if request is None:
                request = self.requests[tuple(inputs)] = self._compile(inputs)
            arrays = [tensor.detach().contiguous().numpy() for tensor in inputs.values()]
            output = request.infer(arrays, share_inputs=True)[0]
        return torch.from_numpy(output)

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
