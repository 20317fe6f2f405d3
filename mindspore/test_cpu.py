"""Each replaced operation computes what torch's operation of the same name is documented to compute."""

import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor, mint
from scipy.special import erf

import cpu

cpu.prepare()

RNG = np.random.default_rng(0)
X = RNG.standard_normal((2, 4, 6, 6)).astype(np.float32)
V = RNG.standard_normal((3, 8)).astype(np.float32)
CONV, NORM = mint.nn.Conv2d(4, 3, 3, stride=2, padding=1), mint.nn.LayerNorm(8, eps=1e-5)
LOOKUP, POOL = mint.nn.Embedding(5, 8), mint.nn.AvgPool2d(2, 2)


def convolution() -> np.ndarray:
    padded = np.pad(X, [(0, 0), (0, 0), (1, 1), (1, 1)])
    windows = np.lib.stride_tricks.sliding_window_view(padded, (3, 3), (2, 3))[:, :, ::2, ::2]
    return np.einsum("nchwij,ocij->nohw", windows, CONV.weight.asnumpy()) + CONV.bias.asnumpy()[:, None, None]


def normalized() -> np.ndarray:
    return (V - V.mean(1, keepdims=True)) / np.sqrt(V.var(1, keepdims=True) + 1e-5)


OPERATIONS = {
    "Conv2d": (lambda x, v: CONV(x), convolution),
    "LayerNorm": (lambda x, v: NORM(v), normalized),
    "Embedding": (lambda x, v: LOOKUP(ms.tensor([[3, 1]])), lambda: LOOKUP.weight.asnumpy()[[[3, 1]]]),
    "AvgPool2d": (lambda x, v: POOL(x), lambda: X.reshape(2, 4, 3, 2, 3, 2).mean((3, 5))),
    "gelu": (lambda x, v: mint.nn.functional.gelu(v), lambda: V * (1 + erf(V / np.sqrt(2))) / 2),
    "pad": (
        lambda x, v: mint.nn.functional.pad(x, (0, 1, 0, 1), mode="constant", value=0),
        lambda: np.pad(X, [(0, 0), (0, 0), (0, 1), (0, 1)]),
    ),
    "stack": (lambda x, v: mint.stack([v, v], dim=1), lambda: np.stack([V, V], 1)),
    "chunk": (lambda x, v: mint.chunk(v, 2, dim=-1)[1], lambda: V[:, 4:]),
    "split": (lambda x, v: mint.split(v, [3, 5], dim=1)[1], lambda: V[:, 3:]),
    "arange": (lambda x, v: mint.arange(start=0, end=5, dtype=ms.float32), lambda: np.arange(5)),
    "full": (lambda x, v: mint.full((2, 2), 1.5), lambda: np.full((2, 2), 1.5)),
    "zeros_like": (lambda x, v: mint.zeros_like(v), lambda: np.zeros_like(V)),
    "ones_like": (lambda x, v: mint.ones_like(v), lambda: np.ones_like(V)),
    "baddbmm": (
        lambda x, v: mint.baddbmm(x[0], x[0], x[1], beta=2, alpha=0.5),
        lambda: 2 * X[0] + 0.5 * X[0] @ X[1],
    ),
    "repeat_interleave": (lambda x, v: mint.repeat_interleave(v, 2, dim=0), lambda: np.repeat(V, 2, 0)),
}


def test_every_replacement_is_tested():
    layers = {owner.__name__.removesuffix("Ext") for owner, name, _ in cpu.REPLACEMENTS if name == "construct"}
    functions = {name for _, name, _ in cpu.REPLACEMENTS if name != "construct"}
    assert (layers - {"GEGLU"}) | functions == set(OPERATIONS)  # every U-Net has a GEGLU, and test_parity.py runs it


@pytest.mark.parametrize("name", OPERATIONS)
def test_it_computes_what_torch_does(name):
    operation, expected = OPERATIONS[name]
    found = operation(Tensor(X), Tensor(V)).asnumpy()
    np.testing.assert_allclose(found, expected(), atol=1e-5)


def test_other_versions_are_refused():
    cpu.check_versions(cpu.TESTED)
    with pytest.raises(RuntimeError, match=r"mindspore 2\.10\.0 is installed.*tested with 2\.7\.2"):
        cpu.check_versions({**cpu.TESTED, "mindspore": "2.10.0"})
