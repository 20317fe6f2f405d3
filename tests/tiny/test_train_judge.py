"""The judge's training at toy size, and the damage it learns from."""

import random
from dataclasses import replace

import torch

from decinb.scenes import Scene, render
from decinb.scenes.judge import VALUES, to_tensor
from decinb.tiny import train_judge


def test_labels_are_those_of_what_can_be_seen():
    scene = Scene(house="red", trees="pine", time="night")
    named = dict(zip(VALUES, train_judge.labels(scene), strict=True))
    assert named["house"] == VALUES["house"].index("red") and named["time"] == VALUES["time"].index("night")
    sketched = dict(zip(VALUES, train_judge.labels(replace(scene, style="sketch")), strict=True))
    assert sketched["house"] == VALUES["house"].index("plain") and sketched["time"] == train_judge.HIDDEN


def test_damaged_images_are_still_images():
    torch.manual_seed(0)
    random.seed(0)
    pixels = torch.stack([to_tensor(render(Scene(house="red", layout=i))) for i in range(4)])
    damaged = train_judge.distort(pixels.clone())
    assert damaged.shape == pixels.shape and damaged.min() >= 0 and damaged.max() <= 1
    assert 0.01 < (damaged - pixels).abs().mean() < 0.3


def test_a_judge_learns_the_time_of_day(capsys):
    train_judge.train(scenes=64, epochs=3, batch=16, workers=1)
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("step")]
    first, last = (float(line.split("time ")[1].split(",")[0]) for line in (lines[0], lines[-1]))
    assert last < 0.8 * first


def test_the_command_trains_saves_and_tests_a_judge(tmp_path, capsys):
    file = tmp_path / "judge.safetensors"
    sizes = "--scenes 64 --epochs 1 --test-scenes 4 --threads 1"
    train_judge.main([*f"--file {file} {sizes}".split(), "--seed", "1"])
    assert "renders: style" in capsys.readouterr().out
    before = file.read_bytes()
    train_judge.main(f"--file {file} --test {sizes}".split())
    assert file.read_bytes() == before
