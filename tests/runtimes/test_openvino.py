"""U-Nets in OpenVINO: the same predictions and images as in PyTorch, and PyTorch where OpenVINO cannot be used."""

import copy
import json
import pickle
import subprocess
import sys
import warnings

import numpy as np
import pytest
import torch
from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor
from diffusers.training_utils import EMAModel
from peft import LoraConfig
from torch import nn

import decinb
from decinb import InputError
from decinb.execution.provenance import pipeline_record
from decinb.runtimes import graph, openvino, watch
from tests.helpers.small import small_nas, small_sd
from tests.helpers.sweeps import same

needs_openvino = pytest.mark.skipif(not graph.is_installed(), reason="needs decinb[openvino]")

ROUNDING = 1e-3  # of predictions of about 1: norms over the few values of a small network enlarge rounding
STEPS = 3


def small_xl() -> UNet2DConditionModel:
    """Return a small U-Net with the conditioning of Stable Diffusion XL."""
    return UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(32, 64),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=2,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=6 * 8 + 32,
        cross_attention_dim=16,
    )


def call(unet, rows=2, size=(8, 8), tokens=7, timestep=500, **arguments):
    """Call a U-Net on the same random numbers every time."""
    draw = torch.Generator().manual_seed(0)
    texts = len(arguments["latent_of"]) if "latent_of" in arguments else rows
    sample = torch.randn(rows, 4, *size, generator=draw)
    text = torch.randn(texts, tokens, 16, generator=draw)
    with torch.no_grad():
        return unet(sample, timestep, text, **arguments, return_dict=False)[0]


def both(unet, **arguments):
    """Return the predictions in OpenVINO and in PyTorch."""
    openvino.attach(unet, "openvino")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fast = call(unet, **arguments)
    openvino.detach(unet)
    return fast, call(unet, **arguments)


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    """Keep graphs in a folder of the test session."""
    folder = tmp_path_factory.getbasetemp() / "graphs"
    folder.mkdir(exist_ok=True)
    monkeypatch.setattr(graph, "cached_assets_path", lambda *args, **kwargs: folder)
    return folder


@pytest.fixture(scope="module")
def fast():
    pipe = decinb.load_pipeline("tiny", "cpu", runtime="openvino")
    pipe.set_progress_bar_config(disable=True)
    return pipe


@needs_openvino
@pytest.mark.parametrize(
    ("build", "arguments"),
    [
        (small_nas, {}),
        (small_nas, {"rows": 1, "size": (16, 8), "tokens": 77, "timestep": torch.tensor(3)}),
        (small_nas, {"rows": 2, "size": (11, 9), "timestep": torch.tensor([0, 999])}),
        (small_nas, {"rows": 2, "latent_of": torch.tensor([0, 1, 1])}),
        (small_sd, {"rows": 3, "size": (11, 16), "timestep": torch.tensor(3.5)}),
        (
            small_xl,
            {"rows": 1, "added_cond_kwargs": {"text_embeds": torch.ones(1, 32), "time_ids": torch.full((1, 6), 64.0)}},
        ),
    ],
)
def test_predictions_are_those_of_pytorch_for_any_shape(build, arguments):
    torch.manual_seed(0)
    predicted, expected = both(build().eval(), **arguments)
    torch.testing.assert_close(predicted, expected, atol=ROUNDING, rtol=0)


@needs_openvino
def test_matrices_of_eight_bits_are_rounded(monkeypatch):
    monkeypatch.setitem(openvino.PRECISIONS, openvino.EIGHT_BITS, "f32")  # or bfloat16 would round more
    torch.manual_seed(2)
    unet = small_nas().eval()
    exact = call(unet)
    errors = {}
    for runtime in ("openvino", openvino.EIGHT_BITS):
        openvino.attach(unet, runtime)
        errors[runtime] = (call(unet) - exact).abs().max()
        openvino.detach(unet)
    assert errors["openvino"] < ROUNDING < errors[openvino.EIGHT_BITS] / 5 < 0.1
    with pytest.raises(InputError, match="runtime must be one of"):
        decinb.load_pipeline("tiny", "cpu", runtime=openvino.EIGHT_BITS)


@needs_openvino
def test_the_graph_is_exported_once_and_holds_no_weights(cache, monkeypatch):
    torch.manual_seed(1)
    unet = small_nas().eval()
    both(unet)
    stored = [file for file in cache.iterdir() if file.name.startswith("UNetNAS")]
    assert stored and all(file.stat().st_size < 200_000 for file in stored)
    monkeypatch.setattr(graph, "export", lambda *args: pytest.fail("exported again"))
    predicted, expected = both(small_nas().eval())  # other weights
    torch.testing.assert_close(predicted, expected, atol=ROUNDING, rtol=0)
    assert not torch.allclose(expected, call(unet), atol=10 * ROUNDING)


@needs_openvino
def test_a_damaged_cache_is_written_again(cache):
    unet = small_sd().eval()
    both(unet)
    for file in cache.iterdir():
        file.write_bytes(file.read_bytes()[:100])
    predicted, expected = both(unet)
    torch.testing.assert_close(predicted, expected, atol=ROUNDING, rtol=0)
    assert sum(file.stat().st_size > 100 for file in cache.iterdir()) == 1


@needs_openvino
def test_calls_of_a_pipeline_and_packed_sweeps_give_the_same_images(fast, tiny, tmp_path):
    image = decinb.load_image("day")
    arguments = {"strength": 1.0, "num_inference_steps": STEPS}
    seen = []
    hook = fast.unet.register_forward_hook(lambda module, args, output: seen.append(len(output[0])))
    made = [
        pipe("a red house", image, **arguments, generator=torch.Generator().manual_seed(0)).images[0]
        for pipe in (fast, tiny)
    ]
    hook.remove()
    assert sum(seen) > 0, "hooks on the network itself still run"
    assert same(*made)
    cells = decinb.grid(guidance_scale=[1, 7.5], num_inference_steps=[STEPS])
    sweeps = [
        decinb.run_sweep(pipe, image, "a red house", cells, folder=tmp_path / name)
        for name, pipe in {"fast": fast, "tiny": tiny}.items()
    ]
    assert all(same(*pair) for pair in zip(*(sweep.images for sweep in sweeps), strict=True))
    names = [sorted(file.name for file in (tmp_path / name).glob("*.png")) for name in ("fast", "tiny")]
    assert names[0] == names[1], "their keys differ: float32 images are the same images"
    again = decinb.replay(tmp_path / "fast" / names[0][0], tiny)
    assert any(same(again, made) for made in sweeps[0].images)


@needs_openvino
def test_bfloat16_is_near_and_its_images_are_kept_apart(tiny):
    pipe = decinb.load_pipeline("tiny", "cpu", runtime="openvino-bfloat16")
    assert pipeline_record(pipe)["dtype"] == "openvino-bfloat16" and pipeline_record(tiny)["dtype"] == "float32"
    pipe.set_progress_bar_config(disable=True)
    image = decinb.load_image("day")
    pixels = [
        np.asarray(one("a red house", image, 1.0, STEPS, generator=torch.Generator().manual_seed(0)).images[0], float)
        for one in (pipe, tiny)
    ]
    assert np.abs(pixels[0] - pixels[1]).mean() < 5


@needs_openvino
def test_bfloat16_is_replayed_in_its_runtime(tiny, tmp_path, capsys):
    pipe = decinb.load_pipeline("tiny", "cpu", runtime="openvino-bfloat16")
    cells = [{"num_inference_steps": STEPS, "guidance_scale": 1.0}]
    sweep = decinb.run_sweep(pipe, decinb.load_image("day"), "a red house", cells, folder=tmp_path, progress=False)
    (path,) = tmp_path.glob("*.png")
    assert same(decinb.replay(path, pipe), sweep.images[0])
    assert same(decinb.replay(path), sweep.images[0])
    assert "U-Net in OpenVINO, bfloat16" in capsys.readouterr().out
    with pytest.raises(decinb.InputError, match=r"give load_pipeline\(..., runtime=...\)"):
        decinb.replay(path, tiny)


def add_lora(unet):
    unet.add_adapter(LoraConfig(r=2, target_modules=["to_q"], init_lora_weights=False))


CHANGES = {
    "modules that were added": add_lora,
    "have hooks": lambda unet: unet.conv_in.register_forward_hook(lambda module, args, output: output + 1),
    "another forward": lambda unet: setattr(unet.conv_act, "forward", lambda hidden: hidden),
    "other attention processors": lambda unet: unet.set_attn_processor(AttnProcessor()),
    "training mode": lambda unet: unet.train(),
    "an attribute that OpenVINO cannot use, scales": lambda unet: setattr(unet.mid_block, "scales", torch.ones(2)),
    "weights are bfloat16": lambda unet: unet.to(torch.bfloat16),
}


@needs_openvino
@pytest.mark.parametrize(("reason", "change"), CHANGES.items(), ids=CHANGES)
def test_what_changes_the_inside_runs_in_pytorch_with_one_line(reason, change):
    torch.manual_seed(0)
    unet = small_nas().eval()
    openvino.attach(unet, "openvino")
    change(unet)
    sample = torch.randn(1, 4, 8, 8).to(unet.dtype)
    text = torch.randn(1, 7, 16).to(unet.dtype)
    with torch.no_grad():
        with pytest.warns(UserWarning, match=reason):
            first = unet(sample, 3, text)[0]
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            second = unet(sample, 3, text)[0]
        expected = type(unet).forward(unet, sample, 3, text)[0]
    if reason not in ("have hooks", "training mode"):
        assert torch.equal(first, expected) and torch.equal(second, expected)
    assert not vars(unet)["forward"].requests, "OpenVINO was used"


@needs_openvino
def test_loaded_and_changed_weights_are_used():
    torch.manual_seed(0)
    unet = small_nas().eval()
    openvino.attach(unet, "openvino")
    before = call(unet)
    unet.load_state_dict(small_nas().state_dict())
    after = call(unet)
    openvino.detach(unet)
    assert not torch.allclose(before, after, atol=10 * ROUNDING)
    torch.testing.assert_close(after, call(unet), atol=ROUNDING, rtol=0)


def step(unet, timestep=500):
    """Return what ``unet`` predicts in OpenVINO, without a warning, and what its class does in PyTorch."""
    draw = torch.Generator().manual_seed(0)
    size = unet.config.sample_size
    width = next(module.to_k.in_features for name, module in unet.named_modules() if name.endswith(".attn2"))
    inputs = torch.randn(2, 4, size, size, generator=draw), timestep, torch.randn(2, 7, width, generator=draw)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("error")
        return unet(*inputs)[0], type(unet).forward(unet, *inputs)[0]


def fuse_lora(unet):
    add_lora(unet)
    unet.fuse_lora()
    unet.unload_lora()


def average(unet):
    average = EMAModel(unet.parameters())
    for weight in average.shadow_params:
        weight.mul_(0.9)
    average.copy_to(unet.parameters())


def multiply(unet):
    for weight in unet.parameters():
        weight.data.mul_(1.1)


def change_one(unet):
    unet.conv_in.weight.data[3, 2, 1, 1] += 5  # not the first value, which every call looks at


def change_eps(unet):
    for module in unet.modules():
        if isinstance(module, nn.GroupNorm):
            module.eps = 0.5


UNSEEN = {fuse_lora: 500, average: 400, multiply: 300, change_one: 500, change_eps: 400}
"""Changes that leave the versions of weights as they are, and the timestep of the next call.

A call with a timestep below 500 is a later one of the same run.
"""


@needs_openvino
@pytest.mark.parametrize(("change", "timestep"), UNSEEN.items(), ids=[change.__name__ for change in UNSEEN])
def test_changes_that_leave_no_version_are_used_at_the_next_call(fast, change, timestep):
    unet = copy.deepcopy(fast.unet)
    before, expected = step(unet)
    torch.testing.assert_close(before, expected, atol=ROUNDING, rtol=0)
    graphs = list(vars(unet)["forward"].requests.values())
    change(unet)
    after, expected = step(unet, timestep)
    torch.testing.assert_close(after, expected, atol=ROUNDING, rtol=0)
    assert not torch.allclose(before, after, atol=10 * ROUNDING)
    assert graphs != list(vars(unet)["forward"].requests.values()), "PyTorch was used"


@needs_openvino
def test_an_unchanged_network_is_compiled_once(fast):
    unet = copy.deepcopy(fast.unet)
    requests = []
    for timestep in (900, 500, 900, 900):
        step(unet, timestep)
        requests += vars(unet)["forward"].requests.values()
    assert len(requests) == 4 and len(set(requests)) == 1


@needs_openvino
def test_freeu_runs_in_pytorch_until_it_is_off():
    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(32, 64),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=16,
    ).eval()
    openvino.attach(unet, "openvino")
    unet.enable_freeu(0.2, 0.2, 2.5, 2.8)
    with pytest.warns(UserWarning, match=r"while OpenVINO cannot run it \(OpConversionFailure: "):
        on = call(unet)
    assert torch.equal(call(unet), on) and not vars(unet)["forward"].requests
    unet.disable_freeu()
    off, expected = step(unet)
    torch.testing.assert_close(off, expected, atol=ROUNDING, rtol=0)
    assert vars(unet)["forward"].requests
    unet.enable_freeu(0.2, 0.2, 2.5, 2.8)
    assert torch.equal(call(unet), on)


@needs_openvino
def test_graphs_of_changed_networks_are_kept_apart(tmp_path, monkeypatch):
    monkeypatch.setattr(graph, "cached_assets_path", lambda *args, **kwargs: tmp_path)
    torch.manual_seed(0)
    unet = small_nas().eval()
    openvino.attach(unet, "openvino")
    with monkeypatch.context() as patched:
        patched.setattr(nn.SiLU, "forward", lambda self, hidden: hidden.relu())
        with pytest.warns(UserWarning, match=r"it uses code of your own, such as SiLU.forward"):
            predicted = call(unet)
        assert torch.equal(predicted, call(unet)) and not list(tmp_path.iterdir())
    changed = copy.deepcopy(unet)
    change_eps(changed)
    for number, network in enumerate((changed, unet), 1):
        predicted, expected = both(network)
        torch.testing.assert_close(predicted, expected, atol=ROUNDING, rtol=0)
        assert len(list(tmp_path.iterdir())) == number


@needs_openvino
def test_hooks_on_all_modules_run_in_pytorch(fast):
    unet = copy.deepcopy(fast.unet)
    before, _ = step(unet)
    hook = nn.modules.module.register_module_forward_hook(
        lambda module, args, output: output * 0.9 if isinstance(module, nn.SiLU) else None
    )
    try:
        with pytest.raises(UserWarning, match="while there is a hook on all modules"):
            step(unet)
        after, expected = step(unet)
    finally:
        hook.remove()
    assert torch.equal(after, expected) and not torch.allclose(before, after, atol=10 * ROUNDING)
    torch.testing.assert_close(step(unet)[0], before, atol=ROUNDING, rtol=0)


@needs_openvino
def test_gradients_flow_through_pytorch():
    unet = small_nas().eval()
    openvino.attach(unet, "openvino")
    unet(torch.randn(1, 4, 8, 8), 3, torch.randn(1, 7, 16)).sample.sum().backward()
    assert unet.conv_in.weight.grad is not None


@needs_openvino
def test_a_network_can_be_copied_and_pickled():
    torch.manual_seed(0)
    unet = small_nas().eval()
    openvino.attach(unet, "openvino")
    expected = call(unet)
    copied = copy.deepcopy(unet)
    assert vars(copied)["forward"].network is copied
    for other in (copied, pickle.loads(pickle.dumps(unet))):
        assert openvino.runtime_of(other) == "openvino"
        torch.testing.assert_close(call(other), expected, atol=ROUNDING, rtol=0)


@needs_openvino
def test_importing_openvino_sends_no_request():
    code = (
        "import json, sys; from decinb.runtimes import graph; graph.import_openvino();"
        "print(json.dumps([name for name in sys.modules if name.startswith('openvino_telemetry.')]))"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert json.loads(run.stdout.splitlines()[-1]) == []


@needs_openvino
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"runtime": "onnx"}, "runtime must be one of torch, openvino, openvino-bfloat16"),
        ({"runtime": "openvino", "dtype": "bfloat16"}, "dtype must be float32 with runtime='openvino'"),
        ({"runtime": "openvino", "compile": True}, "compile must be False with runtime='openvino'"),
    ],
)
def test_what_cannot_be_combined_is_refused_before_loading(arguments, message):
    with pytest.raises(InputError, match=message):
        decinb.load_pipeline("tiny", "cpu", **arguments)


def test_without_openvino_the_message_says_what_to_install(monkeypatch):
    monkeypatch.setattr(openvino, "is_installed", lambda: False)
    with pytest.raises(InputError, match=r"needs OpenVINO: pip install 'decinb\[openvino\]'"):
        decinb.load_pipeline("tiny", "cpu", runtime="openvino")


def test_a_runtime_is_chosen_when_a_model_is_loaded(tiny):
    with pytest.raises(InputError, match="runtime apply when a model is loaded"):
        decinb.load_pipeline(tiny, runtime="openvino")
    with pytest.raises(InputError, match="must be 'torch' on cuda"):
        openvino.check("openvino", torch.device("cuda"), torch.float32)
    with pytest.raises(InputError, match="runtime must be 'torch' for a pipeline without a U-Net"):
        openvino.attach(None, "openvino")


@needs_openvino
def test_autocast_is_left_to_pytorch(fast):
    unet = copy.deepcopy(fast.unet)
    with torch.autocast("cpu", torch.bfloat16):
        with pytest.raises(UserWarning, match=r"while torch\.autocast is on"):
            step(unet)
        after, expected = step(unet)
        pipe = decinb.load_pipeline("tiny", "cpu", runtime="openvino-bfloat16")
        assert openvino.precision(pipe) == "openvino-bfloat16, autocast to bfloat16"
    assert torch.equal(after, expected) and openvino.precision(pipe) == "openvino-bfloat16"


@needs_openvino
def test_a_change_after_a_pause_is_used_in_a_run_that_starts_lower(fast, monkeypatch):
    unet = copy.deepcopy(fast.unet)
    step(unet, 900)
    change_one(unet)
    monkeypatch.setattr(watch, "PAUSE", 0.0)
    after, expected = step(unet, 300)
    torch.testing.assert_close(after, expected, atol=ROUNDING, rtol=0)
