"""The door: what a user gave becomes a plain value, or one clear line that says what is allowed."""

import math
import numbers
import os
import sys
import warnings
from collections.abc import Iterable
from difflib import get_close_matches
from typing import Any

import torch

from decinb.errors import InputError

MAX_STEPS = 999  # of the 1,000 noise levels, a scheduler with an offset reaches one less
MAX_SEED = 2**63 - 1
MAX_GUIDANCE = 10_000  # beyond it half precision ends
HIGH_GUIDANCE = 30  # beyond it there is nothing but glaring colours to see
MAX_CHARACTERS = 4_000  # of a prompt, of which a text encoder reads some 300
MAX_SIDE = 2048  # pixels of an image given to a pipeline, or asked of one
MIN_SIDE = 64
MULTIPLE = 8  # a latent pixel is 8 x 8 image pixels
MAX_REPR = 80  # letters of a value that an error repeats


def strength(value: Any, where: str = "") -> float:
    """How far to go from the input image: above 0, at most 1."""
    value = _number(value, f"{where}strength", "above 0 and at most 1")
    if not 0 < value <= 1:
        raise InputError(f"{where}strength must be above 0 and at most 1, got {value:g}")
    return value


def guidance_scale(value: Any, where: str = "") -> float:
    """How closely to follow the prompt: 0 to 10,000, of which 1 and less are no guidance."""
    value = _number(value, f"{where}guidance_scale", f"from 0 to {MAX_GUIDANCE}")
    if not 0 <= value <= MAX_GUIDANCE:
        raise InputError(f"{where}guidance_scale must be from 0 to {MAX_GUIDANCE}, got {value:g}")
    return value


def fraction(value: Any, name: str) -> float:
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


def count(value: Any, name: str) -> int:
    """How many of something: 1 to 1,000."""
    return _whole(value, name, 1, 1000)


def side(value: Any, name: str) -> int:
    """Height or width of an image in pixels: a multiple of 8 from 64 to 2048."""
    number = _real(value)
    if number is None or number % MULTIPLE or not MIN_SIDE <= number <= MAX_SIDE:
        raise InputError(
            f"{name} must be a multiple of {MULTIPLE} from {MIN_SIDE} to {MAX_SIDE}, got {short_repr(value)}"
        )
    return int(number)


def latents(value: Any, channels: int) -> torch.Tensor | None:
    """What a pipeline with ``output_type="latent"`` gave, (images, channels, height / 8, width / 8); None if not that.

    Raises:
        InputError: there are numbers among them that are none.
    """
    if not (torch.is_tensor(value) and value.ndim == 4 and value.shape[1] == channels and value.is_floating_point()):
        return None
    if not value.isfinite().all():
        raise InputError("image holds latents with NaN or infinity")
    return value


def embeds(value: Any, name: str, width: int) -> torch.Tensor:
    """What a text encoder made of prompts: (prompts, tokens, width), finite."""
    if not (torch.is_tensor(value) and value.ndim == 3 and value.shape[2] == width and value.is_floating_point()):
        got = tuple(value.shape) if torch.is_tensor(value) else short_repr(value)
        raise InputError(f"{name} must be a float tensor (prompts, tokens, {width}), got {got}")
    if not value.isfinite().all():
        raise InputError(f"{name} holds NaN or infinity")
    return value


def depth_map(value: Any) -> torch.Tensor:
    """How near everything in a picture is: (images, height, width), finite, and not the same everywhere."""
    if not (torch.is_tensor(value) and value.ndim == 3 and value.is_floating_point() and value.numel()):
        got = tuple(value.shape) if torch.is_tensor(value) else short_repr(value)
        raise InputError(f"depth_map must be a float tensor (images, height, width), got {got}")
    if not value.isfinite().all():
        raise InputError("depth_map holds NaN or infinity")
    if (
        value.amin((1, 2)) == value.amax((1, 2))
    ).any():  # it is stretched to -1 to 1, and here there is nothing to stretch
        raise InputError("depth_map is the same everywhere: it must tell near from far")
    return value


def text(value: Any, name: str) -> str:
    """A prompt: at most 4,000 letters, each of them one."""
    if not isinstance(value, str):
        raise InputError(f"{name} must be a string, got {short_repr(value)}")
    if len(value) > MAX_CHARACTERS:
        raise InputError(f"{name} must have at most {MAX_CHARACTERS} letters, got {len(value)}")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise InputError(
            f"{name} has half a letter at position {error.start}: {short_repr(value)} is no Unicode"
        ) from None
    return value


def texts(value: Any, name: str) -> list[str]:
    """A prompt, or a list of some."""
    if not isinstance(value, (list, tuple)):
        return [text(value, name)]
    if not value:
        raise InputError(f"{name} is an empty list: give at least one")
    return [text(one, f"{name}[{i}]") for i, one in enumerate(value)]


def together(**lengths: int) -> int:
    """Of what many are given, as many must be given of all; one serves for any number."""
    most = max(lengths.values())
    if odd := [name for name, length in lengths.items() if length not in (1, most)]:
        given = ", ".join(f"{name} has {length}" for name, length in lengths.items())
        raise InputError(f"{odd[0]} must be one, or as many as the others: {given}")
    return most


def generators(value: Any, number: int) -> None:
    """Where random numbers come from: nowhere in particular, one generator for all, or one for each."""
    several = isinstance(value, (list, tuple))
    if value is not None and not all(isinstance(one, torch.Generator) for one in (value if several else [value])):
        raise InputError(
            f"generator must be a torch.Generator, as torch.Generator().manual_seed(7), got {short_repr(value)}"
        )
    if several and len(value) != number:
        raise InputError(f"generator must be one, or one for each of the {number} images, got {len(value)}")


def folder(value: Any) -> str | os.PathLike[str]:
    """A folder's name, whether or not it is there."""
    if not isinstance(value, (str, os.PathLike)) or not str(value) or "\0" in str(value):
        raise InputError(f"folder must be a path, got {short_repr(value)}")
    return value


def choice(value: Any, name: str, allowed: Iterable[str]) -> str:
    """One of a few words."""
    allowed = list(allowed)
    if not isinstance(value, str) or value not in allowed:
        raise InputError(f"{name} must be one of {', '.join(allowed)}, got {short_repr(value)}")
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
            raise InputError(f"{where}unknown argument {short_repr(name)}; {hint}")


# --- what can run, but hardly as it was meant -------------------------------------------------------------------------


def high_guidance(scale: float) -> str | None:
    """What to say of a guidance scale that burns a picture out."""
    if scale > HIGH_GUIDANCE:
        return f"guidance_scale {scale:g} burns the picture out; above {HIGH_GUIDANCE} nothing else is to be seen"
    return None


def late_start(steps: int, scheduler: Any) -> str | None:
    """What to say where a scheduler, set to so many steps, begins far below full noise.

    "Leading" spacing rounds the distance of two steps down: 600 steps of 1,000 levels lie one apart and begin at 600.

    Raises:
        InputError: it cannot take so many steps.
    """
    name, fresh = type(scheduler).__name__, type(scheduler).from_config(scheduler.config)
    try:
        fresh.set_timesteps(steps)
    except Exception as error:
        raise InputError(f"num_inference_steps: {name} cannot take {steps}: {' '.join(str(error).split())}") from error
    levels, first = scheduler.config.get("num_train_timesteps", 1000), float(fresh.timesteps[0])
    if first >= 0.85 * levels * (1 - 1 / steps):  # the first of any number of steps may lie one step below the top
        return None
    return f"num_inference_steps {steps} begins at noise level {first:.0f} of {levels} with {name}: use fewer steps"


def lost_words(words: str, tokenizer: Any) -> str:
    """The end of a prompt that a text encoder does not read, since it takes only so many tokens."""
    if tokenizer is None or not words:
        return ""
    room = tokenizer.model_max_length - tokenizer.num_special_tokens_to_add()
    read = tokenizer(words, add_special_tokens=False, verbose=False)
    if len(read.input_ids) <= room:
        return ""
    if not tokenizer.is_fast:
        return str(tokenizer.decode(read.input_ids[room:]))
    return words[read.token_to_chars(room).start :]


def lost(name: str, words: str) -> str:
    """What to say of the words that were lost."""
    return f"{name} is too long for the text encoder, which does not read its end: {short_repr(words)}"


def unused_negative(scale: float) -> str:
    """What to say of a negative prompt without guidance."""
    return f"negative_prompt is unused at guidance_scale {scale:g}: it takes a scale above 1"


def warn(note: str) -> None:
    """Warn in one line, at the line of the user's own that called decinb."""
    frame, level = sys._getframe(), 1
    while frame.f_back and frame.f_globals.get("__name__", "").partition(".")[0] == "decinb":
        frame, level = frame.f_back, level + 1
    warnings.warn(note, stacklevel=level)


# --- the values themselves --------------------------------------------------------------------------------------------


def short_repr(value: Any) -> str:
    """A value as an error repeats it: on one line, and not at any length."""
    if isinstance(value, (str, bytes)):
        value = value[: MAX_REPR + 1]
    try:
        words = " ".join(repr(value).split())
    except Exception:  # a whole number of 5,000 digits has none, and a stranger's class may raise anything
        words = f"a value of type {type(value).__name__}"
    return words if len(words) <= MAX_REPR else f"{words[:MAX_REPR]}…"


def _number(value: Any, name: str, allowed: str) -> float:
    number = _real(value)
    if number is None or not math.isfinite(number):
        raise InputError(f"{name} must be a number {allowed}, got {short_repr(value)}")
    return round(float(number), 6)  # a list built by adding 0.05 ends in 1.0000000000000002


def _whole(value: Any, name: str, low: int, high: int) -> int:
    number = _real(value)
    if number is None or not low <= number <= high or number != int(number):
        raise InputError(f"{name} must be a whole number from {low} to {high}, got {short_repr(value)}")
    return int(number)


def _real(value: Any) -> Any:
    """A number of Python, NumPy or torch; None for what is none, a truth value included."""
    if getattr(value, "ndim", None) == 0 and hasattr(value, "item"):
        value = value.item()
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        return None
    try:
        float(value)
    except OverflowError:
        return math.inf if value > 0 else -math.inf
    return value
