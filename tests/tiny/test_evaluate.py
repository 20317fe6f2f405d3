"""The measurement of the bundled model: that it runs, what it asks, and that the card says what it found."""

import json
import random
from pathlib import Path

import pytest

from decinb.models import MODELS
from decinb.scenes.adherence import named_attributes
from decinb.scenes.scenes import caption, random_scene
from decinb.tiny import evaluate

RESULTS = Path(__file__).parents[2] / "results" / "tiny" / "evaluate.json"


@pytest.fixture(scope="module")
def stored():
    return json.loads(RESULTS.read_text())


def test_the_card_shows_the_stored_figures(stored):
    assert evaluate.table(stored) in (MODELS["tiny"].source / "README.md").read_text(encoding="utf-8")


def test_the_stored_figures_are_of_the_full_measurement(stored):
    assert not stored["settings"]["quick"]
    assert stored["vae"]["scenes"] == 500 and stored["text"]["prompts"] == 500 and stored["changes"]["pairs"] == 200
    assert len(stored["changes"]["strengths"]) == 10


def test_every_goal_is_met(stored):
    assert not [goal.name for goal in evaluate.goals(stored) if not goal.met]


def test_a_goal_that_is_missed_is_called_so(stored):
    worse = json.loads(json.dumps(stored))
    worse["text"]["right"]["house"] = 0.949
    worse["changes"]["strengths"]["0.5"]["all"]["distance"] = 0.0
    assert [goal.name for goal in evaluate.goals(worse) if not goal.met] == [
        "text, house",
        "distance rises with strength",
    ]
    assert "94.9%   MISSED" in evaluate.table(worse)


def test_the_prompts_say_everything_in_words_that_no_caption_has():
    prompts = evaluate._prompts(200)
    rng = random.Random(0)
    said = {caption(random_scene(rng), rng) for _ in range(5000)}
    assert not said & set(prompts)
    for prompt, scene in zip(prompts, evaluate._scenes("text", 200), strict=True):
        visible = {name: value for name, value in scene.visible().items() if value}
        assert named_attributes(prompt).items() >= visible.items()


def test_the_measurement_runs(tiny, monkeypatch):
    monkeypatch.setattr(evaluate, "STEPS", 2)
    monkeypatch.setattr(evaluate, "STRENGTHS", [0.5, 1.0])
    monkeypatch.setattr(evaluate, "GUIDANCES", [1, 5])
    monkeypatch.setattr(evaluate, "STEP_COUNTS", [1, 2])
    monkeypatch.setattr(evaluate, "QUICK", dict.fromkeys(evaluate.FULL, 4))
    report = evaluate.evaluate(tiny, quick=True)
    assert json.loads(json.dumps(report)) == report
    assert len(evaluate.goals(report)) == 20
    assert "Image to image, 4 pairs" in evaluate.table(report)
