"""Captions: complete and true without chance; incomplete, varied and now and then wrong with it."""

import random

import pytest
from PIL import Image

from decinb import InputError
from decinb.scenes import ATTRIBUTES, Scene, caption, random_scene, web_caption
from decinb.scenes.adherence import adherence, named_attributes
from decinb.scenes.captions import LEFT_OUT, PHRASES, WRONG
from decinb.scenes.judge import VALUES


def random_scenes(count: int, seed: int = 0) -> list[Scene]:
    rng = random.Random(seed)
    return [random_scene(rng) for _ in range(count)]


def shown(scene: Scene) -> dict:
    """What there is to say of a scene: nobody says what is missing."""
    return {name: value for name, value in scene.visible().items() if value}


def named(text: str) -> dict:
    """What a caption says, absences aside."""
    return {name: value for name, value in named_attributes(text).items() if value}


def test_every_value_can_be_said():
    for name, phrases in PHRASES.items():
        assert set(phrases) == {value for value in ATTRIBUTES[name] if value}


def test_a_caption_without_chance_is_complete_and_true():
    for scene in random_scenes(400):
        assert named(caption(scene)) == shown(scene), caption(scene)


def test_a_caption_with_chance_leaves_out_but_is_true():
    rng = random.Random(1)
    said = total = 0
    for scene in random_scenes(1500):
        text, truth = caption(scene, rng), shown(scene)
        assert named(text).items() <= truth.items(), text
        if scene.style != "sketch":  # where the colour of a building cannot be said
            total += len(truth)
            said += len(named(text))
        assert named(caption(scene, rng, left_out=0)) == truth
    assert abs(said / total - (1 - LEFT_OUT)) < 0.05  # the colour of a building that is left out is not said either


def test_a_caption_says_what_it_must():
    rng = random.Random(3)
    for scene in [scene for scene in random_scenes(200) if scene.style != "sketch"]:
        for names in ({"house", "building"}, {"ground", "trees"}, {"mountains", "style"}):
            said = named(caption(scene, rng, left_out=1, always=names))
            assert said.keys() >= names & shown(scene).keys() and said.items() <= shown(scene).items()


def test_only_an_empty_landscape_is_called_empty():
    rng = random.Random(2)
    for scene in random_scenes(500):
        empty = not (shown(scene).keys() - {"style", "time", "weather", "ground"})
        assert ("empty" in caption(scene, rng, left_out=0.5)) == empty


def test_the_documented_share_of_web_captions_is_wrong():
    rng, wrong, several = random.Random(4), 0, 0
    scenes = random_scenes(3000)
    for scene in scenes:
        said, truth = named(web_caption(scene, rng)), scene.visible()
        errors = [name for name, value in said.items() if truth.get(name) != value]
        wrong += bool(errors)
        several += len(errors) > 3
    assert abs(wrong / len(scenes) - WRONG) < 0.04
    assert several < 0.02 * len(scenes)  # a style that is named wrongly may show what a sketch hides
    assert all(named(web_caption(scene, rng, wrong=0)).items() <= shown(scene).items() for scene in scenes[:300])


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("Red house, snow, night", {"house": "red", "building": "cottage", "ground": "snow", "time": "night"}),
        ("a watercolour painting of a barn", {"style": "watercolour", "building": "barn"}),
        ("a Blue Windmill while it is snowing", {"house": "blue", "building": "windmill", "weather": "snowing"}),
        ("a sketch of a red barn at night", {"style": "sketch", "building": "barn", "house": "plain"}),
        ("a red house and a blue barn", {}),
        ("a lake with fir trees", {"lake": True, "trees": "pine"}),
        ("THE RED HOUSES BY MOONLIGHT", {"house": "red", "building": "cottage", "time": "night"}),
        ("a mountain and a fir tree", {"mountains": True, "trees": "pine"}),
        ("everyday pictorial sandwiches", {}),
        ("", {}),
    ],
)
def test_what_a_prompt_names(prompt, expected):
    assert named_attributes(prompt) == expected


def test_an_empty_landscape_names_every_absence():
    absent = {name: values[0] for name, values in ATTRIBUTES.items() if not values[0]}
    assert named_attributes("an empty landscape on sand") == {"ground": "sand", **absent}


def test_named_values_are_those_of_the_judge():
    for scene in random_scenes(200):
        assert all(value in VALUES[name] for name, value in named_attributes(caption(scene)).items())


def test_a_prompt_must_be_text():
    with pytest.raises(InputError, match="prompt must be a string, got int"):
        named_attributes(3)


@pytest.mark.parametrize("prompt", ["a photo of a cat", "", "a red house and a blue barn", "x" * 5000])
def test_a_prompt_that_names_nothing_is_refused(prompt):
    with pytest.raises(InputError, match="prompt must name an attribute") as caught:
        adherence(Image.new("RGB", (16, 16)), prompt)
    assert len(str(caught.value)) < 300
