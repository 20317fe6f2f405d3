"""The evaluation at toy size: that it runs, that its intervals hold, that its tasks are what they say."""

import json
import random
from dataclasses import replace

import numpy as np
import pytest
import torch

from decinb.scenes import caption, estimates, random_scene, render, strokes, tasks
from decinb.scenes.adherence import named_attributes
from decinb.scenes.judge import Judge
from decinb.tiny import evaluate


@pytest.fixture
def judge(monkeypatch):
    """A judge that has learned nothing: what is tested here does not depend on its answers."""
    torch.manual_seed(0)
    untrained = Judge().eval()
    monkeypatch.setattr(Judge, "load", lambda: untrained)
    return untrained


# --- estimates --------------------------------------------------------------------------------------------------------


def test_intervals_hold_the_truth_in_95_of_100_cases():
    rng = np.random.default_rng(0)
    means = [estimates.mean(rng.normal(3, 2, 200)) for _ in range(500)]
    fractions = [estimates.fraction(rng.random(200) < 0.9) for _ in range(500)]
    for found, truth in ((means, 3), (fractions, 0.9)):
        assert 0.92 < np.mean([one["low"] <= truth <= one["high"] for one in found]) < 0.98


def test_a_fraction_of_all_is_not_certain():
    found = estimates.fraction([True] * 50)
    assert found["value"] == found["high"] == 1 and 0.9 < found["low"] < 0.95


def test_the_interval_of_a_frechet_distance_holds_its_value():
    generator = torch.Generator().manual_seed(0)
    first, second = (torch.randn(100, 5, generator=generator) for _ in range(2))
    found = estimates.frechet(first, second)
    assert 0 <= found["low"] < found["value"] < found["high"] < 1
    few = estimates.frechet(first[:8], second[:8])
    assert few["low"] == few["value"] == few["high"]


def test_the_interval_of_fractions_ends_at_0_and_1():
    values = [1.0] * 9 + [0.9]
    assert estimates.mean(values)["high"] > 1 == estimates.mean_fraction(values)["high"]
    assert estimates.mean_fraction([0.0] * 9 + [0.1])["low"] == 0


# --- tasks ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("task", tasks.TASKS)
def test_a_trial_differs_from_its_target_in_what_it_says(task):
    trials = tasks.draw_trials(task, 6)
    assert [trial.prompt for trial in trials] == [trial.prompt for trial in tasks.draw_trials(task, 6)]
    assert [trial.target for trial in trials] != [trial.target for trial in tasks.draw_trials(task, 6, "reference")]
    for trial in trials:
        assert trial.target.house and trial.target.style == "painting"
        named = named_attributes(trial.prompt)
        assert set(trial.changed) <= named.keys()
        assert named.items() >= {(name, value) for name, value in trial.target.visible().items() if value}
    if task == "strokes to painting":
        assert trials[0].image.tobytes() == strokes(trials[0].target).tobytes()


def test_a_house_is_found_where_it_stands():
    for trial in tasks.draw_trials("day to night", 5):
        assert tasks.house_kept(render(trial.target), trial.target) == 1
        assert tasks.house_kept(render(replace(trial.target, house=None)), trial.target) == 0
        elsewhere = replace(trial.target, layout=trial.target.layout + 1)
        assert tasks.house_kept(render(elsewhere), trial.target) < 0.8
        assert tasks.house_kept(trial.image, trial.target) < 0.9, "its colours are those of the day"
        assert tasks.house_kept(trial.image, trial.target, trial.source) == 1
        assert tasks.house_kept(render(trial.target), trial.target, trial.source) == 1


# --- the whole --------------------------------------------------------------------------------------------------------


def test_the_prompts_name_everything():
    for prompt, scene in zip(evaluate.draw_prompts(100), evaluate.draw_scenes("text", 100), strict=True):
        assert named_attributes(prompt).items() >= {(name, value) for name, value in scene.visible().items() if value}
    rng = random.Random(0)
    assert not {caption(random_scene(rng), rng) for _ in range(1000)} & set(evaluate.draw_prompts(100)[:20])


def test_the_measurement_runs_and_can_be_stored(tiny, judge, monkeypatch):
    monkeypatch.setattr(tasks, "STEPS", 3)
    monkeypatch.setattr(evaluate, "STRENGTHS", (0.4, 0.5, 0.6, 1.0))
    monkeypatch.setattr(evaluate, "GUIDANCES", (1, 5, 7.5, 20))
    monkeypatch.setattr(evaluate, "CALLS", (2,))
    report = evaluate.evaluate(tiny, count=2)
    assert json.loads(json.dumps(report)) == report
    assert report["steps"].keys() == evaluate.SAMPLERS.keys()
    text = evaluate.table(report)
    assert "strokes to painting" in text and "MISSED" in text
    missed = {}
    for value in (32.9, 33.1):
        report["vae"]["all"]["psnr"]["value"] = value
        missed[value] = {goal.name for goal in evaluate.goals(report) if not goal.met}
    assert missed[32.9] - missed[33.1] == {"VAE, PSNR in dB"}


def test_parts_are_measured_one_after_another_into_one_file(tiny, judge, monkeypatch, tmp_path):
    monkeypatch.setattr(tasks, "STEPS", 1)
    file = tmp_path / "folder" / "evaluate.json"
    evaluate.evaluate(tiny, 2, ("vae",), file)
    report = evaluate.evaluate(tiny, 3, ("duplicates",), file)
    assert report == json.loads(file.read_text())
    assert report["images"] == {"vae": 2, "duplicates": 3} and report["vae"]["all"]["psnr"]["value"] > 20
    assert report["environment"]["vae"]["dtype"] == "float32"


def test_a_card_is_filled_between_its_marks(tmp_path):
    card = tmp_path / "README.md"
    card.write_text("before\n<!-- evaluate -->\nold\n<!-- /evaluate -->\nafter\n")
    evaluate.fill_card("new", card)
    assert card.read_text() == "before\n<!-- evaluate -->\n```\nnew\n```\n<!-- /evaluate -->\nafter\n"
