"""Find the attributes of a scene that a prompt names, and how many of them an image shows."""

import re
from collections.abc import Iterable, Sequence
from typing import overload

from PIL import Image

from decinb.errors import InputError
from decinb.scenes.attributes import ATTRIBUTES
from decinb.scenes.captions import PHRASES
from decinb.scenes.judge import Judge
from decinb.utils import validation

Value = str | bool | None

_LINKING = {"a", "an", "the", "on", "in", "at", "by", "under", "of", "with", "is"}
"""Small words at the ends of a phrase, which a prompt may leave out."""


def _pattern(phrases: Iterable[str]) -> re.Pattern:
    """Match one of some phrases in any case, in singular or plural, with or without the small words at its ends."""
    cores = []
    for phrase in phrases:
        words = phrase.split()
        while words[0] in _LINKING:
            del words[0]
        while words[-1] in _LINKING:
            del words[-1]
        core = r"[\s-]+".join(words)
        cores.append(core[:-1] if core.endswith("s") and not core.endswith("ss") else core)
    return re.compile(rf"\b(?:{'|'.join(sorted(cores, key=len, reverse=True))})(?:e?s)?\b", re.IGNORECASE)


_NOUNS = [noun for nouns in PHRASES["building"].values() for noun in nouns]

_PATTERNS: dict[str, dict[Value, re.Pattern]] = {
    name: {value: _pattern(phrases) for value, phrases in values.items()} for name, values in PHRASES.items()
} | {"house": {colour: _pattern(f"{colour} {noun}" for noun in _NOUNS) for colour in ATTRIBUTES["house"][1:]}}

_BUILDING = _pattern(_NOUNS)
_EMPTY = _pattern(["an empty landscape"])


def named_attributes(prompt: str) -> dict[str, Value]:
    """Return the attributes of a scene that a prompt names, in the words of the captions.

    Small words and case do not matter: "Red house, snow, night" names a colour, a building, a ground and a time. "An
    empty landscape" names the absence of every thing. An attribute named with two values ("a red house and a blue
    house") is left out, and so are the time and the ground of a sketch, which cannot be seen; any building in a sketch
    is "plain". "no" and "without" are not understood: captions say what is there.

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
    for name in ATTRIBUTES:
        spans = {value: _spans(pattern, prompt) for value, pattern in _PATTERNS[name].items()}
        found = [value for value, own in spans.items() if any(not _is_within(span, spans, value) for span in own)]
        if len(found) == 1:
            named[name] = found[0]
    if _EMPTY.search(prompt):
        for name, values in ATTRIBUTES.items():
            if not values[0] and name not in named:
                named[name] = values[0]
    if named.get("style") == "sketch":
        named = {name: value for name, value in named.items() if name not in ("time", "ground")}
        if _BUILDING.search(prompt):
            named["house"] = "plain"
    return named


def _spans(pattern: re.Pattern, prompt: str) -> list[tuple[int, int]]:
    return [match.span() for match in pattern.finditer(prompt)]


def _is_within(span: tuple[int, int], spans: dict[Value, list[tuple[int, int]]], value: Value) -> bool:
    """Whether a match lies in a longer one of another value, as "painting" does in "watercolour painting"."""
    others = (other for key, found in spans.items() if key != value for other in found)
    return any(start <= span[0] and span[1] <= end and (start, end) != span for start, end in others)


@overload
def adherence(images: Image.Image, prompt: str) -> float: ...


@overload
def adherence(images: Sequence[Image.Image], prompt: str) -> list[float]: ...


def adherence(images: Image.Image | Sequence[Image.Image], prompt: str) -> float | list[float]:
    """Return the fraction of the attributes named by a prompt that an image shows, according to the judge.

    Args:
        images: one image of a scene or several, of any size.
        prompt: names at least one attribute of a scene.

    Returns:
        A number from 0 to 1; a list of them if several images were given.

    Raises:
        InputError: an image is not a PIL image, or the prompt names nothing that the judge knows.
    """
    named = named_attributes(prompt)
    if not named:
        known = ", ".join(ATTRIBUTES)
        raise InputError(
            f"prompt must name an attribute of a scene ({known}; such as 'a red house at night'), "
            f"got {validation.short_repr(prompt)}"
        )
    single = isinstance(images, Image.Image)
    fractions = [
        sum(seen.get(name) == value for name, value in named.items()) / len(named)
        for seen in Judge.load().classify(validation.pil_images(images, "images"))
    ]
    return fractions[0] if single else fractions
