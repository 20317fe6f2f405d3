"""Measure the depth-to-image model beside the bundled one: ``python -m decinb.tiny.evaluate_depth``.

How well its estimator sees depth, how well shapes stay and words are followed at a high strength and at the highest,
and which of the two wins where they disagree. The scenes are those of ``decinb.tiny.evaluate``, which no training uses.
"""

import argparse
import json
import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import DiffusionPipeline, StableDiffusionDepth2ImgPipeline

from decinb.checkpoints.components import Files, contents, read_part
from decinb.loading import load_pipeline
from decinb.models import MODELS
from decinb.pipeline import DeciDiffusionDepth2ImgPipeline
from decinb.scenes import ATTRIBUTES, Scene, caption, depth_map, random_scene, render
from decinb.scenes.judge import Judge
from decinb.tiny.evaluate import CHANGES, GUIDANCE, STEPS, draw_pairs, fill_card, measure_changes, run_in_batches
from decinb.utils.environment import describe

STRENGTHS = (0.6, 1.0)
FULL = {"estimator": 200, "changes": 100}  # scenes, pairs
RESULTS = Path("results/tiny/depth.json")
BUNDLED = Path(MODELS["tiny-depth"].source)
SHARED = ("vae", "text_encoder", "tokenizer", "scheduler")
"""What a depth model has of the model that it was begun with."""


def load(folder: Path = BUNDLED, shared: str | Path = "tiny") -> DeciDiffusionDepth2ImgPipeline:
    """A depth model that was just trained, float32 on the CPU; of the bundled one, what ``load_pipeline`` gives.

    Args:
        folder: with ``unet``, ``depth_estimator`` and ``feature_extractor``.
        shared: the model that lends the other parts, as ``load_pipeline`` takes it.

    Raises:
        ModelError: a part is missing, or not whole.
    """
    lent = load_pipeline(shared, device="cpu").components
    own = contents(Files.of(folder)).parts
    return DeciDiffusionDepth2ImgPipeline(
        **{name: lent[name] for name in SHARED},
        **{name: read_part(name, part, folder, torch.float32) for name, part in own.items()},
    )


def evaluate_estimator(pipe: StableDiffusionDepth2ImgPipeline, count: int) -> dict[str, Any]:
    """The mean absolute error of depth as the U-Net sees it, from -1 to 1 at the size of the latent."""
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
    """Name other shapes than the picture's, at strength 1: the share of pictures with its own, and with those named."""
    named = {None: "pine", "pine": "round", "round": "pine"}
    prompts = [caption(replace(target, trees=named[target.trees], mountains=True)) for *_, target in pairs]
    seen = Judge.load().see(run_in_batches(pipe, [render(scene) for _, scene, _ in pairs], prompts, strength=1.0))
    targets = [target for *_, target in pairs]
    flat = [i for i, target in enumerate(targets) if not target.mountains]
    return {
        "trees as in the picture": _share(seen[i]["trees"] == target.trees for i, target in enumerate(targets)),
        "trees as in the words": _share(seen[i]["trees"] == named[target.trees] for i, target in enumerate(targets)),
        "mountains only in the words": _share(seen[i]["mountains"] for i in flat),
    }


def evaluate(depth: StableDiffusionDepth2ImgPipeline, plain: DiffusionPipeline, sizes: dict[str, int] = FULL) -> dict:
    """Measure everything on fixed seeds.

    Args:
        depth: the depth-to-image pipeline.
        plain: the pipeline of the bundled model, on the same pictures and prompts.
        sizes: how many scenes and pairs, as in ``FULL``.

    Returns:
        What is to be stored: the settings, the environment, and the reports; ``changes`` has by pipeline and strength
        what ``decinb.tiny.evaluate.evaluate_changes`` has by strength.
    """
    pairs = list(draw_pairs(sizes["changes"]))
    both = {"depth": depth, "tiny": plain}
    for pipe in both.values():
        pipe.set_progress_bar_config(disable=True)
    return {
        "settings": {"num_inference_steps": STEPS, "guidance_scale": GUIDANCE, "pairs": len(pairs)},
        "environment": describe(depth),
        "estimator": evaluate_estimator(depth, sizes["estimator"]),
        "changes": {
            name: {f"{strength:g}": measure_changes(pipe, pairs, strength) for strength in STRENGTHS}
            for name, pipe in both.items()
        },
        "disagreement": {name: evaluate_disagreement(pipe, pairs) for name, pipe in both.items()},
    }


def table(report: dict[str, Any]) -> str:
    """The report as text."""
    estimator, changes = report["estimator"], report["changes"]
    lines = [
        f"Depth estimator, {estimator['scenes']} scenes: mean absolute error, where depth goes from -1 to 1",
        "  " + "   ".join(f"{name} {estimator[name]:.3f}" for name in ("all", *ATTRIBUTES["style"])),
        f"Image to image, {report['settings']['pairs']} pairs that differ in one thing",
        f"  {'strength':<34}" + "".join(f"{strength:>16}" for strength in changes["depth"]),
        f"  {'':<34}" + f"{'depth':>8}{'tiny':>8}" * len(changes["depth"]),
    ]
    for name in ("all", *CHANGES):
        keys = ("changed", "kept", "adherence", "overlap", "distance") if name == "all" else ("changed", "overlap")
        for key in keys:
            values = (changes[pipe][at][name][key] for at in changes["depth"] for pipe in changes)
            lines.append(f"  {name + ', ' + key:<34}" + "".join(f"{value:8.2f}" for value in values))
    lines.append("Words that name other trees, and mountains: shares of the pictures at strength 1")
    for name in report["disagreement"]["depth"]:
        values = (report["disagreement"][pipe][name] for pipe in changes)
        lines.append(f"  {name:<50}" + "".join(f"{value:8.2f}" for value in values))
    return "\n".join(lines)


def _share(answers: Any) -> float:
    return float(np.mean([bool(answer) for answer in answers]))


def measure(folder: Path, shared: str | Path = "tiny", results: Path = RESULTS) -> dict[str, Any]:
    """Measure the parts in ``folder``, store the report as JSON, and put its table into their card, if there is one."""
    report = evaluate(load(folder, shared), load_pipeline(shared, device="cpu"))
    results.parent.mkdir(parents=True, exist_ok=True)
    results.write_text(json.dumps(report, indent=2) + "\n")
    if (folder / "README.md").is_file():
        fill_card(table(report), folder / "README.md")
    return report


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, default=BUNDLED, help="the parts (default: the bundled ones)")
    parser.add_argument("--results", type=Path, default=RESULTS, help="where the JSON goes (default %(default)s)")
    given = parser.parse_args()
    print(table(measure(given.folder, results=given.results)))
    print(f"wrote {given.results.name}")


if __name__ == "__main__":
    main()
