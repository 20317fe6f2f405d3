"""The comparison of runtimes, on a few steps and on small networks."""

from pathlib import Path

import pytest
import torch

from decinb import InputError, load_pipeline
from decinb.benchmark import __main__ as command_line
from decinb.benchmark import latency, runtimes
from decinb.runtimes.graph import is_installed
from tests.helpers.small import small_nas

needs_openvino = pytest.mark.skipif(not is_installed(), reason="needs decinb[openvino]")
DESIGN = {"small": [{"num_inference_steps": 2}, {"num_inference_steps": 3}]}


def load(runtime):
    return load_pipeline("tiny", "cpu", runtime=runtime)


@needs_openvino
def test_every_way_is_timed_and_compared_with_the_loop_in_torch():
    found = runtimes.compare(load, DESIGN, ["torch", "openvino"], rounds=1, model="tiny")
    ways = ["one by one, torch", "packed, torch", "one by one, openvino", "packed, openvino"]
    assert list(found.timings["small"]) == ways
    differences = found.settings["designs"]["small"]
    assert differences["one by one, torch"]["psnr_worst"] is None and differences["one by one, torch"]["levels"] == 0
    assert all(differences[way]["levels"] < 1 and differences[way]["psnr_worst"] > 60 for way in ways[2:])
    text = runtimes.table(found)
    assert all(way in text for way in ways)


@needs_openvino
def test_networks_are_timed_in_each_runtime(tmp_path):
    networks = {"small": small_nas}
    found = runtimes.compare_networks((1, 2), 8, 1, networks, ["torch", "openvino"], with_compiled=False)
    ways = ["torch", "openvino", "torch, bfloat16"]
    assert {work: list(timings) for work, timings in found.timings.items()} == {
        "small, 1 rows": ways,
        "small, 2 rows": ways,
    }
    assert list(found.settings["first"]["small"]) == ways
    assert latency.load(latency.save(found, tmp_path, "runtimes")) == found
    assert "small, 2 rows" in runtimes.table(found)


def test_the_command_line_measures_what_is_installed(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(command_line, "is_installed", lambda: False)
    monkeypatch.setattr(runtimes, "GUIDES", DESIGN)
    command_line.main(["runtimes", "--rounds", "1", "--designs", "small", "--folder", str(tmp_path)])
    *_, last = capsys.readouterr().out.splitlines()
    found = latency.load(Path(last.removeprefix("written to ")))
    assert list(found.timings["small"]) == ["one by one, torch", "packed, torch"]


def test_bad_arguments_are_refused():
    with pytest.raises(InputError, match="runtimes include torch"):
        runtimes.compare(load, DESIGN, ["openvino"])
    with pytest.raises(InputError, match="must be at least 1"):
        runtimes.compare_networks(size=0)


def test_the_largest_difference_and_psnr_are_of_pixels():
    expected = {0: torch.zeros(1, 4, 4), 1: torch.zeros(1, 4, 4)}
    images = {0: torch.zeros(1, 4, 4), 1: torch.full((1, 4, 4), 0.1)}
    found = runtimes._difference(images, expected)
    assert found["levels"] == pytest.approx(25.5) and found["psnr_worst"] == pytest.approx(20, abs=1e-3)
