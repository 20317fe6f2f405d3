"""Answers to the exercises are right by computation, and a wrong one is told by how much."""

import pytest

import decinb
from decinb import InputError
from decinb.lessons.answers import ANSWERS


def said(capsys, exercise, answer):
    decinb.check(exercise, answer)
    return capsys.readouterr().out


def test_a_right_answer_is_told_and_explained(capsys):
    assert said(capsys, "02.1", 1).startswith("02.1: right, int(10 * strength) is 5")
    assert "right" in said(capsys, "03.1", " B ")


def test_a_wrong_number_is_told_by_how_much(capsys):
    assert "3 too large" in said(capsys, "02.1", 4)
    assert "0.1 too small" in said(capsys, "04.2", 0.5)
    assert "right" in said(capsys, "04.2", 0.61) and "too large" in said(capsys, "04.2", 0.62)


def test_a_wrong_choice_does_not_tell_the_right_one(capsys):
    text = said(capsys, "03.1", "a")
    assert "not yet" in text and ANSWERS["03.1"].because not in text


@pytest.mark.parametrize(
    ("exercise", "answer", "message"),
    [
        ("99.9", 1, "exercise must be one of 00.1, "),
        ("02.1", "one", "answer must be a number, got 'one'"),
        ("02.1", float("nan"), "answer must be a number, got nan"),
        ("02.1", True, "answer must be a number, got True"),
        ("03.1", 2, "answer must be one of the letters a, b, got 2"),
    ],
)
def test_what_is_no_answer_is_refused(exercise, answer, message):
    with pytest.raises(InputError, match=message):
        decinb.check(exercise, answer)


def test_the_numbers_are_what_the_formula_gives():
    def steps(count, strength):
        return min(int(count * strength), count)

    assert ANSWERS["00.1"].value == steps(30, 0.75)
    assert ANSWERS["01.1"].value == 128 * 128 * 3 / (16 * 16 * 4)
    assert ANSWERS["09.1"].value == steps(30, 1) + 2 * steps(30, 0.5)
    assert abs(ANSWERS["10.1"].value - sum(decinb.MODELS[name].memory for name in ("sdxl-base", "sdxl-refiner"))) < 0.05
    assert ANSWERS["10.2"].value == max(steps(20, strength) for strength in (0.25, 0.5, 0.75, 1))
    assert ANSWERS["02.1"].value == len({steps(10, strength) for strength in (0.50, 0.52, 0.55, 0.58)})
    assert ANSWERS["02.2"].value == sum(steps(30, 0.75 + 0.05 * i) for i in range(6))
    low, high = (ANSWERS["04.2"].value + sign * ANSWERS["04.2"].within for sign in (0, 1))
    assert steps(50, low) == steps(50, high) == 30 and steps(50, 0.62) != 30
    assert ANSWERS["06.1"].value == steps(25, 0.3)
    assert ANSWERS["12.1"].value == pytest.approx(1 / (0.2 + 0.8 / 2), abs=ANSWERS["12.1"].within)
    assert ANSWERS["12.2"].value == pytest.approx(60 / 0.2)
    assert ANSWERS["14.1"].value == len({steps(4, i / 100) for i in range(1, 101)} - {0})
    assert ANSWERS["14.2"].value == (20 * 2) / (4 * 1)
    base = {"strength": 0.6, "guidance_scale": 7.5, "num_inference_steps": 30}
    others = {
        "strength": [0.4, 0.5, 0.7, 0.8],
        "guidance_scale": [3, 5, 9, 12],
        "num_inference_steps": [10, 20, 40, 50],
    }
    assert ANSWERS["05.2"].value == len(decinb.one_at_a_time(base, **others))
    assert ANSWERS["05.1"].value == len(decinb.grid(**{name: [base[name], *more] for name, more in others.items()}))
