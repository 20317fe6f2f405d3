"""Measure the depth-to-image model and the bundled one side by side: ``python -m decinb.tiny.evaluate_depth``.

It measures the error of the depth estimator; how well shapes are kept and prompts are followed at strengths 0.6 and 1;
and whether images follow the depth or the prompt where these contradict each other. No training uses the scenes.
"""

import argparse
import json
import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline, StableDiffusionDepth2ImgPipeline

from decinb.checkpoints.components import Files, find_components, load_component
from decinb.loading import load_pipeline
from decinb.models import MODELS
from decinb.pipeline import DeciDiffusionDepth2ImgPipeline
from decinb.scenes import ATTRIBUTES, Scene, caption, depth_map, estimates, random_scene, render
from decinb.scenes.estimates import Estimate
from decinb.scenes.judge import Judge
from decinb.scenes.tasks import GUIDANCE, STEPS, Trial, draw_trials, run_in_batches
from decinb.tiny.evaluate import columns, fill_card, reference
from decinb.tiny.evaluate import measure as measure_task
from decinb.utils.environment import describe_pipeline

STRENGTHS = (0.6, 1.0)
COUNT = 100
TASKS = ("day to night", "grass to snow", "sketch to painting")
RESULTS = Path("results/tiny/depth.json")
BUNDLED = Path(MODELS["tiny-depth"].source)
SHARED = ("vae", "text_encoder", "tokenizer", "scheduler")
"""The parts that a depth model shares with the model it was finetuned from."""


def load(
    folder: Path = BUNDLED, shared: str | Path = "tiny", device: str | None = "cpu"
) -> DeciDiffusionDepth2ImgPipeline:
    """Load a depth model that was just trained, in float32.

    Args:
        folder: with ``unet``, ``depth_estimator`` and ``feature_extractor``.
        shared: the model that lends the other parts, as ``load_pipeline`` takes it.
        device: as ``load_pipeline`` takes it.

    Raises:
        ModelError: a part is missing, or not whole.
    """
    lender = load_pipeline(shared, device=device, dtype=torch.float32)
    own = find_components(Files.in_folder(folder)).components
    pipe = DeciDiffusionDepth2ImgPipeline(
        **{name: lender.components[name] for name in SHARED},
        **{name: load_component(name, part, folder, torch.float32) for name, part in own.items()},
    )
    return pipe.to(lender.device)


def evaluate_estimator(pipe: StableDiffusionDepth2ImgPipeline, count: int) -> dict[str, Estimate]:
    """Return the mean absolute error of depth as the U-Net takes it, from -1 to 1, over all scenes and by style."""
    rng = random.Random("evaluate depth")
    scenes = [random_scene(rng) for _ in range(count)]

    def prepared(scene: Scene, depth: torch.Tensor | None = None) -> torch.Tensor:
        return pipe.prepare_depth_map([render(scene)], depth, 1, False, torch.float32, pipe.device)

    with torch.no_grad():
        errors = [
            (prepared(scene) - prepared(scene, torch.tensor(depth_map(scene))[None])).abs().mean().item()
            for scene in scenes
        ]
    by_style = {
        style: [error for scene, error in zip(scenes, errors, strict=True) if scene.style == style]
        for style in ATTRIBUTES["style"]
    }
    found = {style: estimates.mean(some) for style, some in by_style.items() if some}
    return {"all": estimates.mean(errors), **found}


def evaluate_disagreement(pipe: DiffusionPipeline, trials: Sequence[Trial]) -> dict[str, Estimate]:
    """Ask for other trees than the input's and for mountains, at strength 1; count which shapes the images have."""
    named = {None: "pine", "pine": "round", "round": "poplar", "poplar": "pine"}
    targets = [trial.target for trial in trials]
    prompts = [caption(replace(target, trees=named[target.trees], mountains=True)) for target in targets]
    seen = Judge.load().classify(run_in_batches(pipe, [trial.image for trial in trials], prompts, strength=1.0))
    pairs = list(zip(seen, targets, strict=True))
    flat = [found["mountains"] for found, target in pairs if not target.mountains]
    return {
        "trees as in the image": estimates.fraction([found["trees"] == target.trees for found, target in pairs]),
        "trees as in the prompt": estimates.fraction(
            [found["trees"] == named[target.trees] for found, target in pairs]
        ),
        **({"mountains only in the prompt": estimates.fraction(flat)} if flat else {}),
    }


def evaluate(depth: StableDiffusionDepth2ImgPipeline, plain: DiffusionPipeline, count: int = COUNT) -> dict[str, Any]:
    """Measure everything on fixed seeds.

    Args:
        depth: the depth-to-image pipeline.
        plain: the pipeline of the bundled model, on the same inputs and prompts.
        count: images a point.

    Returns:
        The settings, the environment, and the reports; ``tasks`` has by task what
        ``decinb.scenes.tasks.measure`` returns by pipeline and strength.
    """
    both = {"depth": depth, "tiny": plain}
    for pipe in both.values():
        pipe.set_progress_bar_config(disable=True)
    trials = {task: draw_trials(task, count) for task in TASKS}
    return {
        "settings": {"num_inference_steps": STEPS, "guidance_scale": GUIDANCE, "images": count},
        "environment": describe_pipeline(depth),
        "estimator": evaluate_estimator(depth, count),
        "tasks": {
            task: {
                f"{name} {strength:g}": measure_task(pipe, trials[task], strength, reference(task, count))
                for strength in STRENGTHS
                for name, pipe in both.items()
            }
            for task in TASKS
        },
        "disagreement": {name: evaluate_disagreement(pipe, trials["day to night"]) for name, pipe in both.items()},
    }


def table(report: dict[str, Any]) -> str:
    """Return the report as text."""
    lines = [f"{report['settings']['images']} images a point", "depth estimator: mean absolute error of depth, -1 to 1"]
    lines += columns("", {name: {"error": value} for name, value in report["estimator"].items()})
    for task, rows in report["tasks"].items():
        lines += [task, *columns("strength", rows)]
    lines += ["prompts with other trees and with mountains, strength 1", *columns("", report["disagreement"])]
    return "\n".join(lines)


def measure(
    folder: Path,
    shared: str | Path = "tiny",
    results: Path = RESULTS,
    count: int = COUNT,
    device: str | None = "cpu",
) -> dict[str, Any]:
    """Measure the parts in ``folder``, store the report as JSON, and put its table into their card if they have one."""
    plain = load_pipeline(shared, device=device, dtype=torch.float32)
    report = evaluate(load(folder, shared, device), plain, count)
    results.parent.mkdir(parents=True, exist_ok=True)
    results.write_text(json.dumps(report, indent=2) + "\n")
    if (folder / "README.md").is_file():
        fill_card(table(report), folder / "README.md")
    return report


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, default=BUNDLED, help="the parts (default: the bundled ones)")
    parser.add_argument("--results", type=Path, default=RESULTS, help="where the JSON goes (default %(default)s)")
    parser.add_argument("--count", type=int, default=COUNT, help="images a point (default %(default)s)")
    parser.add_argument("--device", help="default: a GPU if there is one")
    given = parser.parse_args(arguments)
    print(table(measure(given.folder, results=given.results, count=given.count, device=given.device)))
    print(f"wrote {given.results.name}")


if __name__ == "__main__":
    main()
