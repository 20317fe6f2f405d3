"""Sweeps in separate processes: killed at any moment, or sharing the cells."""

import json
import os
import random
import socket
import subprocess
import sys
import time

import numpy as np
import pytest

import decinb
from decinb.images import read_record

ONE_LEVEL = 1  # of 255: sums over other batches round differently
MAY_DIFFER = {"seconds": 0, "output_hash": None}  # the hash is of pixels that may be rounded differently
SWEEP = """
import sys, torch, decinb
from decinb.benchmark.counting import count_unet_calls
torch.set_num_threads(1)
pipe = decinb.load_pipeline("tiny", device="cpu")
cells = decinb.grid(strength=[0.5, 0.75, 1.0], guidance_scale=[1, 5], num_inference_steps=[10], seed=[0, 1])
print("ready", flush=True)
with count_unet_calls(pipe) as count:
    sweep = decinb.run_sweep(pipe, "day", "a red house at night", cells, folder=sys.argv[1], max_rows=4, progress=False)
sys.stdout.write(f"finished {len(sweep)} rows {count.rows}\\n")  # in one write, because two processes print at once
"""
ROWS = (5 + 7 + 10) * (1 + 2) * 2  # of all cells one by one


@pytest.fixture
def script(tmp_path):
    file = tmp_path / "sweep.py"
    file.write_text(SWEEP)
    return str(file)


def whole(script, folder):
    run = subprocess.run([sys.executable, script, str(folder)], capture_output=True, text=True, timeout=120, check=True)
    assert "finished 12" in run.stdout
    return run.stdout


def same(folder, other):
    """Check that two folders hold the same files, images up to rounding, and records but for ``MAY_DIFFER``."""
    assert sorted(os.listdir(folder)) == sorted(os.listdir(other))
    assert (folder / "sweep.json").read_text() == (other / "sweep.json").read_text()
    for file in folder.glob("*.png"):
        mine, theirs = read_record(file), read_record(other / file.name)
        assert mine | MAY_DIFFER == theirs | MAY_DIFFER
    for mine, theirs in zip(decinb.load_sweep(folder).images, decinb.load_sweep(other).images, strict=True):
        assert np.abs(np.asarray(mine, int) - np.asarray(theirs, int)).max() <= ONE_LEVEL


@pytest.mark.slow
def test_a_sweep_killed_five_times_ends_like_an_undisturbed_one(script, tmp_path, happened):
    rng, finished = random.Random(1), []
    for _ in range(5):
        run = subprocess.Popen([sys.executable, script, str(tmp_path / "killed")], stdout=subprocess.PIPE, text=True)
        assert any(line == "ready\n" for line in run.stdout)
        time.sleep(rng.uniform(0, 2.5))
        run.kill()
        run.wait()
        finished.append(len(list((tmp_path / "killed").glob("*.png"))))
    assert finished == sorted(finished)
    whole(script, tmp_path / "killed")
    whole(script, tmp_path / "undisturbed")
    same(tmp_path / "killed", tmp_path / "undisturbed")
    happened("F1", f"killed five times, with {', '.join(map(str, finished))} of 12 images done; then as if undisturbed")


@pytest.mark.slow
def test_two_processes_share_a_sweep(script, tmp_path, happened):
    # "--multi_gpu" is how accelerate spells several processes on one machine; without a GPU they use the CPU.
    launch = ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1"]
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]  # of a free one: accelerate 1.1 does not look for one itself
    more = ["--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", str(port)]
    run = subprocess.run(
        [sys.executable, *launch, *more, script, str(tmp_path / "shared")], capture_output=True, text=True, timeout=240
    )
    assert run.returncode == 0, run.stderr[-2000:]
    told = [line.split() for line in run.stdout.splitlines() if line.startswith("finished")]
    assert [words[1] for words in told] == ["12", "12"], "each process ends with the whole sweep"
    rows = [int(words[3]) for words in told]
    assert min(rows) > ROWS / 4, "both have computed"
    assert sum(rows) < 1.5 * ROWS, "and not the same images twice"
    whole(script, tmp_path / "alone")
    same(tmp_path / "shared", tmp_path / "alone")
    assert len(json.loads((tmp_path / "shared" / "sweep.json").read_text())["cells"]) == 12
    happened("F10", "two processes of accelerate in one folder share the cells")


def test_processes_that_share_a_sweep_need_a_folder(tiny, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(decinb.InputError, match="folder must be given when several processes share"):
        decinb.run_sweep(tiny, "day", "night", [{"strength": 0.1}], progress=False)
