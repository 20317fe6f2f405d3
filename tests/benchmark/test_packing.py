"""The comparison of packed sweeps with a loop over the pipeline, on a few steps, and its command line."""

import json
from pathlib import Path

import pytest
import torch

from decinb import InputError, grid
from decinb.benchmark import __main__ as command_line
from decinb.benchmark import latency, packing
from tests.helpers.small import small_nas, small_text_encoder, small_vae

TOLERANCE = 1e-4  # in a range of 0 to 1: a sum over more rows adds in another order
DESIGNS = {
    "guidance": grid(guidance_scale=[3.0, 7.5], num_inference_steps=[2]),
    "mixed": grid(strength=[0.5, 1.0], guidance_scale=[1.0], num_inference_steps=[2]),
}


@pytest.fixture(scope="module", autouse=True)
def small_matrix():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(packing, "MATRIX_SIDE", 128)
        yield


@pytest.fixture(scope="module")
def pipe():
    return packing.random_pipeline("cpu", torch.float32, lambda: small_nas(16), small_vae, small_text_encoder)


@pytest.fixture(scope="module")
def measurement(pipe):
    return packing.compare(pipe, DESIGNS, rounds=2, max_rows=4, model="random")


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


def test_both_ways_are_timed_counted_and_compared(measurement):
    assert list(measurement.timings) == list(DESIGNS)
    for timings in measurement.timings.values():
        assert list(timings) == ["one by one", "packed"]
        assert all(len(timing.seconds) == 2 and timing.fastest > 0 for timing in timings.values())
    guidance, mixed = (measurement.settings["designs"][name] for name in DESIGNS)
    # Strength 0.8 of 2 steps runs one step: two cells of one call with two rows each.
    assert guidance["one by one"] == {"calls": 2, "rows": 4, "peak_bytes": None}
    assert guidance["packed"] == {"calls": 1, "rows": 2, "peak_bytes": None}  # equal prompts and latents share rows
    assert (mixed["one by one"]["rows"], mixed["packed"]["rows"], mixed["packed"]["calls"]) == (3, 3, 2)
    assert (mixed["cells"], mixed["pack"]) == (2, 4)
    assert all(found["difference"] < TOLERANCE for found in (guidance, mixed))


def test_a_difference_between_the_images_is_found(pipe):
    def change_second(module, args, output):
        if len(output) == 2:  # only a packed sweep decodes two at once
            output[1] += 0.1

    hook = pipe.vae.decoder.register_forward_hook(change_second)
    try:
        found = packing.compare(pipe, {"mixed": DESIGNS["mixed"]}, rounds=1)
    finally:
        hook.remove()
    assert found.settings["designs"]["mixed"]["difference"] > 100 * TOLERANCE


def test_a_measurement_is_saved_loaded_and_printed(measurement, tmp_path):
    path = latency.save(measurement, tmp_path, "benchmark")
    assert path.name.startswith("benchmark-") and path.parent.parent == tmp_path
    assert latency.load(path) == measurement
    assert str(tmp_path) not in path.read_text() and json.loads(path.read_text())["settings"]["model"] == "random"
    text = packing.table(measurement)
    ratio = latency.ratio(*measurement.timings["mixed"].values())[1]
    assert f"{ratio:.2f} times faster" in text and "random at 128 x 128" in text


def test_the_rate_of_a_matrix_product_is_plausible():
    rate = packing.matrix_rate(torch.device("cpu"), torch.float32)
    assert 1e8 < rate < 1e14  # FLOPs per second, of any CPU


def test_a_random_pipeline_takes_prompts_of_full_length(pipe):
    assert pipe.tokenizer.model_max_length == 77


@pytest.mark.parametrize("bad", [{"rounds": 0}, {"max_rows": 0}])
def test_compare_rejects_numbers_below_1(pipe, bad):
    with pytest.raises(InputError, match=f"{next(iter(bad))} must be at least 1, got 0"):
        packing.compare(pipe, DESIGNS, **bad)


@pytest.mark.parametrize(
    ("arguments", "kind"),
    [
        (["--max-rows", "4", "--designs", "small"], "benchmark"),
        (["options", "--steps", "1", "--options", "channels last"], "options"),
    ],
)
def test_command_line(arguments, kind, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(packing.DESIGNS, "small", DESIGNS["mixed"])
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))  # set anew by the command, and restored after the test
    command_line.main([*arguments, "--device", "cpu", "--rounds", "1", "--folder", str(tmp_path)])
    *_, last = capsys.readouterr().out.splitlines()
    path = Path(last.removeprefix("written to "))
    assert path.name.startswith(f"{kind}-") and list(latency.load(path).timings) == arguments[-1:]
