"""Draw the shapes of a scene: as an image in its style, as crude strokes, as depth, as a mask of each thing."""

import math
import random
from collections.abc import Callable, Iterator
from dataclasses import replace

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from decinb.scenes.attributes import IMAGE_SIZE, Scene
from decinb.scenes.layout import Layout
from decinb.scenes.shapes import Shape, shapes

PAPER, PENCIL = np.array((250, 247, 238), np.float32), np.array((62, 60, 66), np.float32)
PIXELS = 32
"""Height and width of pixel art, in large pixels."""

MIRROR = 2
"""How many times taller a thing is than its reflection: water seen at a low angle shortens reflections."""


def render(scene: Scene, size: int = IMAGE_SIZE) -> Image.Image:
    """Draw a scene as an RGB image of ``size`` x ``size`` pixels. The same scene gives the same bytes."""
    pixels = STYLES[scene.style](scene, size)
    return Image.fromarray(np.clip(pixels + 0.5, 0, 255).astype(np.uint8))


def depth_map(scene: Scene, size: int = IMAGE_SIZE) -> np.ndarray:
    """Return how near each pixel of a scene is, as MiDaS would: (size, size), float32, near is large.

    The sky is 0, mountains and hills are a little nearer, the ground rises from the horizon to 1 at the lower edge, and
    what stands on the ground is as near as its foot. Time, style and colours do not change it; snowflakes, clouds and
    shadows have no depth.

    Source: inverse depth up to scale and shift, Ranftl et al. (2020), arXiv:1907.01341.
    """
    horizon = Layout.draw(scene.layout).horizon
    rows = np.clip(((np.arange(size, dtype=np.float32) + 0.5) / size - horizon) / (1 - horizon), 0, 1)[:, None]
    depth = np.zeros((size, size), np.float32)
    for shape in shapes(scene):
        if shape.thing in ("snow", "clouds", "light", "shadow") or shape.softness:
            continue
        for top, left, mask in _coverage(shape, size):
            region = depth[top : top + mask.shape[0], left : left + mask.shape[1]]
            near = rows[top : top + mask.shape[0]] if shape.nearness is None else np.float32(shape.nearness)
            region += mask * (near - region)
    return depth


def thing_mask(scene: Scene, thing: str, size: int = IMAGE_SIZE) -> np.ndarray:
    """Return where a thing is, whether or not something stands in front of it: a boolean array (size, size).

    Args:
        thing: such as "house", "trees", "mountains" or "lake"; see ``Shape.thing``. All False if the scene lacks it.
    """
    found = np.zeros((size, size), bool)
    for shape in shapes(scene):
        if shape.thing == thing and not shape.softness:
            for top, left, mask in _coverage(shape, size):
                found[top : top + mask.shape[0], left : left + mask.shape[1]] |= mask > 0.5
    return found


def house_mask(scene: Scene, size: int = IMAGE_SIZE) -> np.ndarray:
    """Return where the building is, whether or not trees stand in front of it: a boolean array (size, size)."""
    return thing_mask(scene, "house", size)


# --- styles -----------------------------------------------------------------------------------------------------------


def _painting(scene: Scene, size: int) -> np.ndarray:
    canvas = np.empty((size, size, 3), np.float32)
    canvas[:] = PAPER
    for shape in shapes(scene):
        _lay(canvas, shape, size)
    return canvas


def _sketch(scene: Scene, size: int) -> np.ndarray:
    """Pencil on paper: edges as lines, darker colours of a thing as grey tone."""
    canvas = np.empty((size, size, 3), np.float32)
    canvas[:] = PAPER
    for shape in shapes(_as_sketched(scene)):
        tone = _tone(shape)
        if shape.softness or tone is None:
            continue
        for top, left, mask in _coverage(shape, size, margin=0.03):
            region = canvas[top : top + mask.shape[0], left : left + mask.shape[1]]
            region += mask[..., None] * (PAPER * (1 - tone) + PENCIL * tone - region)
            if shape.outlined:
                blurred = _blurred(mask, 0.008 * size)
                line = np.clip(2.2 * (1 - np.abs(2 * blurred - 1)) - 0.7, 0, 0.9)
                region += line[..., None] * (PENCIL - region)
    return canvas


def _as_sketched(scene: Scene) -> Scene:
    """Return the scene with default values where a pencil cannot show the difference."""
    return replace(scene, time="day", ground="grass", house="red" if scene.house else None)


def _tone(shape: Shape) -> float | None:
    """Return how dark a pencil shades a shape, from 0 to 1; None if it leaves the shape out."""
    if shape.thing == "snow":
        return 0.45
    if shape.thing in ("sky", "ground", "hills", "light", "clouds", "path"):
        return 0.0 if shape.outlined else None
    if shape.thing == "shadow":
        return None
    grey = float(np.dot(np.mean(shape.colours, axis=0), (0.299, 0.587, 0.114))) / 255
    return 0.55 * (1 - grey)


def _watercolour(scene: Scene, size: int) -> np.ndarray:
    """Thin washes on paper: uneven pigment that gathers at the edges, wavering outlines, a ragged white border."""
    rng = np.random.default_rng(scene.layout)
    canvas = np.empty((size, size, 3), np.float32)
    canvas[:] = PAPER
    for shape in shapes(scene):
        _lay(canvas, _wavering(shape), size, wet=True)
    pigment = (0.92 if scene.time == "night" else 0.84) + 0.14 * _smooth_noise(rng, size, 7)[..., None]
    canvas = PAPER - (PAPER - canvas) * pigment
    y, x = np.abs((np.mgrid[:size, :size].astype(np.float32) + 0.5) / size - 0.5) * 2
    border = (x**6 + y**6) ** (1 / 6) + 0.05 * _smooth_noise(rng, size, 11)
    inside = np.clip((0.93 - border) * 14, 0, 1)[..., None]
    return PAPER + (canvas - PAPER) * inside


def _wavering(shape: Shape) -> Shape:
    """Move the edges of a shape a little, as an unsteady brush would."""
    if shape.thing in ("light", "snow"):
        return shape
    moved = []
    for part in shape.parts:
        points = np.asarray(part, np.float32)
        after = np.roll(points, -1, axis=0)
        share = np.array([0, 1 / 3, 2 / 3], np.float32)[None, :, None]
        points = (points[:, None] * (1 - share) + after[:, None] * share).reshape(-1, 2)
        moved.append(points + 0.0045 * np.sin(points[:, ::-1] * (47, 41) + points * (23, 31)))
    return replace(shape, parts=tuple(moved))


def _smooth_noise(rng: np.random.Generator, size: int, cells: int) -> np.ndarray:
    coarse = Image.fromarray(rng.uniform(-1, 1, (cells, cells)).astype(np.float32))
    return np.asarray(coarse.resize((size, size), Image.Resampling.BICUBIC))


def _pixel_art(scene: Scene, size: int) -> np.ndarray:
    """Few large pixels in few colours."""
    canvas = np.zeros((PIXELS, PIXELS, 3), np.float32)
    for shape in shapes(scene):
        _lay(canvas, shape, PIXELS, hard=True)
    canvas = np.clip(np.rint(canvas / 24) * 24, 0, 255)
    return np.asarray(
        Image.fromarray(canvas.astype(np.uint8)).resize((size, size), Image.Resampling.NEAREST), np.float32
    )


STYLES: dict[str, Callable[[Scene, int], np.ndarray]] = {
    "painting": _painting,
    "watercolour": _watercolour,
    "sketch": _sketch,
    "pixel art": _pixel_art,
}


# --- strokes ----------------------------------------------------------------------------------------------------------


def strokes(scene: Scene, size: int = IMAGE_SIZE) -> Image.Image:
    """Draw the crude coloured strokes that a person would paint for a scene, whatever its style.

    Each large shape becomes a few wide strokes of one colour; small shapes, light and shade are left out.

    Source: the input of SDEdit, Meng et al. (2021), arXiv:2108.01073.
    """
    rng = random.Random(scene.layout)
    image = Image.new("RGB", (2 * size, 2 * size), (255, 255, 255))
    pen = ImageDraw.Draw(image)
    for shape in shapes(scene):
        if shape.softness or shape.thing in ("snow", "shadow") or not (shape.outlined or shape.thing == "sky"):
            continue
        for top, left, mask in _coverage(shape, size):
            if mask.sum() < 0.006 * size * size:
                continue
            _hatch(pen, mask > 0.5, left, top, shape, size, rng)
    return image.resize((size, size), Image.Resampling.BOX)


def _hatch(
    pen: ImageDraw.ImageDraw, inside: np.ndarray, left: int, top: int, shape: Shape, size: int, rng: random.Random
) -> None:
    """Cover a region with horizontal strokes, each of one colour."""
    height, reach = inside.shape[0], size if inside.shape[1] == size else 0
    width = min(0.07 * size, max(0.03 * size, 0.4 * height))
    count = max(1, round(height / (0.62 * width)))
    bands = 3 if height > 0.3 * size else 1
    for i in range(count):
        y = (i + 0.5) * height / count
        row = inside[min(int(y), height - 1)]
        edges = np.flatnonzero(np.diff(np.concatenate(([0], row.astype(np.int8), [0]))))
        low, high = _extent(shape)
        share = (math.floor(bands * y / height) + 0.5) / bands
        colour = tuple(round(float(c)) for c in _colours(shape, np.array([low + (high - low) * share]))[0])
        for start, end in zip(edges[::2], edges[1::2], strict=True):
            if end - start < 0.02 * size:
                continue
            inset = min(width / 2, (end - start) / 2) * 0.8 - 0.1 * (end - start == reach) * size
            shift = [rng.uniform(-0.012, 0.012) * size for _ in range(4)]
            first = (left + start + inset + shift[0], top + y + shift[1])
            last = (left + end - inset + shift[2], top + y + shift[3])
            pen.line([(2 * px, 2 * py) for px, py in (first, last)], fill=colour, width=round(2 * width))
            for px, py in (first, last):
                pen.ellipse([2 * px - width, 2 * py - width, 2 * px + width, 2 * py + width], fill=colour)


# --- brushes ----------------------------------------------------------------------------------------------------------


def _coverage(shape: Shape, size: int, margin: float = 0.0) -> Iterator[tuple[int, int, np.ndarray]]:
    """Yield (top, left, mask) of the smallest region that holds a shape, if any of it is in the image.

    The mask is (height, width), float32, the fraction of each pixel that the shape covers; edges are smoothed by
    drawing it several times as large.
    """
    scale = 4 if size <= 256 else 2
    parts = [np.asarray(part) * size for part in shape.parts]
    lows = np.min([part.min(axis=0) for part in parts], axis=0).tolist()
    highs = np.max([part.max(axis=0) for part in parts], axis=0).tolist()
    spread = (margin + 2.5 * shape.softness) * size
    left, top = max(0, math.floor(lows[0] - spread)), max(0, math.floor(lows[1] - spread))
    right, bottom = min(size, math.ceil(highs[0] + spread)), min(size, math.ceil(highs[1] + spread))
    if right <= left or bottom <= top:
        return
    drawn = Image.new("L", ((right - left) * scale, (bottom - top) * scale))
    pen = ImageDraw.Draw(drawn)
    for part in parts:
        pen.polygon(((part - (left, top)) * scale - 0.5).ravel().tolist(), fill=255)
    drawn = drawn.reduce(scale)
    if shape.softness:
        drawn = drawn.filter(ImageFilter.GaussianBlur(shape.softness * size))
    yield top, left, _as_mask(drawn)


def _lay(canvas: np.ndarray, shape: Shape, size: int, wet: bool = False, hard: bool = False) -> None:
    """Paint one shape over what is there.

    Args:
        wet: gather pigment at its edge, as watercolour does.
        hard: cover each pixel wholly or not at all.
    """
    for top, left, mask in _coverage(shape, size):
        height, width = mask.shape
        region = canvas[top : top + height, left : left + width]
        colour = _colours(shape, (np.arange(top, top + height, dtype=np.float32) + 0.5) / size)[:, None]
        if shape.mirrors is not None:
            above = (shape.mirrors * size - MIRROR * (np.arange(height) + 1)).astype(int)
            colour = 0.62 * canvas[np.clip(above, 0, size - 1), left : left + width] + 0.38 * colour
        if hard and not shape.softness:
            mask = (mask > 0.42).astype(np.float32)
        if wet and not shape.softness and shape.outlined:
            rim = 1 - np.abs(2 * _blurred(mask, 0.012 * size) - 1)
            colour = colour * (1 - 0.22 * rim[..., None])
        region += (mask if shape.opacity == 1 else shape.opacity * mask)[..., None] * (colour - region)


def _colours(shape: Shape, heights: np.ndarray) -> np.ndarray:
    """Return the colour of a shape at each of some heights in the image, (heights, 3), float32."""
    colours = np.asarray(shape.colours, np.float32)
    if len(colours) == 1:
        return np.broadcast_to(colours, (len(heights), 3))
    low, high = _extent(shape)
    place = np.clip((heights - low) / max(high - low, 1e-6), 0, 1) * (len(colours) - 1)
    first = np.minimum(place.astype(int), len(colours) - 2)
    return colours[first] + (place - first)[:, None].astype(np.float32) * (colours[first + 1] - colours[first])


def _extent(shape: Shape) -> tuple[float, float]:
    heights = [y for part in shape.parts for _, y in part]
    return min(heights), max(heights)


def _blurred(mask: np.ndarray, radius: float) -> np.ndarray:
    return _as_mask(Image.fromarray((mask * 255).astype(np.uint8)).filter(ImageFilter.GaussianBlur(radius)))


def _as_mask(image: Image.Image) -> np.ndarray:
    pixels = np.frombuffer(image.tobytes(), np.uint8).reshape(image.height, image.width)
    return pixels.astype(np.float32) * np.float32(1 / 255)
