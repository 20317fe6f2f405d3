"""Measure how well the image of a scene follows its prompt: how much of what the prompt names the image shows."""

import re
from collections.abc import Iterable, Sequence

from PIL import Image

from decinb.errors import InputError
from decinb.scenes.judge import Judge
from decinb.scenes.scenes import GROUND_WORDS, HOUSE_WORDS, STYLE_WORDS, TIME_WORDS, TREE_WORDS

Value = str | bool | None
FUNCTION_WORDS = {"a", "an", "the", "on", "in", "at", "by", "under", "of"}


def _pattern(phrases: str | Iterable[str]) -> re.Pattern:
    """Compile a pattern for phrases in any case, in singular or plural, with or without function words at the ends."""
    cores = []
    for phrase in [phrases] if isinstance(phrases, str) else phrases:
        words = phrase.split()
        while words[0] in FUNCTION_WORDS:
            del words[0]
        while words[-1] in FUNCTION_WORDS:
            del words[-1]
        core = r"[\s-]+".join(words)
        cores.append(core[:-1] if core.endswith("s") and not core.endswith("ss") else core)
    return re.compile(rf"\b(?:{'|'.join(cores)})(?:e?s)?\b", re.IGNORECASE)


EMPTY = _pattern("an empty landscape")
ANY_HOUSE = _pattern("a house")
PATTERNS: dict[str, dict[Value, re.Pattern]] = {
    "style": {value: _pattern(phrases) for value, phrases in STYLE_WORDS.items()},
    "time": {value: _pattern(phrases) for value, phrases in TIME_WORDS.items()},
    "ground": {value: _pattern(phrases) for value, phrases in GROUND_WORDS.items()},
    "house": {None: EMPTY} | {value: _pattern(phrase) for value, phrase in HOUSE_WORDS.items()},
    "trees": {None: EMPTY} | {value: _pattern(phrases) for value, phrases in TREE_WORDS.items()},
    "mountains": {False: EMPTY, True: _pattern("mountains")},
}
"""For each value of each attribute, the pattern of the phrases that name it."""


def named_attributes(prompt: str) -> dict[str, Value]:
    """Find the attributes of a scene that a prompt names in the words of the captions.

    Function words and case do not matter ("Red house, snow, night" names three attributes). An attribute named with
    two values ("a red house and a blue house") is left out, as are the time and the ground of a sketch, which cannot
    be seen. Any house in a sketch is "plain". Negations such as "no" and "without" are not understood.

    Args:
        prompt: any text.

    Returns:
        A dict from attribute to value, both as in ``decinb.scenes.judge.VALUES``; empty if the prompt names none.

    Raises:
        InputError: the prompt is not a string.
    """
    if not isinstance(prompt, str):
        raise InputError(f"prompt must be a string, got {type(prompt).__name__}")
    named = {}
    for name, patterns in PATTERNS.items():
        found = [value for value, pattern in patterns.items() if pattern.search(prompt)]
        if len(found) == 1:
            named[name] = found[0]
    if named.get("style") == "sketch":
        named = {name: value for name, value in named.items() if name not in ("time", "ground")}
        if ANY_HOUSE.search(prompt):
            named["house"] = "plain"
    return named


def adherence(images: Image.Image | Sequence[Image.Image], prompt: str) -> float | list[float]:
    """Measure how much of what a prompt names an image shows, according to the judge of the bundled scenes.

    Args:
        images: one image of a scene or several, of any size.
        prompt: names at least one attribute of a scene.

    Returns:
        The fraction of the named attributes that the image shows, 0 to 1; a list of fractions for several images.

    Raises:
        InputError: the prompt is not a string, or names nothing that the judge knows.
    """
    named = named_attributes(prompt)
    if not named:
        raise InputError(
            f"prompt must name an attribute of a scene ({', '.join(PATTERNS)}; such as 'a red house at night'), "
            f"got {prompt!r}"
        )
    single = isinstance(images, Image.Image)
    fractions = [
        sum(shown.get(name) == value for name, value in named.items()) / len(named)
        for shown in Judge.load().classify([images] if single else images)
    ]
    return fractions[0] if single else fractions
