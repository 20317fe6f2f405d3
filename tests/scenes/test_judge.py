"""Tests of the judge: it is accurate on scenes that it was not trained on, and its training runs."""

import random

import numpy as np
import pytest
import torch
from PIL import Image

from decinb.scenes.judge import VALUES, WEIGHTS, Judge, accuracy
from decinb.scenes.scenes import ATTRIBUTES, Scene, random_scene, render
from decinb.tiny import train_judge

FRESH = 0.98  # least accuracy for every attribute on 200 unseen renders; the judge reaches 0.99 or more
DISTORTED = 0.95  # the same on distorted renders


@pytest.fixture(scope="module")
def scenes() -> list[Scene]:
    rng = random.Random("unseen by the judge")
    return [random_scene(rng) for _ in range(200)]


@pytest.fixture(scope="module")
def images(scenes) -> list[Image.Image]:
    return [render(scene) for scene in scenes]


def test_the_judge_is_small():
    assert WEIGHTS.stat().st_size < 1_000_000
    assert sum(parameter.numel() for parameter in Judge.load().parameters()) < 250_000


def test_the_judge_is_accurate_on_new_renders(scenes, images):
    fractions = accuracy(Judge.load(), scenes, images)
    assert fractions.keys() >= ATTRIBUTES.keys()
    assert min(fractions.values()) >= FRESH, fractions


def test_the_judge_is_accurate_on_distorted_renders(scenes, images):
    random.seed(0)
    torch.manual_seed(0)
    tensors = torch.stack([torch.tensor(np.array(image)).permute(2, 0, 1) / 255 for image in images])
    distorted = (train_judge.distort(tensors) * 255).byte().permute(0, 2, 3, 1).numpy()
    assert np.abs(distorted - np.stack(images).astype(float)).mean() > 10  # of 255
    fractions = accuracy(Judge.load(), scenes, [Image.fromarray(image) for image in distorted])
    assert min(fractions[name] for name in ATTRIBUTES) >= DISTORTED, fractions


def test_the_judge_takes_images_of_any_size_and_mode():
    judge = Judge.load()
    scene = Scene(time="sunset", ground="snow", house="white", trees="round", mountains=True, layout=4)
    found = judge.classify([render(scene, 512), render(scene).convert("RGBA"), render(scene, 256).resize((300, 200))])
    assert found == [scene.visible()] * 3
    assert judge.classify([]) == []


def test_the_judge_gives_only_possible_answers():
    noise = np.random.default_rng(0).integers(0, 256, (8, 128, 128, 3), dtype=np.uint8)
    for found in Judge.load().classify([Image.fromarray(image) for image in noise]):
        assert all(value in VALUES[name] for name, value in found.items())
        sketch = found["style"] == "sketch"
        assert found.keys() == VALUES.keys() - ({"time", "ground"} if sketch else set())
        assert found["house"] is None or (found["house"] == "plain") == sketch


def test_the_command_trains_saves_and_tests_a_judge(tmp_path, capsys):
    file = tmp_path / "judge.safetensors"
    sizes = "--scenes 8 --epochs 2 --test-scenes 4 --threads 1"
    train_judge.main(f"--file {file} {sizes} --model tiny".split())
    printed = capsys.readouterr().out
    assert "renders: style" in printed and "after the VAE: style" in printed
    before = file.read_bytes()
    train_judge.main(f"--file {file} --test {sizes}".split())
    assert file.read_bytes() == before
