"""Input validation: turn what a user gave into a plain value, or raise one clear line that says what is allowed."""

import itertools
import math
import numbers
import os
import sys
import warnings
from collections.abc import Iterable, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from decinb.errors import InputError, reason

MAX_STEPS = 999  # of 1,000 timesteps; a scheduler with an offset reaches one less
MAX_SEED = 2**63 - 1
MAX_GUIDANCE = 10_000  # more overflows in half precision
HIGH_GUIDANCE = 30  # more gives over-saturated images
MAX_CHARACTERS = 4_000  # of a prompt; a text encoder reads about 300
MAX_IMAGES = 10_000  # in one figure, gallery or measure
MAX_SIDE = 2048  # pixels of an image that a pipeline takes or makes
MULTIPLE = 8  # a latent pixel stands for 8 x 8 image pixels, with most VAEs
MIN_SIDE = MULTIPLE
MAX_SCHEDULER_NUMBER = 100_000  # in its configuration; nearly all have 1,000 training timesteps
MAX_NAME = 255  # bytes of the name of a file or folder
MAX_PATH = 4_000  # bytes; Linux has room for 4,096, with what is appended
ROUNDING = 1e-6  # sums of floats may lie this far outside of a range
MAX_REPR = 80  # characters of a value that an error message repeats


def strength(value: Any, where: str = "") -> float:
    """Validate how much of the input image to replace: above 0, at most 1."""
    value = _number(value, f"{where}strength", "above 0 and at most 1", 1)
    if not 0 < value <= 1:
        raise InputError(f"{where}strength must be above 0 and at most 1, got {value:g}")
    return value


def guidance_scale(value: Any, where: str = "") -> float:
    """Validate how closely to follow the prompt: 0 to 10,000. At 1 and below there is no guidance."""
    value = _number(value, f"{where}guidance_scale", f"from 0 to {MAX_GUIDANCE}", MAX_GUIDANCE)
    if not 0 <= value <= MAX_GUIDANCE:
        raise InputError(f"{where}guidance_scale must be from 0 to {MAX_GUIDANCE}, got {value:g}")
    return value


def fraction(value: Any, name: str) -> float:
    """Validate a number from 0 to 1."""
    value = _number(value, name, "from 0 to 1", 1)
    if not 0 <= value <= 1:
        raise InputError(f"{name} must be from 0 to 1, got {value:g}")
    return value


def num_inference_steps(value: Any, where: str = "") -> int:
    """Validate a number of denoising steps: 1 to 999."""
    return integer(value, f"{where}num_inference_steps", 1, MAX_STEPS)


def seed(value: Any, where: str = "") -> int:
    """Validate a seed: 0 to 2**63 - 1."""
    return integer(value, f"{where}seed", 0, MAX_SEED)


def count(value: Any, name: str) -> int:
    """Validate a count: 1 to 1,000."""
    return integer(value, name, 1, 1000)


def integer(value: Any, name: str, low: int, high: int) -> int:
    """Validate an integer between two bounds, both of them allowed."""
    number = real(value)
    if number is None or not low <= number <= high or number != int(number):
        raise InputError(f"{name} must be an integer from {low} to {high}, got {short_repr(value)}")
    return int(number)


def side(value: Any, name: str, multiple: int = MULTIPLE) -> int:
    """Validate the height or width of an image in pixels: a multiple of 8, or of what a VAE needs, up to 2048."""
    number = real(value)
    if number is None or not multiple <= number <= MAX_SIDE or number % multiple:
        raise InputError(
            f"{name} must be a multiple of {multiple} from {multiple} to {MAX_SIDE}, got {short_repr(value)}"
        )
    return int(number)


def plain_tensor(value: torch.Tensor, name: str) -> torch.Tensor:
    """Refuse a tensor that does not hold its numbers one by one: on the meta device, sparse, quantised or complex."""
    problems = {
        "on the meta device": value.is_meta,
        "sparse": value.layout != torch.strided,
        "quantised": value.is_quantized,
        "complex": value.is_complex(),
    }
    for problem, is_so in problems.items():
        if is_so:
            raise InputError(f"{name} must be an ordinary tensor, got one that is {problem}")
    return value


def latents(value: Any, channels: int, name: str = "image") -> torch.Tensor | None:
    """Validate latents as a pipeline returns them with ``output_type="latent"``; return None for any other input.

    Args:
        value: latents are a float tensor (images, channels, height / 8, width / 8).
        channels: those of the VAE's latents.
        name: the argument that an error names.

    Raises:
        InputError: the latents hold NaN or infinity.
    """
    if not (torch.is_tensor(value) and value.ndim == 4 and value.shape[1] == channels and value.is_floating_point()):
        return None
    if not plain_tensor(value, name).isfinite().all():
        raise InputError(f"{name} holds latents with NaN or infinity")
    return value


def embeds(value: Any, name: str, width: int) -> torch.Tensor:
    """Validate the output of a text encoder: a finite float tensor (prompts, tokens, width)."""
    if not (torch.is_tensor(value) and value.ndim == 3 and value.shape[2] == width and value.is_floating_point()):
        got = tuple(value.shape) if torch.is_tensor(value) else short_repr(value)
        raise InputError(f"{name} must be a float tensor (prompts, tokens, {width}), got {got}")
    if not plain_tensor(value, name).isfinite().all():
        raise InputError(f"{name} holds NaN or infinity")
    return value


def depth_map(value: Any) -> torch.Tensor:
    """Validate the depth of images: a finite float tensor (images, height, width) that is not constant."""
    if not (torch.is_tensor(value) and value.ndim == 3 and value.is_floating_point() and value.numel()):
        got = tuple(value.shape) if torch.is_tensor(value) else short_repr(value)
        raise InputError(f"depth_map must be a float tensor (images, height, width), got {got}")
    if not plain_tensor(value, "depth_map").isfinite().all():
        raise InputError("depth_map holds NaN or infinity")
    if (value.amin((1, 2)) == value.amax((1, 2))).any():  # diffusers divides by the range
        raise InputError("depth_map is constant: it must distinguish near from far")
    return value


def text(value: Any, name: str) -> str:
    """Validate a prompt: at most 4,000 characters of valid Unicode."""
    if not isinstance(value, str):
        raise InputError(f"{name} must be a string, got {short_repr(value)}")
    if len(value) > MAX_CHARACTERS:
        raise InputError(f"{name} must have at most {MAX_CHARACTERS} characters, got {len(value)}")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise InputError(
            f"{name} has a lone surrogate at position {error.start}, which is not valid Unicode: {short_repr(value)}"
        ) from None
    return value


def texts(value: Any, name: str) -> list[str]:
    """Validate a prompt or a list of prompts, and return a list."""
    if not isinstance(value, (list, tuple)):
        return [text(value, name)]
    if not value:
        raise InputError(f"{name} is an empty list: give at least one")
    return [text(one, f"{name}[{i}]") for i, one in enumerate(value)]


def batch_size(**lengths: int) -> int:
    """Return the number of items in a batch: every argument must have that many, or a single one for all."""
    most = max(lengths.values())
    for name, length in lengths.items():
        if length not in (1, most):
            given = ", ".join(f"{name} has {length}" for name, length in lengths.items())
            raise InputError(f"{name} must have 1 or {most} items, got {length} ({given})")
    return most


def generators(value: Any, number: int) -> None:
    """Validate sources of random numbers: None, one generator, or a list with one for each image."""
    several = isinstance(value, list)
    if value is not None and not all(isinstance(one, torch.Generator) for one in (value if several else [value])):
        raise InputError(
            f"generator must be a torch.Generator such as torch.Generator().manual_seed(7), got {short_repr(value)}"
        )
    if several and len(value) != number:
        raise InputError(f"generator must be one generator or a list of {number}, one per image, got {len(value)}")


def path(value: Any, name: str) -> Path:
    """Validate a path to a file or folder, which need not exist; ``~`` at its start is the user's home."""
    try:
        text = os.fsdecode(value)
        longest = max(len(os.fsencode(part)) for part in text.split(os.sep))
        if not text or "\0" in text:
            raise ValueError
        found = Path(text).expanduser()
    except (TypeError, ValueError, RuntimeError):  # not a path, not to be encoded, or there is no such user
        raise InputError(f"{name} must be a path, got {short_repr(value)}") from None
    if len(os.fsencode(text)) > MAX_PATH:
        raise InputError(f"{name} must be a path of at most {MAX_PATH:,} bytes, got {len(os.fsencode(text)):,}")
    if longest > MAX_NAME:
        raise InputError(f"{name} must have names of at most {MAX_NAME} bytes, got {longest} in {short_repr(text)}")
    return found


def file(value: Any, name: str = "file") -> Path:
    """Validate a path to a file that is to be written; a folder in its place is refused."""
    found = path(value, name)
    if found.is_dir():
        raise InputError(f"{name} must name a file, got the folder {short_repr(str(found))}")
    return found


def folder(value: Any) -> Path:
    """Validate the name of a folder, which need not exist."""
    return path(value, "folder")


def pil_image(value: Any, name: str) -> Image.Image:
    """Return a PIL image."""
    if not isinstance(value, Image.Image):
        raise InputError(f"{name} must be a PIL image, got {short_repr(value)}")
    return value


def pil_images(values: Any, name: str) -> Sequence[Image.Image]:
    """Return PIL images from one image or several, such as ``sweep.images``, which are read from files one by one."""
    images = [values] if isinstance(values, Image.Image) else bounded_list(values, name, MAX_IMAGES)
    for i, one in enumerate(images):
        pil_image(one, f"{name}[{i}]")
    return images


def bounded_list(values: Any, name: str, most: int) -> Sequence[Any]:
    """Return the values of an argument as a sequence; a generator is read, but not beyond ``most`` values.

    Raises:
        InputError: it is not a list or the like, or a generator of more values.
    """
    try:
        if isinstance(values, (str, bytes, dict)):
            raise TypeError
        read = values if isinstance(values, Sequence) else list(itertools.islice(values, most + 1))
        number = len(read)
    except TypeError:  # not iterable, or an array without dimensions
        raise InputError(f"{name} must be a list of values, got {short_repr(values)}") from None
    except OverflowError:
        raise InputError(f"{name} must have fewer than 2**63 values, got {short_repr(values)}") from None
    if read is not values and number > most:
        raise InputError(f"{name} has more than {most:,} values, or never ends: give a list")
    return read


def scheduler_config(config: dict[str, Any]) -> None:
    """Refuse a scheduler's configuration with a number so large that its tables would fill the memory."""
    name, number = largest_number(config)
    if number > MAX_SCHEDULER_NUMBER:
        raise InputError(f"{name} must be at most {MAX_SCHEDULER_NUMBER:,}, got {short_repr(number)}")


def choice(value: Any, name: str, allowed: Iterable[str]) -> str:
    """Validate one of a few allowed strings."""
    allowed = list(allowed)
    if not isinstance(value, str) or value not in allowed:
        raise InputError(f"{name} must be one of {', '.join(allowed)}, got {short_repr(value)}")
    return value


def flag(value: Any, name: str) -> bool:
    """Validate True or False."""
    if not isinstance(value, (bool, np.bool_)):
        raise InputError(f"{name} must be True or False, got {short_repr(value)}")
    return bool(value)


def steps_run(steps: int, strength: float, where: str = "") -> int:
    """Return how many of the steps run at a strength; truncated as diffusers does, so 0.58 of 50 steps is 28.

    Raises:
        InputError: no step would run; the message names the smallest strength that leaves one.
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
    """Refuse an unknown argument, and suggest the known one that is spelt most like it."""
    allowed = list(allowed)
    for name in names:
        if not isinstance(name, str) or name not in allowed:  # comparing an array would raise
            near = get_close_matches(name, allowed, 1) if isinstance(name, str) else []
            hint = f"did you mean {near[0]!r}?" if near else f"known are {', '.join(allowed)}"
            raise InputError(f"{where}unknown argument {short_repr(name)}; {hint}")


# --- warnings: the call can run, but the result may surprise ----------------------------------------------------------


def high_guidance(scale: float) -> str | None:
    """Return a warning if a guidance scale is so high that the image will be over-saturated."""
    if scale > HIGH_GUIDANCE:
        return f"guidance_scale {scale:g} is above {HIGH_GUIDANCE}: the image will be over-saturated"
    return None


def late_start(steps: int, scheduler: Any) -> str | None:
    """Return a warning if a scheduler with this number of steps starts far below full noise.

    "Leading" spacing rounds the distance between steps down: 600 steps of 1,000 timesteps are 1 apart and start at 600.

    Raises:
        InputError: the scheduler does not support this number of steps.
    """
    name, fresh = type(scheduler).__name__, type(scheduler).from_config(scheduler.config)
    try:
        fresh.set_timesteps(steps)
    except Exception as error:
        raise InputError(f"num_inference_steps: {name} does not support {steps}: {reason(error)}") from error
    total, first = scheduler.config.get("num_train_timesteps", 1000), float(fresh.timesteps[0])
    # The first timestep may be one step below the top; EDM's are logarithms of the noise, and always start at the top.
    if hasattr(scheduler, "precondition_noise") or first >= 0.85 * total * (1 - 1 / steps):
        return None
    return f"num_inference_steps {steps} starts at timestep {first:.0f} of {total} with {name}: use fewer steps"


def lost_words(words: str, tokenizer: Any) -> str:
    """Return the end of a prompt that a text encoder ignores, because it reads a limited number of tokens."""
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
    """Return a warning about the end of a prompt that is ignored."""
    return f"{name} is too long for the text encoder, which ignores its end: {short_repr(words)}"


def unused_negative(scale: float) -> str:
    """Return a warning about a negative prompt without guidance."""
    return f"negative_prompt is unused at guidance_scale {scale:g}: it needs a scale above 1"


def warn(note: str) -> None:
    """Warn in one line, attributed to the line of the user's code that called decinb."""
    frame, level = sys._getframe(), 1
    while frame.f_back and frame.f_globals.get("__name__", "").partition(".")[0] == "decinb":
        frame, level = frame.f_back, level + 1
    warnings.warn(note, stacklevel=level)


# --- helpers ----------------------------------------------------------------------------------------------------------


def equal(one: Any, other: Any) -> bool:
    """Return whether two values of any kind are equal: arrays and tensors, if they agree in shape and in all values."""
    if one is other:
        return True
    if tuple(getattr(one, "shape", ())) != tuple(getattr(other, "shape", ())):
        return False
    try:
        same = one == other
        return bool(same.all() if hasattr(same, "all") else same)
    except Exception:  # whatever a class may raise
        return False


def short_repr(value: Any) -> str:
    """Return a value as an error message repeats it: on one line, and the middle left out beyond 80 characters."""
    if isinstance(value, (str, bytes)) and len(value) > 2 * MAX_REPR:
        value = value[:MAX_REPR] + value[-MAX_REPR:]  # the middle of a million characters need not be formatted
    try:
        words = " ".join(repr(value).split())
    except Exception:  # Python refuses to print an integer of 5,000 digits, and any class may raise anything
        words = f"a value of type {type(value).__name__}"
    half = MAX_REPR // 2
    return words if len(words) <= MAX_REPR else f"{words[:half]}…{words[-half:]}"  # the end of a path tells most


def _number(value: Any, name: str, allowed: str, most: float) -> float:
    """Return a finite number: a float of Python exactly as given, unless only rounding puts it outside of the range.

    Diffusers truncates ``steps * strength``, so the last digit may decide a step: 10 steps at ``0.1 + 0.7`` run 7.
    """
    number = real(value)
    if number is None or not math.isfinite(number):
        raise InputError(f"{name} must be a number {allowed}, got {short_repr(value)}")
    number = float(number)
    if getattr(value, "itemsize", 8) < 8:
        number = round(number, 6)  # a float32 of 0.7 is 0.699999988
    inside = min(max(number, 0.0), float(most))
    return inside if abs(inside - number) < ROUNDING else number  # adding 0.05 twenty times gives 1.0000000000000002


def real(value: Any) -> Any:
    """Return a real number of Python, NumPy or torch; None for anything else, booleans included."""
    if getattr(value, "ndim", None) == 0 and hasattr(value, "item"):
        value = None if torch.is_tensor(value) and value.is_meta else value.item()
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        return None
    try:
        float(value)
    except OverflowError:
        return math.inf if value > 0 else -math.inf
    return value


def largest_number(config: Any) -> tuple[str, float]:
    """Return the finite number of the greatest magnitude in a value from JSON, and the name of its entry."""
    found, pending = ("", 0.0), [("", config)]
    while pending:
        name, value = pending.pop()
        if isinstance(value, dict):
            pending += [(str(key), inner) for key, inner in value.items()]
        elif isinstance(value, (list, tuple)):
            pending += [(name, inner) for inner in value]
        elif isinstance(value, (int, float)) and (isinstance(value, int) or math.isfinite(value)):
            found = max(found, (name, abs(value)), key=lambda entry: entry[1])
    return found
