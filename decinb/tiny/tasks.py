"""The image-to-image tasks that the bundled model is measured on: an input, a prompt, and the scene asked for."""

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from diffusers import DiffusionPipeline
from PIL import Image

from decinb.scenes import Scene, caption, random_scene, render, strokes

GUIDANCE = 7.5
STEPS = 30
BATCH = 32

TASKS = ("strokes to painting", "day to night", "grass to snow", "sketch to painting")


@dataclass(frozen=True)
class Trial:
    """One input of a task.

    Args:
        image: the input.
        prompt: names every attribute of the target.
        target: the scene asked for; it has a building.
        changed: the attributes in which the input differs from the target.
    """

    image: Image.Image
    prompt: str
    target: Scene
    changed: tuple[str, ...]


def draw_trials(task: str, count: int, purpose: str = "evaluate") -> list[Trial]:
    """Draw the inputs of a task, always the same for one purpose. No training uses these seeds."""
    rng = random.Random(f"{purpose} {task}")
    trials = []
    for _ in range(count):
        scene = random_scene(rng)
        weather = "clear" if scene.weather == "snowing" else scene.weather
        scene = replace(scene, style="painting", house=scene.house or "red", weather=weather)
        if task == "strokes to painting":
            before, target, changed = strokes(scene), scene, ("style",)
        elif task == "day to night":
            before, target, changed = render(replace(scene, time="day")), replace(scene, time="night"), ("time",)
        elif task == "grass to snow":
            before, target, changed = render(replace(scene, ground="grass")), replace(scene, ground="snow"), ("ground",)
        else:
            before, target, changed = render(replace(scene, style="sketch")), scene, ("style", "time", "ground")
        trials.append(Trial(before, caption(target), target, changed))
    return trials


def run_in_batches(
    pipe: DiffusionPipeline,
    images: Sequence[Image.Image],
    prompts: Sequence[str],
    strength: float,
    guidance_scale: float = GUIDANCE,
    num_inference_steps: int | None = None,
    seed: int = 0,
) -> list[Image.Image]:
    """Call an image-to-image pipeline on many images, each with its own prompt and its own seed, in ``STEPS`` steps."""
    made = []
    for start in range(0, len(prompts), BATCH):
        rows = slice(start, start + BATCH)
        made += pipe(
            prompt=list(prompts[rows]),
            image=list(images[rows]),
            strength=strength,
            guidance_scale=guidance_scale,
            num_inference_steps=num_inference_steps or STEPS,
            generator=[torch.Generator().manual_seed(seed + start + i) for i in range(len(prompts[rows]))],
        ).images
    return made


def house_kept(image: Image.Image, target: Scene) -> float:
    """Return how much of the building of ``target`` an image shows in its place, from 0 to 1, without the judge.

    A pixel shows it if its colour is nearer, by a third, to the target drawn with its building than to the target drawn
    without. Only pixels in which the two drawings differ clearly are counted.
    """
    pixels, with_house, without = (
        np.asarray(one, dtype=float)
        for one in (image, render(target, image.width), render(replace(target, house=None), image.width))
    )
    visible = np.abs(with_house - without).sum(axis=-1) > 30
    found = np.abs(pixels - with_house).sum(axis=-1) < 2 / 3 * np.abs(pixels - without).sum(axis=-1)
    return float(found[visible].mean()) if visible.any() else 1.0
