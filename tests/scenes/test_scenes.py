"""Scenes: one layout is one place, the mask is where the house is, and captions tell the truth and all of it."""

import itertools
import random
from dataclasses import replace

import numpy as np
import pytest

from decinb.scenes.scenes import (
    ATTRIBUTES,
    GROUND_WORDS,
    HOUSE_WORDS,
    STYLE_WORDS,
    TIME_WORDS,
    TREE_WORDS,
    Scene,
    caption,
    depth_map,
    differing,
    house_mask,
    random_scene,
    render,
    twin,
)

WORDS = {
    "style": STYLE_WORDS,
    "time": TIME_WORDS,
    "ground": GROUND_WORDS,
    "house": {name: (phrase,) for name, phrase in HOUSE_WORDS.items()} | {"plain": ("a house",)},
    "trees": TREE_WORDS,
    "mountains": {True: ("mountains",)},
}
LAYOUTS = range(100, 130)

# The shape of one thing found in two kinds of light differs at its smoothed edges only; a sketch adds an outline of two
# pixels. Two layouts at random overlap by about 0.2.
SAME_PLACE, SAME_PLACE_SKETCHED, OTHER_PLACE = 0.9, 0.7, 0.5


def pixels(scene: Scene, size: int = 128) -> np.ndarray:
    return np.asarray(render(scene, size)).astype(int)


def place(scene: Scene, thing: str) -> np.ndarray:
    """Where a picture changes when one thing is taken out of its scene."""
    return (pixels(scene) != pixels(replace(scene, **{thing: ATTRIBUTES[thing][0]}))).any(axis=-1)


def overlap(first: np.ndarray, second: np.ndarray) -> float:
    return (first & second).sum() / (first | second).sum()


def everything() -> list[Scene]:
    """Every combination of attributes, each in another layout."""
    combinations = itertools.product(*ATTRIBUTES.values())
    return [Scene(*values, layout=i) for i, values in enumerate(combinations)]


def random_scenes(count: int, seed: int = 0) -> list[Scene]:
    rng = random.Random(seed)
    return [random_scene(rng) for _ in range(count)]


# --- the picture ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("thing", ["house", "trees", "mountains"])
@pytest.mark.parametrize(
    ("other", "least"),
    [
        ({"time": "night"}, SAME_PLACE),
        ({"time": "sunset"}, SAME_PLACE),
        ({"ground": "sand"}, SAME_PLACE),
        ({"style": "sketch"}, SAME_PLACE_SKETCHED),
    ],
)
def test_things_stay_in_place_when_something_else_changes(thing, other, least):
    value = ATTRIBUTES[thing][1]
    scenes = [Scene(**{thing: value}, layout=layout) for layout in LAYOUTS[:10]]
    assert np.mean([overlap(place(scene, thing), place(replace(scene, **other), thing)) for scene in scenes]) > least


@pytest.mark.parametrize("thing", ["house", "trees", "mountains"])
def test_another_layout_is_another_place(thing):
    scenes = [Scene(**{thing: ATTRIBUTES[thing][1]}, layout=layout) for layout in LAYOUTS[:10]]
    places = [place(scene, thing) for scene in scenes]
    assert np.mean([overlap(*pair) for pair in itertools.combinations(places, 2)]) < OTHER_PLACE


def test_a_change_of_the_house_changes_nothing_outside_it():
    for layout in LAYOUTS:
        scene = Scene(house="red", trees="pine", mountains=True, layout=layout)
        repainted = (pixels(scene) != pixels(replace(scene, house="blue"))).any(axis=-1)
        assert repainted.any()
        assert not (repainted & ~wider(house_mask(scene))).any()


@pytest.mark.parametrize("style", ATTRIBUTES["style"])
def test_the_mask_covers_the_house(style):
    for layout in LAYOUTS:
        scene = Scene(style=style, house="red", layout=layout)
        house, mask = place(scene, "house"), house_mask(scene)
        assert not (house & ~wider(mask)).any()
        if style == "painting":  # the paper inside a sketched house is the paper around it
            assert (house & mask).sum() > 0.98 * mask.sum()


def wider(mask: np.ndarray) -> np.ndarray:
    """The mask and two pixels around it: a smoothed edge, or the half of a pencil line that lies outside."""
    for axis in (0, 1):
        mask = np.any([np.roll(mask, step, axis) for step in range(-2, 3)], axis=0)
    return mask


def test_no_house_has_an_empty_mask():
    assert not house_mask(Scene(trees="pine")).any()


def test_every_combination_looks_different_unless_a_sketch_hides_it():
    scenes = [replace(scene, layout=7) for scene in everything()]
    by_look = {}
    for scene in scenes:
        by_look.setdefault(render(scene, 64).tobytes(), set()).add(tuple(scene.visible().items()))
    assert all(len(visible) == 1 for visible in by_look.values())
    assert len(by_look) == len({tuple(scene.visible().items()) for scene in scenes})


def test_a_sketch_shows_no_colour():
    for scene in random_scenes(20):
        sketch = pixels(replace(scene, style="sketch"))
        assert np.ptp(sketch, axis=-1).max() <= 12  # the paper is a little warm, 250 to 240
        assert np.ptp(pixels(replace(scene, style="painting")), axis=-1).max() > 40


@pytest.mark.parametrize("size", [64, 128, 320, 512])
def test_size_changes_only_the_resolution(size):
    scene = Scene(house="red", trees="round", mountains=True, layout=3)
    picture = render(scene, size)
    assert (picture.size, picture.mode) == ((size, size), "RGB")
    assert house_mask(scene, size).shape == (size, size)
    shrunk = np.asarray(picture.resize((64, 64))).astype(int)
    assert np.abs(shrunk - pixels(scene, 64)).mean() < 3  # of 255: edges fall between other pixels


def test_the_same_scene_is_the_same_picture():
    assert random_scenes(20, seed=5) == random_scenes(20, seed=5) != random_scenes(20, seed=6)
    scene = random_scenes(1)[0]
    assert render(scene).tobytes() == render(replace(scene)).tobytes()


def test_random_scenes_show_every_value():
    scenes = random_scenes(300)
    for name, values in ATTRIBUTES.items():
        assert {getattr(scene, name) for scene in scenes} == set(values)
    rng = random.Random(0)
    assert {random_scene(rng, sketches=1).style for _ in range(20)} == {"sketch"}
    assert {random_scene(rng, sketches=0).style for _ in range(20)} == {"painting"}


def test_a_twin_is_the_same_place_with_one_or_two_things_seen_to_change():
    rng, changes = random.Random(3), []
    for scene in random_scenes(500):
        other = twin(scene, rng)
        changed = differing(scene, other)
        assert other.layout == scene.layout and changed == differing(other, scene)
        assert all(getattr(other, name) for name in changed & other.visible().keys()), "words can ask for it"
        if other.style == scene.style:  # another style shows and hides other attributes too
            changes.append(len(changed))
    assert set(changes) == {1, 2}
    assert 0.6 < changes.count(1) / len(changes) < 0.85  # 0.7, and more where a second change is one of style
    assert not differing(scene, replace(scene, layout=scene.layout + 1))


# --- the depth --------------------------------------------------------------------------------------------------------


def test_the_sky_is_far_and_the_ground_comes_near():
    for layout in LAYOUTS:
        depth = depth_map(Scene(layout=layout))
        assert depth.dtype == np.float32 and depth.shape == (128, 128)
        assert (depth == depth[:, :1]).all(), "nothing stands here"
        assert not depth[:60].any() and depth.min() == 0 and 0.98 < depth.max() <= 1
        assert (np.diff(depth[:, 0]) >= 0).all() and (np.diff(depth[90:, 0]) > 0).all()


@pytest.mark.parametrize("thing", ["house", "trees"])
def test_what_stands_is_as_near_as_the_ground_at_its_foot(thing):
    for layout in LAYOUTS:
        scene = Scene(**{thing: ATTRIBUTES[thing][1]}, layout=layout)
        depth, ground = depth_map(scene), depth_map(Scene(layout=layout))
        there = depth > ground + 0.02  # at its foot it cannot be told from the ground
        assert there.any()
        if thing == "house":
            inside = house_mask(scene) & ~wider(~house_mask(scene))  # away from smoothed edges
            (near,) = np.unique(depth[inside])
            foot = np.flatnonzero(house_mask(scene).any(axis=1)).max()
            assert abs(near - ground[foot, 0]) < 0.03
        else:
            assert ground[there].max() < depth[there].max() < 1


def test_mountains_are_a_little_nearer_than_the_sky():
    for layout in LAYOUTS:
        depth = depth_map(Scene(mountains=True, layout=layout))
        assert 0 < depth[:60].max() < 0.15


def test_no_look_changes_the_depth():
    for scene in random_scenes(20):
        depth = depth_map(scene)
        for look in ({"style": "sketch"}, {"style": "painting"}, {"time": "night"}, {"ground": "snow"}):
            assert np.array_equal(depth, depth_map(replace(scene, **look)))
        if scene.house:
            assert np.array_equal(depth, depth_map(replace(scene, house="blue")))


@pytest.mark.parametrize("thing", ["house", "trees", "mountains"])
def test_depth_has_the_shape_of_the_picture(thing):
    for layout in LAYOUTS:
        scene, without = Scene(**{thing: ATTRIBUTES[thing][1]}, layout=layout), Scene(layout=layout)
        nearer = depth_map(scene) > depth_map(without)
        assert not (nearer & ~place(scene, thing)).any()
        assert overlap(nearer, place(scene, thing)) > 0.8  # a foot is as near as the ground


# --- the words --------------------------------------------------------------------------------------------------------


def said(text: str) -> dict:
    """What a caption says, by looking for the phrases of the tables as they stand."""
    return {
        name: value
        for name, values in WORDS.items()
        for value, phrases in values.items()
        if any(phrase in text for phrase in phrases)
    }


def shown(scene: Scene) -> dict:
    """What there is to say of a scene: what is missing is not said."""
    return {name: value for name, value in scene.visible().items() if value}


def test_a_caption_without_chance_is_complete_and_true():
    for scene in everything():
        assert said(caption(scene)) == shown(scene), caption(scene)
        assert caption(scene) == caption(replace(scene, layout=scene.layout + 1))


def test_a_caption_with_chance_leaves_out_but_never_lies():
    rng = random.Random(1)
    left_out = 0
    for scene in random_scenes(1000):
        text, truth = caption(scene, rng), shown(scene)
        assert said(text).items() <= truth.items(), text
        left_out += said(text).keys() - {"style"} != truth.keys() - {"style"}
        assert said(caption(scene, rng, left_out=0)).keys() >= truth.keys() - {"style"}
    assert 200 < left_out < 600  # with 12% each, of two to five attributes: 1 - 0.88**2 to 1 - 0.88**5


def test_a_caption_calls_empty_only_what_is_empty():
    rng = random.Random(2)
    for scene in random_scenes(1000):
        empty = not (scene.house or scene.trees or scene.mountains)
        assert ("empty" in caption(scene, rng, left_out=0.5)) == empty


def test_a_caption_never_leaves_out_what_must_be_said():
    rng = random.Random(3)
    for scene in random_scenes(300):
        for names in ({"house", "time"}, {"ground", "trees"}, {"mountains", "style"}):
            text = caption(scene, rng, left_out=1, always=names)
            assert said(text).keys() - {"style"} == names & shown(scene).keys() - {"style"}, text
            assert "style" in said(text) or "style" not in names
