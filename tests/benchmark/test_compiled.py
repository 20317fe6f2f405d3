"""The comparison of eager and compiled networks, on small networks and with made-up times."""

import pytest
from diffusers import UNet2DConditionModel

from decinb import InputError
from decinb.benchmark import compiled, latency
from decinb.benchmark.latency import Measurement, Timing
from tests.helpers.small import small_nas, small_sd

WHERE = {"device": "GPU", "dtype": "float16", "threads": 2, "load": 0.0}


def smallest() -> UNet2DConditionModel:
    """Return a U-Net of one block, which is compiled fast."""
    blocks = {"down_block_types": ("DownBlock2D",), "up_block_types": ("UpBlock2D",), "mid_block_type": None}
    return UNet2DConditionModel(
        block_out_channels=(8,), layers_per_block=1, norm_num_groups=4, cross_attention_dim=8, **blocks
    )


def test_networks_are_timed_in_each_mode_and_left_as_they_were(tmp_path):
    networks = {"U-Net-NAS": small_nas, "SD v1.5": small_sd}
    found = compiled.compare("cpu", "float32", 8, 2, 2, networks, ["eager"])
    assert {name: list(timings) for name, timings in found.timings.items()} == {name: ["eager"] for name in networks}
    assert latency.load(latency.save(found, tmp_path, "compiled")) == found


@pytest.mark.slow
@pytest.mark.skipif(not compiled.has_compiler(), reason="torch needs a C++ compiler")
def test_a_network_is_compiled_once_and_timed_in_turns():
    found = compiled.compare("cpu", "float32", 8, 2, 1, {"U-Net": smallest})
    first, timings = found.settings["first"]["U-Net"], found.timings["U-Net"]
    assert list(timings) == ["eager", "compiled"]
    assert first["compiled"] > 10 * timings["compiled"].slowest, "only the first call compiles"


def test_the_first_call_is_paid_back_by_what_later_calls_save():
    timings = {"net": {"eager": Timing((2.0, 3.0)), "compiled": Timing((1.0, 1.0)), "CUDA graphs": Timing((4.0, 4.0))}}
    settings = {"size": 8, "rows": 2, "first": {"net": {"eager": 3.0, "compiled": 31.0, "CUDA graphs": 9.0}}}
    found = Measurement(timings, settings, WHERE)
    assert compiled.calls_to_pay_back(found, "net", "compiled") == pytest.approx(30 / 1.5)
    text = compiled.table(found)
    assert "20 calls" in text and "never" in text and " 2.50" in text


def test_bad_arguments_are_refused():
    with pytest.raises(InputError, match="repeats and rows must be at least 1, got 0 and 2"):
        compiled.compare("cpu", repeats=0)
    with pytest.raises(InputError, match="modes must be 'eager' and others of"):
        compiled.compare("cpu", modes=["CUDA graphs"])
