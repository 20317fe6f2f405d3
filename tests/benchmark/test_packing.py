"""What ``python -m decinb.benchmark`` measures, on a few steps: its record, its table, and its large pipeline."""

import json

import pytest
import torch
from diffusers import AutoencoderKL
from transformers import CLIPTextConfig, CLIPTextModel

from decinb import InputError, grid
from decinb.benchmark import latency, packing
from decinb.unet_nas import V1_CONFIGURATIONS, UNetNAS

TOLERANCE = 1e-4  # of a range of 0 to 1: a sum over more rows adds in another order
DESIGNS = {
    "guidance": grid(guidance_scale=[3.0, 7.5], num_inference_steps=[2]),
    "mixed": grid(strength=[0.5, 1.0], guidance_scale=[1.0], num_inference_steps=[2]),
}
SMALL = {
    **V1_CONFIGURATIONS,
    "down_blocks_in_channels": [32, 32, 32],
    "down_blocks_out_channels": [32, 32, 64],
    "prev_output_channels": [64, 64, 32],
    "cross_attention_dim": 16,
    "temb_dim": 32,
    "num_attention_heads": 2,
}


@pytest.fixture(scope="module", autouse=True)
def small_matrix():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(packing, "SMALL_MATRIX", 128)
        yield


@pytest.fixture(scope="module")
def record(tiny):
    return packing.compare(tiny, DESIGNS, rounds=2, pack=4, model="tiny")


def test_the_designs_are_the_guides_and_48_mixed_cells():
    assert {name: len(cells) for name, cells in packing.DESIGNS.items()} == {
        "guidance": 7,
        "strength": 6,
        "steps": 8,
        "mixed": 48,
    }
    assert [cell["guidance_scale"] for cell in packing.DESIGNS["guidance"]] == [4.5, 6, 7.5, 9, 10.5, 12, 13.5]
    assert [cell["num_inference_steps"] for cell in packing.DESIGNS["steps"]] == list(range(30, 101, 10))
    assert [round(cell["strength"], 2) for cell in packing.DESIGNS["strength"]] == [0.75, 0.8, 0.85, 0.9, 0.95, 1.0]


def test_both_ways_are_timed_counted_and_compared(record):
    assert list(record.timings) == list(DESIGNS)
    for timings in record.timings.values():
        assert list(timings) == ["one by one", "packed"]
        assert all(len(timing.seconds) == 2 and timing.fastest > 0 for timing in timings.values())
    guidance, mixed = (record.settings["designs"][name] for name in DESIGNS)
    # Strength 0.8 of 2 steps leaves one: two cells of a call of two rows each, whose prompts and latents are the same.
    assert guidance["one by one"] == {"calls": 2, "rows": 4, "peak_bytes": None}
    assert guidance["packed"] == {"calls": 1, "rows": 2, "peak_bytes": None}
    assert (mixed["one by one"]["rows"], mixed["packed"]["rows"], mixed["packed"]["calls"]) == (3, 3, 2)
    assert (mixed["cells"], mixed["pack"]) == (2, 4)
    assert all(found["difference"] < TOLERANCE for found in (guidance, mixed))


def test_a_difference_would_be_seen(tiny):
    def spoil(module, args, output):
        if len(output) == 2:  # only packing decodes two at once
            output[1] += 0.1

    hook = tiny.vae.decoder.register_forward_hook(spoil)
    try:
        found = packing.compare(tiny, {"mixed": DESIGNS["mixed"]}, rounds=1)
    finally:
        hook.remove()
    assert found.settings["designs"]["mixed"]["difference"] > 100 * TOLERANCE


def test_the_record_survives_the_disk_and_is_told(record, tmp_path):
    path = latency.save(record, tmp_path, "benchmark")
    assert path.name.startswith("benchmark-") and path.parent.parent == tmp_path
    assert latency.load(path) == record
    assert str(tmp_path) not in path.read_text() and json.loads(path.read_text())["settings"]["model"] == "tiny"
    told = packing.table(record)
    ratio = latency.ratio(*record.timings["mixed"].values())[1]
    assert f"{ratio:.2f} times faster" in told and "tiny at 128 x 128" in told


def test_the_rate_of_a_matrix_product_is_a_rate():
    rate = packing.matrix_rate(torch.device("cpu"), torch.float32)
    assert 1e8 < rate < 1e14  # FLOPs a second, of any CPU


def test_a_random_pipeline_runs_both_ways():
    text = CLIPTextConfig(hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2)
    pipe = packing.random_pipeline(
        "cpu",
        torch.float32,
        unet=lambda: UNetNAS(SMALL, sample_size=16),
        vae=lambda: AutoencoderKL(
            block_out_channels=(32,) * 4,
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
        ),
        text_encoder=lambda: CLIPTextModel(text),
    )
    assert pipe.tokenizer.model_max_length == 77
    record = packing.compare(pipe, {"mixed": DESIGNS["mixed"]}, rounds=1)
    assert record.settings["designs"]["mixed"]["difference"] < TOLERANCE


@pytest.mark.parametrize("bad", [{"rounds": 0}, {"pack": 0}])
def test_compare_refuses_what_it_cannot_do(tiny, bad):
    with pytest.raises(InputError, match=f"{next(iter(bad))} must be at least 1, got 0"):
        packing.compare(tiny, DESIGNS, **bad)
