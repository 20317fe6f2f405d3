"""Image-to-image tasks whose right result is known, and how well a pipeline does them.

A trial of a task is an input, a prompt, and the scene asked for.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from diffusers import DiffusionPipeline
from PIL import Image

from decinb.metrics import detail
from decinb.models import defaults_of
from decinb.scenes import Scene, caption, estimates, random_scene, render, strokes
from decinb.scenes.adherence import named_attributes
from decinb.scenes.estimates import Estimate
from decinb.scenes.judge import Judge

GUIDANCE = 7.5
STEPS = 30
BATCH, BATCH_GPU = 32, 200

TASKS = ("strokes to painting", "day to night", "grass to snow", "sketch to painting")


@dataclass(frozen=True)
class Trial:
    """One input of a task.

    Args:
        image: the input.
        prompt: names every attribute of the target.
        target: the scene asked for; it has a building.
        source: the scene that the input shows, at the same place; as strokes if it is the target itself.
        changed: the attributes in which the input differs from the target.
    """

    image: Image.Image
    prompt: str
    target: Scene
    source: Scene
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
            source, target, changed = scene, scene, ("style",)
        elif task == "day to night":
            source, target, changed = replace(scene, time="day"), replace(scene, time="night"), ("time",)
        elif task == "grass to snow":
            source, target, changed = replace(scene, ground="grass"), replace(scene, ground="snow"), ("ground",)
        else:
            source, target, changed = replace(scene, style="sketch"), scene, ("style", "time", "ground")
        image = strokes(scene) if source == target else render(source)
        trials.append(Trial(image, caption(target), target, source, changed))
    return trials


def run_in_batches(
    pipe: DiffusionPipeline,
    images: Sequence[Image.Image],
    prompts: Sequence[str],
    strength: float,
    guidance_scale: float | None = None,
    num_inference_steps: int | None = None,
    seed: int = 0,
) -> list[Image.Image]:
    """Call an image-to-image pipeline on many images, each with its own prompt and its own seed.

    Guidance scale and steps are by default those of the pipeline's model, if it has any of its own, such as a model
    with guidance built in; else ``GUIDANCE`` and ``STEPS``.
    """
    usual = {"guidance_scale": GUIDANCE, "num_inference_steps": STEPS, **defaults_of(pipe)}
    made, batch = [], BATCH if pipe.device.type == "cpu" else BATCH_GPU
    for start in range(0, len(prompts), batch):
        rows = slice(start, start + batch)
        made += pipe(
            prompt=list(prompts[rows]),
            image=list(images[rows]),
            strength=strength,
            guidance_scale=usual["guidance_scale"] if guidance_scale is None else guidance_scale,
            num_inference_steps=num_inference_steps or usual["num_inference_steps"],
            generator=[torch.Generator().manual_seed(seed + start + i) for i in range(len(prompts[rows]))],
        ).images
    return made


@lru_cache(maxsize=2048)
def _drawn(scene: Scene, size: int) -> Image.Image:
    """Render a scene once for all strengths that are compared with it."""
    return render(scene, size)


def house_kept(image: Image.Image, target: Scene, source: Scene | None = None) -> float:
    """Return how much of the building of ``target`` an image shows in its place, from 0 to 1, without the judge.

    A pixel shows it if its distance to the scene drawn with the building is less than two thirds of that to the scene
    drawn without. Only pixels in which the two drawings differ clearly are counted.

    Args:
        image: made from an image of ``source``.
        target: the scene asked for.
        source: the same place before the change, such as by day. An image that still looks more like it is compared
            with it: the building has its old colours there.
    """
    pixels = np.asarray(image, dtype=float)

    def far(scene: Scene) -> float:
        return float(np.abs(pixels - np.asarray(_drawn(scene, image.width), dtype=float)).mean())

    scene = target if source is None else min(target, source, key=far)
    with_house, without = (
        np.asarray(_drawn(one, image.width), dtype=float) for one in (scene, replace(scene, house=None))
    )
    visible = np.abs(with_house - without).sum(axis=-1) > 30
    found = np.abs(pixels - with_house).sum(axis=-1) < 2 / 3 * np.abs(pixels - without).sum(axis=-1)
    return float(found[visible].mean()) if visible.any() else 1.0


def reference(task: str, count: int) -> list[Image.Image]:
    """Return renders of other scenes that would be right results of a task."""
    return [render(trial.target) for trial in draw_trials(task, count, purpose="reference")]


def measure(
    pipe: DiffusionPipeline,
    trials: Sequence[Trial],
    strength: float,
    renders: Sequence[Image.Image],
    num_inference_steps: int | None = None,
) -> dict[str, Estimate]:
    """Run trials at one strength.

    Args:
        renders: what the images made are compared with as a whole; as many as there are trials.
        num_inference_steps: of the whole schedule; by default as in ``run_in_batches``.

    Returns:
        ``changed``, the fraction of images with every attribute that the input lacked; ``adherence``, of all that the
        prompt names; ``layout``, how well the building stayed in its place (at strength 1, by chance alone);
        ``detail``, that of an image beside that of its target; ``change``, the mean difference from the input;
        ``frechet``, the distance to the renders.
    """
    images, prompts = [trial.image for trial in trials], [trial.prompt for trial in trials]
    made = run_in_batches(pipe, images, prompts, strength, num_inference_steps=num_inference_steps)
    judge = Judge.load()
    pairs = list(zip(trials, made, strict=True))
    answers = [answer(trial.prompt, seen) for trial, seen in zip(trials, judge.classify(made), strict=True)]
    changed = [
        all(right[name] for name in trial.changed if name in right)
        for trial, right in zip(trials, answers, strict=True)
    ]
    return {
        "changed": estimates.fraction(changed),
        "adherence": estimates.mean_fraction([float(np.mean(list(right.values()))) for right in answers]),
        "layout": estimates.mean_fraction([house_kept(image, trial.target, trial.source) for trial, image in pairs]),
        "detail": estimates.mean([detail(image) / detail(_drawn(trial.target, image.width)) for trial, image in pairs]),
        "change": estimates.change(made, images),
        "frechet": estimates.frechet(judge.features(made), judge.features(renders)),
    }


def answer(prompt: str, seen: dict[str, Any]) -> dict[str, bool]:
    """Return for each attribute that a prompt names whether the judge sees it."""
    return {name: seen.get(name) == value for name, value in named_attributes(prompt).items()}
