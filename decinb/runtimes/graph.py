"""A U-Net as an OpenVINO graph. Weights are inputs of the graph, so that one graph serves all weights of its design.

The graph is exported once and kept in the user's cache as a small zip file. It takes any number of rows, any latent
size and any number of tokens.
"""

import copy
import hashlib
import inspect
import io
import json
import sys
import tempfile
import warnings
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

import torch
from huggingface_hub import cached_assets_path
from torch import Tensor, nn

from decinb.runtimes.watch import design_hash
from decinb.utils.environment import versions
from decinb.utils.files import write_atomically

if TYPE_CHECKING:
    from openvino import Model

FREE_DIMENSIONS = {"sample": (0, 2, 3), "encoder_hidden_states": (0, 1)}  # of the other inputs only the first, the rows
ODD_SIZE = (10, 12)  # not multiples of 8, or diffusers' U-Net would leave out what other sizes need
FILES = ("graph.xml", "graph.bin")
ROWS, TOKENS = 2, 5  # of the example that the graph is traced with


def is_installed() -> bool:
    """Return whether OpenVINO can be imported."""
    return "openvino" in sys.modules or find_spec("openvino") is not None


@cache
def import_openvino() -> ModuleType:
    """Import OpenVINO without its telemetry, which would send a request at every import and export."""
    sys.modules.setdefault("openvino_telemetry", None)
    import openvino

    return openvino


def read_graph(network: nn.Module, inputs: Mapping[str, Tensor]) -> "Model":
    """Return the graph of a network from the cache, or export it.

    Args:
        network: a U-Net of diffusers or a ``UNetNAS``.
        inputs: the tensors of a call by argument; keys with a dot, such as ``added_cond_kwargs.time_ids``, are items of
            an argument that is a dict.

    Returns:
        A graph whose inputs are named after ``inputs`` and after the network's parameters.
    """
    core, file = import_openvino().Core(), None
    with suppress(OSError):  # there may be no folder for it
        file = _cache_file(network, inputs)
        if file.exists():
            with suppress(zipfile.BadZipFile, zlib.error, KeyError, RuntimeError), zipfile.ZipFile(file) as stored:
                return core.read_model(*map(stored.read, FILES))
    graph = export(network, inputs)
    if file is not None:
        with suppress(OSError):
            write_atomically(file, _zipped(graph))
    return graph


def fill(graph: "Model", network: nn.Module, eight_bits: bool = False) -> None:
    """Replace the inputs of a graph that are parameters of a network by their values.

    Args:
        graph: from ``read_graph``.
        network: whose values are taken, without a copy where they stay as they are.
        eight_bits: store the matrices as integers of 8 bits, with a factor for each output. OpenVINO would expand the
            weights of convolutions again.
    """
    import_openvino()
    from openvino import opset13

    values = dict(network.named_parameters())
    for parameter in list(graph.get_parameters()):
        names = parameter.output(0).get_names() & values.keys()
        if names:
            value = values[names.pop()].detach()
            if eight_bits and value.ndim == 2:
                factors = value.abs().amax(dim=1, keepdim=True).clamp(min=1e-12) / 127
                integers = opset13.constant((value / factors).round().to(torch.int8).numpy())
                node = opset13.multiply(opset13.convert(integers, "f32"), opset13.constant(factors.numpy()))
            else:
                node = opset13.constant(value.numpy(), shared_memory=True)
            parameter.output(0).replace(node.output(0))
            graph.remove_parameter(parameter)
    graph.validate_nodes_and_infer_types()


@torch.no_grad()
def export(network: nn.Module, inputs: Mapping[str, Tensor]) -> "Model":
    """Trace a network on a small example, and return its graph; arguments as for ``read_graph``."""
    openvino = import_openvino()
    parameters = dict(network.named_parameters())
    # A copy of the modules with the same parameters, which are exchanged while it is traced.
    shell = copy.deepcopy(_without_hooks(network), {id(value): value for value in parameters.values()})
    for module in shell.modules():
        if "_chunk_size" in vars(module):
            vars(module)["_chunk_size"] = None  # or the graph would have as many chunks for every size
    places = [(shell.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2]) for name in parameters]

    def forward(*tensors: Tensor) -> Tensor:
        for (module, name), tensor in zip(places, tensors[len(inputs) :], strict=True):
            module._parameters[name] = tensor
        arguments = nest(dict(zip(inputs, tensors, strict=False)))
        return type(shell).forward(shell, **arguments, return_dict=False)[0]

    example = (*_example(inputs), *(value.detach() for value in parameters.values()))
    shapes = [[-1 if i in _free(name) else side for i, side in enumerate(t.shape)] for name, t in inputs.items()]
    shapes += [list(value.shape) for value in parameters.values()]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the tracer's, about sizes that it takes for constants
        traced = torch.jit.trace(forward, example, check_trace=False)
        graph = openvino.convert_model(
            traced, example_input=example, input=[openvino.PartialShape(shape) for shape in shapes]
        )
    for graph_input, name in zip(graph.inputs, [*inputs, *parameters], strict=True):
        graph_input.get_tensor().set_names({name})
    return graph


def nest(inputs: Mapping[str, Tensor]) -> dict[str, Tensor | dict[str, Tensor]]:
    """Return inputs as arguments: ``{"a": x, "b.c": y}`` becomes ``{"a": x, "b": {"c": y}}``."""
    arguments: dict[str, Tensor | dict[str, Tensor]] = {}
    for name, tensor in inputs.items():
        outer, _, inner = name.partition(".")
        if inner:
            arguments.setdefault(outer, {})[inner] = tensor
        else:
            arguments[outer] = tensor
    return arguments


def fixed_sides(inputs: Mapping[str, Tensor]) -> dict[str, list[int | None]]:
    """Return the shapes of inputs, with None where one graph serves all sizes."""
    return {
        name: [None if i in _free(name) else side for i, side in enumerate(tensor.shape)]
        for name, tensor in inputs.items()
    }


def _free(name: str) -> Sequence[int]:
    return FREE_DIMENSIONS.get(name, (0,))


def _example(inputs: Mapping[str, Tensor]) -> list[Tensor]:
    """Return small tensors of the same kind, all with the same number of rows."""
    sizes = {"sample": ODD_SIZE, "encoder_hidden_states": (TOKENS,)}
    example = []
    for name, tensor in inputs.items():
        shape = list(tensor.shape)
        for dimension, side in zip(_free(name), (ROWS, *sizes.get(name, ())), strict=True):
            shape[dimension] = side
        example.append(torch.zeros(shape, dtype=tensor.dtype))
    return example


def _without_hooks(network: nn.Module) -> nn.Module:
    """Return a shallow copy of a network without the hooks and the replaced ``forward`` of the network itself."""
    bare = copy.copy(network)
    vars(bare).pop("forward", None)
    bare._forward_hooks, bare._forward_pre_hooks = type(network._forward_hooks)(), type(network._forward_pre_hooks)()
    return bare


def _zipped(graph: "Model") -> bytes:
    """Return the two files of a graph as one: what a reader finds always belongs together."""
    stored = io.BytesIO()
    with tempfile.TemporaryDirectory() as folder, zipfile.ZipFile(stored, "w", zipfile.ZIP_DEFLATED) as file:
        paths = [Path(folder) / name for name in FILES]
        import_openvino().serialize(graph, *paths)
        for path in paths:
            file.write(path, path.name)
    return stored.getvalue()


def _cache_file(network: nn.Module, inputs: Mapping[str, Tensor]) -> Path:
    """Return where a graph is kept: under a hash of everything that it depends on."""
    cls = type(network)
    decides = {
        "network": design_hash(network),
        "source": hashlib.sha256(Path(inspect.getfile(cls)).read_bytes()).hexdigest(),
        "export": hashlib.sha256(Path(__file__).read_bytes()).hexdigest(),
        "versions": versions(("torch", "diffusers", "openvino")),
        "parameters": {name: list(value.shape) for name, value in network.named_parameters()},
        "inputs": fixed_sides(inputs),
    }
    digest = hashlib.sha256(json.dumps(decides, sort_keys=True, default=str).encode()).hexdigest()
    folder = cached_assets_path("decinb", subfolder="graphs")
    return folder / f"{cls.__name__}-{digest[:16]}.zip"
