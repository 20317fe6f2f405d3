"""A scene as a list of coloured shapes, the farthest first. Images, depth, strokes and masks are drawn from them."""

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from decinb.scenes.attributes import Scene
from decinb.scenes.layout import Layout, Point

Colour = tuple[float, float, float]
Polygon = Sequence[Point]

SKY: dict[str, dict[str, tuple[Colour, ...]]] = {  # from the top to the horizon
    "clear": {
        "day": ((44, 120, 214), (112, 184, 240), (214, 238, 250)),
        "sunset": ((72, 46, 122), (214, 92, 116), (255, 188, 92)),
        "night": ((8, 12, 46), (26, 36, 92), (72, 90, 156)),
    },
    "snowing": {
        "day": ((140, 160, 190), (180, 196, 216), (220, 228, 238)),
        "sunset": ((122, 92, 136), (196, 130, 136), (244, 190, 150)),
        "night": ((24, 30, 66), (44, 54, 100), (84, 98, 152)),
    },
}
SKY["cloudy"] = SKY["clear"]
LIGHT: dict[str, Colour] = {"day": (1, 1, 1), "sunset": (1.0, 0.82, 0.72), "night": (0.44, 0.49, 0.76)}
WALL_LIGHT: dict[str, Colour] = {"day": (1, 1, 1), "sunset": (1.0, 0.88, 0.82), "night": (0.62, 0.62, 0.78)}
"""The light on painted walls: less tinted than ``LIGHT``, so that a wall keeps the colour that a caption names."""
GROUND: dict[str, tuple[Colour, Colour]] = {  # far and near
    "grass": ((158, 204, 92), (62, 138, 54)),
    "autumn": ((224, 196, 92), (158, 112, 42)),
    "snow": ((246, 250, 255), (214, 226, 244)),
    "sand": ((255, 238, 190), (240, 204, 140)),
}
PATH: dict[str, Colour] = {
    "grass": (226, 198, 146),
    "autumn": (246, 222, 168),
    "snow": (168, 178, 208),
    "sand": (196, 146, 92),
}
HOUSE: dict[str, Colour] = {
    "red": (214, 52, 46),
    "blue": (46, 98, 214),
    "yellow": (250, 200, 44),
    "white": (248, 244, 236),
}
CLOUD: dict[str, tuple[Colour, Colour]] = {  # lit from above, in shade below
    "day": ((255, 255, 255), (206, 220, 236)),
    "sunset": ((255, 206, 160), (206, 116, 130)),
    "night": ((92, 104, 158), (52, 62, 112)),
}
ROOF, ROOF_SNOW, DOOR, TRIM = (112, 72, 62), (246, 250, 255), (96, 56, 40), (250, 246, 236)
TRUNK, PINE, ROUND, POPLAR = (104, 70, 46), (30, 104, 72), (66, 148, 60), (112, 160, 46)
AUTUMN = {"round": (226, 92, 34), "poplar": (244, 176, 40), "pine": (36, 96, 66)}
ROCK, FAR_ROCK, ROCK_SNOW = (112, 110, 146), (136, 150, 190), (250, 252, 255)
WOOD, WINDOW, WINDOW_LIT = (150, 104, 66), (150, 206, 240), (255, 216, 104)
SUN: dict[str, tuple[Colour, Colour]] = {  # the disc and the light around it
    "day": ((255, 240, 130), (255, 246, 200)),
    "sunset": ((255, 232, 140), (255, 170, 80)),
    "night": ((250, 246, 214), (150, 164, 220)),
}
STAR, FLAKE = (255, 252, 226), (255, 255, 255)

SHADE = 0.7
"""How much light a side that faces away from the sun gets, 0 to 1."""


@dataclass(frozen=True)
class Shape:
    """One flat piece of a scene.

    Args:
        thing: what it is a part of: "sky", "light", "clouds", "mountains", "hills", "ground", "lake", "path", "house",
            "trees", "fence", "smoke", "snow" or "shadow".
        parts: polygons in fractions of the image; the shape is their union.
        colours: from the top of the shape to its lower end.
        nearness: of all of it, from 0 (the sky) to 1 (the lower edge of the image); None for what lies on the ground
            and comes nearer row by row.
        softness: how far its edge is blurred, in fractions of the image.
        opacity: 0 to 1.
        outlined: whether a pencil draws its edge; what is not outlined is shading on another shape.
        mirrors: the height at which the shape reflects the image above it, mixed with its own colours; None for none.
    """

    thing: str
    parts: tuple[Polygon, ...]
    colours: tuple[Colour, ...]
    nearness: float | None = 0.0
    softness: float = 0.0
    opacity: float = 1.0
    outlined: bool = True
    mirrors: float | None = None


def shapes(scene: Scene) -> list[Shape]:
    """Return the shapes of a scene, the farthest first. They are the same in every style."""
    at = Layout.draw(scene.layout)
    made = [*_sky(scene, at)]
    if scene.mountains:
        made += _mountains(scene, at)
    made += _ground(scene, at)
    if scene.lake:
        made += _lake(scene, at)
    if scene.path:
        made += _path(scene, at)
    standing = [(foot, _tree(scene, at, x, foot, height)) for x, foot, height in at.trees if scene.trees]
    if scene.house:
        standing.append((at.house[1], BUILDINGS[scene.building](scene, at)))
    for _, pieces in sorted(standing, key=lambda item: item[0]):
        made += pieces
    if scene.fence:
        made += _fence(scene, at)
    if scene.weather == "snowing":
        flakes = tuple(_ellipse(x, y, radius, radius, 8) for x, y, radius in at.flakes)
        made.append(Shape("snow", flakes, (_mix(FLAKE, LIGHT_SKY[scene.time], 0.15),), nearness=0, outlined=False))
    return made


LIGHT_SKY = {time: colours[-1] for time, colours in SKY["clear"].items()}


# --- the sky and what is far ------------------------------------------------------------------------------------------


def _sky(scene: Scene, at: Layout) -> Iterator[Shape]:
    yield Shape("sky", (_box(0, 0, 1, at.horizon + 0.03),), SKY[scene.weather][scene.time], outlined=False)
    if scene.weather != "snowing":
        yield from _light(scene, at)
    if scene.weather == "cloudy":
        for x, y, width in at.clouds:
            puffs = ((-0.32, 0, 0.2), (0, -0.09, 0.29), (0.3, 0.01, 0.2), (0.12, 0.06, 0.2), (-0.14, 0.06, 0.2))
            parts = tuple(_ellipse(x + dx * width, y + dy * width, r * width, 0.8 * r * width) for dx, dy, r in puffs)
            yield Shape("clouds", parts, CLOUD[scene.time])


def _light(scene: Scene, at: Layout) -> Iterator[Shape]:
    """The sun, low at sunset, or the moon and the stars."""
    disc, halo = SUN[scene.time]
    x, y = at.light
    if scene.time == "night":
        stars = [star for star in at.stars if math.dist(star[:2], (x, y)) > 0.13]
        yield Shape("light", tuple(_star(*star) for star in stars), (STAR,), outlined=False)
    if scene.time == "sunset":
        y = at.horizon - 0.17
    for spread, softness in ((0.2, 0.07), (0.11, 0.035)):
        yield Shape(
            "light", (_ellipse(x, y, spread, spread),), (halo,), softness=softness, opacity=0.45, outlined=False
        )
    yield Shape("light", (_crescent(x, y, 0.08) if scene.time == "night" else _ellipse(x, y, 0.075, 0.075),), (disc,))


def _mountains(scene: Scene, at: Layout) -> Iterator[Shape]:
    light, haze = LIGHT[scene.time], SKY[scene.weather][scene.time][-1]
    base = at.horizon + 0.02
    dim = 0.4 if scene.time == "night" else 1.0  # less haze, or dark mountains would vanish in a dark sky
    ridge = [(x, at.horizon - height) for x, height in at.far_peaks]
    far = tuple(_mix(_lit(FAR_ROCK, light), haze, dim * share) for share in (0.35, 0.75))
    yield Shape("mountains", ([(-0.1, base), *ridge, (1.1, base)],), far, nearness=0.04)
    for rank, (x, height, half) in enumerate(at.near_peaks):
        top, left, right = (x, at.horizon - height), (x - half, base), (x + half, base)
        nearness = 0.06 + 0.015 * rank
        colours = tuple(_mix(_lit(ROCK, light), haze, dim * share) for share in (0.1, 0.5))
        dark = tuple(_mix(_lit(ROCK, light, SHADE), haze, dim * share) for share in (0.05, 0.5))
        yield Shape("mountains", ([top, right, left],), colours, nearness)
        side = 1 if at.light[0] < x else -1  # the side away from the light is in shade
        fold = [
            (x + side * 0.1 * half, at.horizon - 0.6 * height),
            (x - side * 0.04 * half, at.horizon - 0.34 * height),
        ]
        away = right if side > 0 else left
        yield Shape("mountains", ([top, away, (x + side * 0.14 * half, base), *reversed(fold)],), dark, nearness,
                    outlined=False)  # fmt: skip
        cap = [top, (x + 0.36 * half, at.horizon - 0.66 * height), (x + 0.17 * half, at.horizon - 0.7 * height),
               (x + 0.05 * half, at.horizon - 0.58 * height), (x - 0.13 * half, at.horizon - 0.69 * height),
               (x - 0.35 * half, at.horizon - 0.66 * height)]  # fmt: skip
        cap_dark = [top, (x + side * 0.36 * half, at.horizon - 0.66 * height),
                    (x + side * 0.15 * half, at.horizon - 0.69 * height),
                    (x + side * 0.06 * half, at.horizon - 0.62 * height)]  # fmt: skip
        yield Shape("mountains", (cap,), (_lit(ROCK_SNOW, _glare(light)),), nearness)
        yield Shape("mountains", (cap_dark,), (_lit(ROCK_SNOW, _glare(light), 0.8),), nearness, outlined=False)


def _ground(scene: Scene, at: Layout) -> Iterator[Shape]:
    light, haze = LIGHT[scene.time], SKY[scene.weather][scene.time][-1]
    far, near = (_lit(colour, light) for colour in GROUND[scene.ground])
    curve = _curve(at.hills, at.horizon)
    yield Shape("hills", ([(0, at.horizon + 0.08), *curve, (1, at.horizon + 0.08)],),
                (_mix(_mix(far, near, 0.35), haze, 0.3), _mix(far, near, 0.3)), nearness=0.1)  # fmt: skip
    edge = _curve([0.4 * height for height in reversed(at.hills)], at.horizon + 0.03)
    yield Shape("ground", ([(0, 1), *edge, (1, 1)],), (far, _mix(far, near, 0.6), near), nearness=None)
    for x, y, half in at.patches:
        fallen = scene.ground == "autumn"
        bright = _lit((206, 92, 36), light) if fallen else _mix(_mix(far, near, 0.25), (255, 255, 255), 0.05)
        yield Shape("ground", (_ellipse(x, y, half, 0.22 * half),), (bright,), nearness=None, softness=0.02,
                    opacity=0.35 if fallen else 0.6, outlined=False)  # fmt: skip
    rise = _curve(at.rise, at.horizon + 0.42)
    yield Shape("ground", ([(0, 1), *rise, (1, 1)],), (_mix(far, near, 0.55), near, tuple(0.88 * c for c in near)),
                nearness=None, outlined=False)  # fmt: skip


def _lake(scene: Scene, at: Layout) -> Iterator[Shape]:
    x, half, shore = at.lake
    top = at.horizon + 0.03
    sky = SKY[scene.weather][scene.time]
    water = [(x + half * math.cos(angle), top + (shore - top) * math.sin(angle)) for angle in _angles(0, math.pi, 24)]
    bank = [(px, py + 0.014 * (py - top) / (shore - top)) for px, py in water]
    light = LIGHT[scene.time]
    yield Shape("lake", (bank,), (_lit(PATH[scene.ground], light, 0.9),), nearness=None, outlined=False)
    yield Shape("lake", (water,), (_mix(sky[-1], (120, 190, 230), 0.3), _mix(sky[0], _lit((50, 130, 200), light), 0.4)),
                nearness=None, mirrors=top)  # fmt: skip


def _path(scene: Scene, at: Layout) -> Iterator[Shape]:
    (end, swing), (start, top, _) = at.path, at.house
    if scene.house:
        start = _door(scene, at)[0]
    else:
        top = (at.lake[2] if scene.lake else at.horizon) + 0.03
    left, right = [], []
    for i in range(13):
        part = i / 12
        middle = start + (end - start) * part**1.5 + swing * math.sin(math.pi * part)
        y, half = top + (1.02 - top) * part, 0.028 + 0.1 * part**1.3
        left.append((middle - half, y))
        right.append((middle + half, y))
    colour = _lit(PATH[scene.ground], LIGHT[scene.time])
    yield Shape("path", ([*left, *reversed(right)],), (_mix(colour, (255, 255, 255), 0.08), colour), nearness=None)


# --- what stands on the ground ----------------------------------------------------------------------------------------


def _shadow(scene: Scene, at: Layout, x: float, foot: float, half: float) -> Shape:
    away = 0.0 if scene.weather == "snowing" else (0.5 if at.light[0] < x else -0.5)
    colour = _lit(GROUND[scene.ground][1], LIGHT[scene.time], 0.5)
    blot = _ellipse(x + away * half, foot + 0.004, 1.15 * half, max(0.12 * half, 0.016))
    return Shape("shadow", (blot,), (colour,), None, softness=0.008, opacity=0.6, outlined=False)


def _tree(scene: Scene, at: Layout, x: float, foot: float, height: float) -> list[Shape]:
    light, near = LIGHT[scene.time], _nearness(at, foot)
    snowy = scene.ground == "snow"
    side = -1 if at.light[0] < x else 1  # where the light comes from
    kind = scene.trees
    leaves = AUTUMN[kind] if scene.ground == "autumn" else {"pine": PINE, "round": ROUND, "poplar": POPLAR}[kind]
    dark, bright = _lit(leaves, light, 0.78), _lit(_mix(leaves, (255, 240, 130), 0.22), light)
    made = [_shadow(scene, at, x, foot, 0.26 * height)]
    thick = max(0.1 * height, 0.03)
    made.append(
        _on("trees", [_box(x - thick / 2, foot - 0.32 * height, x + thick / 2, foot)], _lit(TRUNK, light), near)
    )
    if kind == "pine":
        for tier in range(3):
            low, half, rise = foot - (0.14 + 0.25 * tier) * height, (0.33 - 0.075 * tier) * height, 0.38 * height
            top, left, right = (x, low - rise), (x - half, low), (x + half, low)
            made.append(_on("trees", [[top, right, left]], dark, near))
            lit_corner = (x + side * half, low)
            made.append(_on("trees", [[top, lit_corner, (x + side * 0.15 * half, low)]], bright, near, outlined=False))
            if snowy:
                cap = [
                    top,
                    (x + 0.45 * half, low - 0.5 * rise),
                    (x, low - 0.42 * rise),
                    (x - 0.45 * half, low - 0.5 * rise),
                ]
                made.append(_on("trees", [cap], _lit(ROOF_SNOW, _glare(light)), near, outlined=False))
    elif kind == "round":
        puffs = ((0, -0.7, 0.27), (-0.2, -0.56, 0.22), (0.2, -0.56, 0.22), (0, -0.46, 0.24))
        crown = [_ellipse(x + dx * height, foot + dy * height, r * height, r * height) for dx, dy, r in puffs]
        lit = [
            _ellipse(
                x + (dx * 0.8 + side * 0.07) * height, foot + (dy - 0.05) * height, 0.68 * r * height, 0.62 * r * height
            )
            for dx, dy, r in puffs[:3]
        ]
        made.append(_on("trees", crown, dark, near))
        made.append(_on("trees", lit, bright, near, outlined=False))
        if snowy:
            caps = ((0, 0.87, 0.18, 0.08), (-0.22, 0.69, 0.13, 0.07), (0.22, 0.69, 0.13, 0.07))
            cap = [_ellipse(x + dx * height, foot - y * height, a * height, b * height) for dx, y, a, b in caps]
            made.append(_on("trees", cap, _lit(ROOF_SNOW, _glare(light)), near, outlined=False))
    else:
        tall = 1.2 * height
        made.append(_on("trees", [_drop(x, foot - 0.12 * tall, 0.17 * tall, 0.88 * tall)], dark, near))
        lit_drop = _drop(x + side * 0.05 * tall, foot - 0.2 * tall, 0.09 * tall, 0.7 * tall)
        made.append(_on("trees", [lit_drop], bright, near, outlined=False))
        if snowy:
            cap = _drop(x, foot - 0.82 * tall, 0.075 * tall, 0.18 * tall)
            made.append(_on("trees", [cap], _lit(ROOF_SNOW, _glare(light)), near, outlined=False))
    return made


def _door(scene: Scene, at: Layout) -> tuple[float, float]:
    """Return the x of the middle of a building's door, and half the width of the building's front."""
    x, _, width = at.house
    if scene.building == "windmill":
        return x, 0.25 * width
    front = 0.46 * width
    return (x + width / 2 - front / 2 if at.turned else x - width / 2 + front / 2), front / 2


def _cottage(scene: Scene, at: Layout) -> list[Shape]:
    return _gabled(scene, at, eaves=0.42, profile=((0, 0.42), (0.5, 0.78), (1, 0.42)), chimney=True)


def _barn(scene: Scene, at: Layout) -> list[Shape]:
    profile = ((0, 0.38), (0.14, 0.62), (0.5, 0.8), (0.86, 0.62), (1, 0.38))
    return _gabled(scene, at, eaves=0.38, profile=profile, chimney=False)


def _gabled(scene: Scene, at: Layout, eaves: float, profile: Sequence[Point], chimney: bool) -> list[Shape]:
    """A building seen from a corner: a gable in front, a long wall and a roof beside it.

    Args:
        eaves: height of the long wall in widths of the building.
        profile: the upper edge of the front as (position, height), from the outer edge to the corner with the long
            wall, in widths of the front and of the building.
    """
    x, foot, width = at.house
    light, near = LIGHT[scene.time], _nearness(at, foot)
    side = -1 if at.turned else 1  # from the front towards the long wall
    front, rise = 0.46 * width, 0.03 * width
    outer = x - side * width / 2
    faces_light = (at.light[0] < x) == (side > 0)
    wall = HOUSE[scene.house]
    wall_front, wall_side = (
        _lit(wall, WALL_LIGHT[scene.time], share) for share in ((1, SHADE) if faces_light else (0.78, 0.95))
    )
    roof = ROOF_SNOW if scene.ground == "snow" else ROOF
    roof_light = _glare(light) if scene.ground == "snow" else light

    def at_front(position: float, height: float) -> Point:
        return outer + side * position * front, foot - height * width

    def behind(point: Point) -> Point:
        return point[0] + side * (width - front), point[1] - rise

    corner = at_front(1, 0)
    long_wall = [corner, behind(corner), behind(at_front(1, eaves)), at_front(1, eaves)]
    edge = [at_front(position, height) for position, height in profile]
    peak = max(range(len(edge)), key=lambda i: -edge[i][1])
    slope = edge[peak:]
    lowest = (slope[-1][0] + side * 0.03 * width, slope[-1][1] + 0.035 * width)
    slope = [*slope[:-1], lowest]
    made = [_shadow(scene, at, x, foot, 0.5 * width)]
    made.append(_on("house", [long_wall], wall_side, near))
    if chimney:
        cx, cy = edge[peak][0] + side * 0.36 * width, edge[peak][1]
        made.append(_on("house", [_box(cx - 0.05 * width, cy - 0.1 * width, cx + 0.06 * width, cy + 0.15 * width)],
                        _lit(ROOF, light, 0.75), near))  # fmt: skip
    made.append(_on("house", [[at_front(0, 0), *edge, corner]], wall_front, near))
    for i, (start, end) in enumerate(itertools.pairwise(slope)):
        plane = [start, behind(start), behind(end), end]
        made.append(
            _on("house", [plane], _lit(roof, roof_light, (0.96, 0.82)[i] if faces_light else (1, 0.9)[i]), near)
        )
    overhang = [(edge[0][0] - side * 0.035 * width, edge[0][1] + 0.035 * width), *edge[1 : peak + 1]]
    thick = 0.075 * width
    rim = [*overhang, *slope[1:], *((px, py - thick) for px, py in reversed([*overhang, *slope[1:]]))]
    made.append(_on("house", [rim], _lit(roof, roof_light, 0.88), near, outlined=False))

    glass = WINDOW if scene.time == "day" else WINDOW_LIT
    door_x, half = _door(scene, at)
    windows = []
    if chimney:
        made.append(_on("house", [_box(door_x - 0.3 * half, foot - 0.27 * width, door_x + 0.3 * half, foot)],
                        _lit(DOOR, light), near))  # fmt: skip
        for step in range(3):
            puff = _ellipse(cx + (0.05 + 0.05 * step**1.5) * width, cy - (0.17 + 0.14 * step) * width,
                            (0.05 + 0.025 * step) * width, (0.045 + 0.02 * step) * width)  # fmt: skip
            made.append(
                Shape("smoke", (puff,), (CLOUD[scene.time][0],), near, 0.008, 0.6 - 0.12 * step, outlined=False)
            )
        for along in (0.3, 0.72):
            px = corner[0] + side * along * (width - front)
            py = foot - rise * along - 0.24 * width
            windows.append(_box(px - 0.065 * width, py - 0.075 * width, px + 0.065 * width, py + 0.075 * width))
    else:
        door = _box(door_x - 0.55 * half, foot - 0.3 * width, door_x + 0.55 * half, foot)
        trim = TRIM if scene.house != "white" else ROOF
        made.append(_on("house", [door], _lit(trim, light), near))
        panel = _box(door_x - 0.36 * half, foot - 0.255 * width, door_x + 0.36 * half, foot)
        made.append(_on("house", [panel], _lit(DOOR, light, 0.9), near, outlined=False))
        windows.append(_ellipse(door_x, foot - 0.53 * width, 0.07 * width, 0.07 * width))
    made += _glowing(scene, windows, glass, near, 0.05 * width)
    return made


def _windmill(scene: Scene, at: Layout) -> list[Shape]:
    x, foot, width = at.house
    light, near = LIGHT[scene.time], _nearness(at, foot)
    height = 1.02 * width
    wall = HOUSE[scene.house]
    tower = [(x - 0.25 * width, foot), (x - 0.16 * width, foot - height), (x + 0.16 * width, foot - height),
             (x + 0.25 * width, foot)]  # fmt: skip
    side = 1 if at.light[0] < x else -1
    shaded = [(x + side * 0.06 * width, foot), (x + side * 0.04 * width, foot - height),
              (x + side * 0.16 * width, foot - height), (x + side * 0.25 * width, foot)]  # fmt: skip
    hub = (x, foot - height - 0.02 * width)
    roof = ROOF_SNOW if scene.ground == "snow" else ROOF
    cap = [(x + 0.2 * width * math.cos(angle), foot - height - 0.22 * width * math.sin(angle))
           for angle in _angles(0, math.pi, 14)]  # fmt: skip
    made = [_shadow(scene, at, x, foot, 0.3 * width)]
    made.append(_on("house", [tower], _lit(wall, WALL_LIGHT[scene.time]), near))
    made.append(_on("house", [shaded], _lit(wall, WALL_LIGHT[scene.time], SHADE), near, outlined=False))
    made.append(_on("house", [cap], _lit(roof, _glare(light) if scene.ground == "snow" else light), near))
    made.append(_on("house", [_box(x - 0.075 * width, foot - 0.24 * width, x + 0.075 * width, foot)], _lit(DOOR, light),
                    near))  # fmt: skip
    glass = WINDOW if scene.time == "day" else WINDOW_LIT
    window = _box(x - 0.06 * width, foot - 0.58 * width, x + 0.06 * width, foot - 0.44 * width)
    made += _glowing(scene, [window], glass, near, 0.05 * width)
    sails = [
        _bar(hub, at.sails + quarter * math.pi / 2, 0.08 * width, 0.56 * width, 0.13 * width) for quarter in range(4)
    ]
    arms = [_bar(hub, at.sails + quarter * math.pi / 2, 0.0, 0.56 * width, 0.045 * width) for quarter in range(4)]
    made.append(_on("house", sails, _lit(TRIM, _glare(light), 0.96), near))
    made.append(_on("house", [*arms, _ellipse(*hub, 0.055 * width, 0.055 * width)], _lit(TRUNK, light, 0.9), near,
                    outlined=False))  # fmt: skip
    return made


BUILDINGS = {"cottage": _cottage, "barn": _barn, "windmill": _windmill}


def _glowing(scene: Scene, windows: list[Polygon], glass: Colour, near: float, halo: float) -> Iterator[Shape]:
    """Windows, lit when it is dark."""
    if scene.time == "night":
        yield replace(_on("house", windows, WINDOW_LIT, near, outlined=False), softness=halo, opacity=0.55)
    yield _on("house", windows, glass, near)


def _fence(scene: Scene, at: Layout) -> list[Shape]:
    foot, start, end = at.fence
    light, near = LIGHT[scene.time], _nearness(at, foot)
    colour = _lit(TRIM if scene.ground in ("grass", "autumn") else WOOD, _glare(light))
    rails = [_box(start, foot - height - 0.014, end, foot - height + 0.014) for height in (0.045, 0.1)]
    posts = []
    for i in range(round((end - start) / 0.11) + 1):
        x = start + 0.11 * i
        posts.append(
            [
                (x - 0.021, foot),
                (x - 0.021, foot - 0.13),
                (x, foot - 0.155),
                (x + 0.021, foot - 0.13),
                (x + 0.021, foot),
            ]
        )
    return [
        Shape("shadow", (_box(start, foot - 0.008, end, foot + 0.016),), (_lit(GROUND[scene.ground][1], light, 0.5),),
              None, softness=0.006, opacity=0.5, outlined=False),
        _on("fence", rails, tuple(0.86 * c for c in colour), near),
        _on("fence", posts, colour, near),
    ]  # fmt: skip


# --- light and geometry -----------------------------------------------------------------------------------------------


def _on(thing: str, parts: Sequence[Polygon], colour: Colour, nearness: float, outlined: bool = True) -> Shape:
    """A shape that stands on the ground: a little lighter above than below."""
    above = tuple(min(255.0, 1.06 * c) for c in colour)
    return Shape(thing, tuple(parts), (above, tuple(0.9 * c for c in colour)), nearness, outlined=outlined)


def _nearness(at: Layout, y: float) -> float:
    return min(max((y - at.horizon) / (1 - at.horizon), 0.0), 1.0)


def _lit(colour: Colour, light: Colour, share: float = 1.0) -> Colour:
    """A colour in some light; what is in shade is a little bluer."""
    cool = (1 - share) * 0.25
    return tuple(
        min(255.0, c * amount * (share + extra)) for c, amount, extra in zip(colour, light, (0, 0, cool), strict=True)
    )


def _glare(light: Colour) -> Colour:
    """The light on snow and on white paint, which stay bright in the dark."""
    return tuple(min(1.0, 0.22 + 0.84 * amount) for amount in light)


def _mix(colour: Colour, other: Colour, share: float) -> Colour:
    return tuple(c + (o - c) * share for c, o in zip(colour, other, strict=True))


def _angles(start: float, end: float, count: int) -> list[float]:
    return [start + (end - start) * i / (count - 1) for i in range(count)]


def _box(left: float, top: float, right: float, bottom: float) -> Polygon:
    return [(left, top), (right, top), (right, bottom), (left, bottom)]


def _ellipse(x: float, y: float, across: float, down: float, corners: int = 24) -> Polygon:
    return [(x + across * math.cos(a), y + down * math.sin(a)) for a in _angles(0, 2 * math.pi, corners + 1)[:-1]]


def _crescent(x: float, y: float, radius: float) -> Polygon:
    outer = [(x + radius * math.cos(a), y + radius * math.sin(a)) for a in _angles(-0.3 * math.pi, 1.3 * math.pi, 24)]
    turned = [(px - x, py - y) for px, py in outer]
    inner = [(x + 0.72 * px, y + 0.72 * py - 0.3 * radius) for px, py in reversed(turned)]
    return [_rotated(point, (x, y), 0.5) for point in [*outer, *inner]]


def _star(x: float, y: float, radius: float) -> Polygon:
    """A small star with four points."""
    reaches, angles = (1, 0.64) * 4, _angles(0, 2 * math.pi, 9)[:-1]
    return [(x + radius * r * math.cos(a), y + radius * r * math.sin(a)) for r, a in zip(reaches, angles, strict=True)]


def _drop(x: float, foot: float, half: float, height: float) -> Polygon:
    """A pointed oval, as a poplar has it."""
    right = [(x + half * math.sin(math.pi * t) ** 0.75, foot - height * t) for t in _angles(0, 1, 12)]
    return [*right, *((2 * x - px, py) for px, py in reversed(right))]


def _bar(start: Point, angle: float, first: float, last: float, thick: float) -> Polygon:
    """A rectangle that leads away from a point, from one distance to another."""
    dx, dy = math.cos(angle), math.sin(angle)
    corners = ((first, -thick / 2), (last, -thick / 2), (last, thick / 2), (first, thick / 2))
    return [(start[0] + dx * along - dy * across, start[1] + dy * along + dx * across) for along, across in corners]


def _rotated(point: Point, centre: Point, angle: float) -> Point:
    dx, dy = point[0] - centre[0], point[1] - centre[1]
    return (
        centre[0] + dx * math.cos(angle) - dy * math.sin(angle),
        centre[1] + dx * math.sin(angle) + dy * math.cos(angle),
    )


def _curve(heights: Sequence[float], base: float, points: int = 25) -> list[Point]:
    """A smooth line from the left edge to the right that passes above ``base`` by heights at even steps."""
    made = []
    for i in range(points):
        place = i / (points - 1) * (len(heights) - 1)
        first = min(int(place), len(heights) - 2)
        share = (1 - math.cos(math.pi * (place - first))) / 2
        made.append((i / (points - 1), base - heights[first] - (heights[first + 1] - heights[first]) * share))
    return made
