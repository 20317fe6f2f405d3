"""Tests of the measurement of the bundled model: it runs, its goals are met, and the card shows its results."""

import json
import random
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from decinb.models import MODELS
from decinb.scenes.adherence import named_attributes
from decinb.scenes.scenes import Scene, caption, house_mask, random_scene, render
from decinb.tiny import evaluate

RESULTS = Path(__file__).parents[2] / "results" / "tiny" / "evaluate.json"


@pytest.fixture(scope="module")
def stored():
    return json.loads(RESULTS.read_text())


def test_the_card_shows_the_stored_results(stored):
    assert evaluate.table(stored) in (MODELS["tiny"].source / "README.md").read_text(encoding="utf-8")


def test_the_stored_results_are_of_the_full_measurement(stored):
    assert not stored["settings"]["quick"]
    assert stored["vae"]["scenes"] == 500 and stored["text"]["prompts"] == 500 and stored["changes"]["pairs"] == 200
    assert len(stored["changes"]["strengths"]) == 10


def test_every_goal_is_met(stored):
    assert not [goal.name for goal in evaluate.goals(stored) if not goal.met]


def test_missed_goals_are_marked(stored):
    worse = json.loads(json.dumps(stored))
    worse["text"]["correct"]["house"] = 0.949
    worse["changes"]["strengths"]["0.5"]["all"]["distance"] = 0.0
    assert [goal.name for goal in evaluate.goals(worse) if not goal.met] == [
        "text, house",
        "distance rises with strength",
    ]
    assert "94.9%   MISSED" in evaluate.table(worse)


def test_prompts_are_complete_and_differ_from_all_captions():
    prompts = evaluate._prompts(200)
    rng = random.Random(0)
    captions = {caption(random_scene(rng), rng) for _ in range(5000)}
    assert not captions & set(prompts)
    for prompt, scene in zip(prompts, evaluate._scenes("text", 200), strict=True):
        visible = {name: value for name, value in scene.visible().items() if value}
        assert named_attributes(prompt).items() >= visible.items()


def test_the_command_measures_everything(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(evaluate, "STEPS", 2)
    monkeypatch.setattr(evaluate, "STRENGTHS", [0.5, 1.0])
    monkeypatch.setattr(evaluate, "GUIDANCES", [1, 5])
    monkeypatch.setattr(evaluate, "STEP_COUNTS", [1, 2])
    monkeypatch.setattr(evaluate, "QUICK", dict.fromkeys(evaluate.FULL, 4))
    evaluate.main(["--quick", "--results", str(tmp_path)])
    report = json.loads((tmp_path / "evaluate-quick.json").read_text())
    assert len(evaluate.goals(report)) == 20
    assert "Image to image, 4 pairs" in capsys.readouterr().out


def test_the_house_is_found_only_where_it_is():
    target = Scene(time="night", house="red", trees="pine", layout=21)
    mask = house_mask(target)
    assert evaluate.overlap(evaluate.find_house(render(target), target), mask) > 0.9  # trees hide the rest
    assert evaluate.overlap(evaluate.find_house(render(replace(target, house=None)), target), mask) == 0
    moved = [render(replace(target, layout=layout)) for layout in range(10)]
    assert np.mean([evaluate.overlap(evaluate.find_house(image, target), mask) for image in moved]) < 0.5
