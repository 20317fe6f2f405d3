"""Images in and out.

In: a sample's name, a path, a URL or a PIL image becomes an upright RGB picture of a size the model can take.
Out: a PNG that is whole or not there at all, and that carries the record of how it was made.
"""

import functools
import io
import ipaddress
import json
import os
import socket
import time
import warnings
from contextlib import suppress
from pathlib import Path
from typing import Any
from urllib.parse import urljoin, urlsplit

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError
from PIL.PngImagePlugin import PngInfo

from decinb.errors import InputError
from decinb.tiny.scenes import Scene, render

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
MAX_SIDE = 2048  # of an image given to a pipeline
MIN_SIDE = 64
MULTIPLE = 8  # a latent pixel is 8 x 8 image pixels

RECORD = "decinb"  # the PNG text chunk with the record
INPUT = b"inPt"  # the PNG chunk with the input: by its capitals ancillary, private and safe to copy

MAX_BYTES = 20_000_000
MAX_SECONDS = 20
MAX_REDIRECTS = 3


def load_image(source: str | Path | Image.Image, size: int | None = None, allow_private: bool = False) -> Image.Image:
    """Read an image from the name of a sample, a path, a URL, or a PIL image.

    The picture is turned upright, laid on white where it is transparent, and made RGB. It is never squashed: what does
    not fit is cut off evenly at the edges.

    Args:
        source: a key of ``SAMPLES``, a path to a PNG, JPEG or WEBP file, an http(s) URL of one, or a PIL image.
        size: height and width of the result in pixels, a multiple of 8 from 64 to 2048: the largest square in the
            middle, scaled. Without it the picture keeps its size, cut to a multiple of 8, at most 2048.
        allow_private: let a URL lead to an address inside the own network.

    Raises:
        InputError: there is no such sample or file, the picture is damaged, too large or too small, or the server
            did not send a picture (at most 20 MB in 20 seconds).
    """
    if size is not None and (not isinstance(size, int) or size % MULTIPLE or not MIN_SIDE <= size <= MAX_SIDE):
        raise InputError(f"size must be a multiple of {MULTIPLE} from {MIN_SIDE} to {MAX_SIDE}, got {size!r}")
    if isinstance(source, str) and source in SAMPLES:
        scene, own_size = SAMPLES[source]
        return render(scene, size or own_size)
    name = "image" if isinstance(source, Image.Image) else str(source)
    return _fit(_upright_rgb(_open(source, allow_private), name), size)


def as_rgb(image: Image.Image) -> Image.Image:
    """A picture of any mode as RGB: laid on white where it is transparent, 16 bits scaled to 8."""
    if image.mode.startswith("I;16"):
        # Pillow would cut off everything above 255; half grey must stay half grey.
        return Image.fromarray((np.asarray(image) // 257).astype(np.uint8)).convert("RGB")
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


def _open(source: str | Path | Image.Image, allow_private: bool) -> Image.Image:
    if isinstance(source, Image.Image):
        return source
    if not isinstance(source, (str, Path)):
        raise InputError(f"image must be a sample's name, a path, a URL or a PIL image, got {type(source).__name__}")
    if "://" in str(source):
        data, name = _download(str(source), allow_private), str(source)
    else:
        path = Path(source).expanduser()
        if not path.is_file():
            samples = ", ".join(SAMPLES)
            raise InputError(f"image {str(source)!r} is neither a file nor one of the samples: {samples}")
        data, name = path.read_bytes(), str(source)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # a lower limit of our own follows
            image = Image.open(io.BytesIO(data), formats=FORMATS)
    except UnidentifiedImageError:
        raise InputError(f"image {name!r} is not a {', '.join(FORMATS)} picture") from None
    except (OSError, ValueError, Image.DecompressionBombError) as error:
        raise InputError(f"image {name!r} is damaged or too large: {error}") from error
    return image


def _upright_rgb(image: Image.Image, name: str) -> Image.Image:
    width, height = image.size
    if width * height > MAX_PIXELS:
        raise InputError(
            f"image {name!r} has {width} x {height} pixels; at most {MAX_PIXELS // 10**6} million are allowed"
        )
    try:
        return as_rgb(ImageOps.exif_transpose(image))
    except (OSError, ValueError, SyntaxError) as error:
        raise InputError(f"image {name!r} is damaged: {error}") from error


def _fit(image: Image.Image, size: int | None) -> Image.Image:
    if min(image.size) < MIN_SIDE:
        raise InputError(f"image must be at least {MIN_SIDE} x {MIN_SIDE} pixels, got {image.width} x {image.height}")
    if size:
        return ImageOps.fit(image, (size, size), Image.Resampling.LANCZOS)
    shrink = min(1, MAX_SIDE / max(image.size))
    width, height = (max(MULTIPLE, int(side * shrink) // MULTIPLE * MULTIPLE) for side in image.size)
    if shrink < 1:
        return ImageOps.fit(image, (width, height), Image.Resampling.LANCZOS)
    left, top = (image.width - width) // 2, (image.height - height) // 2
    return image.crop((left, top, left + width, top + height))


def _download(url: str, allow_private: bool) -> bytes:
    """The body of a URL, from public addresses only, with its size and time bounded while it is read."""
    import requests

    deadline = time.monotonic() + MAX_SECONDS
    asked = url
    try:
        for _ in range(MAX_REDIRECTS + 1):
            _check_address(url, asked, allow_private)
            with requests.get(url, stream=True, timeout=(5, 10), allow_redirects=False) as response:
                if response.is_redirect:
                    url = urljoin(url, response.headers["location"])
                    continue
                if not response.ok:
                    raise InputError(
                        f"image {asked!r}: {urlsplit(url).hostname} answered with status {response.status_code}"
                    )
                body = bytearray()
                for chunk in response.iter_content(65536):
                    body += chunk
                    if len(body) > MAX_BYTES or time.monotonic() > deadline:
                        raise InputError(
                            f"image {asked!r} is more than {MAX_BYTES // 10**6} MB or took more than {MAX_SECONDS} s"
                        )
                return bytes(body)
    except requests.RequestException as error:
        raise InputError(
            f"image {asked!r} could not be fetched from {urlsplit(url).hostname}: {type(error).__name__}"
        ) from error
    raise InputError(f"image {asked!r} was redirected more than {MAX_REDIRECTS} times")


def _check_address(url: str, asked: str, allow_private: bool) -> None:
    parts = urlsplit(url)
    if parts.scheme.lower() not in ("http", "https") or not parts.hostname or parts.username:
        raise InputError(f"image {asked!r} must be an http or https URL without a user name (it leads to {url!r})")
    try:
        found = socket.getaddrinfo(parts.hostname, parts.port or parts.scheme, type=socket.SOCK_STREAM)
    except (OSError, ValueError) as error:
        raise InputError(f"image {asked!r}: the host {parts.hostname} is not known ({error})") from error
    inside = [address[4][0] for address in found if not ipaddress.ip_address(address[4][0].split("%")[0]).is_global]
    if inside and not allow_private:
        raise InputError(
            f"image {asked!r} leads to {parts.hostname}, inside the own network; allow_private=True permits that"
        )
