"""MindSpore computes what torch computed: part by part, and in whole calls with the same noise."""

import json

import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor
from safetensors.numpy import load_file, save_file

import cases
import loading
import parity
from unet_nas import UNetNAS

# Float32 sums in another order, against the largest value. The VAE's encoder differs most, by 8e-5 of 9, and there
# MindSpore is the closer one: within 3e-6 of what torch computes in float64.
ROUNDING = 3e-5
PUBLISHED = json.loads((cases.ROOT / "tests" / "fixtures" / "unet_nas_reference.json").read_text())


@pytest.fixture(scope="module")
def pipe():
    return loading.load_pipeline()


@pytest.fixture(scope="module")
def parts(pipe):
    return parity.compare_parts(pipe)


@pytest.fixture(scope="module")
def calls(pipe, parts):
    loading.compile_unet(pipe)
    return parity.compare_calls(pipe)[0]


@pytest.mark.parametrize("name", ["tokens", "timesteps"])
def test_integers_are_equal(parts, name):
    assert parts[name]["difference"] == 0


UNET = [f"unet {height} x {width} at {t}" for height, width in cases.LATENT_SIZES for t in cases.TIMESTEPS]


@pytest.mark.parametrize("name", ["text", "encoded", "decoded", "noisy", "denoised", *UNET])
def test_parts_differ_by_rounding(parts, name):
    assert parts[name]["difference"] <= ROUNDING * parts[name]["largest"], parts[name]


@pytest.mark.parametrize("name", cases.CALLS)
def test_whole_calls_differ_by_rounding(calls, name):
    assert calls[name]["difference"] <= ROUNDING * calls[name]["largest"], calls[name]


@pytest.mark.parametrize("name", cases.IMAGES)
def test_images_differ_by_one_level_in_few_bytes(calls, name):
    assert calls[name]["levels"] <= 1
    assert calls[name]["bytes"] <= 0.002 * calls[name]["of"], calls[name]


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_unet_equals_the_published_definition(name):
    """Weights and inputs are formulas, see ``tests/core/test_unet_nas.py``."""
    case = PUBLISHED[name]
    model = UNetNAS(case["configurations"])
    parameters = dict(model.parameters_and_names())
    assert {key: list(parameter.shape) for key, parameter in parameters.items()} == case["keys"]
    for k, (key, parameter) in enumerate(sorted(parameters.items())):
        value = np.sin(0.7390851 * np.arange(parameter.size) + 1.6180339 * k)
        matrix = len(parameter.shape) > 1
        value = value / np.sqrt(parameter.size / parameter.shape[0]) if matrix else 0.1 * value + key.endswith("weight")
        parameter.set_data(Tensor(value.astype(np.float32).reshape(parameter.shape)))
    model.set_train(False)

    sample = cases.wave((case["batch"], 4, case["height"], case["width"]), 0.1)
    text = cases.wave((case["batch"], case["tokens"], case["configurations"]["cross_attention_dim"]), 0.5)
    out = model(Tensor(sample), Tensor(np.array(case["timesteps"])), Tensor(text))[0].asnumpy()
    assert out.shape == sample.shape
    assert np.abs(out.ravel()[:32] - case["first"]).max() <= 1e-4  # both are float32
    assert np.abs(out.ravel()[-32:] - case["last"]).max() <= 1e-4
    assert np.abs(out).sum() == pytest.approx(case["abs_sum"], abs=1e-4 * out.size)


@pytest.mark.parametrize("change", ["missing", "extra", "shape"])
def test_weights_that_do_not_fit_are_refused(pipe, tmp_path, change):
    weights = load_file(cases.MODEL / "text_encoder" / "model.safetensors")
    name = next(name for name in sorted(weights) if name.endswith("final_layer_norm.weight"))
    if change == "missing":
        del weights[name]
    elif change == "extra":
        weights[f"{name}_2"] = weights[name]
    else:
        weights[name] = weights[name][:-1]
    save_file(weights, tmp_path / "model.safetensors")
    before = [parameter.asnumpy() for parameter in pipe.text_encoder.get_parameters()]
    with pytest.raises(ValueError, match=name.split(".")[-2]):
        loading.load_weights(pipe.text_encoder, tmp_path / "model.safetensors")
    for parameter, value in zip(pipe.text_encoder.get_parameters(), before, strict=True):
        assert np.array_equal(parameter.asnumpy(), value)


def test_the_device_is_a_cpu():
    assert ms.get_context("device_target") == "CPU"
