"""Read images that users give, and save images with the record of how they were made.

``load_image`` turns a sample's name, a path, a URL, bytes, an array, a tensor or a PIL image into an upright RGB image
of a size that a model takes. ``save_image`` writes a PNG, complete or not at all, with a record inside, and a seal: the
hash of all bytes before it. A file that was edited since, even by a program that keeps the record, is refused.
"""

import functools
import hashlib
import io
import json
import os
import re
import struct
import warnings
import zlib
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from PIL.PngImagePlugin import PngInfo

from decinb.errors import InputError, reason
from decinb.scenes import Scene, render, strokes
from decinb.utils import validation
from decinb.utils.files import open_regular, parse_json, read_regular, write_atomically
from decinb.utils.url import fetch
from decinb.utils.validation import MAX_SIDE, MULTIPLE

SAMPLES: dict[str, tuple[Scene, int]] = {
    "day": (Scene(house="blue", trees="round", mountains=True, layout=13), 128),
    "sunset": (Scene(time="sunset", ground="sand", house="white", trees="pine", layout=2), 128),
    "night": (Scene(time="night", ground="snow", house="red", trees="pine", layout=10), 128),
    "winter": (Scene(ground="snow", house="yellow", trees="pine", mountains=True, layout=18), 128),
    "sketch": (Scene(style="sketch", house="red", trees="pine", mountains=True, layout=17), 128),
    "valley": (Scene(house="red", trees="pine", mountains=True, layout=3), 512),
    "strokes": (Scene(time="sunset", house="red", trees="poplar", mountains=True, path=True, layout=5), 128),
}
"""The sample images by name, drawn when they are asked for: a scene, and its height and width in pixels.

"strokes" shows its scene as crude strokes of colour.
"""

FORMATS = ("PNG", "JPEG", "WEBP")
MAX_PIXELS = 64_000_000  # more than a phone photo; checked in the header, before anything is decoded
MAX_FILE = 250_000_000  # bytes, of that many pixels without compression
MAX_SAVED_PIXELS = 4 * MAX_SIDE**2  # of an image that decinb saved; an upscaler makes more than MAX_SIDE a side
MAX_SAVED_FILE = 64_000_000  # bytes, of that many pixels without compression, and an input
MAX_PARTS = 100_000  # chunks of a PNG; a large photo has some thousands
MAX_SCANS = 100  # of a JPEG, each of which goes over all pixels; programs write about ten
SCAN = re.compile(rb"\xff\xda\x00[\x08\x0a\x0c\x0e]")  # the start of one, with its length for 1 to 4 colours
MAX_CONTAINERS = 20_000  # lists and dicts in a record; the longest chain has some thousands
MAX_BATCH = 1000  # images in one call
ROUNDING = 1e-4  # floats may lie this far below 0 or above 1
MAX_ASPECT = 4  # models are not trained on longer images

RECORD = "decinb"  # the PNG text chunk with the record
INPUT = b"inPt"  # the PNG chunk with the input image; the capitals say: ancillary, private, safe to copy
SEAL = b"seAL"  # the PNG chunk before the last with the SHA-256 of what comes before it: not safe to copy
END = b"\0\0\0\0IEND\xaeB`\x82"  # the last chunk of every PNG
OUTPUT_HASH = "output_hash"  # a field of all records that were ever sealed

Source: TypeAlias = str | os.PathLike[str] | bytes | np.ndarray | torch.Tensor | Image.Image
"""What ``load_image`` takes."""


def load_image(source: Source, size: int | None = None, allow_private: bool = False) -> Image.Image:
    """Load an image from the name of a sample, a path, a URL, bytes, an array, a tensor or a PIL image.

    The result is upright (as EXIF says) and RGB, with white where the image is transparent. The aspect ratio is kept:
    what does not fit is cropped evenly at the edges.

    Args:
        source: a key of ``SAMPLES``, a path to a PNG, JPEG or WEBP file, an http(s) URL of one, its bytes, a PIL image,
            an array (height, width, channels) or a tensor (channels, height, width), also in a batch of one; integers
            from 0 to 255, or to 65535 if any is above 255, or floats from 0 to 1. A uint16 array with no value
            above 255 is refused, unless it is black: nothing tells whether its white is 255 or 65535.
        size: height and width of the result in pixels, a multiple of 8 up to 2048: the largest square in the middle,
            scaled. None keeps the size of the image, cropped to a multiple of 8 and at most 2048.
        allow_private: let a URL lead to a private address, one of this machine or its network.

    Raises:
        InputError: there is no such sample or file, the image is damaged, too large or too small, or the server did
            not send an image (at most 20 MB in 20 seconds).
    """
    size = None if size is None else validation.side(size, "size")
    return fit(read_image(source, size, allow_private), size)


def read_image(source: Source, size: int | None = None, allow_private: bool = False) -> Image.Image:
    """Read an image like ``load_image``, but keep its original size; ``size`` is that of a sample."""
    size = None if size is None else validation.side(size, "size")
    if isinstance(source, str) and source in SAMPLES:
        return _draw_sample(source, size).copy()
    if isinstance(source, (np.ndarray, torch.Tensor)):
        return _from_array(source)
    data, name = (b"", "image") if isinstance(source, Image.Image) else _bytes(source, allow_private)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about many pixels, which are limited below, and about damaged EXIF
            _check_parts(data)
            image = source if isinstance(source, Image.Image) else Image.open(io.BytesIO(data), formats=FORMATS)
            return _upright_rgb(image, name)
    except UnidentifiedImageError:
        raise InputError(f"{name} is not a PNG, JPEG or WEBP image{_looks_like(data)}") from None
    except InputError:
        raise
    except (MemoryError, Image.DecompressionBombError) as error:
        raise InputError(f"{name} has more than {MAX_PIXELS // 10**6} million pixels") from error
    except Exception as error:  # Pillow's decoders may raise anything on damaged data
        raise InputError(f"{name} is damaged: {reason(error)}") from error


@functools.lru_cache(maxsize=16)
def _draw_sample(name: str, size: int | None) -> Image.Image:
    """Draw a sample once: sweeps and the playground ask for the same one again and again."""
    scene, own_size = SAMPLES[name]
    return (strokes if name == "strokes" else render)(scene, size or own_size)


def load_images(
    source: Source | list[Source], multiple: int = MULTIPLE, exact: bool = False
) -> list[Image.Image] | torch.Tensor:
    """Load one image or several of the same size, each as ``load_image`` does.

    Args:
        source: one source, a list of them, an array (images, height, width, channels) or a tensor (images, channels,
            height, width).
        multiple: the sides of the result are multiples of this.
        exact: keep arrays and tensors of floats as they are, rather than rounding them to the 256 levels of an image.

    Returns:
        A list, or for exact floats a float tensor (images, 3, height, width) from 0 to 1.

    Raises:
        InputError: the list is empty, an image cannot be loaded, or they differ in size.
    """
    if exact and (pixels := _float_batch(source)) is not None:
        return fit_pixels(pixels, multiple)
    if isinstance(source, (np.ndarray, torch.Tensor)) and source.ndim == 4:
        source = list(source)
    if not isinstance(source, (list, tuple)):
        return [fit(read_image(source), multiple=multiple)]
    if not source:
        raise InputError("image is an empty list: give at least one")
    if len(source) > MAX_BATCH:
        raise InputError(f"image must be at most {MAX_BATCH:,} images, got {len(source):,}")
    made = []
    for i, one in enumerate(source):
        try:
            made.append(fit(read_image(one), multiple=multiple))
        except InputError as error:
            raise InputError(f"image[{i}]: {error}") from error
    for i, one in enumerate(made):
        if one.size != made[0].size:
            raise InputError(
                f"image[{i}] has {one.width} x {one.height} pixels and image[0] {made[0].width} x {made[0].height}: "
                "the images of one call must have the same size"
            )
    return made


def as_rgb(image: Image.Image) -> Image.Image:
    """Convert an image of any mode to RGB: white where it is transparent, 16 bits and floats scaled to 8 bits."""
    if image.mode in ("F", "I") or image.mode.startswith("I;16"):
        # Pillow would clip everything above 255.
        return Image.fromarray(_eight_bits(np.asarray(image), image.mode.startswith("I;16"))).convert("RGB")
    if image.mode == "La":
        image = image.convert("LA")  # the only mode that Pillow converts it to
    if image.has_transparency_data:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")


def save_image(image: Image.Image, path: Path, record: dict[str, Any], input_image: Image.Image | None = None) -> None:
    """Write a PNG with its record inside, and with the input image if one is given; complete or not at all.

    Args:
        image: what to save.
        path: the file. Its folder must exist.
        record: what the image was made from, as JSON.
        input_image: the image that it was made from; saved without loss.

    Raises:
        OSError: the file cannot be written, or the image is too large to be read again.
    """
    if image.width * image.height > MAX_SAVED_PIXELS:
        raise OSError(f"an image of {image.width} x {image.height} pixels is too large to be saved with its record")
    info = PngInfo()
    info.add_itxt(RECORD, json.dumps(record, allow_nan=False))
    if input_image is not None:
        info.add(INPUT, _lossless(input_image))
    file = io.BytesIO()
    image.save(file, "PNG", pnginfo=info)
    write_atomically(path, _sealed(file.getvalue()))


class Saved(NamedTuple):
    """What a PNG holds that decinb saved.

    Args:
        image: the image.
        record: what it was made from.
        input_image: the image that it was made from, or None.
        sealed: whether the seal proves that nothing was changed; False for files of earlier versions, which have none.
    """

    image: Image.Image
    record: dict[str, Any]
    input_image: Image.Image | None
    sealed: bool


def read_record(path: str | Path) -> dict[str, Any]:
    """Return the record inside a PNG that decinb saved.

    Raises:
        InputError: the file is not such a PNG, is damaged, or was changed.
    """
    return read_saved(path).record


def read_input(path: str | Path) -> Image.Image:
    """Return the input image inside a PNG that decinb saved.

    Raises:
        InputError: the file is not such a PNG, is damaged, was changed, or was made without an input image.
    """
    image = read_saved(path).input_image
    if image is None:
        raise InputError(f"{_shown(path)} does not contain the image that it was made from")
    return image


def read_saved(path: str | Path) -> Saved:
    """Return all that is inside a PNG that decinb saved.

    Raises:
        InputError: the file is not such a PNG, is damaged, or was changed.
    """
    try:
        with open_regular(validation.path(path, "path"), MAX_SAVED_FILE) as file:
            data = file.read()
        _check_parts(data)
        sealed = _has_seal(data)
        with _open(io.BytesIO(data), "PNG") as image:
            del data  # a large file and its pixels need not be in memory together
            if image.width * image.height > MAX_SAVED_PIXELS:
                raise ValueError("it has too many pixels")
            image.load()
            text = image.text[RECORD]
            if text.count("{") + text.count("[") > MAX_CONTAINERS:
                raise ValueError("the record has too many parts")
            record = parse_json(text)
            if not isinstance(record, dict):
                raise ValueError("the record is not a dict")
            own = {chunk[0]: chunk[1] for chunk in image.private_chunks}
        image = image.convert("RGB")
        input_image = _decode_input(own[INPUT]) if INPUT in own else None
    except InputError:
        raise
    except Exception as error:  # Pillow's decoders may raise anything on damaged data
        why = getattr(error, "strerror", None) or reason(error)
        raise InputError(f"{_shown(path)} is not a PNG that decinb saved, or is damaged: {why}") from error
    if not sealed and (SEAL in own or OUTPUT_HASH in record):
        raise InputError(f"{_shown(path)} was changed after decinb saved it")
    return Saved(image, record, input_image, sealed)


def _decode_input(data: bytes) -> Image.Image:
    with _open(io.BytesIO(data), "WEBP") as image:
        if max(image.size) > MAX_SIDE:
            raise ValueError("the image inside is too large")
        return image.convert("RGB")


def _open(file: Any, format: str) -> Image.Image:
    """Open an image of one format; how many pixels it may have is checked by the caller, so nothing warns of many."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return Image.open(file, formats=(format,))


def _shown(path: str | os.PathLike[str]) -> str:
    return validation.short_repr(os.fspath(path))


def _sealed(png: bytes) -> bytes:
    """Return a PNG file with a seal before its last chunk."""
    before = png.removesuffix(END)
    return before + _seal(before)


def _has_seal(png: bytes) -> bool:
    """Return whether a PNG file ends with its seal, and the seal is right."""
    end = len(END) + 44  # the length, type and checksum of the chunk around 32 bytes
    return len(png) > end and _seal(memoryview(png)[:-end]) == png[-end:]


def _seal(before: bytes | memoryview) -> bytes:
    """Return the end of a PNG file: the chunk with the seal of what comes before it, and the last chunk."""
    seal = hashlib.sha256(before).digest()
    return struct.pack(">I", len(seal)) + SEAL + seal + struct.pack(">I", zlib.crc32(SEAL + seal)) + END


@functools.lru_cache(8)
def _webp(size: tuple[int, int], pixels: bytes) -> bytes:
    file = io.BytesIO()
    Image.frombytes("RGB", size, pixels).save(file, "WEBP", lossless=True, quality=50)
    return file.getvalue()


def _lossless(image: Image.Image) -> bytes:
    """Compress an image without loss; cached, because a sweep saves the same input many times."""
    image = image.convert("RGB")
    return _webp(image.size, image.tobytes())


def _bytes(source: Any, allow_private: bool) -> tuple[bytes, str]:
    """Return the bytes to decode, and what error messages call them."""
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
        return read_regular(path, MAX_FILE), name
    except (OSError, RuntimeError, ValueError) as error:  # no permission, no such user (~name), an impossible name
        if isinstance(error, InputError):
            raise
        raise InputError(f"{name} cannot be read: {validation.short_repr(str(error))}") from error


def _looks_like(data: bytes) -> str:
    start = data[:512].lstrip().lower()
    if not data:
        return ": it is empty"
    return ": it is a web page" if start.startswith((b"<!doctype html", b"<html")) else ""


def _check_parts(data: bytes) -> None:
    """Refuse a PNG or JPEG file of very many parts, which take long to read however few its pixels are."""
    if data.startswith(b"\xff\xd8") and (scans := len(SCAN.findall(data))) > MAX_SCANS:
        raise ValueError(f"it has {scans:,} scans, and at most {MAX_SCANS} are allowed")
    if data.startswith(b"\x89PNG"):
        start = 8
        for _ in range(MAX_PARTS):
            start += 12 + int.from_bytes(data[start : start + 4])  # length, type and checksum around the content
            if start >= len(data):
                return
        raise ValueError(f"it has more than {MAX_PARTS:,} chunks")


def _upright_rgb(image: Image.Image, name: str) -> Image.Image:
    width, height = image.size
    if width * height > MAX_PIXELS:
        raise InputError(f"{name} has {width} x {height} pixels; at most {MAX_PIXELS // 10**6} million are allowed")
    return as_rgb(ImageOps.exif_transpose(image))


def _from_array(array: np.ndarray | torch.Tensor) -> Image.Image:
    """Convert an array (height, width[, channels]) or a tensor ([channels,] height, width), also in a batch of one."""
    if isinstance(array, torch.Tensor):
        validation.plain_tensor(array, "image")
    if array.ndim == 4:
        if array.shape[0] != 1:
            raise InputError(f"image has the shape {tuple(array.shape)}, {array.shape[0]} images: one is expected here")
        array = array[0]
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
        raise InputError(f"image of {array.dtype} has 4 channels like latents: an image has 1 or 3")
    if array.shape[0] * array.shape[1] > MAX_PIXELS:
        raise InputError(f"image has the shape {shape}; at most {MAX_PIXELS // 10**6} million pixels are allowed")
    return as_rgb(Image.fromarray(_eight_bits(array.squeeze(-1) if array.ndim == 3 and channels == 1 else array)))


def _eight_bits(values: np.ndarray, deep: bool = False) -> np.ndarray:
    """Convert pixel values to bytes: 16 bits, and floats from 0 to 1, are scaled; ``deep`` says that white is 65535."""
    kind = values.dtype.kind
    if values.dtype == np.uint8:
        return values
    if kind == "b":
        return values.astype(np.uint8) * 255
    if kind not in "fiu":
        raise InputError(f"image must hold integers or floats, got {values.dtype}")
    low, high = values.min(), values.max()
    if kind == "f":
        _check_floats(float(low), float(high))
        return (values.clip(0, 1) * 255).round().astype(np.uint8)
    if low < 0 or high > 65535:
        raise InputError(f"image of integers must be from 0 to 255, or to 65535, got {low} to {high}")
    if kind == "u" and values.dtype.itemsize == 2 and 0 < high <= 255 and not deep:
        raise InputError(
            f"image of uint16 is from {low} to {high}, so its white may be 255 or 65535: convert it to uint8, after a "
            "division by 257 if white is 65535"
        )
    return (values // 257 if deep or high > 255 else values).astype(np.uint8)


def _check_floats(low: float, high: float) -> None:
    if not (np.isfinite(low) and np.isfinite(high)):
        raise InputError("image holds NaN or infinity")
    if low < -ROUNDING or high > 1 + ROUNDING:
        hint = "halve it and add 0.5" if low >= -1 - ROUNDING and high <= 1 + ROUNDING else "divide bytes by 255"
        raise InputError(f"image of floats must be from 0 to 1, got {low:g} to {high:g}; {hint}")


def _float_batch(source: Any) -> torch.Tensor | None:
    """Return arrays and tensors of floats as one tensor (images, 3, height, width), or None for anything else.

    None also for those that ``read_image`` refuses or scales down.
    """
    items = list(source) if isinstance(source, (list, tuple)) else [source]
    batches = []
    for item in items[: MAX_BATCH + 1]:
        if isinstance(item, np.ndarray) and item.dtype.kind == "f" and item.ndim in (3, 4):
            item = torch.from_numpy(np.moveaxis(item.astype(np.float32), -1, -3))
        elif not (isinstance(item, torch.Tensor) and item.is_floating_point() and item.ndim in (3, 4)):
            return None
        batch = validation.plain_tensor(item, "image").detach()
        batches.append(batch if batch.ndim == 4 else batch[None])
    shapes = {tuple(batch.shape[1:]) for batch in batches}
    if len(shapes) != 1 or sum(map(len, batches)) > MAX_BATCH:
        return None
    ((channels, height, width),) = shapes
    if channels not in (1, 3) or min(height, width) == 0 or max(height, width) > MAX_SIDE or not len(batches[0]):
        return None
    pixels = torch.cat([batch.float() for batch in batches])
    _check_floats(float(pixels.min()), float(pixels.max()))
    return pixels.clamp(0, 1).expand(-1, 3, -1, -1)


def fit_pixels(pixels: torch.Tensor, multiple: int = MULTIPLE) -> torch.Tensor:
    """Crop pixels (images, channels, height, width) evenly, so that their sides are multiples of ``multiple``."""
    height, width = pixels.shape[-2:]
    _check_smallest(width, height, multiple)
    new_height, new_width = height // multiple * multiple, width // multiple * multiple
    top, left = (height - new_height) // 2, (width - new_width) // 2
    return pixels[..., top : top + new_height, left : left + new_width]


def _check_smallest(width: int, height: int, multiple: int) -> None:
    if min(width, height) < multiple:
        raise InputError(f"image must be at least {multiple} x {multiple} pixels, got {width} x {height}")


def fit(image: Image.Image, size: int | None = None, multiple: int = MULTIPLE) -> Image.Image:
    """Crop and scale an image to a size that a model takes, as ``load_image`` describes."""
    width, height = image.size
    _check_smallest(width, height, multiple)
    if size:
        return ImageOps.fit(image, (size, size), Image.Resampling.LANCZOS)
    shrink = min(1, MAX_SIDE / max(image.size))
    if min(image.size) * shrink < multiple:
        raise InputError(
            f"image of {width} x {height} pixels is too long: scaled to {MAX_SIDE} pixels, its shorter side has less "
            f"than {multiple}"
        )
    if max(image.size) > MAX_ASPECT * min(image.size):
        validation.warn(
            f"image of {width} x {height} pixels is longer than {MAX_ASPECT}:1: models are not trained on such images"
        )
    width, height = (int(side * shrink) // multiple * multiple for side in image.size)
    if shrink < 1:
        return ImageOps.fit(image, (width, height), Image.Resampling.LANCZOS)
    left, top = (image.width - width) // 2, (image.height - height) // 2
    return image.crop((left, top, left + width, top + height))
