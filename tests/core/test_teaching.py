"""The plans of the teaching page account for every minute, and name sections that exist."""

import re
from itertools import pairwise
from pathlib import Path

import nbformat
import pytest

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "teaching.md").read_text(encoding="utf-8")
QUIZ = (ROOT / "docs" / "quiz.md").read_text(encoding="utf-8")
ROWS = re.findall(r"^\| (\d+) to (\d+) \|(.*)$", PAGE, re.M)
SECTIONS = re.compile(r"\]\(\.\./notebooks/([\w]+\.ipynb)\)[^|]*")


def headings(notebook: str) -> list[str]:
    cells = nbformat.read(ROOT / "notebooks" / notebook, as_version=4).cells
    lines = [line for cell in cells if cell.cell_type == "markdown" for line in cell.source.splitlines()]
    return [line.removeprefix("## ") for line in lines if line.startswith("## ")]


@pytest.mark.parametrize(("first", "last"), [(0, 90), (100, 180)])
def test_a_plan_accounts_for_every_minute(first, last):
    spans = [(int(start), int(end)) for start, end, _ in ROWS if first <= int(start) < last]
    assert spans[0][0] == first and spans[-1][1] == last
    assert all(one[1] == two[0] for one, two in pairwise(spans))


def test_the_sections_that_it_names_exist():
    named = 0
    for line in PAGE.splitlines():
        for match in SECTIONS.finditer(line):
            for section in re.findall(r"\*([^*]+)\*", match[0]):
                assert any(heading.endswith(section) for heading in headings(match[1])), (match[1], section)
                named += 1
    assert named >= 20


def test_the_quiz_has_twenty_questions_and_says_where_each_answer_is():
    questions, answers = QUIZ.split("## Answers")
    numbers = [int(number) for number in re.findall(r"^(\d+)\. ", questions, re.M)]
    rows = re.findall(r"^\| (\d+) \| ([abc]) \| \[\d\d\]\(\.\./notebooks/(\w+\.ipynb)\) \| \*(.+)\* \|$", answers, re.M)
    assert numbers == [int(number) for number, *_ in rows] == list(range(1, 21))
    assert re.findall(r"^ +- \((\w)\) ", questions, re.M) == list("abc") * 20
    assert not [(notebook, section) for _, _, notebook, section in rows if section not in headings(notebook)]
    assert "(quiz.md)" in PAGE


def test_the_exercises_that_it_names_can_be_checked():
    from decinb.lessons.answers import ANSWERS

    assert set(re.findall(r"Exercise (\d\d\.\d)", PAGE)) <= set(ANSWERS)
