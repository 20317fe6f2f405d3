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
from tests.helpers import sweeping

ONE_LEVEL = 1  # of 255: sums over other batches round differently
PROCESSES = sweeping.processes()
MAY_DIFFER = {"seconds": 0, "output_hash": None}  # the hash is of pixels that may be rounded differently


def start(folder):
    """Start a sweep, and return its process and what it tells, when it begins."""
    told, theirs = PROCESSES.Pipe(duplex=False)
    process = PROCESSES.Process(target=sweeping.sweep_into, args=(str(folder), theirs))
    process.start()
    theirs.close()  # so that the end of the process ends what it tells
    assert told.recv() == "ready"
    return process, told


def whole(folder):
    process, told = start(folder)
    assert told.recv()[0] == sweeping.IMAGES
    process.join()


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
def test_a_sweep_killed_five_times_ends_like_an_undisturbed_one(tmp_path, happened):
    rng, finished = random.Random(1), []
    for _ in range(5):
        process, _ = start(tmp_path / "killed")
        time.sleep(rng.uniform(0, 2.5))
        process.kill()
        process.join()
        finished.append(len(list((tmp_path / "killed").glob("*.png"))))
    assert finished == sorted(finished)
    whole(tmp_path / "killed")
    whole(tmp_path / "undisturbed")
    same(tmp_path / "killed", tmp_path / "undisturbed")
    happened("F1", f"killed five times, with {', '.join(map(str, finished))} of 12 images done; then as if undisturbed")


@pytest.mark.slow
def test_two_processes_share_a_sweep(tmp_path, happened):
    # "--multi_gpu" is how accelerate spells several processes on one machine; without a GPU they use the CPU.
    launch = ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1"]
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]  # of a free one: accelerate 1.1 does not look for one itself
    more = ["--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", str(port)]
    script = [sweeping.__file__, str(tmp_path / "shared")]
    run = subprocess.run([sys.executable, *launch, *more, *script], capture_output=True, text=True, timeout=240)
    assert run.returncode == 0, run.stderr[-2000:]
    told = [line.split() for line in run.stdout.splitlines() if line.startswith("finished")]
    assert [words[1] for words in told] == ["12", "12"], "each process ends with the whole sweep"
    rows = [int(words[3]) for words in told]
    assert min(rows) > sweeping.ROWS / 4, "both have computed"
    assert sum(rows) < 1.5 * sweeping.ROWS, "and not the same images twice"
    whole(tmp_path / "alone")
    same(tmp_path / "shared", tmp_path / "alone")
    assert len(json.loads((tmp_path / "shared" / "sweep.json").read_text())["cells"]) == 12
    happened("F10", "two processes of accelerate in one folder share the cells")


def test_processes_that_share_a_sweep_need_a_folder(tiny, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(decinb.InputError, match="folder must be given when several processes share"):
        decinb.run_sweep(tiny, "day", "night", [{"strength": 0.1}], progress=False)
