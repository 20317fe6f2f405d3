"""Tests of scenes: a layout is a place, masks and depth match images, and captions are true and complete."""

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

# Least overlap of a thing with itself: in another light only smoothed edges differ, and a sketch adds an outline of two
# pixels. Things in two random layouts overlap by about 0.2.
SAME_PLACE, SAME_PLACE_SKETCHED, OTHER_PLACE = 0.9, 0.7, 0.5


def pixels(scene: Scene, size: int = 128) -> np.ndarray:
    return np.asarray(render(scene, size)).astype(int)


def place(scene: Scene, thing: str) -> np.ndarray:
    """Return where an image changes when one thing is removed from its scene."""
    return (pixels(scene) != pixels(replace(scene, **{thing: ATTRIBUTES[thing][0]}))).any(axis=-1)


def overlap(first: np.ndarray, second: np.ndarray) -> float:
    return (first & second).sum() / (first | second).sum()


def everything() -> list[Scene]:
    """Return every combination of attributes, each in another layout."""
    combinations = itertools.product(*ATTRIBUTES.values())
    return [Scene(*values, layout=i) for i, values in enumerate(combinations)]


def random_scenes(count: int, seed: int = 0) -> list[Scene]:
    rng = random.Random(seed)
    return [random_scene(rng) for _ in range(count)]


# --- images -----------------------------------------------------------------------------------------------------------


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
def test_different_layouts_are_different_places(thing):
    scenes = [Scene(**{thing: ATTRIBUTES[thing][1]}, layout=layout) for layout in LAYOUTS[:10]]
    places = [place(scene, thing) for scene in scenes]
    assert np.mean([overlap(*pair) for pair in itertools.combinations(places, 2)]) < OTHER_PLACE


def test_repainting_the_house_changes_nothing_outside_it():
    for layout in LAYOUTS:
        scene = Scene(house="red", trees="pine", mountains=True, layout=layout)
        repainted = (pixels(scene) != pixels(replace(scene, house="blue"))).any(axis=-1)
        assert repainted.any()
        assert not (repainted & ~dilated(house_mask(scene))).any()


@pytest.mark.parametrize("style", ATTRIBUTES["style"])
def test_the_mask_covers_the_house(style):
    for layout in LAYOUTS:
        scene = Scene(style=style, house="red", layout=layout)
        house, mask = place(scene, "house"), house_mask(scene)
        assert not (house & ~dilated(mask)).any()
        if style == "painting":  # in a sketch the inside of a house is as white as the paper
            assert (house & mask).sum() > 0.98 * mask.sum()


def dilated(mask: np.ndarray) -> np.ndarray:
    """Extend a mask by two pixels, for smoothed edges and the outer half of pencil lines."""
    for axis in (0, 1):
        mask = np.any([np.roll(mask, step, axis) for step in range(-2, 3)], axis=0)
    return mask


def test_without_a_house_the_mask_is_empty():
    assert not house_mask(Scene(trees="pine")).any()


def test_scenes_look_the_same_only_if_their_visible_attributes_are_equal():
    scenes = [replace(scene, layout=7) for scene in everything()]
    by_look = {}
    for scene in scenes:
        by_look.setdefault(render(scene, 64).tobytes(), set()).add(tuple(scene.visible().items()))
    assert all(len(visible) == 1 for visible in by_look.values())
    assert len(by_look) == len({tuple(scene.visible().items()) for scene in scenes})


def test_sketches_have_no_colour():
    for scene in random_scenes(20):
        sketch = pixels(replace(scene, style="sketch"))
        assert np.ptp(sketch, axis=-1).max() <= 12  # the paper is slightly warm, 250 to 240
        assert np.ptp(pixels(replace(scene, style="painting")), axis=-1).max() > 40


@pytest.mark.parametrize("size", [64, 128, 320, 512])
def test_the_size_changes_only_the_resolution(size):
    scene = Scene(house="red", trees="round", mountains=True, layout=3)
    image = render(scene, size)
    assert (image.size, image.mode) == ((size, size), "RGB")
    assert house_mask(scene, size).shape == (size, size)
    shrunk = np.asarray(image.resize((64, 64))).astype(int)
    assert np.abs(shrunk - pixels(scene, 64)).mean() < 3  # of 255; edges fall on other pixels


def test_the_same_scene_gives_the_same_image():
    assert random_scenes(20, seed=5) == random_scenes(20, seed=5) != random_scenes(20, seed=6)
    scene = random_scenes(1)[0]
    assert render(scene).tobytes() == render(replace(scene)).tobytes()


def test_random_scenes_have_every_value():
    scenes = random_scenes(300)
    for name, values in ATTRIBUTES.items():
        assert {getattr(scene, name) for scene in scenes} == set(values)
    rng = random.Random(0)
    assert {random_scene(rng, sketches=1).style for _ in range(20)} == {"sketch"}
    assert {random_scene(rng, sketches=0).style for _ in range(20)} == {"painting"}


def test_a_twin_is_the_same_place_with_one_or_two_visible_changes():
    rng, changes = random.Random(3), []
    for scene in random_scenes(500):
        other = twin(scene, rng)
        changed = differing(scene, other)
        assert other.layout == scene.layout and changed == differing(other, scene)
        assert all(getattr(other, name) for name in changed & other.visible().keys()), "a caption can name it"
        if other.style == scene.style:  # another style also shows or hides other attributes
            changes.append(len(changed))
    assert set(changes) == {1, 2}
    assert 0.6 < changes.count(1) / len(changes) < 0.85  # 0.7, and more because second changes of style are not counted
    assert not differing(scene, replace(scene, layout=scene.layout + 1))


# --- depth ------------------------------------------------------------------------------------------------------------


def test_the_sky_is_far_and_the_ground_rises_to_near():
    for layout in LAYOUTS:
        depth = depth_map(Scene(layout=layout))
        assert depth.dtype == np.float32 and depth.shape == (128, 128)
        assert (depth == depth[:, :1]).all(), "an empty landscape is the same in all columns"
        assert not depth[:60].any() and depth.min() == 0 and 0.98 < depth.max() <= 1
        assert (np.diff(depth[:, 0]) >= 0).all() and (np.diff(depth[90:, 0]) > 0).all()


@pytest.mark.parametrize("thing", ["house", "trees"])
def test_things_have_the_depth_of_the_ground_at_their_foot(thing):
    for layout in LAYOUTS:
        scene = Scene(**{thing: ATTRIBUTES[thing][1]}, layout=layout)
        depth, ground = depth_map(scene), depth_map(Scene(layout=layout))
        there = depth > ground + 0.02  # at its foot a thing has the depth of the ground
        assert there.any()
        if thing == "house":
            inside = house_mask(scene) & ~dilated(~house_mask(scene))  # away from smoothed edges
            (near,) = np.unique(depth[inside])
            foot = np.flatnonzero(house_mask(scene).any(axis=1)).max()
            assert abs(near - ground[foot, 0]) < 0.03
        else:
            assert ground[there].max() < depth[there].max() < 1


def test_mountains_are_slightly_nearer_than_the_sky():
    for layout in LAYOUTS:
        depth = depth_map(Scene(mountains=True, layout=layout))
        assert 0 < depth[:60].max() < 0.15


def test_style_time_ground_and_colour_do_not_change_the_depth():
    for scene in random_scenes(20):
        depth = depth_map(scene)
        for look in ({"style": "sketch"}, {"style": "painting"}, {"time": "night"}, {"ground": "snow"}):
            assert np.array_equal(depth, depth_map(replace(scene, **look)))
        if scene.house:
            assert np.array_equal(depth, depth_map(replace(scene, house="blue")))


@pytest.mark.parametrize("thing", ["house", "trees", "mountains"])
def test_things_have_the_same_shape_in_depth_and_image(thing):
    for layout in LAYOUTS:
        scene, without = Scene(**{thing: ATTRIBUTES[thing][1]}, layout=layout), Scene(layout=layout)
        nearer = depth_map(scene) > depth_map(without)
        assert not (nearer & ~place(scene, thing)).any()
        assert overlap(nearer, place(scene, thing)) > 0.8  # a foot has the depth of the ground


# --- captions ---------------------------------------------------------------------------------------------------------


def named(text: str) -> dict:
    """Return what a caption names, by searching for the phrases in the tables."""
    return {
        name: value
        for name, values in WORDS.items()
        for value, phrases in values.items()
        if any(phrase in text for phrase in phrases)
    }


def shown(scene: Scene) -> dict:
    """Return what a caption can name: the visible attributes, without what is missing."""
    return {name: value for name, value in scene.visible().items() if value}


def test_without_a_generator_captions_are_complete_and_true():
    for scene in everything():
        assert named(caption(scene)) == shown(scene), caption(scene)
        assert caption(scene) == caption(replace(scene, layout=scene.layout + 1))


def test_random_captions_leave_out_attributes_but_are_true():
    rng = random.Random(1)
    left_out = 0
    for scene in random_scenes(1000):
        text, truth = caption(scene, rng), shown(scene)
        assert named(text).items() <= truth.items(), text
        left_out += named(text).keys() - {"style"} != truth.keys() - {"style"}
        assert named(caption(scene, rng, left_out=0)).keys() >= truth.keys() - {"style"}
    assert 200 < left_out < 600  # with 12% each, of two to five attributes: 1 - 0.88**2 to 1 - 0.88**5


def test_only_empty_landscapes_are_called_empty():
    rng = random.Random(2)
    for scene in random_scenes(1000):
        empty = not (scene.house or scene.trees or scene.mountains)
        assert ("empty" in caption(scene, rng, left_out=0.5)) == empty


def test_captions_never_leave_out_what_must_be_named():
    rng = random.Random(3)
    for scene in random_scenes(300):
        for names in ({"house", "time"}, {"ground", "trees"}, {"mountains", "style"}):
            text = caption(scene, rng, left_out=1, always=names)
            assert named(text).keys() - {"style"} == names & shown(scene).keys() - {"style"}, text
            assert "style" in named(text) or "style" not in names
