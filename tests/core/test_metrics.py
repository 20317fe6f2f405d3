"""Metrics and the judge behind them: prompts are read as captions are written, scenes are seen as they are drawn."""

import itertools
import random
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from decinb.errors import InputError
from decinb.metrics import clipped_fraction, mean_abs_difference, oversaturated, psnr, ssim
from decinb.scenes import ATTRIBUTES, Scene, caption, house_mask, random_scene, render
from decinb.scenes.adherence import adherence, named_attributes
from decinb.scenes.judge import VALUES, WEIGHTS, Judge, accuracy
from decinb.tiny.train_judge import damage

FRESH = 0.98  # least share right of 200 unseen renders, in every attribute; the judge reaches 0.99 and more
DAMAGED = 0.95  # the same, of renders that were blurred, bent, and given noise


@pytest.fixture(scope="module")
def scenes() -> list[Scene]:
    rng = random.Random("unseen by the judge")
    return [random_scene(rng) for _ in range(200)]


@pytest.fixture(scope="module")
def pictures(scenes) -> list[Image.Image]:
    return [render(scene) for scene in scenes]


def plain(grey: int, size: tuple[int, int] = (16, 16)) -> Image.Image:
    return Image.new("RGB", size, (grey, grey, grey))


# --- what a prompt names ----------------------------------------------------------------------------------------------


def to_say(scene: Scene) -> dict:
    """What a complete caption names: what is there, and of an empty landscape what is not."""
    empty = not (scene.house or scene.trees or scene.mountains)
    return {name: value for name, value in scene.visible().items() if value or empty}


def test_a_complete_caption_names_what_its_scene_shows():
    for values in itertools.product(*ATTRIBUTES.values()):
        scene = Scene(*values)
        assert named_attributes(caption(scene)) == to_say(scene), caption(scene)


def test_every_wording_is_read_and_nothing_is_invented():
    rng = random.Random(0)
    for _ in range(2000):
        scene = random_scene(rng)
        text = caption(scene, rng, left_out=0)
        named, truth = named_attributes(text), to_say(scene)
        assert named.items() <= truth.items(), text
        assert named.keys() >= truth.keys() - {"style"}, text  # the style of a painting may go unsaid
        shorter = caption(scene, rng, left_out=0.5)
        assert named_attributes(shorter).items() <= truth.items(), shorter


@pytest.mark.parametrize(
    ("prompt", "named"),
    [
        ("Red house, snow, night", {"house": "red", "ground": "snow", "time": "night"}),
        ("THE RED HOUSES BY MOONLIGHT", {"house": "red", "time": "night"}),
        ("a mountain and a fir tree", {"mountains": True, "trees": "pine"}),
        ("sketches of a blue house at night in winter", {"style": "sketch", "house": "plain"}),
        ("a house", {}),  # in a painting it would have a colour
        ("a red house and a blue house at sunset", {"time": "sunset"}),
        ("everyday pictorial sandwiches", {}),
        ("", {}),
    ],
)
def test_prompts_of_other_form(prompt, named):
    assert named_attributes(prompt) == named


# --- the judge --------------------------------------------------------------------------------------------------------


def test_the_judge_is_small():
    assert WEIGHTS.stat().st_size < 1_000_000
    assert sum(parameter.numel() for parameter in Judge.load().parameters()) < 250_000


def test_the_judge_is_right_about_fresh_renders(scenes, pictures):
    shares = accuracy(Judge.load(), scenes, pictures)
    assert shares.keys() >= ATTRIBUTES.keys()
    assert min(shares.values()) >= FRESH, shares


def test_the_judge_is_right_about_damaged_renders(scenes, pictures):
    random.seed(0)
    torch.manual_seed(0)
    tensors = torch.stack([torch.tensor(np.array(picture)).permute(2, 0, 1) / 255 for picture in pictures])
    damaged = (damage(tensors) * 255).byte().permute(0, 2, 3, 1).numpy()
    assert np.abs(damaged - np.stack(pictures).astype(float)).mean() > 10  # of 255: they are damaged indeed
    shares = accuracy(Judge.load(), scenes, [Image.fromarray(picture) for picture in damaged])
    assert min(shares[name] for name in ATTRIBUTES) >= DAMAGED, shares


def test_the_judge_looks_at_any_size_and_mode():
    judge = Judge.load()
    scene = Scene(time="sunset", ground="snow", house="white", trees="round", mountains=True, layout=4)
    seen = judge.see([render(scene, 512), render(scene).convert("RGBA"), render(scene, 256).resize((300, 200))])
    assert seen == [scene.visible()] * 3
    assert judge.see([]) == []


def test_the_judge_answers_as_a_scene_would():
    noise = np.random.default_rng(0).integers(0, 256, (8, 128, 128, 3), dtype=np.uint8)
    for seen in Judge.load().see([Image.fromarray(picture) for picture in noise]):
        assert all(value in VALUES[name] for name, value in seen.items())
        sketch = seen["style"] == "sketch"
        assert seen.keys() == VALUES.keys() - ({"time", "ground"} if sketch else set())
        assert seen["house"] is None or (seen["house"] == "plain") == sketch


# --- adherence --------------------------------------------------------------------------------------------------------


def test_a_picture_adheres_to_its_own_caption(scenes, pictures):
    shares = [adherence(picture, caption(scene)) for scene, picture in zip(scenes, pictures, strict=True)]
    assert np.mean(shares) >= FRESH


def test_a_picture_adheres_little_to_another_caption():
    day = Scene(house="red", trees="pine", layout=9)
    night = Scene(time="night", ground="snow", house="blue", trees="round", layout=9)
    assert adherence(render(day), caption(night)) == pytest.approx(1 / 5)  # both are paintings
    sketch = replace(day, style="sketch")
    assert adherence(render(sketch), "by day on grass") == 0  # a sketch shows neither


def test_adherence_counts_what_is_named():
    picture = render(Scene(house="red", layout=9))
    assert adherence(picture, "a red house at night") == 0.5
    assert adherence([picture, render(Scene(time="night"))], "at night") == [0.0, 1.0]


@pytest.mark.parametrize("prompt", ["a photo of a cat", "", "a red house and a blue house"])
def test_a_prompt_that_names_nothing_is_refused(prompt):
    with pytest.raises(InputError, match="prompt must name something"):
        adherence(plain(0), prompt)


def test_a_prompt_must_be_a_string():
    with pytest.raises(InputError, match="list"):
        adherence(plain(0), ["at night"])


# --- numbers of two pictures ------------------------------------------------------------------------------------------


def test_change_is_the_mean_difference():
    assert mean_abs_difference(plain(0), plain(255)) == 1
    assert mean_abs_difference(plain(7), plain(7)) == 0
    assert mean_abs_difference(plain(51), plain(102)) == pytest.approx(0.2)


def test_psnr_of_a_known_difference():
    assert psnr(plain(0), plain(255)) == 0
    assert psnr(plain(100), plain(100 + 51)) == pytest.approx(20 * np.log10(5))
    assert psnr(plain(9), plain(9)) == float("inf")


def test_ssim_sees_structure_rather_than_brightness():
    picture = render(Scene(house="red", trees="pine", mountains=True, layout=9))
    values = np.asarray(picture).astype(float)
    # Two changes of the same mean square: everything brighter, and noise.
    brighter = Image.fromarray((values + 12).clip(0, 255).astype(np.uint8))
    noise = np.random.default_rng(0).choice([-12, 12], values.shape)
    noisy = Image.fromarray((values + noise).clip(0, 255).astype(np.uint8))
    assert ssim(picture, picture) == pytest.approx(1)
    assert ssim(noisy, picture) < 0.7 < 0.95 < ssim(brighter, picture) < 1
    # Without structure only the means count: (2 m n + c) / (m^2 + n^2 + c), with c = 0.01^2.
    assert ssim(plain(51), plain(102)) == pytest.approx((2 * 0.2 * 0.4 + 1e-4) / (0.2**2 + 0.4**2 + 1e-4))


@pytest.mark.parametrize("measure", [mean_abs_difference, psnr, ssim])
def test_pictures_of_two_sizes_are_refused(measure):
    with pytest.raises(InputError, match=r"\(16, 16\) and \(24, 16\)"):
        measure(plain(0), plain(0, size=(24, 16)))


def test_saturated_counts_pixels_at_the_limit():
    half = Image.fromarray(np.repeat([[[255, 90, 90]], [[90, 90, 90]]], 4, axis=1).astype(np.uint8))
    assert clipped_fraction(half) == 0.5
    assert clipped_fraction([half, Image.new("RGB", half.size, (9, 9, 9))]) == 0.25


# --- the rule of the evaluation ---------------------------------------------------------------------------------------


def test_the_house_is_found_only_where_it_is():
    from decinb.tiny.evaluate import find_house, overlap

    target = Scene(time="night", house="red", trees="pine", layout=21)
    mask = house_mask(target)
    assert overlap(find_house(render(target), target), mask) > 0.9  # less than 1 by what trees hide
    assert overlap(find_house(render(replace(target, house=None)), target), mask) == 0
    moved = [render(replace(target, layout=layout)) for layout in range(10)]
    assert np.mean([overlap(find_house(image, target), mask) for image in moved]) < 0.5


def test_oversaturated_counts_pure_colours_and_no_dark_ones():
    red, nearly, grey, dark = (255, 0, 0), (200, 9, 60), (90, 90, 90), (0, 0, 31)
    row = np.array([[red, nearly, grey, dark]], dtype=np.uint8)
    assert oversaturated(Image.fromarray(row)) == 0.5
    assert oversaturated([Image.fromarray(row[:, :2]), Image.fromarray(row[:, 2:])]) == 0.5
    assert oversaturated([render(Scene(time=time, house="red")) for time in ("day", "sunset", "night")]) == 0.0
