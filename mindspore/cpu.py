"""Make MindONE run on a CPU: supply the operations of ``mindspore.mint`` that have kernels for Ascend only.

MindONE is written on ``mindspore.mint``, whose operations carry PyTorch's names and arguments. On a CPU some of them
raise ``The kernel ... unregistered``. Each has an older relative in ``mindspore.ops`` that has a CPU kernel and
computes the same; ``prepare`` puts those in place. On any other device it changes nothing.
"""

import importlib.metadata

import mindspore as ms
from mindone.diffusers.models.activations import GEGLU
from mindspore import mint, ops

TESTED = {"mindspore": "2.7.2", "mindone": "0.5.0"}


def prepare(device: str = "CPU", threads: int = 1) -> None:
    """Choose the device, and on a CPU supply the missing operations. Call it before any model is built.

    Args:
        device: ``"CPU"``, ``"GPU"`` or ``"Ascend"``.
        threads: threads of an operation on a CPU. The bundled model's operations are too small to share.

    Raises:
        RuntimeError: the device is a CPU, and MindSpore or MindONE has another version than the tested one.
    """
    if device == "CPU":
        check_versions({name: importlib.metadata.version(name) for name in TESTED})
    ms.set_device(device)
    if device == "CPU" and mint.stack is not _stack:  # once: MindSpore refuses to set the number of threads again
        # By default each operation is queued for another thread. On a CPU the queue costs more than the operation:
        # with this call, models run 5 to 10 times faster.
        ms.runtime.launch_blocking()
        ms.device_context.cpu.op_tuning.threads_num(threads)
        for owner, name, replacement in REPLACEMENTS:
            setattr(owner, name, replacement)


def check_versions(installed: dict[str, str]) -> None:
    """Refuse versions that the replacements were not tested with.

    Raises:
        RuntimeError: a version differs. In MindSpore 2.10.0, for one, this convolution runs 40 times slower.
    """
    for name, version in TESTED.items():
        if installed[name] != version:
            raise RuntimeError(
                f"{name} {installed[name]} is installed, and the replacements for a CPU were tested with {version} "
                "only: install requirements.txt"
            )


def _conv2d(self, input):  # Conv2DExt has no kernel; Conv2D has, and takes the bias in a second operation
    output = ops.conv2d(input, self.weight, None, self.stride, "pad", self.padding, self.dilation, self.groups)
    return output if self.bias is None else ops.bias_add(output, self.bias)


def _layer_norm(self, input):  # LayerNormExt has no kernel; LayerNorm has, and gives mean and variance as well
    axis = input.ndim - len(self.normalized_shape)
    return ops.LayerNorm(axis, axis, self.eps)(input, self.weight, self.bias)[0]


def _embedding(self, input):  # Embedding has no kernel; a lookup is a gather along the first axis
    return ops.gather(self.weight, input, 0)


def _avg_pool2d(self, input):  # AvgPool2D has no kernel; AvgPool has
    return ops.avg_pool2d(input, self.kernel_size, self.stride or self.kernel_size, self.padding)


def _gelu(input, *, approximate="none"):  # GeluExt has no kernel; for "none", ops.gelu uses the error function
    return ops.gelu(input, approximate=approximate)


def _pad(input, pad, mode="constant", value=0):  # ConstantPadND has no kernel
    return ops.pad(input, pad, mode, value if mode == "constant" else None)


def _stack(tensors, dim=0):  # StackExt has no kernel
    return ops.stack(tensors, dim)


def _geglu(self, hidden_states):  # under ms.jit, the method Tensor.chunk with the keyword dim has no kernel either
    hidden_states, gate = mint.chunk(self.proj(hidden_states), 2, -1)
    return hidden_states * self.gelu(gate)


def _chunk(input, chunks, dim=0):  # Chunk has no kernel under ms.jit
    return ops.chunk(input, chunks, dim)


def _split(tensor, split_size_or_sections, dim=0):  # SplitTensor and SplitWithSize have no kernel under ms.jit
    return ops.split(tensor, split_size_or_sections, dim)


def _arange(start, end=None, step=1, *, dtype=None):  # Arange has no kernel
    return ops.arange(start, end, step, dtype=dtype)


def _full(size, fill_value, *, dtype=None):  # FillScalar has no kernel; ops.full makes integers unless told otherwise
    if dtype is None and isinstance(fill_value, float):
        dtype = ms.float32
    return ops.full(size, fill_value, dtype=dtype)


def _zeros_like(input, *, dtype=None):  # ZerosLikeExt has no kernel
    return ops.zeros_like(input, dtype=dtype)


def _ones_like(input, *, dtype=None):  # OnesLikeExt has no kernel
    return ops.ones_like(input, dtype=dtype)


def _baddbmm(input, batch1, batch2, *, beta=1, alpha=1):  # Baddbmm has no kernel; it is a product and a sum
    product = alpha * mint.bmm(batch1, batch2)
    return product if beta == 0 else beta * input + product


def _repeat_interleave(input, repeats, dim=None, *, output_size=None):  # RepeatInterleaveInt has no kernel
    return ops.repeat_interleave(input, repeats, dim)


REPLACEMENTS = [
    (mint.nn.Conv2d, "construct", _conv2d),
    (mint.nn.LayerNorm, "construct", _layer_norm),
    (mint.nn.Embedding, "construct", _embedding),
    (mint.nn.AvgPool2d, "construct", _avg_pool2d),
    (mint.nn.functional, "gelu", _gelu),
    (mint.nn.functional, "pad", _pad),
    (GEGLU, "construct", _geglu),
    (mint, "stack", _stack),
    (mint, "chunk", _chunk),
    (mint, "split", _split),
    (mint, "arange", _arange),
    (mint, "full", _full),
    (mint, "zeros_like", _zeros_like),
    (mint, "ones_like", _ones_like),
    (mint, "baddbmm", _baddbmm),
    (mint, "repeat_interleave", _repeat_interleave),
]
"""Where an operation is looked up, under which name, and what stands in for it."""
