"""Numbers for pictures: how far one went from another, and how much of what a prompt names is in it."""

import math
import re
from collections.abc import Iterable, Sequence

import numpy as np
from PIL import Image

from decinb.errors import InputError
from decinb.tiny.scenes import GROUND_WORDS, HOUSE_WORDS, STYLE_WORDS, TIME_WORDS, TREE_WORDS

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
        A dict from attribute to value, both as in ``decinb.tiny.judge.VALUES``; empty if the prompt names none.

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
    from decinb.tiny.judge import Judge  # reads its weights, which only this needs

    single = isinstance(images, Image.Image)
    shares = [
        sum(seen.get(name) == value for name, value in named.items()) / len(named)
        for seen in Judge.load().see([images] if single else images)
    ]
    return shares[0] if single else shares


def change(image: Image.Image, original: Image.Image) -> float:
    """The mean absolute difference of two pictures of the same size, from 0 (equal) to 1 (black against white)."""
    first, second = _pair(image, original)
    return float(np.abs(first - second).mean())


def saturated(images: Image.Image | Sequence[Image.Image]) -> float:
    """The share of pixels, 0 to 1, in which a channel is within 2 of black or white; over all images given."""
    images = [images] if isinstance(images, Image.Image) else images
    pixels = np.concatenate([np.asarray(image.convert("RGB")).reshape(-1, 3) for image in images])
    return float(((pixels <= 2) | (pixels >= 253)).any(axis=1).mean())


def oversaturated(images: Image.Image | Sequence[Image.Image]) -> float:
    """The share of pixels, 0 to 1, purer in colour than 95% (HSV saturation), very dark ones aside; over all images."""
    images = [images] if isinstance(images, Image.Image) else images
    pixels = np.concatenate([np.asarray(image.convert("RGB"), dtype=int).reshape(-1, 3) for image in images])
    most, least = pixels.max(axis=1), pixels.min(axis=1)
    return float(((most >= 32) & (most - least > 0.95 * most)).mean())  # below 32 of 255, purity is rounding


def psnr(image: Image.Image, original: Image.Image) -> float:
    """The peak signal-to-noise ratio of two pictures of the same size, in dB; infinite if they are equal."""
    first, second = _pair(image, original)
    squared = float(np.square(first - second).mean())
    return -10 * math.log10(squared) if squared else math.inf


def ssim(image: Image.Image, original: Image.Image) -> float:
    """The structural similarity of two pictures of the same size, at most 1 (equal); each side at least 11 pixels.

    Source: Wang et al., "Image Quality Assessment: From Error Visibility to Structural Similarity" (2004), with its
    window (a Gaussian of deviation 1.5 over 11 x 11 pixels) and constants, averaged over the three colours.
    """
    first, second = _pair(image, original)
    window = np.exp(-0.5 * (np.arange(-5, 6) / 1.5) ** 2)
    window /= window.sum()

    def local(values: np.ndarray) -> np.ndarray:
        for axis in (0, 1):
            values = np.lib.stride_tricks.sliding_window_view(values, len(window), axis=axis) @ window
        return values

    mean1, mean2 = local(first), local(second)
    variances = local(first**2) - mean1**2 + local(second**2) - mean2**2
    covariance = local(first * second) - mean1 * mean2
    c1, c2 = 0.01**2, 0.03**2
    similar = (2 * mean1 * mean2 + c1) * (2 * covariance + c2) / ((mean1**2 + mean2**2 + c1) * (variances + c2))
    return float(similar.mean())


def _pair(image: Image.Image, original: Image.Image) -> tuple[np.ndarray, np.ndarray]:
    if image.size != original.size:
        raise InputError(f"the pictures must be of one size, got {image.size} and {original.size}")
    first, second = (np.asarray(picture.convert("RGB"), dtype=np.float64) / 255 for picture in (image, original))
    return first, second
