"""What a scene is: the attributes that a caption can name, and a seed for everything else."""

import random
from dataclasses import dataclass

ATTRIBUTES: dict[str, tuple] = {
    "style": ("painting", "watercolour", "sketch", "pixel art"),
    "time": ("day", "sunset", "night"),
    "weather": ("clear", "cloudy", "snowing"),
    "ground": ("grass", "autumn", "snow", "sand"),
    "house": (None, "red", "blue", "yellow", "white"),
    "building": (None, "cottage", "barn", "windmill"),
    "trees": (None, "pine", "round", "poplar"),
    "mountains": (False, True),
    "lake": (False, True),
    "path": (False, True),
    "fence": (False, True),
}
"""Every attribute of a scene with its values. ``house`` is the colour of the building, ``building`` its kind."""

IMAGE_SIZE = 128
"""Height and width in pixels of the images that the bundled model was trained on."""


@dataclass(frozen=True)
class Scene:
    """A landscape: its attributes, and the seed of its layout.

    Two scenes with the same layout and different attributes show the same place: by day and at night, painted and
    sketched.

    Args:
        house: colour of the building; None for no building.
        building: kind of the building; a scene with a ``house`` and no ``building`` has a cottage.
        layout: seed of everything a caption does not say, such as where things stand.
    """

    style: str = "painting"
    time: str = "day"
    weather: str = "clear"
    ground: str = "grass"
    house: str | None = None
    building: str | None = None
    trees: str | None = None
    mountains: bool = False
    lake: bool = False
    path: bool = False
    fence: bool = False
    layout: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "building", (self.building or "cottage") if self.house else None)

    def visible(self) -> dict[str, str | bool | None]:
        """Return the attributes that can be seen. A sketch shows no time, no ground and no colour ("plain")."""
        seen = {name: getattr(self, name) for name in ATTRIBUTES}
        if self.style == "sketch":
            del seen["time"], seen["ground"]
            seen["house"] = "plain" if self.house else None
        return seen


def random_scene(rng: random.Random) -> Scene:
    """Draw a scene. Every value of an attribute occurs; snow falls only where the ground is snow.

    Half of all scenes are paintings; the other styles share the rest evenly. Three quarters of the scenes have a
    building and as many have trees.
    """
    ground = rng.choice(ATTRIBUTES["ground"])
    return Scene(
        style=rng.choices(ATTRIBUTES["style"], (3, 1, 1, 1))[0],
        time=rng.choice(ATTRIBUTES["time"]),
        weather=rng.choice(ATTRIBUTES["weather"] if ground == "snow" else ATTRIBUTES["weather"][:2]),
        ground=ground,
        house=rng.choice(ATTRIBUTES["house"][1:]) if rng.random() < 0.75 else None,
        building=rng.choice(ATTRIBUTES["building"][1:]),
        trees=rng.choice(ATTRIBUTES["trees"][1:]) if rng.random() < 0.75 else None,
        mountains=rng.random() < 0.5,
        lake=rng.random() < 0.4,
        path=rng.random() < 0.4,
        fence=rng.random() < 0.3,
        layout=rng.randrange(2**31),
    )


def differing(scene: Scene, other: Scene) -> set[str]:
    """Return the names of the attributes in which two scenes look different."""
    first, second = scene.visible(), other.visible()
    return {name for name in ATTRIBUTES if first.get(name) != second.get(name)}
