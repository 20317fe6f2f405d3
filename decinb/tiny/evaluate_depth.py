"""Compare the depth-to-image model with the bundled one: ``python -m decinb.tiny.evaluate_depth``.

The report says how accurate the depth estimator is, how well shapes are kept and prompts are followed at strengths 0.6
and 1, and whether depth or prompt decides if they disagree. The scenes are those of ``decinb.tiny.evaluate``.
"""

import argparse
import json
import random
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import DiffusionPipeline, StableDiffusionDepth2ImgPipeline

from decinb.checkpoints.components import Files, find_components, load_component
from decinb.loading import load_pipeline
from decinb.models import MODELS
from decinb.pipeline import DeciDiffusionDepth2ImgPipeline
from decinb.scenes.judge import Judge
from decinb.scenes.scenes import ATTRIBUTES, Scene, caption, depth_map, random_scene, render
from decinb.tiny.evaluate import CHANGES, GUIDANCE, STEPS, draw_pairs, fill_card, measure_changes, run_in_batches
from decinb.utils.environment import describe_pipeline

STRENGTHS = (0.6, 1.0)
FULL = {"estimator": 200, "changes": 100}
QUICK = {"estimator": 40, "changes": 8}
"""The numbers of scenes (for the estimator) and pairs (for changes)."""
BUNDLED = Path(MODELS["tiny-depth"].source)
SHARED = ("vae", "text_encoder", "tokenizer", "scheduler")
"""The parts that a depth model shares with the model from which its training started."""


def load(folder: Path = BUNDLED, shared: str | Path = "tiny") -> DeciDiffusionDepth2ImgPipeline:
    """Load a depth model in float32 on the CPU.

    Args:
        folder: with ``unet``, ``depth_estimator`` and ``feature_extractor``.
        shared: the model with the other parts, as for ``load_pipeline``.

    Raises:
        ModelError: a part is missing or incomplete.
    """
    others = load_pipeline(shared, device="cpu").components
    own = find_components(Files.in_folder(folder)).components
    return DeciDiffusionDepth2ImgPipeline(
        **{name: others[name] for name in SHARED},
        **{name: load_component(name, part, folder, torch.float32) for name, part in own.items()},
    )


def evaluate_estimator(pipe: StableDiffusionDepth2ImgPipeline, count: int) -> dict[str, Any]:
    """Return the mean absolute error of depth as the U-Net gets it, from -1 to 1 at the size of the latent."""
    rng = random.Random("evaluate depth")
    scenes = [random_scene(rng, sketches=0.5) for _ in range(count)]

    def prepared(scene: Scene, depth: torch.Tensor | None = None) -> torch.Tensor:
        return pipe.prepare_depth_map([render(scene)], depth, 1, False, torch.float32, torch.device("cpu"))

    with torch.no_grad():
        errors = [
            (prepared(scene) - prepared(scene, torch.tensor(depth_map(scene))[None])).abs().mean().item()
            for scene in scenes
        ]
    by_style = {
        style: float(np.mean([error for scene, error in zip(scenes, errors, strict=True) if scene.style == style]))
        for style in ATTRIBUTES["style"]
    }
    return {"scenes": count, "all": float(np.mean(errors)), **by_style}


def evaluate_disagreement(pipe: DiffusionPipeline, pairs: Sequence[tuple[str, Scene, Scene]]) -> dict[str, float]:
    """Name shapes in the prompt that the input lacks, at strength 1, and return how often images show which."""
    named = {None: "pine", "pine": "round", "round": "pine"}
    prompts = [caption(replace(target, trees=named[target.trees], mountains=True)) for *_, target in pairs]
    shown = Judge.load().classify(run_in_batches(pipe, [render(scene) for _, scene, _ in pairs], prompts, strength=1.0))
    targets = [target for *_, target in pairs]
    flat = [i for i, target in enumerate(targets) if not target.mountains]
    return {
        "trees of the input": _fraction(shown[i]["trees"] == target.trees for i, target in enumerate(targets)),
        "trees of the prompt": _fraction(shown[i]["trees"] == named[target.trees] for i, target in enumerate(targets)),
        "mountains only in the prompt": _fraction(shown[i]["mountains"] for i in flat),
    }


def evaluate(depth: StableDiffusionDepth2ImgPipeline, plain: DiffusionPipeline, sizes: dict[str, int] = FULL) -> dict:
    """Measure everything on fixed seeds.

    Args:
        depth: the depth-to-image pipeline.
        plain: the pipeline of the bundled model, for the same images and prompts.
        sizes: the numbers of scenes and pairs, as ``FULL``.

    Returns:
        The settings, the environment, and one report for each measurement; ``changes`` has for each pipeline what
        ``decinb.tiny.evaluate.evaluate_changes`` reports for each strength.
    """
    pairs = list(draw_pairs(sizes["changes"]))
    both = {"depth": depth, "tiny": plain}
    for pipe in both.values():
        pipe.set_progress_bar_config(disable=True)
    return {
        "settings": {"num_inference_steps": STEPS, "guidance_scale": GUIDANCE, "pairs": len(pairs)},
        "environment": describe_pipeline(depth),
        "estimator": evaluate_estimator(depth, sizes["estimator"]),
        "changes": {
            name: {f"{strength:g}": measure_changes(pipe, pairs, strength) for strength in STRENGTHS}
            for name, pipe in both.items()
        },
        "disagreement": {name: evaluate_disagreement(pipe, pairs) for name, pipe in both.items()},
    }


def table(report: dict[str, Any]) -> str:
    """Format the report as text."""
    estimator, changes = report["estimator"], report["changes"]
    lines = [
        f"Depth estimator, {estimator['scenes']} scenes: mean absolute error of depth from -1 to 1",
        "  " + "   ".join(f"{name} {estimator[name]:.3f}" for name in ("all", *ATTRIBUTES["style"])),
        f"Image to image, {report['settings']['pairs']} pairs that differ in one attribute",
        f"  {'strength':<34}" + "".join(f"{strength:>16}" for strength in changes["depth"]),
        f"  {'':<34}" + f"{'depth':>8}{'tiny':>8}" * len(changes["depth"]),
    ]
    for name in ("all", *CHANGES):
        keys = ("changed", "kept", "adherence", "overlap", "distance") if name == "all" else ("changed", "overlap")
        for key in keys:
            values = (changes[pipe][at][name][key] for at in changes["depth"] for pipe in changes)
            lines.append(f"  {name + ', ' + key:<34}" + "".join(f"{value:8.2f}" for value in values))
    lines.append("Prompts with other trees and with mountains: fractions of the images at strength 1")
    for name in report["disagreement"]["depth"]:
        values = (report["disagreement"][pipe][name] for pipe in changes)
        lines.append(f"  {name:<50}" + "".join(f"{value:8.2f}" for value in values))
    return "\n".join(lines)


def _fraction(answers: Iterable[Any]) -> float:
    return float(np.mean([bool(answer) for answer in answers]))


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, default=BUNDLED, help="the depth model (default: the bundled one)")
    parser.add_argument("--shared", default="tiny", help="the model with the other parts (default %(default)s)")
    parser.add_argument("--quick", action="store_true", help="use fewer scenes")
    parser.add_argument(
        "--results", type=Path, default=Path("results/tiny"), help="folder for the JSON file (default %(default)s)"
    )
    given = parser.parse_args(arguments)
    plain = load_pipeline(given.shared, device="cpu")
    report = evaluate(load(given.folder, given.shared), plain, QUICK if given.quick else FULL)
    print(table(report))
    given.results.mkdir(parents=True, exist_ok=True)
    file = given.results / ("depth-quick.json" if given.quick else "depth.json")
    file.write_text(json.dumps(report, indent=2) + "\n")
    print(f"saved {file.name}")
    card = given.folder / "README.md"
    if card.is_file() and not given.quick:
        fill_card(table(report), card)


if __name__ == "__main__":
    main()
