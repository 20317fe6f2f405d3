"""Guess, then see: right answers, a page that is complete without scripts, and a score in a browser."""

import html
import re

import numpy as np
import pytest
from PIL import Image

from decinb import InputError, Sweep
from decinb.figures.viewer import page
from tests.helpers.browser import open_browser

STRENGTHS, SCALES = (0.3, 0.5, 0.75, 1.0), (1, 7.5)


def colour(strength: float, scale: float) -> tuple[int, int, int]:
    return int(255 * strength), int(20 * scale), 90


@pytest.fixture(scope="module")
def sweep() -> Sweep:
    fixed = {"image": "day", "prompt": "</script><b>", "negative_prompt": None, "num_inference_steps": 30, "seed": 0}
    cells = [{"strength": strength, "guidance_scale": scale} for strength in STRENGTHS for scale in SCALES]
    images = [Image.new("RGB", (64, 64), colour(*cell.values())) for cell in cells]
    return Sweep(None, "", cells, images, [{**fixed, **cell, "steps_run": 9} for cell in cells])


def questions(fragment: str) -> list[str]:
    return re.findall(r"<li>(.*?)</li>", fragment, re.DOTALL)


def test_each_question_has_one_right_choice_and_says_it_without_scripts(sweep):
    asked = questions(sweep.quiz("strength", 8)._repr_html_())
    assert len(asked) == 8
    for item in asked:
        choices = re.findall(r"<button type=\"button\"( data-right=1)?>([^<]+)</button>", item)
        assert [choice for _, choice in choices] == ["0.3", "0.5", "0.75", "1"]
        (right,) = [choice for mark, choice in choices if mark]
        assert f"<summary>answer</summary>{right}<" in item
        assert '<div class="choices" hidden>' in item


def test_pairs_differ_in_one_argument_and_the_larger_is_right(sweep):
    asked = questions(sweep.quiz("guidance_scale", pairs=True)._repr_html_())
    assert len(asked) == 4, "one for each strength"
    for item in asked:
        left, right = re.search(r"\((\S+) and (\S+)\)", item).groups()
        answer = "the left one" if float(left) > float(right) else "the right one"
        assert f"answer</summary>{answer}" in item


def test_the_same_seed_asks_the_same(sweep):
    def asked(seed):
        return questions(sweep.quiz("strength", seed=seed)._repr_html_())

    assert asked(1) == asked(1) != asked(2)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"name": "strenght"}, "did you mean 'strength'"),
        ({"name": np.array([1, 2])}, r"^name: unknown argument array\(\[1, 2\]\); known are image, prompt, "),
        ({"name": "seed"}, "seed must differ"),
        ({"name": "strength", "questions": 0}, "questions must be an integer from 1 to 20, got 0"),
    ],
)
def test_a_quiz_that_cannot_be_asked_is_refused(sweep, arguments, message):
    with pytest.raises(InputError, match=message):
        sweep.quiz(**arguments)


@pytest.mark.browser
def test_answers_are_marked_and_counted(sweep, tmp_path):
    file = tmp_path / "quiz.html"
    file.write_text(page("quiz", sweep.quiz("strength", 3)._repr_html_()), encoding="utf-8")
    with open_browser() as browser:
        tab = browser.new_context(offline=True).new_page()
        tab.goto(file.as_uri())
        assert tab.locator("details").first.is_hidden()
        first, second = tab.locator("li").nth(0), tab.locator("li").nth(1)
        first.locator("button[data-right]").click()
        assert tab.locator(".score").inner_text() == "1 of 1 right"
        wrong = second.locator("button:not([data-right])").first
        wrong.click()
        wrong.click(force=True)  # a second answer does not count
        assert tab.locator(".score").inner_text() == "1 of 2 right"
        assert "wrong" in wrong.get_attribute("class")
        answer = second.locator("button[data-right]").inner_text()
        assert html.unescape(second.locator("details").inner_text()).endswith(answer)
