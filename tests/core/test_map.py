"""The map of the notebooks is up to date, marks one notebook a copy, and its labels do not overlap."""

import re
from itertools import combinations
from xml.etree import ElementTree

import pytest

from tools.draw_map import FOLDER, STOPS, describe, draw

SVG = "{http://www.w3.org/2000/svg}"


@pytest.mark.parametrize("number", STOPS)
def test_the_map_of_each_notebook_is_up_to_date(number):
    assert (FOLDER / f"{number}.svg").read_text(encoding="utf-8") == draw(number)


def test_every_notebook_is_on_the_map_and_shows_it():
    for path in sorted((FOLDER.parents[1] / "notebooks").glob("*.ipynb")):
        assert path.stem[:2] in STOPS


def test_a_map_marks_its_own_notebook_only():
    root = ElementTree.fromstring(draw("03"))
    assert len(root.findall(f"{SVG}rect[@class='here']")) == 1
    assert root.find(f"{SVG}text[@class='at']").text == "03 guidance"
    assert root.find(f"{SVG}title").text == describe("03")


def test_labels_do_not_overlap_and_lie_inside():
    root = ElementTree.fromstring(draw("00"))
    width, height = map(float, root.get("viewBox").split()[2:])
    boxes = [
        tuple(float(rect.get(name)) for name in ("x", "y", "width", "height"))
        for rect in root.findall(f"{SVG}rect")
        if rect.get("class") in ("stop", "here")
    ]
    assert len(boxes) == len(STOPS)
    for x, y, w, h in boxes:
        assert x >= 0 and y >= 0 and x + w <= width and y + h <= height
    for (x, y, w, h), (x2, y2, w2, h2) in combinations(boxes, 2):
        assert x + w <= x2 or x2 + w2 <= x or y + h <= y2 or y2 + h2 <= y


def test_the_map_follows_the_theme_and_fetches_nothing():
    drawn = draw("00")
    assert "prefers-color-scheme: dark" in drawn
    assert not re.search(r"(?:href|src)=|url\((?!#)|@import", drawn)
