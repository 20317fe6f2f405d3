"""Where things stand in a scene, drawn from the seed of its layout alone."""

import random
from collections.abc import Sequence
from dataclasses import dataclass

Point = tuple[float, float]


@dataclass(frozen=True)
class Layout:
    """Positions and sizes in fractions of the image, y downwards, for everything a scene might show."""

    horizon: float
    light: Point  # of the sun and the moon
    far_peaks: Sequence[Point]
    near_peaks: Sequence[tuple[float, float, float]]  # (x, height above the horizon, half width), the farthest first
    hills: Sequence[float]  # height above the horizon of a curve at even steps from the left edge to the right
    rise: Sequence[float]  # height of the nearest rise of the ground at even steps
    patches: Sequence[tuple[float, float, float]]  # (x, y, half width) of brighter ground
    house: tuple[float, float, float]  # (x of the middle, y of the foot, width)
    turned: bool  # whether the front of the house is on the right
    sails: float  # angle of a windmill's sails, in radians
    trees: Sequence[tuple[float, float, float]]  # (x, y of the foot, height), the farthest first
    clouds: Sequence[tuple[float, float, float]]  # (x, y, width)
    stars: Sequence[tuple[float, float, float]]  # (x, y, radius)
    flakes: Sequence[tuple[float, float, float]]  # (x, y, radius)
    lake: tuple[float, float, float]  # (x of the middle, half width, y of the near shore)
    path: tuple[float, float]  # (x at the lower edge, sideways swing)
    fence: tuple[float, float, float]  # (y of the foot, x of its start, x of its end)

    @classmethod
    def draw(cls, seed: int) -> "Layout":
        """Draw the layout of a seed."""
        rng = random.Random(seed)
        horizon = rng.uniform(0.44, 0.52)
        light = (rng.uniform(0.14, 0.86), rng.uniform(0.11, 0.2))

        far_peaks = [(-0.1 + 0.15 * i + rng.uniform(-0.03, 0.03), rng.uniform(0.06, 0.16)) for i in range(9)]
        start = rng.uniform(0.02, 0.28)
        near_peaks = [
            (start + 0.36 * i + rng.uniform(-0.05, 0.05), rng.uniform(0.22, 0.34), rng.uniform(0.26, 0.36))
            for i in range(3)
        ]
        rng.shuffle(near_peaks)
        hills = [rng.uniform(0.0, 0.07) for _ in range(6)]
        rise = [rng.uniform(-0.05, 0.1) for _ in range(4)]
        patches = [(rng.random(), horizon + rng.uniform(0.15, 0.35), rng.uniform(0.12, 0.3)) for _ in range(2)]

        house = (rng.uniform(0.28, 0.72), horizon + rng.uniform(0.23, 0.31), rng.uniform(0.34, 0.42))
        turned = rng.random() < 0.5
        sails = rng.uniform(0.2, 1.3)
        trees = _trees(rng, horizon, house)

        clouds = [(rng.uniform(0.1, 0.9), rng.uniform(0.1, 0.3), rng.uniform(0.24, 0.4))]
        clouds.append(((clouds[0][0] + rng.uniform(0.4, 0.6)) % 1, rng.uniform(0.08, 0.24), rng.uniform(0.2, 0.34)))
        stars = [(*_jittered(rng, i, 5, 0.2, 0.15), rng.choice((0.011, 0.011, 0.017))) for i in range(15)]
        flakes = [(*_jittered(rng, i, 6, 1 / 6, 1 / 6), rng.uniform(0.013, 0.02)) for i in range(36)]

        lake = (rng.uniform(0.2, 0.8), rng.uniform(0.5, 0.8), horizon + rng.uniform(0.19, 0.24))
        path = (rng.uniform(0.2, 0.8), rng.uniform(-0.1, 0.1))
        fence_foot = rng.uniform(0.92, 0.96)
        fence = (
            (fence_foot, 0.0, rng.uniform(0.35, 0.6)) if path[0] < 0.5 else (fence_foot, rng.uniform(0.4, 0.65), 1.0)
        )
        return cls(
            horizon, light, far_peaks, near_peaks, hills, rise, patches, house, turned, sails, trees, clouds, stars,
            flakes, lake, path, fence,
        )  # fmt: skip


def _trees(rng: random.Random, horizon: float, house: tuple[float, float, float]) -> list[tuple[float, float, float]]:
    """Place three to five trees on both sides of the house, never completely behind it; nearer trees are taller."""
    trees = []
    for i in range(rng.choice((3, 4, 4, 5))):
        side = (-1, 1)[i % 2] if rng.random() < 0.8 else rng.choice((-1, 1))
        x = house[0] + side * (house[2] / 2 + rng.uniform(0.06, 0.13) + 0.13 * (i // 2))
        if not 0.04 < x < 0.96:
            x = house[0] - side * (house[2] / 2 + rng.uniform(0.1, 0.4))
        foot = horizon + rng.uniform(0.19, 0.35)
        trees.append((min(max(x, 0.05), 0.95), foot, (0.12 + 0.6 * (foot - horizon)) * rng.uniform(0.95, 1.2)))
    return sorted(trees, key=lambda tree: tree[1])


def _jittered(rng: random.Random, index: int, columns: int, width: float, height: float) -> Point:
    """Return a random point in one cell of a grid, so that points are spread evenly and never lie in a row."""
    row, column = divmod(index, columns)
    return (column + rng.uniform(0.15, 0.85)) * width, (row + rng.uniform(0.15, 0.85)) * height
