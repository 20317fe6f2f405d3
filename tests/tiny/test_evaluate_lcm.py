"""The comparison of student and teacher at toy size."""

import json

import pytest
import torch

from decinb.scenes.judge import Judge
from decinb.tiny import evaluate_lcm


@pytest.fixture
def judge(monkeypatch):
    """A judge that has learned nothing: what is tested here does not depend on its answers."""
    torch.manual_seed(0)
    untrained = Judge().eval()
    monkeypatch.setattr(Judge, "load", lambda: untrained)


@pytest.mark.slow
def test_every_point_is_measured_and_stored(tiny_lcm, judge, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(evaluate_lcm, "STUDENT_STEPS", (1, 4))
    monkeypatch.setattr(evaluate_lcm, "TEACHER_STEPS", (2, 6))
    monkeypatch.setattr(evaluate_lcm, "ASKED", (4, 6))
    monkeypatch.setattr(evaluate_lcm, "TASKS", ("day to night",))
    file = tmp_path / "few_steps.json"
    evaluate_lcm.main(["--count", "2", "--device", "cpu", "--results", str(file)])
    report = json.loads(file.read_text())
    student, *teachers = report["from prompts"]
    assert student == "tiny-lcm"
    assert teachers == ["tiny, DDIM", "tiny, DPM++ 2M", "tiny, UniPC"]
    for way, rows in report["from prompts"].items():
        assert list(rows) == (["1", "4"] if way == student else ["2", "6"])
        assert all(set(row) == {"adherence", "frechet", "spread"} for row in rows.values())
    task = report["image to image"]["day to night"]
    assert list(task["0.5"]["tiny-lcm"]) == ["4"], "one step at strength 0.5 is none"
    assert list(task["0.75"]["tiny, DDIM"]) == ["2", "6"]
    assert list(task["0.75"]) == ["tiny-lcm", "tiny, DDIM"]
    text = capsys.readouterr().out
    assert "tiny-lcm at 4 steps no worse than tiny at 6, frechet" in text and text.count("from prompts") == 4


def test_no_worse_means_within_the_interval():
    def report(frechet, adherence):
        teacher = {
            "frechet": {"value": 2.0, "low": 1.5, "high": 2.5},
            "adherence": {"value": 0.9, "low": 0.85, "high": 0.95},
        }
        student = {"frechet": {"value": frechet}, "adherence": {"value": adherence}}
        return {"from prompts": {"tiny-lcm": {"4": student}, "tiny, DDIM": {"20": teacher}}}

    assert evaluate_lcm.compare(report(2.4, 0.86)) == {"frechet": True, "adherence": True}
    assert evaluate_lcm.compare(report(0.1, 1.0)) == {"frechet": True, "adherence": True}
    assert evaluate_lcm.compare(report(2.6, 0.84)) == {"frechet": False, "adherence": False}
