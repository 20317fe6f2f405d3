"""The judge's answers, the Fréchet distance on its features, and the count by colours, which needs no judge."""

import random
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from decinb.scenes import Scene, random_scene, render
from decinb.scenes.colours import count_red_buildings, count_suns, ground_by_colour, time_by_colour
from decinb.scenes.judge import VALUES, Judge, accuracy, frechet_distance


@pytest.fixture(scope="module")
def judge():
    torch.manual_seed(0)
    return Judge().eval()


def test_answers_are_those_of_a_scene(judge):
    rng = random.Random(0)
    scenes = [random_scene(rng) for _ in range(8)]
    images = [render(scene) for scene in scenes]
    for seen in judge.classify(images):
        hidden = {"time", "ground"} if seen["style"] == "sketch" else set()
        assert seen.keys() == VALUES.keys() - hidden
        assert all(value in VALUES[name] for name, value in seen.items())
        assert (seen["house"] is None) == (seen["building"] is None)
        assert (seen["house"] == "plain") <= (seen["style"] == "sketch")
    assert all(0 <= share <= 1 for share in accuracy(judge, scenes, images).values())


def test_a_saved_judge_answers_the_same(judge, tmp_path):
    judge.save(tmp_path / "judge.safetensors")
    image = render(Scene(house="red"))
    again = Judge.load(tmp_path / "judge.safetensors")
    assert again.classify([image]) == judge.classify([image])
    assert torch.allclose(again.features([image]), judge.features([image]), atol=0.02)  # stored in fp16


def test_the_frechet_distance_of_normal_distributions():
    generator = torch.Generator().manual_seed(0)
    first = torch.randn(20_000, 3, generator=generator)
    second = 2 * torch.randn(20_000, 3, generator=generator) + torch.tensor([3.0, 0, 0])
    assert frechet_distance(first, first) == pytest.approx(0, abs=1e-6)
    assert frechet_distance(first, second) == pytest.approx(9 + 3 * (2 - 1) ** 2, rel=0.03)


def test_noise_is_farther_from_scenes_than_other_scenes_are(judge):
    rng = random.Random(1)
    first, second = ([render(random_scene(rng), 64) for _ in range(24)] for _ in range(2))
    noise = [
        Image.fromarray(np.random.default_rng(i).integers(0, 255, (64, 64, 3)).astype(np.uint8)) for i in range(24)
    ]
    features = judge.features(first)
    assert frechet_distance(judge.features(second), features) < frechet_distance(judge.features(noise), features)


@pytest.fixture(scope="module")
def scenes():
    rng = random.Random(9)
    drawn = [random_scene(rng) for _ in range(40)]
    return [
        replace(scene, style="painting", weather="clear", house="red", ground=rng.choice(("grass", "snow")))
        for scene in drawn
    ]


def test_colours_tell_time_and_ground(scenes):
    images = [render(scene) for scene in scenes]
    assert np.mean([time_by_colour(image) == scene.time for scene, image in zip(scenes, images, strict=True)]) > 0.9
    grounds = [ground_by_colour(image, scene.time) == scene.ground for scene, image in zip(scenes, images, strict=True)]
    assert np.mean(grounds) > 0.95


def test_renders_have_one_sun_and_one_building(scenes):
    images = [render(scene) for scene in scenes]
    assert all(count_suns(image, scene.time) <= 1 for scene, image in zip(scenes, images, strict=True))
    counts = [count_red_buildings(image, s.building, s.time) for s, image in zip(scenes, images, strict=True)]
    assert np.mean([count == 1 for count in counts]) > 0.9


def test_two_suns_and_two_buildings_are_counted():
    def mirrored(scene: Scene) -> Image.Image:
        """The left half of an image and its mirror image."""
        pixels = np.asarray(render(scene)).copy()
        pixels[:, 64:] = pixels[:, 63::-1]
        return Image.fromarray(pixels)

    at_left = [layout for layout in range(300) if _is_left(layout)][:5]
    assert at_left
    for layout in at_left:
        scene = Scene(house="red", building="windmill", layout=layout)
        assert count_suns(mirrored(scene), "day") == 2
        assert count_red_buildings(mirrored(scene), "windmill", "day") == 2


def _is_left(layout: int) -> bool:
    from decinb.scenes.layout import Layout

    at = Layout.draw(layout)
    return at.light[0] < 0.3 and at.house[0] < 0.32 and abs(at.light[0] - at.house[0]) > 0.08
