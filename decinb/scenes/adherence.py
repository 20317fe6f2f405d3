"""TODO scenes.adherence."""

import re
from collections.abc import Iterable, Sequence

from PIL import Image

from decinb.errors import InputError
from decinb.scenes.scenes import GROUND_WORDS, HOUSE_WORDS, STYLE_WORDS, TIME_WORDS, TREE_WORDS

Value = str | bool | None


_LINKING = {"a", "an", "the", "on", "in", "at", "by", "under", "of"}  # what a caption needs and a prompt may leave out


_EMPTY = "an empty landscape"


def _pattern(phrases: str | Iterable[str]) -> re.Pattern:
    """Finds one of the phrases in any case, in singular or plural, with or without the small words at its ends."""
    cores = []
    for phrase in [phrases] if isinstance(phrases, str) else phrases:
        words = phrase.split()
        while words[0] in _LINKING:
            del words[0]
        while words[-1] in _LINKING:
            del words[-1]
        core = r"[\s-]+".join(words)
        cores.append(core[:-1] if core.endswith("s") and not core.endswith("ss") else core)
    return re.compile(rf"\b(?:{'|'.join(cores)})(?:e?s)?\b", re.IGNORECASE)


_WORDS: dict[str, dict[Value, re.Pattern]] = {
    "style": {value: _pattern(phrases) for value, phrases in STYLE_WORDS.items()},
    "time": {value: _pattern(phrases) for value, phrases in TIME_WORDS.items()},
    "ground": {value: _pattern(phrases) for value, phrases in GROUND_WORDS.items()},
    "house": {None: _pattern(_EMPTY)} | {value: _pattern(phrase) for value, phrase in HOUSE_WORDS.items()},
    "trees": {None: _pattern(_EMPTY)} | {value: _pattern(phrases) for value, phrases in TREE_WORDS.items()},
    "mountains": {False: _pattern(_EMPTY), True: _pattern("mountains")},
}


_HOUSE = _pattern("a house")


def named_attributes(prompt: str) -> dict[str, Value]:
    """The attributes of a scene that a prompt names, in the words of the captions.

    Small words and case do not matter ("Red house, snow, night" names three). What is named with two values ("a red
    house and a blue house") is left out, and so are a sketch's time and ground, which cannot be seen; any house in a
    sketch is "plain". "no" and "without" are not understood: captions say what is there.

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
    for name, patterns in _WORDS.items():
        found = [value for value, pattern in patterns.items() if pattern.search(prompt)]
        if len(found) == 1:
            named[name] = found[0]
    if named.get("style") == "sketch":
        named = {name: value for name, value in named.items() if name not in ("time", "ground")}
        if _HOUSE.search(prompt):
            named["house"] = "plain"
    return named


def adherence(images: Image.Image | Sequence[Image.Image], prompt: str) -> float | list[float]:
    """How much of what a prompt names is in a picture, as the judge of the bundled scenes sees it.

    Args:
        images: one picture of a scene or several, of any size.
        prompt: names at least one attribute of a scene.

    Returns:
        The share of the named attributes that the picture shows, from 0 to 1; a list if several pictures were given.

    Raises:
        InputError: the prompt names nothing that the judge knows.
    """
    named = named_attributes(prompt)
    if not named:
        known = ", ".join(_WORDS)
        raise InputError(
            f"prompt must name something of a scene ({known}; such as 'a red house at night'), got {prompt!r}"
        )
    from decinb.scenes.judge import Judge  # reads its weights, which only this needs

    single = isinstance(images, Image.Image)
    shares = [
        sum(seen.get(name) == value for name, value in named.items()) / len(named)
        for seen in Judge.load().see([images] if single else images)
    ]
    return shares[0] if single else shares
