"""Guess, then see: questions on the images of a sweep, answered in the page, with a score.

It needs no kernel. Where scripts are not allowed, each answer can be unfolded.
"""

import html
import random
from collections.abc import Mapping, Sequence
from importlib.resources import files
from typing import Any
from uuid import uuid4

from PIL import Image

from decinb.errors import InputError
from decinb.figures.viewer import Fragment, data_url
from decinb.utils import validation
from decinb.utils.labels import ARGUMENTS, SELECTABLE, SHORT, describe, plain

MAX_CHOICES = 8


def quiz(
    images: Sequence[Image.Image],
    records: Sequence[Mapping[str, Any]],
    name: str,
    questions: int = 5,
    pairs: bool = False,
    seed: int = 0,
) -> Fragment:
    """Return questions on images: which value of an argument made this one, or which of two has the larger value.

    Args:
        images, records: of a sweep.
        name: the argument to guess, in which the records differ.
        questions: how many, each on another image, 1 to 20; fewer if there are fewer images.
        pairs: show two images that differ in this argument only, and ask which has the larger value.
        seed: of the choice of images.

    Raises:
        InputError: the argument is unknown, the same everywhere, or has no order (with ``pairs``); no two images
            differ in it alone (with ``pairs``).
    """
    validation.known([name], SELECTABLE, "name: ")
    questions = validation.integer(questions, "questions", 1, 20)
    values = list(dict.fromkeys(record[name] for record in records))
    if len(values) < 2:
        raise InputError(f"{name} must differ between the images, or there is nothing to guess")
    draw = random.Random(validation.seed(seed))
    asked = _pairs(images, records, name, draw) if pairs else _singles(images, records, name, values, draw)
    items = "\n".join(f"<li>{item}</li>" for item in asked[:questions])
    root = f"decinb-{uuid4().hex[:8]}"
    source = files("decinb.figures")
    script = source.joinpath("quiz.js").read_text(encoding="utf-8").replace("__ID__", root)
    style = source.joinpath("quiz.html").read_text(encoding="utf-8")
    score = '<p class="score" role="status" hidden></p>'
    return Fragment(
        f'<div class="decinb-quiz" id="{root}">{style}<ol>{items}</ol>{score}</div><script>{script}</script>'
    )


def _singles(
    images: Sequence[Image.Image],
    records: Sequence[Mapping[str, Any]],
    name: str,
    values: Sequence[Any],
    draw: random.Random,
) -> list[str]:
    """Ask for the value of one image, among all values of the sweep or some of them."""
    numeric = all(isinstance(value, (int, float)) for value in values)
    asked = []
    for i in draw.sample(range(len(records)), len(records)):
        answer = records[i][name]
        others = [value for value in values if value != answer]
        choices = [answer, *draw.sample(others, min(len(others), MAX_CHOICES - 1))]
        choices = sorted(choices) if numeric else draw.sample(choices, len(choices))
        shown = f'<img src="{data_url(images[i])}" alt="an image of the sweep" width="192">'
        options = [(_value(name, value), value == answer) for value in choices]
        asked.append(_question(f"Which {_word(name)} made this image?", shown, options))
    return asked


def _pairs(
    images: Sequence[Image.Image], records: Sequence[Mapping[str, Any]], name: str, draw: random.Random
) -> list[str]:
    """Ask which of two images has the larger value, if they are alike in everything else."""
    if not all(isinstance(record[name], (int, float)) for record in records):
        raise InputError(f"{name} has no order: ask for it without pairs")

    def alike(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
        return one[name] != other[name] and all(one[key] == other[key] for key in ARGUMENTS if key != name)

    count = len(records)
    found = [(i, k) for i in range(count) for k in range(i + 1, count) if alike(records[i], records[k])]
    if not found:
        raise InputError(f"no two images of the sweep differ in {name} alone")
    asked = []
    for pair in draw.sample(found, len(found)):
        left, right = draw.sample(pair, 2)
        shown = "".join(
            f'<img src="{data_url(images[i])}" alt="the image on the {side}" width="192"> '
            for i, side in ((left, "left"), (right, "right"))
        )
        larger = records[left][name] > records[right][name]
        values = " and ".join(_value(name, records[i][name]) for i in (left, right))
        options = [("the left one", larger), ("the right one", not larger)]
        asked.append(_question(f"Which of these two has more {_word(name)}?", shown, options, f" ({values})"))
    return asked


def _question(text: str, shown: str, options: Sequence[tuple[str, bool]], more: str = "") -> str:
    """Return a question as HTML.

    Args:
        text: the question.
        shown: its images, as HTML.
        options: what to choose from, and whether it is right.
        more: what the answer adds.
    """
    buttons = "".join(
        f'<button type="button"{" data-right=1" if right else ""}>{html.escape(option)}</button> '
        for option, right in options
    )
    answer = next(option for option, right in options if right) + more
    return (
        f'<p>{html.escape(text)}</p>{shown}<div class="choices" hidden>{buttons}</div>'
        f"<details><summary>answer</summary>{html.escape(answer)}</details>"
    )


def _word(name: str) -> str:
    return SHORT.get(name, name.replace("_", " "))


def _value(name: str, value: Any) -> str:
    return plain(value) if name in SHORT else describe(name, value)
