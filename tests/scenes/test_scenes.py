"""Scenes: one layout is one place, every attribute can be seen, masks and depth have the shapes of the image."""

import itertools
import random
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from decinb.scenes import ATTRIBUTES, Scene, depth_map, differing, house_mask, random_scene, render, strokes, thing_mask
from decinb.scenes.layout import Layout

LAYOUTS = range(100, 112)
FULL = Scene(house="red", trees="pine", mountains=True, lake=True, path=True, fence=True)
THINGS = {"trees": "pine", "mountains": True, "lake": True, "path": True, "fence": True, "house": "red"}

# The edges of one thing in two kinds of light differ a little; two random layouts overlap by about 0.2.
SAME_PLACE, OTHER_PLACE = 0.8, 0.7


def pixels(scene: Scene, size: int = 128) -> np.ndarray:
    return np.asarray(render(scene, size)).astype(int)


def overlap(first: np.ndarray, second: np.ndarray) -> float:
    return (first & second).sum() / max((first | second).sum(), 1)


def wider(mask: np.ndarray, by: int = 3) -> np.ndarray:
    """The mask and some pixels around it, as a smoothed edge or a pencil line needs."""
    for axis in (0, 1):
        mask = np.any([np.roll(mask, step, axis) for step in range(-by, by + 1)], axis=0)
    return mask


def random_scenes(count: int, seed: int = 0) -> list[Scene]:
    rng = random.Random(seed)
    return [random_scene(rng) for _ in range(count)]


# --- attributes -------------------------------------------------------------------------------------------------------


def test_random_scenes_show_every_value():
    scenes = random_scenes(600)
    for name, values in ATTRIBUTES.items():
        assert {getattr(scene, name) for scene in scenes} == set(values)
    assert all(scene.ground == "snow" for scene in scenes if scene.weather == "snowing")
    assert all((scene.house is None) == (scene.building is None) for scene in scenes)
    assert random_scenes(20, seed=5) == random_scenes(20, seed=5) != random_scenes(20, seed=6)


def test_a_house_without_a_kind_is_a_cottage():
    assert Scene(house="red").building == "cottage"
    assert replace(Scene(house="red", building="barn"), house=None).building is None


def test_a_sketch_hides_time_ground_and_colour():
    first = Scene(style="sketch", house="red", time="night", ground="sand", layout=3)
    second = Scene(style="sketch", house="blue", time="day", ground="snow", layout=3)
    assert first.visible() == second.visible() and not differing(first, second)
    assert first.visible()["house"] == "plain" and "time" not in first.visible()


# --- images -----------------------------------------------------------------------------------------------------------


def test_the_same_scene_gives_the_same_bytes():
    for scene in random_scenes(8):
        assert render(scene).tobytes() == render(replace(scene)).tobytes()
        assert strokes(scene).tobytes() == strokes(replace(scene)).tobytes()


@pytest.mark.parametrize("style", ATTRIBUTES["style"])
def test_every_attribute_changes_the_image(style):
    scene = replace(FULL, style=style, ground="snow", layout=7)
    for name, values in ATTRIBUTES.items():
        looks = {}
        for value in values:
            other = replace(scene, **{name: value})
            looks.setdefault(pixels(other, 64).tobytes(), set()).add(tuple(other.visible().items()))
        assert all(len(visible) == 1 for visible in looks.values()), (style, name)
        assert len(looks) == len({tuple(replace(scene, **{name: value}).visible().items()) for value in values}), name


def test_a_sketch_shows_no_colour():
    for scene in random_scenes(12):
        sketch = pixels(replace(scene, style="sketch"))
        assert np.ptp(sketch, axis=-1).max() <= 14  # the paper is a little warm
        assert np.ptp(pixels(replace(scene, style="painting")), axis=-1).max() > 40


def test_pixel_art_has_large_pixels():
    image = pixels(replace(FULL, style="pixel art"))
    blocks = image.reshape(32, 4, 32, 4, 3)
    assert (blocks == blocks[:, :1, :, :1]).all()


def test_a_watercolour_leaves_a_white_border():
    image = pixels(replace(FULL, style="watercolour", time="night"))
    border = np.concatenate([image[:2].reshape(-1, 3), image[-2:].reshape(-1, 3), image[:, 0], image[:, -1]])
    assert border.min() > 200 and image[40:90, 40:90].mean() < 150


def test_far_mountains_can_be_seen_at_night():
    for layout in LAYOUTS:
        scene = Scene(time="night", mountains=True, layout=layout)
        seen = np.abs(pixels(scene) - pixels(replace(scene, mountains=False))).max(axis=-1)
        assert (seen > 15).sum() > 0.4 * thing_mask(scene, "mountains").sum()  # the rest is behind hills


def test_a_lake_mirrors_the_mountains():
    for layout in LAYOUTS:
        scene = Scene(lake=True, mountains=True, layout=layout)
        mirrored = np.abs(pixels(scene) - pixels(replace(scene, mountains=False))).max(axis=-1) > 8
        assert (mirrored & thing_mask(scene, "lake")).sum() > 50


@pytest.mark.parametrize("size", [64, 320])
def test_the_size_changes_only_the_resolution(size):
    scene = replace(FULL, layout=3)
    image = render(scene, size)
    assert (image.size, image.mode) == ((size, size), "RGB")
    assert house_mask(scene, size).shape == (size, size)
    shrunk = np.asarray(image.resize((64, 64), Image.Resampling.BOX)).astype(int)
    assert np.abs(shrunk - pixels(scene, 64)).mean() < 4  # of 255: edges fall between other pixels


def test_strokes_have_the_colours_and_the_layout_but_no_details():
    for scene in random_scenes(8):
        painting = replace(scene, style="painting", weather="clear")
        crude, fine = (np.asarray(image).astype(int) for image in (strokes(painting), render(painting)))
        coarse = [np.asarray(Image.fromarray(x.astype(np.uint8)).resize((8, 8), Image.Resampling.BOX)).astype(int)
                  for x in (crude, fine)]  # fmt: skip
        assert np.abs(coarse[0] - coarse[1]).mean() < 32  # two random scenes differ by about 70
        assert strokes(painting).tobytes() == strokes(replace(painting, style="sketch")).tobytes()


# --- layout -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("thing", THINGS)
def test_a_thing_stays_in_its_place_whatever_else_changes(thing):
    scene = replace(Scene(layout=5), **{thing: THINGS[thing]})
    mask = thing_mask(scene, thing)
    assert mask.any()
    for other in ({"time": "night"}, {"ground": "snow"}, {"style": "sketch"}, {"weather": "cloudy"}):
        assert overlap(mask, thing_mask(replace(scene, **other), thing)) > SAME_PLACE


@pytest.mark.parametrize("thing", ["house", "trees", "mountains"])
def test_another_layout_is_another_place(thing):
    masks = [thing_mask(replace(FULL, layout=layout), thing) for layout in LAYOUTS]
    assert np.mean([overlap(*pair) for pair in itertools.combinations(masks, 2)]) < OTHER_PLACE


def test_everything_lies_in_the_image():
    for layout in range(200):
        at = Layout.draw(layout)
        assert 0.4 < at.horizon < 0.55 and 0.2 < at.house[0] < 0.8 and at.horizon < at.house[1] < 0.9
        assert all(0 < x < 1 and at.horizon < foot < 0.95 for x, foot, _ in at.trees)


# --- masks and depth --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("building", ATTRIBUTES["building"][1:])
def test_the_mask_covers_the_building(building):
    for layout in LAYOUTS:
        scene = Scene(house="red", building=building, layout=layout)
        changed = (pixels(scene) != pixels(replace(scene, house="blue"))).any(axis=-1)
        assert changed.any() and not (changed & ~wider(house_mask(scene))).any()
        assert overlap(house_mask(scene), thing_mask(replace(scene, trees="pine"), "house")) == 1


def test_what_a_scene_lacks_is_nowhere():
    scene = Scene(trees="pine")
    assert not house_mask(scene).any() and not thing_mask(scene, "lake").any()


def test_the_sky_is_far_and_the_ground_comes_near():
    for layout in LAYOUTS:
        depth = depth_map(Scene(layout=layout))
        assert depth.dtype == np.float32 and depth.shape == (128, 128)
        assert not depth[:40].any() and depth.min() == 0 and 0.98 < depth.max() <= 1
        assert (np.diff(depth[85:, 0]) > 0).all() and (depth[85:] == depth[85:, :1]).all()


def test_a_building_is_as_near_as_its_foot():
    for layout in LAYOUTS:
        scene = Scene(house="red", layout=layout)
        depth, ground, mask = depth_map(scene), depth_map(Scene(layout=layout)), house_mask(scene)
        inside = mask & ~wider(~mask)
        foot = np.flatnonzero(mask.any(axis=1)).max()
        assert np.abs(depth[inside] - ground[foot, 0]).max() < 0.08


def test_mountains_are_a_little_nearer_than_the_sky():
    for layout in LAYOUTS:
        assert 0 < depth_map(Scene(mountains=True, layout=layout))[:45].max() < 0.15


def test_the_look_does_not_change_the_depth():
    for scene in random_scenes(8):
        depth = depth_map(scene)
        looks = [{"style": "sketch"}, {"time": "night"}, {"weather": "cloudy"}, {"style": "pixel art"}]
        looks += [{"house": "blue"}] if scene.house else []
        assert all(np.array_equal(depth, depth_map(replace(scene, **look))) for look in looks)
