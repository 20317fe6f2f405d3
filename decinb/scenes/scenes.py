"""Scenes: small landscapes drawn from attributes, with captions that describe them.

A scene is the ground truth of its image, so that whether an image follows a prompt can be measured. Attributes are what
a caption can name; ``layout`` is a seed for all else, such as the position and size of things. Scenes with the same
layout and different attributes show the same place: by day and by night, painted and sketched.
"""

import random
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace

import numpy as np
from PIL import Image, ImageDraw

ATTRIBUTES: dict[str, tuple] = {
    "style": ("painting", "sketch"),
    "time": ("day", "sunset", "night"),
    "ground": ("grass", "snow", "sand"),
    "house": (None, "red", "blue", "yellow", "white"),
    "trees": (None, "pine", "round"),
    "mountains": (False, True),
}
"""Every attribute of a scene with its values. The time, the ground and all colours are invisible in a sketch."""

IMAGE_SIZE = 128
"""Height and width in pixels at which the bundled model was trained."""


@dataclass(frozen=True)
class Scene:
    """A landscape: its attributes, and the seed of its layout."""

    style: str = "painting"
    time: str = "day"
    ground: str = "grass"
    house: str | None = None
    trees: str | None = None
    mountains: bool = False
    layout: int = 0

    def visible(self) -> dict[str, str | bool | None]:
        """Return the visible attributes: all for a painting; no time, no ground and a "plain" house for a sketch."""
        visible = {name: getattr(self, name) for name in ATTRIBUTES}
        if self.style == "sketch":
            del visible["time"], visible["ground"]
            visible["house"] = "plain" if self.house else None
        return visible


def random_scene(rng: random.Random, sketches: float = 0.2) -> Scene:
    """Choose a scene at random: sketches with the given probability, mountains half of the time, all else uniformly."""
    return Scene(
        style="sketch" if rng.random() < sketches else "painting",
        time=rng.choice(ATTRIBUTES["time"]),
        ground=rng.choice(ATTRIBUTES["ground"]),
        house=rng.choice(ATTRIBUTES["house"]),
        trees=rng.choice(ATTRIBUTES["trees"]),
        mountains=rng.random() < 0.5,
        layout=rng.randrange(2**31),
    )


def twin(
    scene: Scene,
    rng: random.Random,
    among: Sequence[str] = ("style", "time", "ground", "house", "house", "trees", "mountains"),
) -> Scene:
    """Change one or two attributes of a scene to others that are visible, so that a prompt can ask for them.

    Args:
        scene: keeps its layout.
        rng: chooses the changes.
        among: the attributes that may change; one that is named twice changes more often.
    """
    other, changes = scene, 1 if rng.random() < 0.7 else 2
    while len(differing(scene, other)) < changes:
        name = rng.choice(among)
        other = replace(other, **{name: rng.choice([value for value in ATTRIBUTES[name] if value])})
    return other


def differing(scene: Scene, other: Scene) -> set[str]:
    """Return the visible attributes in which two scenes differ."""
    first, second = scene.visible(), other.visible()
    return {name for name in ATTRIBUTES if first.get(name) != second.get(name)}


# --- drawing ----------------------------------------------------------------------------------------------------------

Colour = tuple[float, float, float]
Point = tuple[float, float]

SKY: dict[str, tuple[Colour, Colour]] = {  # at the top and at the horizon
    "day": ((84, 160, 235), (196, 226, 248)),
    "sunset": ((82, 50, 112), (250, 150, 76)),
    "night": ((10, 12, 40), (42, 52, 104)),
}
GROUND: dict[str, tuple[Colour, Colour]] = {  # at the horizon and at the lower edge
    "grass": ((112, 180, 78), (62, 130, 48)),
    "snow": ((250, 252, 255), (206, 218, 236)),
    "sand": ((232, 202, 138), (204, 164, 94)),
}
LIGHT: dict[str, Colour] = {"day": (1, 1, 1), "sunset": (0.94, 0.76, 0.70), "night": (0.40, 0.45, 0.66)}
HOUSE: dict[str, Colour] = {
    "red": (204, 48, 44),
    "blue": (48, 92, 208),
    "yellow": (240, 196, 60),
    "white": (240, 236, 228),
}

ROOF, ROOF_SNOW, TRUNK, DOOR = (122, 66, 46), (244, 248, 255), (92, 62, 42), (84, 50, 36)
PINE, ROUND, ROUND_LIT = (36, 98, 66), (56, 128, 58), (88, 162, 76)
ROCK, ROCK_SHADE, ROCK_SNOW = (128, 126, 148), (96, 96, 122), (240, 244, 252)
WINDOW_DARK, WINDOW_LIT = (176, 218, 246), (255, 222, 112)
SUN, SUN_LOW, MOON, STAR = (255, 234, 112), (255, 112, 66), (250, 246, 214), (255, 255, 255)
PAPER, PENCIL = (250, 248, 240), (64, 62, 66)


@dataclass(frozen=True)
class _Layout:
    """The position and size of everything, as fractions of the image, whether or not the scene shows it."""

    horizon: float
    light: Point
    peaks: Sequence[tuple[float, float, float]]  # (x, height, half width), farthest first
    house: tuple[float, float, float]  # (x of the middle, y of the foot, width)
    trees: Sequence[tuple[float, float, float]]  # (x, y of the foot, height), farthest first
    stars: Sequence[Point]

    @classmethod
    def draw(cls, seed: int) -> "_Layout":
        rng = random.Random(seed)
        horizon = rng.uniform(0.52, 0.66)
        light = (rng.uniform(0.12, 0.88), rng.uniform(0.10, 0.26))
        start = rng.uniform(0.0, 0.25)
        peaks = [
            (start + 0.34 * i + rng.uniform(-0.05, 0.05), rng.uniform(0.18, 0.36), rng.uniform(0.18, 0.26))
            for i in range(3)
        ]
        rng.shuffle(peaks)
        foot = horizon + rng.uniform(0.10, 0.22)
        house = (rng.uniform(0.24, 0.76), foot, rng.uniform(0.26, 0.36))
        # Trees are to the left and right of the house, never completely behind it.
        sides = [-1, 1, rng.choice([-1, 1])][: rng.choice([2, 2, 3])]
        trees = []
        for i, side in enumerate(sides):
            x = house[0] + side * (house[2] / 2 + rng.uniform(0.08, 0.16) + (0.16 if i == 2 else 0.0))
            if not 0.06 < x < 0.94:
                x = house[0] - side * (house[2] / 2 + rng.uniform(0.20, 0.34))
            trees.append((min(max(x, 0.06), 0.94), horizon + rng.uniform(0.05, 0.24), rng.uniform(0.26, 0.36)))
        stars = [(rng.uniform(0.03, 0.97), rng.uniform(0.03, 0.42)) for _ in range(9)]
        return cls(horizon, light, peaks, house, sorted(trees, key=lambda tree: tree[1]), stars)


class _Brush:
    """Draws shapes given in fractions of the image: filled and lit in a painting, shaded and outlined in a sketch."""

    def __init__(self, size: int, style: str, time: str):
        self.size = size
        self.sketch = style == "sketch"
        self.light = LIGHT[time]
        self.image = Image.new("RGB", (size, size), PAPER)
        self.pen = ImageDraw.Draw(self.image)

    def move_to(self, foot: float) -> None:
        """Draw what follows at the distance where the ground has the height ``foot``; only depth depends on it."""

    def gradient(self, top: float, bottom: float, upper: Colour, lower: Colour, lit: bool) -> None:
        first, last = round(top * self.size), round(bottom * self.size)
        rows = np.linspace(0, 1, max(last - first, 1))[:, None] * (np.array(lower) - upper) + upper
        rows = rows * self.light if lit else rows
        band = Image.fromarray(rows.round().astype(np.uint8)[:, None]).resize((self.size, last - first))
        self.image.paste(band, (0, first))

    def polygon(self, points: Sequence[Point], colour: Colour, lit: bool = True) -> None:
        corners = [self._pixels(point) for point in points]
        self.pen.polygon(corners, fill=self._fill(colour, lit))
        if self.sketch:
            self.pen.line([*corners, corners[0], corners[1]], fill=PENCIL, width=self._line, joint="curve")

    def circle(self, centre: Point, radius: float, colour: Colour, lit: bool = True) -> None:
        box = [
            self._pixels((centre[0] - radius, centre[1] - radius)),
            self._pixels((centre[0] + radius, centre[1] + radius)),
        ]
        self.pen.ellipse(box, fill=self._fill(colour, lit), outline=PENCIL if self.sketch else None, width=self._line)

    def glow(self, centre: Point, radius: float, colour: Colour) -> None:
        x, y = np.meshgrid(*[(np.arange(self.size) + 0.5) / self.size] * 2)
        near = np.exp(-(((x - centre[0]) ** 2 + (y - centre[1]) ** 2) / radius**2)) * 0.5
        blend = Image.fromarray((near * 255).astype(np.uint8))
        self.image.paste(Image.new("RGB", self.image.size, colour), mask=blend)

    def line(self, start: Point, end: Point) -> None:
        self.pen.line([self._pixels(start), self._pixels(end)], fill=PENCIL, width=self._line)

    @property
    def _line(self) -> int:
        return max(1, round(0.014 * self.size))

    def _pixels(self, point: Point) -> Point:
        return point[0] * self.size, point[1] * self.size

    def _fill(self, colour: Colour, lit: bool) -> tuple[int, ...]:
        if self.sketch:  # pencil shading: darker for darker colours, but never very dark
            grey = 0.299 * colour[0] + 0.587 * colour[1] + 0.114 * colour[2]
            return tuple(round(p - (1 - grey / 255) * 96) for p in PAPER)
        return tuple(round(c * light) for c, light in zip(colour, self.light if lit else (1, 1, 1), strict=True))


class _DepthBrush(_Brush):
    """Draws the shapes of a painting, each filled with its inverse depth: that of the ground at its foot."""

    def __init__(self, size: int, horizon: float):
        super().__init__(size, "painting", "day")
        self.horizon = horizon
        self.nearness = 0.0
        self.image = Image.new("F", (size, size))
        self.pen = ImageDraw.Draw(self.image)

    def move_to(self, foot: float) -> None:
        self.nearness = float(self._ground(foot))

    def gradient(self, top: float, bottom: float, upper: Colour, lower: Colour, lit: bool) -> None:
        first, last = round(top * self.size), round(bottom * self.size)
        column = self._ground((np.arange(first, last) + 0.5) / self.size).astype(np.float32)
        self.image.paste(Image.fromarray(np.repeat(column[:, None], self.size, axis=1)), (0, first))

    def glow(self, centre: Point, radius: float, colour: Colour) -> None:
        """Draw nothing: light has no depth."""

    def _ground(self, y: float | np.ndarray) -> np.ndarray:
        return np.clip((y - self.horizon) / (1 - self.horizon), 0, 1)

    def _fill(self, colour: Colour, lit: bool) -> float:
        return self.nearness


def render(scene: Scene, size: int = IMAGE_SIZE) -> Image.Image:
    """Render a scene as an RGB image of ``size`` x ``size`` pixels, drawn larger and reduced for smooth edges."""
    brush = _Brush(_drawn_size(size), scene.style, scene.time)
    _draw(brush, scene, _Layout.draw(scene.layout))
    return brush.image.resize((size, size), Image.Resampling.BOX)


def depth_map(scene: Scene, size: int = IMAGE_SIZE) -> np.ndarray:
    """Render the inverse depth of a scene, as a depth estimator such as MiDaS predicts it.

    The sky is 0, mountains are slightly more, and the ground rises from 0 at the horizon to 1 at the lower edge; houses
    and trees have the depth of the ground at their foot. Depth does not depend on time, style or colour.

    Returns:
        An array (size, size), float32; larger is nearer.

    Source: inverse depth up to scale and shift, Ranftl et al. (2020), arXiv:1907.01341.
    """
    layout = _Layout.draw(scene.layout)
    brush = _DepthBrush(_drawn_size(size), layout.horizon)
    _draw(brush, scene, layout)
    return np.asarray(brush.image.resize((size, size), Image.Resampling.BOX))


def house_mask(scene: Scene, size: int = IMAGE_SIZE) -> np.ndarray:
    """Return where the house is: a boolean array (size, size) of walls and roof, including what trees hide."""
    canvas = Image.new("1", (size, size))
    if scene.house:
        walls, roof = _house_outline(_Layout.draw(scene.layout))
        for outline in (walls, roof):
            ImageDraw.Draw(canvas).polygon([(x * size, y * size) for x, y in outline], fill=1)
    return np.array(canvas)


def _drawn_size(size: int) -> int:
    return 4 * size if size <= 256 else 2 * size


def _draw(brush: _Brush, scene: Scene, layout: _Layout) -> None:
    _draw_sky(brush, scene, layout)
    if scene.mountains:
        _draw_mountains(brush, layout)
    _draw_ground(brush, scene, layout)
    house_is_drawn = scene.house is None
    for tree in layout.trees if scene.trees else ():
        if not house_is_drawn and tree[1] > layout.house[1]:
            _draw_house(brush, scene, layout)
            house_is_drawn = True
        _draw_tree(brush, scene.trees, *tree)
    if not house_is_drawn:
        _draw_house(brush, scene, layout)


def _draw_sky(brush: _Brush, scene: Scene, layout: _Layout) -> None:
    if brush.sketch:
        brush.circle(layout.light, 0.07, PAPER)
        return
    upper, lower = SKY[scene.time]
    brush.gradient(0, layout.horizon, upper, lower, lit=False)
    x, y = layout.light
    if scene.time == "day":
        brush.glow((x, y), 0.16, SUN)
        brush.circle((x, y), 0.075, SUN, lit=False)
    elif scene.time == "sunset":
        low = (x, layout.horizon - 0.09)
        brush.glow(low, 0.22, SUN_LOW)
        brush.circle(low, 0.085, SUN_LOW, lit=False)
    else:
        for star in layout.stars:
            brush.circle(star, 0.008, STAR, lit=False)
        sky_behind = tuple(u + (v - u) * y / layout.horizon for u, v in zip(upper, lower, strict=True))
        brush.circle((x, y), 0.075, MOON, lit=False)
        brush.circle((x + 0.035, y - 0.015), 0.062, sky_behind, lit=False)


def _draw_mountains(brush: _Brush, layout: _Layout) -> None:
    base = layout.horizon + 0.01
    for rank, (x, height, half) in enumerate(layout.peaks, start=1):
        brush.move_to(layout.horizon + 0.02 + 0.01 * rank)  # behind the horizon, but each nearer than the last
        top = (x, base - height)
        cap_left = (x - 0.3 * half, base - 0.7 * height)
        cap_right = (x + 0.3 * half, base - 0.7 * height)
        brush.polygon([top, (x + half, base), (x - half, base)], ROCK)
        if not brush.sketch:
            brush.polygon([top, (x + half, base), (x + 0.15 * half, base)], ROCK_SHADE)
        brush.polygon([top, cap_right, (x, base - 0.62 * height), cap_left], ROCK_SNOW)


def _draw_ground(brush: _Brush, scene: Scene, layout: _Layout) -> None:
    if brush.sketch:
        brush.pen.rectangle([0, layout.horizon * brush.size, brush.size, brush.size], fill=PAPER)
        brush.line((0, layout.horizon), (1, layout.horizon))
    else:
        brush.gradient(layout.horizon, 1, *GROUND[scene.ground], lit=True)


def _house_outline(layout: _Layout) -> tuple[list[Point], list[Point]]:
    x, foot, width = layout.house
    left, right, eaves = x - width / 2, x + width / 2, foot - 0.56 * width
    walls = [(left, eaves), (right, eaves), (right, foot), (left, foot)]
    roof = [(left - 0.1 * width, eaves), (x, eaves - 0.46 * width), (right + 0.1 * width, eaves)]
    return walls, roof


def _draw_house(brush: _Brush, scene: Scene, layout: _Layout) -> None:
    x, foot, width = layout.house
    walls, roof = _house_outline(layout)
    eaves = walls[0][1]
    brush.move_to(foot)
    brush.polygon(walls, PAPER if brush.sketch else HOUSE[scene.house])
    brush.polygon(roof, ROOF if brush.sketch or scene.ground != "snow" else ROOF_SNOW)
    brush.polygon(_box(x, foot - 0.16 * width, 0.18 * width, 0.32 * width), DOOR)
    lit_window = WINDOW_DARK if scene.time == "day" or brush.sketch else WINDOW_LIT
    for side in (-1, 1):
        brush.polygon(
            _box(x + side * 0.3 * width, eaves + 0.24 * width, 0.17 * width, 0.17 * width), lit_window, lit=False
        )


def _draw_tree(brush: _Brush, kind: str, x: float, foot: float, height: float) -> None:
    brush.move_to(foot)
    brush.polygon(_box(x, foot - 0.11 * height, 0.12 * height, 0.22 * height), TRUNK)
    if kind == "pine":
        for part in (0, 1, 2):
            low, half = foot - (0.18 + 0.24 * part) * height, (0.30 - 0.065 * part) * height
            brush.polygon([(x - half, low), (x, low - 0.36 * height), (x + half, low)], PINE)
    else:
        brush.circle((x, foot - 0.62 * height), 0.36 * height, ROUND)
        if not brush.sketch:
            brush.circle((x - 0.09 * height, foot - 0.71 * height), 0.2 * height, ROUND_LIT)


def _box(x: float, y: float, width: float, height: float) -> list[Point]:
    left, right, top, bottom = x - width / 2, x + width / 2, y - height / 2, y + height / 2
    return [(left, top), (right, top), (right, bottom), (left, bottom)]


# --- captions ---------------------------------------------------------------------------------------------------------

STYLE_WORDS = {
    "painting": ("a painting of", "a colourful painting of", "a picture of"),
    "sketch": ("a sketch of", "a pencil sketch of", "a pencil drawing of"),
}
TIME_WORDS = {
    "day": ("by day", "on a sunny day", "under a blue sky"),
    "sunset": ("at sunset", "in the evening sun", "under an orange sky"),
    "night": ("at night", "under the stars", "by moonlight"),
}
GROUND_WORDS = {
    "grass": ("on grass", "on green grass", "in a meadow"),
    "snow": ("on snow", "in the snow", "in winter"),
    "sand": ("on sand", "in the desert", "on a beach"),
}
HOUSE_WORDS = {"red": "a red house", "blue": "a blue house", "yellow": "a yellow house", "white": "a white house"}
TREE_WORDS = {"pine": ("pine trees", "fir trees"), "round": ("round trees", "leafy trees")}


def caption(
    scene: Scene, rng: random.Random | None = None, left_out: float = 0.12, always: Collection[str] = ()
) -> str:
    """Describe a scene in words.

    Args:
        scene: what to describe.
        rng: varies words and order, and leaves out attributes; without it the caption is complete and always the same.
        left_out: the probability with which each attribute is left out, 0 to 1.
        always: attributes that are never left out.
    """

    def choose(words: str | Sequence[str]) -> str:
        words = (words,) if isinstance(words, str) else words
        return rng.choice(words) if rng else words[0]

    def kept(name: str) -> bool:
        return rng is None or name in always or rng.random() >= left_out

    things, empty = [], not (scene.house or scene.trees or scene.mountains)
    if scene.house and kept("house"):
        things.append("a house" if scene.style == "sketch" else HOUSE_WORDS[scene.house])
    if scene.trees and kept("trees"):
        things.append(choose(TREE_WORDS[scene.trees]))
    if scene.mountains and kept("mountains"):
        things.append("mountains")
    place = []
    if scene.style == "painting":
        if kept("ground"):
            place.append(choose(GROUND_WORDS[scene.ground]))
        if kept("time"):
            place.append(choose(TIME_WORDS[scene.time]))
    if rng:
        rng.shuffle(things)
        rng.shuffle(place)
    listed = " and ".join(things) if len(things) < 3 else f"{things[0]}, {things[1]} and {things[2]}"
    sentence = " ".join([listed or ("an empty landscape" if empty else "a landscape"), *place])
    if scene.style == "sketch" or rng is None or "style" in always or rng.random() < 0.5:
        sentence = f"{choose(STYLE_WORDS[scene.style])} {sentence}"
    return sentence
