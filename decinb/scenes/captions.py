"""Captions of scenes: complete and true ones, and incomplete, partly wrong ones like those on the web."""

import random
from collections.abc import Collection, Sequence
from dataclasses import replace

from decinb.scenes.attributes import ATTRIBUTES, Scene

PHRASES: dict[str, dict[str | bool, tuple[str, ...]]] = {
    "style": {
        "painting": ("a painting of", "an oil painting of", "a colourful painting of"),
        "watercolour": ("a watercolour of", "a watercolour painting of", "a watercolor of"),
        "sketch": ("a sketch of", "a pencil sketch of", "a pencil drawing of"),
        "pixel art": ("pixel art of", "a pixel art picture of", "a pixel art game scene of"),
    },
    "time": {
        "day": ("by day", "on a sunny day", "in daylight"),
        "sunset": ("at sunset", "in the evening sun", "at dusk"),
        "night": ("at night", "on a starry night", "by moonlight"),
    },
    "weather": {
        "clear": ("under a clear sky", "in clear weather"),
        "cloudy": ("under a cloudy sky", "with clouds", "in cloudy weather"),
        "snowing": ("in a snowfall", "while it is snowing", "in snowy weather"),
    },
    "ground": {
        "grass": ("on grass", "on green grass", "in a meadow"),
        "autumn": ("in autumn", "among autumn leaves", "on fallen leaves"),
        "snow": ("on snow", "in the snow", "in winter"),
        "sand": ("on sand", "in the desert", "on a beach"),
    },
    "building": {"cottage": ("house", "cottage"), "barn": ("barn",), "windmill": ("windmill",)},
    "trees": {
        "pine": ("pine trees", "fir trees"),
        "round": ("round trees", "leafy trees"),
        "poplar": ("poplar trees", "tall thin trees"),
    },
    "mountains": {True: ("mountains",)},
    "lake": {True: ("a lake",)},
    "path": {True: ("a path", "a winding path")},
    "fence": {True: ("a fence", "a wooden fence")},
}
"""The phrases for each value; captions that are not random use the first. A building's colour precedes its noun."""

LEFT_OUT = 0.3
"""The probability that a caption leaves an attribute out."""

WRONG = 0.4
"""The fraction of web captions that name a wrong value of one or two attributes."""

_THINGS = ("trees", "mountains", "lake", "path", "fence")
_PLACES = ("ground", "weather", "time")


def caption(
    scene: Scene, rng: random.Random | None = None, left_out: float = LEFT_OUT, always: Collection[str] = ()
) -> str:
    """Describe a scene in words. Everything that the caption says is true.

    Args:
        scene: what to describe.
        rng: varies words and order, leaves out each attribute with probability ``left_out``, and turns one caption in
            six into a list separated by commas; without it, the caption is complete and always the same.
        left_out: 0 to 1. If a building is named, its colour may still be left out.
        always: names of attributes that are never left out.
    """

    def one_of(phrases: Sequence[str]) -> str:
        return rng.choice(phrases) if rng else phrases[0]

    def is_said(name: str) -> bool:
        return rng is None or name in always or rng.random() >= left_out

    visible = scene.visible()
    things = []
    if scene.house and (is_said("building") or "house" in always):
        noun = one_of(PHRASES["building"][scene.building])
        coloured = visible["house"] != "plain" and is_said("house")
        things.append(f"a {scene.house} {noun}" if coloured else f"a {noun}")
    things += [one_of(PHRASES[name][visible[name]]) for name in _THINGS if visible[name] and is_said(name)]
    places = [one_of(PHRASES[name][visible[name]]) for name in _PLACES if name in visible and is_said(name)]
    style = one_of(PHRASES["style"][scene.style]) if is_said("style") else ""
    if rng:
        rng.shuffle(things)
        rng.shuffle(places)
    if not things:
        empty = not (scene.house or any(visible[name] for name in _THINGS))
        things = ["an empty landscape" if empty else "a landscape"]
    if rng and rng.random() < 1 / 6:
        return ", ".join([*things, *places, *([style.removesuffix(" of")] if style else [])])
    listed = things[0] if len(things) == 1 else f"{', '.join(things[:-1])} and {things[-1]}"
    return " ".join([*([style] if style else []), listed, *places])


def web_caption(scene: Scene, rng: random.Random, left_out: float = LEFT_OUT, wrong: float = WRONG) -> str:
    """Describe a scene as captions on the web do: incompletely, and with probability ``wrong`` also wrongly.

    A wrong caption gives one attribute, or in 30% of cases two, a value that the scene does not have: another colour or
    kind, or a thing that is not there.
    """
    told, always = scene, []
    if rng.random() < wrong:
        for _ in range(2 if rng.random() < 0.3 else 1):
            told, name = _misnamed(told, scene, rng)
            always.append(name)
    return caption(told, rng, left_out, always)


def _misnamed(told: Scene, scene: Scene, rng: random.Random) -> tuple[Scene, str]:
    """Give one attribute of ``told`` a value that ``scene`` does not have; return the new scene and the attribute."""
    visible = told.visible()
    others = {
        name: [value for value in values if value and value != getattr(scene, name)]
        for name, values in ATTRIBUTES.items()
        if name in visible and visible[name] != "plain" and (name != "building" or scene.house)
    }
    name = rng.choice([name for name, values in others.items() if values])
    return replace(told, **{name: rng.choice(others[name])}), name
