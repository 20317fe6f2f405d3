"""Faster ways to run a pipeline: the pictures stay, and every option can be taken back."""

import pytest
import torch
from diffusers.models.attention_processor import AttnProcessor2_0
from diffusers.models.resnet import ResnetBlock2D

import decinb
from decinb.benchmark import options, packing, plots
from decinb.utils import acceleration

SAME = 40  # dB: what the issue of speed allows; rounding alone leaves more than 80
ROUNDING = 1e-4  # compiled kernels add in another order


@pytest.fixture(scope="module")
def record(tiny):
    before = list(tiny.unet.state_dict())
    names = [name for name, option in options.options(tiny).items() if not option.compiles]
    made = options.compare_options(tiny, packing.picture_call(tiny, 2), names, repeats=2, model="tiny")
    assert list(tiny.unet.state_dict()) == before, "a fused network would have matrices of its own"
    return made


def test_no_option_changes_the_picture(record):
    found = record.settings["options"]
    assert {"plain attention", "channels last", "fused QKV", "one thread"} <= set(found)
    assert all(option["psnr"] > SAME for option in found.values())
    assert all(list(timings) == ["as loaded", name] for name, timings in record.timings.items())
    told = packing.options_table(record)
    assert all(name in told for name in found)
    plots.plot_options({"one machine": record, "another": record})


def test_every_option_is_taken_back(tiny, record):
    assert {type(processor) for processor in tiny.unet.attn_processors.values()} == {AttnProcessor2_0}
    assert tiny.unet.conv_in.weight.is_contiguous() and tiny.vae.decoder.conv_in.weight.is_contiguous()
    assert torch.get_num_threads() > 0 and "forward" not in vars(tiny.unet)


def test_an_unknown_option_is_refused(tiny):
    with pytest.raises(decinb.InputError, match="'magic' is no option on cpu; known are plain attention"):
        options.compare_options(tiny, lambda: None, ["magic"])


def test_without_a_compiler_the_switch_says_so_and_changes_nothing(monkeypatch):
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CXX", raising=False)
    with pytest.warns(UserWarning, match=r"compile=True changes nothing here: no C\+\+ compiler"):
        pipe = decinb.load_pipeline("tiny", "cpu", compile=True)
    assert "forward" not in vars(pipe.unet)


@pytest.mark.skipif(not acceleration.has_compiler(), reason="torch needs a C++ compiler")
def test_compiled_a_network_says_the_same_and_hooks_stay_outside():
    block = ResnetBlock2D(in_channels=8, out_channels=8, temb_channels=8, groups=2).eval()
    given = torch.randn(2, 8, 8, 8), torch.randn(2, 8)
    seen = []
    block.register_forward_hook(lambda module, args, output: seen.append(len(output)))
    with torch.no_grad():
        plain = block(*given)
        acceleration.compile_network(block)
        compiled = block(*given)
        acceleration.uncompile_network(block)
    torch.testing.assert_close(compiled, plain, atol=ROUNDING, rtol=0)
    assert seen == [2, 2] and "forward" not in vars(block)
