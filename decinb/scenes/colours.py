"""Read attributes from the colours of an image, as a check of the judge that does not depend on it.

Meant for paintings, whose colours are the renderer's own. Other styles mix them with paper, or leave them out.
"""

import numpy as np
from PIL import Image

from decinb.scenes.shapes import GROUND, HOUSE, LIGHT, SKY, SUN, WALL_LIGHT

SIDE = 64
"""Height and width in pixels to which images are scaled first."""

NEAR = 30.0
"""How far a pixel may be from the colour of the sun or the moon, of 255, in each channel."""

SUN_AREA, WALL_AREA = 0.004, 0.006
"""The smallest fraction of an image that counts as a sun, and as a wall."""

SUN_WIDTH, BUILDING_WIDTH = 0.18, {"cottage": 0.48, "barn": 0.48, "windmill": 0.28}
"""The largest width of one sun and one building, in fractions of the image. Regions farther apart count as two."""


def time_by_colour(image: Image.Image) -> str:
    """Return the time of day whose clear sky is nearest in colour to an image, a quarter of the way down."""
    sky = np.median(_pixels(image)[SIDE // 5 : 3 * SIDE // 10].reshape(-1, 3), axis=0)
    return min(SKY["clear"], key=lambda time: np.abs(sky - SKY["clear"][time][1]).sum())


def ground_by_colour(image: Image.Image, time: str) -> str:
    """Return the ground whose colour at ``time`` is nearest to that of the lower edge of an image."""
    lower = np.median(_pixels(image)[-SIDE // 16 :].reshape(-1, 3), axis=0)
    return min(GROUND, key=lambda ground: np.abs(lower - np.multiply(GROUND[ground][1], LIGHT[time])).sum())


def count_suns(image: Image.Image, time: str) -> int:
    """Return the number of suns or moons in the upper half of an image. A cloud may cover the middle of one."""
    upper = _pixels(image)[: SIDE // 2]
    found = (np.abs(upper - SUN[time][0]) < NEAR).all(axis=-1)
    return _count(found, SUN_AREA, SUN_WIDTH)


def count_red_buildings(image: Image.Image, building: str, time: str) -> int:
    """Return the number of buildings with red walls in an image. Other wall colours also occur in sky, sand and snow.

    Args:
        building: the kind of building, which limits how wide one can be.
    """
    wall = np.multiply(HOUSE["red"], WALL_LIGHT[time])
    pixels = _pixels(image)
    length = np.linalg.norm(pixels, axis=-1)
    apart = np.linalg.norm(pixels / np.maximum(length, 1)[..., None] - wall / np.linalg.norm(wall), axis=-1)
    brightness = length / np.linalg.norm(wall)
    return _count((apart < 0.13) & (brightness > 0.55) & (brightness < 1.2), WALL_AREA, BUILDING_WIDTH[building])


def _pixels(image: Image.Image) -> np.ndarray:
    return np.asarray(image.convert("RGB").resize((SIDE, SIDE), Image.Resampling.BOX), dtype=float)


def _count(found: np.ndarray, area: float, width: float) -> int:
    """Count groups of regions that are larger than ``area`` and together no wider than ``width``, from the left."""
    count, reach = 0, -1.0
    for left, right in sorted((left, right) for left, right, size in _regions(found) if size > area * SIDE * SIDE):
        if right > reach:
            count, reach = count + 1, max(left + width * SIDE, right)
    return count


def _regions(found: np.ndarray) -> list[tuple[int, int, int]]:
    """Return the leftmost and rightmost column and the number of pixels of every connected region."""
    todo, regions = found.copy(), []
    for start in zip(*np.nonzero(found), strict=True):
        if not todo[start]:
            continue
        todo[start] = False
        stack, columns = [start], []
        while stack:
            y, x = stack.pop()
            columns.append(x)
            for near in ((y - 1, x), (y + 1, x), (y, x - 1), (y, x + 1)):
                if 0 <= near[0] < found.shape[0] and 0 <= near[1] < found.shape[1] and todo[near]:
                    todo[near] = False
                    stack.append(near)
        regions.append((min(columns), max(columns), len(columns)))
    return regions
