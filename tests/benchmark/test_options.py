"""Options to run a pipeline faster: images stay the same, and every option can be turned off again."""

import pytest
import torch
from diffusers.models.attention import FeedForward
from diffusers.models.attention_processor import AttnProcessor2_0

import decinb
from decinb.benchmark import latency, options, packing, plots
from decinb.utils.acceleration import compile_network, has_compiler, uncompile_network
from tests.helpers.small import small_nas, small_text_encoder, small_vae

SAME = 40  # dB; rounding alone gives more than 80
ROUNDING = 1e-4  # compiled kernels add in another order


@pytest.fixture(scope="module")
def pipe():
    return packing.random_pipeline("cpu", torch.float32, lambda: small_nas(16), small_vae, small_text_encoder)


@pytest.fixture(scope="module")
def measurement(pipe):
    before = list(pipe.unet.state_dict())
    names = [name for name, option in options.options(pipe).items() if not option.compiles]
    found = options.compare_options(pipe, options.example_call(pipe, 2), names, repeats=2, model="random")
    assert list(pipe.unet.state_dict()) == before, "the fused weights are still in the network"
    return found


def test_no_option_changes_the_image(measurement):
    found = measurement.settings["options"]
    assert {"plain attention", "channels last", "fused QKV", "one thread"} <= set(found)
    assert all(option["psnr"] > SAME for option in found.values())
    assert all(list(timings) == ["as loaded", name] for name, timings in measurement.timings.items())
    text = options.table(measurement)
    assert all(name in text for name in found)


def test_options_are_plotted(measurement, monkeypatch):
    drawn = []
    monkeypatch.setattr(plots.plt, "close", drawn.append)
    plots.plot_options({"one machine": measurement, "another": measurement})
    (ax,) = drawn[0].axes
    names = list(measurement.timings)
    assert [label.get_text() for label in ax.get_yticklabels()] == names and len(ax.patches) == 2 * len(names)
    faster = [latency.ratio(*timings.values())[1] for timings in measurement.timings.values()]
    assert [bar.get_width() for bar in ax.patches] == pytest.approx(2 * faster)
    lines = options.table(measurement).splitlines()[2:]
    for name, line, text in zip(names, lines, ax.texts[: len(names)], strict=True):
        assert line.startswith(name) and all(said in line for said in text.get_text().split(", "))
    monkeypatch.undo()
    plots.plt.close("all")


def test_every_option_is_turned_off_again(pipe, measurement):
    assert {type(processor) for processor in pipe.unet.attn_processors.values()} == {AttnProcessor2_0}
    assert pipe.unet.conv_in.weight.is_contiguous() and pipe.vae.decoder.conv_in.weight.is_contiguous()
    assert torch.get_num_threads() > 0 and "forward" not in vars(pipe.unet)


def test_an_unknown_option_is_rejected(pipe):
    with pytest.raises(decinb.InputError, match="there is no option 'magic' on cpu; there are plain attention"):
        options.compare_options(pipe, lambda: None, ["magic"])


def test_without_a_compiler_there_is_a_warning_and_no_change(monkeypatch):
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CXX", raising=False)
    with pytest.warns(UserWarning, match=r"compile=True changes nothing here: no C\+\+ compiler"):
        pipe = decinb.load_pipeline("tiny", "cpu", compile=True)
    assert "forward" not in vars(pipe.unet)


@pytest.mark.skipif(not has_compiler(), reason="torch needs a C++ compiler")
def test_a_compiled_network_gives_the_same_and_its_hooks_run():
    network = FeedForward(8).eval()
    given = torch.randn(2, 4, 8)
    seen = []
    network.register_forward_hook(lambda module, args, output: seen.append(len(output)))
    with torch.no_grad():
        plain = network(given)
        compile_network(network)
        compiled = network(given)
        uncompile_network(network)
    torch.testing.assert_close(compiled, plain, atol=ROUNDING, rtol=0)
    assert seen == [2, 2] and "forward" not in vars(network)
