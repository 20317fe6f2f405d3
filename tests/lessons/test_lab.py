"""What a lesson is told of a model: an example that suits it, whether the judge can look, measures with intervals."""

import math
import random
from dataclasses import replace

import pytest
import torch

import decinb
from decinb.lessons.lab import UNKNOWN
from decinb.models import MODELS, draws_scenes
from decinb.scenes import caption, random_scene, render
from decinb.scenes.judge import Judge


@pytest.fixture
def judge(monkeypatch):
    """A judge that has learned nothing: what is tested here does not depend on its answers."""
    torch.manual_seed(0)
    untrained = Judge().eval()
    monkeypatch.setattr(Judge, "load", lambda: untrained)
    return untrained


def test_the_judge_looks_at_models_that_draw_scenes_not_at_an_image_size(tiny, monkeypatch):
    assert draws_scenes(tiny)
    monkeypatch.setitem(MODELS, "tiny", replace(MODELS["tiny"], draws_scenes=False))
    assert decinb.image_size(tiny) == 128 and not decinb.Lab(tiny).can_judge
    assert decinb.Lab(tiny, can_judge=True).can_judge


def test_a_lab_has_the_models_example_and_prints_the_prompt(tiny, capsys):
    lab = decinb.Lab(tiny)
    assert lab.image.size == (128, 128) and lab.prompt == MODELS["tiny"].example_prompt and lab.is_example
    assert capsys.readouterr().out == f"prompt: {lab.prompt}\n"
    assert lab.choose("a house", "a photo") == "a house"


def test_a_photo_gets_one_line_that_says_what_the_model_knows(tiny, capsys):
    lab = decinb.Lab(tiny, image=render(random_scene_with_house()), prompt="a house")
    assert "knows only drawn landscapes" in capsys.readouterr().out and not lab.is_example
    decinb.Lab(tiny, image="sketch")
    assert "knows only" not in capsys.readouterr().out


def random_scene_with_house():
    return replace(random_scene(random.Random(0)), house="red")


def test_where_nothing_can_be_judged_the_measures_are_unknown(tiny, judge):
    blind, lab = decinb.Lab(tiny, can_judge=False), decinb.Lab(tiny)
    images = [lab.image] * 3
    assert blind.adherence(images) is UNKNOWN and blind.shows(images, "a red house") is UNKNOWN
    assert lab.adherence(images, "words that name nothing") is UNKNOWN
    assert lab.distance(images, "words that name nothing") is UNKNOWN
    assert math.isnan(blind.distance(images)["value"])
    assert blind.trial("day to night") == (blind.image, blind.prompt)


def test_measures_have_intervals(tiny, judge):
    lab = decinb.Lab(tiny)
    images = [render(replace(random_scene_with_house(), layout=layout)) for layout in range(6)]
    brightest = lab.mean(lambda image: float(max(image.convert("L").getextrema())), images)  # far above 1
    for estimate in (lab.adherence(images), lab.spread(images), lab.mean(decinb.oversaturated, images), brightest):
        assert estimate["low"] <= estimate["value"] <= estimate["high"]
    assert lab.spread(images)["low"] < lab.spread(images)["value"]
    assert lab.spread([lab.image] * 3)["value"] == 0
    assert f"{lab.shows(images, 'a house'):.0%}".endswith("%)")


def test_images_of_many_prompts_are_compared_with_as_many_renders(tiny):
    lab = decinb.Lab(tiny)
    prompts = lab.prompts(24)
    assert len(set(prompts)) > 20 and prompts == lab.prompts(24)
    scenes = [random_scene(random.Random(seed)) for seed in range(24)]
    renders = [render(scene) for scene in scenes]
    right, wrong = lab.quality(renders, [caption(scene) for scene in scenes]), lab.quality(renders, prompts)
    assert right["adherence"]["value"] > 0.9 > wrong["adherence"]["value"]
    assert right["distance"] == wrong["distance"] and right["distance"]["low"] < right["distance"]["high"]
    assert right["distance"]["value"] < lab.quality([lab.image] * 24, prompts)["distance"]["value"]
    blind = decinb.Lab(tiny, can_judge=False)
    assert set(blind.prompts(3)) == {blind.prompt} and blind.quality(renders, prompts)["distance"] is UNKNOWN


@pytest.mark.slow
def test_curves_have_one_estimate_for_each_strength(tiny, judge):
    curves = decinb.Lab(tiny).curves("day to night", [0.3, 1.0], count=2, num_inference_steps=4)
    assert {"changed", "adherence", "layout", "detail", "change", "frechet"} == set(curves)
    assert all(len(points) == 2 for points in curves.values())
    blind = decinb.Lab(tiny, can_judge=False).curves("day to night", [1.0], count=2, num_inference_steps=4)
    assert set(blind) == set(curves) and blind["change"][0]["value"] > 0 and blind["layout"] == [UNKNOWN]


def test_what_is_kept_is_counted_in_pairs(tiny, judge):
    lab = decinb.Lab(tiny)
    originals = [render(random_scene(random.Random(seed))) for seed in range(6)]
    assert lab.kept(originals, originals)["value"] == 1
    first, second = (lab.kept([originals[i]], [originals[i + 1]])["value"] for i in (0, 1))
    assert lab.kept(originals[:2], originals[1:3])["value"] == pytest.approx((first + second) / 2)
    with pytest.raises(ValueError):
        lab.kept(originals, originals[1:])
    assert decinb.Lab(tiny, can_judge=False).kept(originals, originals) is UNKNOWN


@pytest.mark.slow
def test_a_chain_of_styles_is_measured_link_by_link(tiny, judge):
    styles = ["watercolour", "sketch"]
    measured = decinb.Lab(tiny).style_chain(styles, 0.3, count=2, num_inference_steps=4)
    assert set(measured) == {"before", "after", "things", "layout", "chance"}
    assert all(len(points) == len(styles) for points in measured.values())
    assert 0 <= measured["layout"][0]["value"] <= 1
    blind = decinb.Lab(tiny, can_judge=False).style_chain(styles, 0.3)
    assert blind == {name: [UNKNOWN] * 2 for name in measured}


def test_a_summary_leaves_out_what_is_unknown(capsys):
    decinb.what_you_saw(f"the distance is {UNKNOWN:.2f}", "an image of nanometres", "a line")
    assert capsys.readouterr().out == "- an image of nanometres\n- a line\n"
