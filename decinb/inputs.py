"""The door: what a user gave becomes a plain value, or one clear line that says what is allowed."""

import math
import numbers
from collections.abc import Iterable
from difflib import get_close_matches
from typing import Any

from decinb.errors import InputError

MAX_STEPS = 999  # of the 1,000 noise levels, a scheduler with an offset reaches one less
MAX_SEED = 2**63 - 1


def strength(value: Any, where: str = "") -> float:
    """How far to go from the input image: above 0, at most 1."""
    value = _number(value, f"{where}strength", "above 0 and at most 1")
    if not 0 < value <= 1:
        raise InputError(f"{where}strength must be above 0 and at most 1, got {value:g}")
    return value


def guidance_scale(value: Any, where: str = "") -> float:
    """How closely to follow the prompt: 0 or more."""
    value = _number(value, f"{where}guidance_scale", "of 0 or more")
    if value < 0:
        raise InputError(f"{where}guidance_scale must be 0 or more, got {value:g}")
    return value


def share(value: Any, name: str) -> float:
    """A part of a whole: 0 to 1."""
    value = _number(value, name, "from 0 to 1")
    if not 0 <= value <= 1:
        raise InputError(f"{name} must be from 0 to 1, got {value:g}")
    return value


def num_inference_steps(value: Any, where: str = "") -> int:
    """In how many steps to remove all noise: 1 to 999."""
    return _whole(value, f"{where}num_inference_steps", 1, MAX_STEPS)


def seed(value: Any, where: str = "") -> int:
    """Of the random numbers: 0 to 2**63 - 1."""
    return _whole(value, f"{where}seed", 0, MAX_SEED)


def text(value: Any, name: str) -> str:
    """A prompt."""
    if not isinstance(value, str):
        raise InputError(f"{name} must be a string, got {value!r}")
    return value


def steps_run(steps: int, strength: float, where: str = "") -> int:
    """How many of the steps really run at a strength. ``int`` cuts off, as diffusers does: 0.58 of 50 is 28.

    Raises:
        InputError: none would; the message names the smallest strength that leaves one.
    """
    run = min(int(steps * strength), steps)
    if run == 0:
        smallest = math.ceil(1e6 / steps) / 1e6
        raise InputError(
            f"{where}strength {strength:g} of {steps} steps leaves 0 steps to run; "
            f"the smallest strength at {steps} steps is {smallest:g}"
        )
    return run


def known(names: Iterable[str], allowed: Iterable[str], where: str = "") -> None:
    """Refuse a name that is not allowed, with the one that was probably meant."""
    allowed = list(allowed)
    for name in names:
        if name not in allowed:
            near = get_close_matches(str(name), allowed, 1)
            hint = f"did you mean {near[0]!r}?" if near else f"known are {', '.join(allowed)}"
            raise InputError(f"{where}unknown argument {name!r}; {hint}")


def _number(value: Any, name: str, allowed: str) -> float:
    if isinstance(value, bool) or not isinstance(value, numbers.Real) or not math.isfinite(value):
        raise InputError(f"{name} must be a number {allowed}, got {value!r}")
    return round(float(value), 6)  # a list built by adding 0.05 ends in 1.0000000000000002


def _whole(value: Any, name: str, low: int, high: int) -> int:
    fits = isinstance(value, numbers.Real) and not isinstance(value, bool) and low <= value <= high
    if not fits or value != int(value):
        raise InputError(f"{name} must be a whole number from {low} to {high}, got {value!r}")
    return int(value)
