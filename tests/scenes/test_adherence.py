"""Tests of adherence: what prompts name, and how much of it images show."""

import itertools
import random
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from decinb.errors import InputError
from decinb.scenes.adherence import adherence, named_attributes
from decinb.scenes.scenes import ATTRIBUTES, Scene, caption, random_scene, render

FRESH = 0.98  # least mean adherence of renders to their own captions


def nameable(scene: Scene) -> dict:
    """Return what a complete caption names: what there is, and for an empty landscape also what is missing."""
    empty = not (scene.house or scene.trees or scene.mountains)
    return {name: value for name, value in scene.visible().items() if value or empty}


def test_a_complete_caption_names_what_its_scene_shows():
    for values in itertools.product(*ATTRIBUTES.values()):
        scene = Scene(*values)
        assert named_attributes(caption(scene)) == nameable(scene), caption(scene)


def test_every_wording_is_understood_and_nothing_is_invented():
    rng = random.Random(0)
    for _ in range(2000):
        scene = random_scene(rng)
        text = caption(scene, rng, left_out=0)
        named, truth = named_attributes(text), nameable(scene)
        assert named.items() <= truth.items(), text
        assert named.keys() >= truth.keys() - {"style"}, text  # captions of paintings may leave out the style
        shorter = caption(scene, rng, left_out=0.5)
        assert named_attributes(shorter).items() <= truth.items(), shorter


@pytest.mark.parametrize(
    ("prompt", "named"),
    [
        ("Red house, snow, night", {"house": "red", "ground": "snow", "time": "night"}),
        ("THE RED HOUSES BY MOONLIGHT", {"house": "red", "time": "night"}),
        ("a mountain and a fir tree", {"mountains": True, "trees": "pine"}),
        ("sketches of a blue house at night in winter", {"style": "sketch", "house": "plain"}),
        ("a house", {}),  # only the house of a sketch has no colour
        ("a red house and a blue house at sunset", {"time": "sunset"}),
        ("everyday pictorial sandwiches", {}),
        ("", {}),
    ],
)
def test_prompts_in_other_forms(prompt, named):
    assert named_attributes(prompt) == named


def test_an_image_adheres_to_its_own_caption():
    rng = random.Random("unseen by the judge")
    scenes = [random_scene(rng) for _ in range(200)]
    assert np.mean([adherence(render(scene), caption(scene)) for scene in scenes]) >= FRESH


def test_an_image_does_not_adhere_to_another_caption():
    day = Scene(house="red", trees="pine", layout=9)
    night = Scene(time="night", ground="snow", house="blue", trees="round", layout=9)
    assert adherence(render(day), caption(night)) == pytest.approx(1 / 5)  # both are paintings
    sketch = replace(day, style="sketch")
    assert adherence(render(sketch), "by day on grass") == 0  # a sketch shows neither


def test_adherence_is_the_fraction_of_named_attributes():
    image = render(Scene(house="red", layout=9))
    assert adherence(image, "a red house at night") == 0.5
    assert adherence([image, render(Scene(time="night"))], "at night") == [0.0, 1.0]


@pytest.mark.parametrize("prompt", ["a photo of a cat", "", "a red house and a blue house"])
def test_a_prompt_that_names_nothing_is_refused(prompt):
    with pytest.raises(InputError, match="prompt must name an attribute"):
        adherence(Image.new("RGB", (16, 16)), prompt)


def test_a_prompt_must_be_a_string():
    with pytest.raises(InputError, match="list"):
        adherence(Image.new("RGB", (16, 16)), ["at night"])
