"""``make gpu``: each stage on small networks on the CPU, and what a machine without a GPU is told."""

import json

import pytest
import torch

from decinb.benchmark import packing
from tools import run_gpu


@pytest.fixture(autouse=True)
def small_matrix(monkeypatch):
    monkeypatch.setattr(packing, "MATRIX_SIDE", 64)


@pytest.mark.skipif(torch.cuda.is_available(), reason="here it would run")
def test_without_a_gpu_it_says_what_it_would_do(capsys, tmp_path):
    run_gpu.main(["--folder", str(tmp_path)])
    text = capsys.readouterr().out
    assert text.startswith("no CUDA GPU") and all(name in text for name in run_gpu.STAGES)
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
@pytest.mark.parametrize("name", run_gpu.STAGES)
def test_each_stage_runs_on_the_cpu(name, tmp_path):
    findings = run_gpu.STAGES[name][0](run_gpu.small_size(), tmp_path)
    json.dumps(findings)
    if "file" in findings:
        assert [file.name for file in tmp_path.glob("*/*.json")] == [findings["file"]]
    assert name != "out of memory" or findings["was_halved"]
    assert name != "exactness" or findings["packed_to_alone_psnr"] > 60
    assert name not in ("sweep", "latency") or run_gpu.target_table({name: findings}).count(" -  no") < 3


@pytest.mark.slow
def test_a_stage_is_written_as_it_ends_and_a_failure_does_not_stop_the_others(tmp_path, monkeypatch, capsys):
    seen = []

    def stage(name, folder, seconds, small):
        (file,) = folder.glob("*/gpu-*.json")
        seen.append(list(json.loads(file.read_text())["settings"]["stages"]))
        return {"outcome": "failed" if name == "sweep" else "done"}

    monkeypatch.setattr(run_gpu, "_run_stage", stage)
    stages = run_gpu.run_stages(["tests", "sweep", "options"], tmp_path, 1, small=True)
    assert seen == [[], ["tests"], ["tests", "sweep"]]
    assert [one["outcome"] for one in stages.values()] == ["done", "failed", "done"]
    assert [one["outcome"] for one in run_gpu.run_stages(["tests"], tmp_path, 0, True).values()] == ["left out"]


@pytest.mark.slow
def test_a_stage_has_a_process_of_its_own_and_a_time_limit(tmp_path):
    done = run_gpu._run_stage("loading", tmp_path, 600, small=True)
    assert done["outcome"] == "done" and list(tmp_path.glob("*/loading-to-device-*.json"))
    assert run_gpu._run_stage("loading", tmp_path, 0.01, small=True)["outcome"] == "cut off"


def test_the_table_of_targets_says_which_are_reached():
    stages = {"sweep": {"packed_over_loop": 7.0, "of_matrix_rate": 0.3}, "latency": {}}
    _, *lines = run_gpu.target_table(stages).splitlines()
    assert [line.split()[-2:] for line in lines] == [["7.00", "yes"], ["0.30", "no"], ["-", "no"]]
