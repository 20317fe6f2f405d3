"""Images in and out.

In: whatever a user calls a picture (a sample's name, a path, a URL, bytes, an array, a PIL image) becomes an upright
RGB picture of a size the model can take.
Out: a PNG that is whole or not there at all, and that carries the record of how it was made.
"""

import functools
import io
import json
import os
import re
import warnings
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from PIL.PngImagePlugin import PngInfo

from decinb.errors import InputError
from decinb.scenes import Scene, render
from decinb.utils import validation
from decinb.utils.url import fetch
from decinb.utils.validation import MAX_SIDE, MIN_SIDE, MULTIPLE

SAMPLES: dict[str, tuple[Scene, int]] = {
    "day": (Scene(house="blue", trees="round", mountains=True, layout=13), 128),
    "sunset": (Scene(time="sunset", ground="sand", house="white", trees="pine", layout=2), 128),
    "night": (Scene(time="night", ground="snow", house="red", trees="pine", layout=10), 128),
    "winter": (Scene(ground="snow", house="yellow", trees="pine", mountains=True, layout=18), 128),
    "sketch": (Scene(style="sketch", house="red", trees="pine", mountains=True, layout=17), 128),
    "valley": (Scene(house="red", trees="pine", mountains=True, layout=3), 512),
}
"""The bundled pictures, drawn when asked for: a scene, and its height and width in pixels."""

FORMATS = ("PNG", "JPEG", "WEBP")
MAX_PIXELS = 64_000_000  # a large phone photo; read from the header, before anything is decoded
MAX_FILE = 250_000_000  # bytes: so many pixels, not compressed
ROUNDING = 1e-4  # that floats of a picture may lie below 0 or above 1
MAX_ASPECT = 4  # no model has seen a picture that is longer

RECORD = "decinb"  # the PNG text chunk with the record
INPUT = b"inPt"  # the PNG chunk with the input: by its capitals ancillary, private and safe to copy

Source = str | os.PathLike[str] | bytes | np.ndarray | torch.Tensor | Image.Image
"""What a user may call a picture."""


def load_image(source: Source, size: int | None = None, allow_private: bool = False) -> Image.Image:
    """Read an image from the name of a sample, a path, a URL, bytes, an array, or a PIL image.

    The picture is turned upright, laid on white where it is transparent, and made RGB. It is never squashed: what does
    not fit is cut off evenly at the edges.

    Args:
        source: a key of ``SAMPLES``, a path to a PNG, JPEG or WEBP file, an http(s) URL of one, its bytes, a PIL image,
            an array (height, width, channels) or a tensor (channels, height, width); whole numbers from 0 to 255, or
            floats from 0 to 1.
        size: height and width of the result in pixels, a multiple of 8 from 64 to 2048: the largest square in the
            middle, scaled. Without it the picture keeps its size, cut to a multiple of 8, at most 2048.
        allow_private: let a URL lead to an address inside the own network.

    Raises:
        InputError: there is no such sample or file, the picture is damaged, too large or too small, or the server
            did not send a picture (at most 20 MB in 20 seconds).
    """
    return fit(read_image(source, size, allow_private), size)


def read_image(source: Source, size: int | None = None, allow_private: bool = False) -> Image.Image:
    """As ``load_image``, of the size that the picture has: a sample is drawn at the size that is asked for."""
    size = None if size is None else validation.side(size, "size")
    if isinstance(source, str) and source in SAMPLES:
        scene, own_size = SAMPLES[source]
        return render(scene, size or own_size)
    if isinstance(source, (np.ndarray, torch.Tensor)):
        return _from_array(source)
    data, name = (b"", "image") if isinstance(source, Image.Image) else _bytes(source, allow_private)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of many pixels, for which there is a limit here, and of damaged EXIF
            image = source if isinstance(source, Image.Image) else Image.open(io.BytesIO(data), formats=FORMATS)
            return _upright_rgb(image, name)
    except UnidentifiedImageError:
        raise InputError(f"{name} is not a {', '.join(FORMATS)} picture{_looks_like(data)}") from None
    except InputError:
        raise
    except (MemoryError, Image.DecompressionBombError) as error:
        raise InputError(f"{name} has more pixels than the {MAX_PIXELS // 10**6} million that are allowed") from error
    except Exception as error:  # Pillow's decoders raise whatever the bytes lead them to
        raise InputError(f"{name} is damaged: {' '.join(str(error).split())}") from error


def load_images(source: Source | list[Source], name: str = "image") -> list[Image.Image]:
    """One picture or several of one size, each as ``load_image`` reads it; an array may hold them along its first axis.

    Raises:
        InputError: there is none, one cannot be used, or they differ in size.
    """
    if isinstance(source, (np.ndarray, torch.Tensor)) and source.ndim == 4:
        source = list(source)
    if not isinstance(source, (list, tuple)):
        return [load_image(source)]
    if not source:
        raise InputError(f"{name} is an empty list: give at least one")
    made = []
    for i, one in enumerate(source):
        try:
            made.append(load_image(one))
        except InputError as error:
            raise InputError(f"{name}[{i}]: {error}") from error
    for i, one in enumerate(made):
        if one.size != made[0].size:
            raise InputError(
                f"{name}[{i}] has {one.width} x {one.height} pixels and {name}[0] {made[0].width} x {made[0].height}: "
                "those of one call must be of one size"
            )
    return made


def as_rgb(image: Image.Image) -> Image.Image:
    """A picture of any mode as RGB: laid on white where it is transparent, 16 bits and floats scaled to 8 bits."""
    if image.mode in ("F", "I") or image.mode.startswith("I;16"):
        # Pillow would cut off everything above 255; half grey must stay half grey.
        return Image.fromarray(_eight_bits(np.asarray(image))).convert("RGB")
    if image.mode == "La":
        image = image.convert("LA")  # the only mode that Pillow makes of it
    if image.has_transparency_data:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")


def save_image(image: Image.Image, path: Path, record: dict[str, Any], input_image: Image.Image | None = None) -> None:
    """Write a PNG with its record, and the picture it was made from, inside; no half-written file is ever found."""
    text = PngInfo()
    text.add_itxt(RECORD, json.dumps(record, allow_nan=False))
    if input_image is not None:
        text.add(INPUT, _lossless(input_image))
    try:
        with open(part_of(path), "wb") as file:
            image.save(file, "PNG", pnginfo=text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part_of(path), path)
    except OSError:
        with suppress(OSError):  # on a full disk the half would keep the room
            part_of(path).unlink()
        raise


def part_of(path: Path) -> Path:
    """Where a file is written before it gets its name: the same again after a kill, so that none is left behind."""
    return path.with_name(f".{path.name}.{os.environ.get('RANK', '0')}.part")  # the processes of one run never share


def read_record(path: str | Path) -> dict[str, Any]:
    """The record inside a PNG that decinb wrote.

    Raises:
        InputError: the file is not such a PNG, or not a whole one.
    """
    return _read(path)[0]


def read_input(path: str | Path) -> Image.Image:
    """The picture that a PNG of decinb was made from, which lies inside it.

    Raises:
        InputError: the file is not such a PNG, or not a whole one.
    """
    inside = _read(path)[1]
    if inside is None:
        raise InputError(f"{str(path)!r} does not hold the picture that it was made from")
    return inside


def _read(path: str | Path) -> tuple[dict[str, Any], Image.Image | None]:
    try:
        with Image.open(path, formats=("PNG",)) as image:
            image.load()
            record = json.loads(image.text[RECORD])
            if not isinstance(record, dict):
                raise ValueError("the record is not a dict")
            inside = next((chunk[1] for chunk in image.private_chunks if chunk[0] == INPUT), None)
        if inside is None:
            return record, None
        with Image.open(io.BytesIO(inside), formats=("WEBP",)) as picture:
            if picture.width > MAX_SIDE or picture.height > MAX_SIDE:
                raise ValueError("the picture inside is too large")
            return record, picture.convert("RGB")
    except (OSError, KeyError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise InputError(f"{str(path)!r} is not a whole PNG with a record of decinb in it") from error


@functools.lru_cache(8)
def _webp(size: tuple[int, int], pixels: bytes) -> bytes:
    file = io.BytesIO()
    Image.frombytes("RGB", size, pixels).save(file, "WEBP", lossless=True, quality=50)
    return file.getvalue()


def _lossless(image: Image.Image) -> bytes:
    """A picture in few bytes that keep every pixel; a sweep asks for the same one again and again."""
    image = image.convert("RGB")
    return _webp(image.size, image.tobytes())


def _bytes(source: Any, allow_private: bool) -> tuple[bytes, str]:
    """What is to be decoded, and what to call it in an error."""
    if isinstance(source, (bytes, bytearray)):
        return bytes(source), f"image of {len(source)} bytes"
    if not isinstance(source, (str, os.PathLike)):
        raise InputError(
            f"image must be a sample's name, a path, a URL, bytes, an array or a PIL image, got {type(source).__name__}"
        )
    text = os.fsdecode(source)
    name = f"image {validation.short_repr(text)}"
    if "://" in text or re.match("(data|file):", text, re.IGNORECASE):
        data, host = fetch(text.strip(), allow_private)
        return data, f"{name} from {host}"
    try:
        path = Path(text).expanduser()
        if path.is_dir():
            raise InputError(f"{name} is a folder: give a file in it")
        if not path.is_file():
            raise InputError(f"{name} is neither a file nor one of the samples: {', '.join(SAMPLES)}")
        if path.stat().st_size > MAX_FILE:
            raise InputError(f"{name} has {path.stat().st_size} bytes; at most {MAX_FILE} are allowed")
        return path.read_bytes(), name
    except (OSError, RuntimeError, ValueError) as error:  # no right to read it, no such user, no possible name
        if isinstance(error, InputError):
            raise
        raise InputError(f"{name} cannot be read: {validation.short_repr(str(error))}") from error


def _looks_like(data: bytes) -> str:
    start = data[:512].lstrip().lower()
    if not data:
        return ": it is empty"
    return ": it is a web page" if start.startswith((b"<!doctype html", b"<html")) else ""


def _upright_rgb(image: Image.Image, name: str) -> Image.Image:
    width, height = image.size
    if width * height > MAX_PIXELS:
        raise InputError(f"{name} has {width} x {height} pixels; at most {MAX_PIXELS // 10**6} million are allowed")
    return as_rgb(ImageOps.exif_transpose(image))


def _from_array(array: np.ndarray | torch.Tensor) -> Image.Image:
    """A picture from numbers: (height, width), (height, width, channels), or of a tensor (channels, height, width)."""
    shape = tuple(array.shape)
    if isinstance(array, torch.Tensor):
        expected, channels = "(channels, height, width), CHW", shape[0] if len(shape) == 3 else 1
        array = array.detach().cpu()
        array = (array.float() if array.is_floating_point() else array).numpy()
        array = np.moveaxis(array, 0, -1) if array.ndim == 3 else array
        other = len(shape) == 3 and shape[-1] in (1, 3, 4) and "HWC"
    else:
        expected, channels = "(height, width, channels), HWC", shape[-1] if len(shape) == 3 else 1
        other = len(shape) == 3 and shape[0] in (1, 3, 4) and "CHW"
    if len(shape) not in (2, 3) or channels not in (1, 3, 4) or 0 in shape:
        looks = f", which looks like {other}" if other and channels not in (1, 3, 4) else ""
        raise InputError(f"image must have the shape {expected} with 1, 3 or 4 channels, got {shape}{looks}")
    if channels == 4 and array.dtype != np.uint8:
        raise InputError(f"image of {array.dtype} has 4 channels, as latents have: a picture has 1 or 3")
    if array.shape[0] * array.shape[1] > MAX_PIXELS:
        raise InputError(f"image has the shape {shape}; at most {MAX_PIXELS // 10**6} million pixels are allowed")
    return as_rgb(Image.fromarray(_eight_bits(array.squeeze(-1) if array.ndim == 3 and channels == 1 else array)))


def _eight_bits(values: np.ndarray) -> np.ndarray:
    """Numbers of a picture as bytes: 16 bits, and floats from 0 to 1, are scaled."""
    kind = values.dtype.kind
    if values.dtype == np.uint8:
        return values
    if kind == "b":
        return values.astype(np.uint8) * 255
    if kind not in "fiu":
        raise InputError(f"image must hold whole numbers or floats, got {values.dtype}")
    low, high = values.min(), values.max()
    if kind == "f":
        if not (np.isfinite(low) and np.isfinite(high)):
            raise InputError("image holds NaN or infinity")
        if low < -ROUNDING or high > 1 + ROUNDING:
            raise InputError(f"floats of an image must be from 0 to 1, got {low:g} to {high:g}; divide bytes by 255")
        return (values.clip(0, 1) * 255).round().astype(np.uint8)
    if low < 0 or high > 65535:
        raise InputError(f"whole numbers of an image must be from 0 to 255, or of 16 bits, got {low} to {high}")
    deep = high > 255 or values.dtype.itemsize == 2
    return (values // 257 if deep else values).astype(np.uint8)


def fit(image: Image.Image, size: int | None = None) -> Image.Image:
    """The middle of a picture in a size that a model can take: see ``load_image``."""
    width, height = image.size
    if min(image.size) < MIN_SIDE:
        raise InputError(f"image must be at least {MIN_SIDE} x {MIN_SIDE} pixels, got {width} x {height}")
    if size:
        return ImageOps.fit(image, (size, size), Image.Resampling.LANCZOS)
    shrink = min(1, MAX_SIDE / max(image.size))
    if min(image.size) * shrink < MIN_SIDE:
        raise InputError(
            f"image of {width} x {height} pixels is too long: at {MAX_SIDE}, its shorter side has less than {MIN_SIDE}"
        )
    if max(image.size) > MAX_ASPECT * min(image.size):
        validation.warn(f"image of {width} x {height} pixels is longer than {MAX_ASPECT}:1, which no model has learnt")
    width, height = (int(side * shrink) // MULTIPLE * MULTIPLE for side in image.size)
    if shrink < 1:
        return ImageOps.fit(image, (width, height), Image.Resampling.LANCZOS)
    left, top = (image.width - width) // 2, (image.height - height) // 2
    return image.crop((left, top, left + width, top + height))
