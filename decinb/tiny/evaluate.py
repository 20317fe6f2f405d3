"""Measure the bundled model: ``python -m decinb.tiny.evaluate``.

It measures the VAE on unseen scenes; the effects of strength, guidance and steps; how often things are drawn twice; and
how often the judge agrees with the renderer's own colours. Every value has a 95% confidence interval. The scenes come
from seeds that no training uses. ``goals`` compares the results with what the model should reach.
"""

import argparse
import json
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import DPMSolverMultistepScheduler, UniPCMultistepScheduler
from PIL import Image

from decinb.errors import InputError
from decinb.images import load_image
from decinb.loading import load_pipeline
from decinb.metrics import clipped_fraction, detail, mean_abs_difference, oversaturated, psnr, ssim
from decinb.models import MODELS
from decinb.pipeline import DeciDiffusionImg2ImgPipeline
from decinb.runtimes import openvino
from decinb.scenes import ATTRIBUTES, IMAGE_SIZE, Scene, caption, estimates, random_scene, render
from decinb.scenes.colours import count_red_buildings, count_suns, ground_by_colour, time_by_colour
from decinb.scenes.estimates import Estimate
from decinb.scenes.judge import Judge, accuracy, through_vae
from decinb.scenes.tasks import GUIDANCE, STEPS, TASKS, answer, draw_trials, measure, reference, run_in_batches
from decinb.utils.environment import describe_pipeline

STRENGTHS = (0.2, 0.4, 0.5, 0.6, 0.75, 0.85, 1.0)
GUIDANCES = (1, 2, 4.5, 5, 7.5, 10.5, 13.5, 20)
CALLS = (5, 10, 20, 30)
SAMPLERS: dict[str, Callable[[Any], Any]] = {
    "DDIM": lambda config: None,  # the pipeline's own
    "DPM++ 2M": lambda config: DPMSolverMultistepScheduler.from_config(config),
    "UniPC": lambda config: UniPCMultistepScheduler.from_config(config),
}
SEEDS = 4
"""Images of each prompt that the spread over seeds is measured on."""

FULL = 200
"""Images for each point of a curve."""

_GREY = Image.new("RGB", (IMAGE_SIZE, IMAGE_SIZE), (127, 127, 127))  # strength 1 keeps nothing of it


# --- measurements -----------------------------------------------------------------------------------------------------


def evaluate_vae(pipe: DeciDiffusionImg2ImgPipeline, count: int) -> dict[str, Any]:
    """Compare unseen scenes with themselves after the VAE: PSNR in dB, SSIM, and what the judge still sees right."""
    scenes = draw_scenes("vae", count)
    images = [render(scene) for scene in scenes]
    back = through_vae(images, pipe.vae)
    report: dict[str, Any] = {}
    for name in ("all", *ATTRIBUTES["style"]):
        pairs = [pair for scene, *pair in zip(scenes, back, images, strict=True) if name in ("all", scene.style)]
        if pairs:
            report[name] = {
                "psnr": estimates.mean([psnr(*pair) for pair in pairs]),
                "ssim": estimates.mean([ssim(*pair) for pair in pairs]),
            }
    judged = accuracy(Judge.load(), scenes, back)
    report["judged right"] = {name: judged[name] for name in ATTRIBUTES if name in judged}
    return report


def evaluate_tasks(pipe: DeciDiffusionImg2ImgPipeline, count: int) -> dict[str, Any]:
    """Run every task at every strength."""
    return {
        task: {f"{strength:g}": measure(pipe, draw_trials(task, count), strength, reference(task, count))
               for strength in STRENGTHS}
        for task in TASKS
    }  # fmt: skip


def evaluate_examples(pipe: DeciDiffusionImg2ImgPipeline, count: int) -> dict[str, Any]:
    """Turn the sample "day" into snow at night, as the guide's sweeps do, and "day" into snow, over many seeds.

    Reported by strength: ``said``, the fraction with the sky and the ground that the prompt names; and once
    ``ends``, the mean difference of the images at strengths 0.75 and 1 from the same seed.
    """
    image = load_image("day", IMAGE_SIZE)
    prompts = {
        "day to night": MODELS["tiny"].example_prompt,
        "grass to snow": "a painting of a blue house, round trees and mountains on snow by day",
    }
    report = {}
    for name, prompt in prompts.items():
        rows, kept = {}, {}
        for strength in (0.5, 0.75, 0.85, 1.0):
            made = run_in_batches(pipe, [image] * count, [prompt] * count, strength)
            rights = [answer(prompt, seen) for seen in Judge.load().classify(made)]
            said = [right.get("time", False) and right.get("ground", False) for right in rights]
            rows[f"{strength:g}"], kept[strength] = estimates.fraction(said), made
        ends = [mean_abs_difference(*pair) for pair in zip(kept[0.75], kept[1.0], strict=True)]
        report[name] = {"said": rows, "ends": estimates.mean(ends)}
    return report


def evaluate_guidance(pipe: DeciDiffusionImg2ImgPipeline, count: int) -> dict[str, Any]:
    """Make images from prompts alone at every guidance scale.

    Reported by scale: the fraction right of every attribute, and ``all`` of a prompt at once; ``spread``, the mean
    difference of two images of one prompt from different seeds; ``clipped`` and ``oversaturated`` pixels; ``frechet``,
    the distance to renders of other scenes; ``detail``, the mean difference of neighbouring pixels beside that of
    those renders.
    """
    judge, prompts = Judge.load(), draw_prompts(count)
    renders = [render(scene) for scene in draw_scenes("reference", count)]
    features, edges = judge.features(renders), np.mean([detail(image) for image in renders])
    report = {}
    for scale in GUIDANCES:
        made = run_in_batches(pipe, [_GREY] * count, prompts, 1.0, scale)
        answers = [answer(*pair) for pair in zip(prompts, judge.classify(made), strict=True)]
        report[f"{scale:g}"] = {
            **{
                name: estimates.fraction([right[name] for right in answers if name in right])
                for name in ATTRIBUTES
                if any(name in right for right in answers)
            },
            "all": estimates.fraction([all(right.values()) for right in answers]),
            "spread": _spread(pipe, prompts, made, guidance_scale=scale),
            "clipped": estimates.mean_fraction([clipped_fraction(image) for image in made]),
            "oversaturated": estimates.mean_fraction([oversaturated(image) for image in made]),
            "frechet": estimates.frechet(judge.features(made), features),
            "detail": estimates.mean([detail(image) / edges for image in made]),
        }
    return report


def _spread(
    pipe: DeciDiffusionImg2ImgPipeline, prompts: Sequence[str], made: list[Image.Image], **how: Any
) -> Estimate:
    """Return how far images of one prompt from ``SEEDS`` seeds differ; ``made`` are those of the first seed."""
    few = prompts[: max(2, len(prompts) // SEEDS)]
    again = [run_in_batches(pipe, [_GREY] * len(few), few, 1.0, seed=10_000 * i, **how) for i in range(1, SEEDS)]
    return estimates.mean(
        [
            float(np.mean([mean_abs_difference(a, b) for i, a in enumerate(same) for b in same[:i]]))
            for same in zip(made[: len(few)], *again, strict=True)
        ]
    )


def evaluate_prompts(pipe: DeciDiffusionImg2ImgPipeline, count: int, **how: Any) -> dict[str, Estimate]:
    """Make images from prompts alone in one way.

    Args:
        count: number of prompts.
        how: ``guidance_scale`` and ``num_inference_steps``, as for ``run_in_batches``.

    Returns:
        ``adherence``, the fraction right of what a prompt names; ``frechet``, the distance to renders of other scenes;
        ``spread``, the mean difference of two images of one prompt from different seeds.
    """
    judge, prompts = Judge.load(), draw_prompts(count)
    made = run_in_batches(pipe, [_GREY] * count, prompts, 1.0, **how)
    answers = [answer(*pair) for pair in zip(prompts, judge.classify(made), strict=True)]
    renders = judge.features([render(scene) for scene in draw_scenes("reference", count)])
    return {
        "adherence": estimates.mean_fraction([float(np.mean(list(right.values()))) for right in answers]),
        "frechet": estimates.frechet(judge.features(made), renders),
        "spread": _spread(pipe, prompts, made, **how),
    }


def evaluate_steps(pipe: DeciDiffusionImg2ImgPipeline, count: int) -> dict[str, Any]:
    """Make images from prompts alone with several samplers, at equal numbers of U-Net calls."""
    judge, prompts, own = Judge.load(), draw_prompts(count), pipe.scheduler
    features = judge.features([render(scene) for scene in draw_scenes("reference", count)])
    report: dict[str, Any] = {}
    try:
        for name, make in SAMPLERS.items():
            pipe.scheduler = make(own.config) or own
            report[name] = {}
            for calls in CALLS:
                made = run_in_batches(pipe, [_GREY] * count, prompts, 1.0, num_inference_steps=calls)
                answers = [answer(*pair) for pair in zip(prompts, judge.classify(made), strict=True)]
                report[name][str(calls)] = {
                    "adherence": estimates.mean_fraction([float(np.mean(list(right.values()))) for right in answers]),
                    "frechet": estimates.frechet(judge.features(made), features),
                }
    finally:
        pipe.scheduler = own
    return report


def evaluate_duplicates(pipe: DeciDiffusionImg2ImgPipeline, count: int) -> dict[str, Any]:
    """Count suns and red buildings by colour in images that ask for one, and in renders of the same scenes.

    Reported for both: the fraction with two or more; and how often the judge agrees with the renderer's colours on time
    and ground.
    """
    rng = random.Random("evaluate duplicates")
    scenes = [
        replace(random_scene(rng), style="painting", weather="clear", house="red", ground=rng.choice(("grass", "snow")))
        for _ in range(count)
    ]
    prompts = [caption(scene) for scene in scenes]
    sets = {
        "made": run_in_batches(pipe, [_GREY] * count, prompts, 1.0),
        "renders": [render(scene) for scene in scenes],
    }
    report = {}
    for name, images in sets.items():
        pairs = list(zip(scenes, images, strict=True))
        judged = [
            (seen.get("time"), seen.get("ground"), image)
            for seen, image in zip(Judge.load().classify(images), images, strict=True)
            if "time" in seen
        ]
        report[name] = {
            "two suns": estimates.fraction([count_suns(image, scene.time) > 1 for scene, image in pairs]),
            "two buildings": estimates.fraction(
                [count_red_buildings(image, scene.building, scene.time) > 1 for scene, image in pairs]
            ),
        }
        if judged:
            report[name]["judge and colours agree on time"] = estimates.fraction(
                [time_by_colour(image) == found for found, _, image in judged]
            )
            report[name]["judge and colours agree on ground"] = estimates.fraction(
                [ground_by_colour(image, found) == ground for found, ground, image in judged]
            )
    return report


def evaluate_call(pipe: DeciDiffusionImg2ImgPipeline, count: int) -> dict[str, Any]:
    """Time six calls of 30 steps at strength 0.75, in seconds, whatever ``count`` is; the first is not counted."""
    image, prompt = render(Scene(house="red")), caption(Scene(house="red", time="night"))
    times = []
    for _ in range(6):
        started = time.monotonic()
        run_in_batches(pipe, [image], [prompt], strength=0.75)
        times.append(time.monotonic() - started)
    return {"median seconds": float(np.median(times[1:]))}


def draw_scenes(purpose: str, count: int) -> list[Scene]:
    """Draw random scenes, always the same for one purpose, that no training uses."""
    rng = random.Random(f"evaluate {purpose}")
    return [random_scene(rng) for _ in range(count)]


def draw_prompts(count: int) -> list[str]:
    """Draw prompts that name every attribute of a scene, in varied words, so that everything can be judged."""
    rng = random.Random("evaluate words")
    return [caption(scene, rng, left_out=0) for scene in draw_scenes("text", count)]


# --- the report -------------------------------------------------------------------------------------------------------

MEASUREMENTS: dict[str, Callable[[DeciDiffusionImg2ImgPipeline, int], dict[str, Any]]] = {
    "call": evaluate_call,
    "vae": evaluate_vae,
    "tasks": evaluate_tasks,
    "examples": evaluate_examples,
    "guidance": evaluate_guidance,
    "steps": evaluate_steps,
    "duplicates": evaluate_duplicates,
}


def evaluate(
    pipe: DeciDiffusionImg2ImgPipeline,
    count: int = FULL,
    parts: Sequence[str] = tuple(MEASUREMENTS),
    file: Path | None = None,
) -> dict[str, Any]:
    """Measure everything, or some parts of it, on fixed seeds.

    Args:
        pipe: the pipeline of the bundled model, or of one trained like it.
        count: images for each point of a curve; at least 20 for intervals of Fréchet distances.
        parts: names in ``MEASUREMENTS``.
        file: a JSON file that is written after each part, and keeps the parts that were measured before.

    Returns:
        The settings; the number of images and the environment of each part; and a report for each part.
    """
    pipe.set_progress_bar_config(disable=True)
    settings = {"num_inference_steps": STEPS, "guidance_scale": GUIDANCE}
    report: dict[str, Any] = {"settings": settings, "images": {}, "environment": {}}
    if file and file.is_file():
        report = json.loads(file.read_text())
    for name in parts:
        started = time.monotonic()
        report[name] = MEASUREMENTS[name](pipe, count)
        report["images"][name], report["environment"][name] = count, describe_pipeline(pipe)
        print(f"{name}: {time.monotonic() - started:.0f} s", flush=True)
        if file:
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(json.dumps(report, indent=2) + "\n")
    return report


@dataclass(frozen=True)
class Goal:
    """A value that was asked for, what was reached, and whether that is enough."""

    name: str
    asked: str
    reached: str
    met: bool


def goals(report: dict[str, Any]) -> list[Goal]:
    """Compare a report with what was asked of the bundled model."""
    found = []

    def asked(name: str, value: float, low: float | None = None, high: float | None = None, form: str = ".2f") -> None:
        limits = [
            f"{word} {limit:{form}}" for word, limit in (("at least", low), ("at most", high)) if limit is not None
        ]
        met = (low is None or value >= low) and (high is None or value <= high)
        found.append(Goal(name, ", ".join(limits), f"{value:{form}}", met))

    guidance, tasks = report["guidance"], report["tasks"]
    one, usual, strong = guidance["1"], guidance["7.5"], guidance["20"]
    named = [name for name in ATTRIBUTES if name in usual]
    asked("VAE, PSNR in dB", report["vae"]["all"]["psnr"]["value"], 33, form=".1f")
    night = report["examples"]["day to night"]
    asked("sky and ground as said, strength 0.5", night["said"]["0.5"]["value"], high=0.3)
    asked("sky and ground as said, strength 1", night["said"]["1"]["value"], 0.95)
    for name, row in report["examples"].items():
        asked(f"strength 0.75 to 1, difference, {name}", row["ends"]["value"], 0.12)
    asked("attributes right, guidance 1, mean", float(np.mean([one[name]["value"] for name in named])), 0.5, 0.85)
    asked("attributes right, guidance 7.5, least", min(usual[name]["value"] for name in named), 0.95)
    asked("all of a prompt, guidance 7.5", usual["all"]["value"], 0.85)
    asked("spread at 7.5 beside 1", usual["spread"]["value"] / max(one["spread"]["value"], 1e-9), high=0.7)
    burnt = max(
        strong[key]["value"] / max(usual[key]["value"], 1e-9) for key in ("clipped", "oversaturated", "frechet")
    )
    asked("burning at 20 beside 7.5", burnt, 1.5)
    asked("detail beside renders, guidance 5", guidance["5"]["detail"]["value"], 0.95, 1.05)
    rows = tasks["strokes to painting"]
    least = 1.5 * rows["1"]["frechet"]["value"]
    sweet = [rows[key]["layout"]["value"] for key in ("0.4", "0.5", "0.6") if rows[key]["frechet"]["value"] <= least]
    asked("strokes at 0.4 to 0.6, layout where realistic", max(sweet, default=0.0), 0.6)
    for name in ("two suns", "two buildings"):
        asked(name, report["duplicates"]["made"][name]["value"], high=0.03)
    asked("30 steps at strength 0.75, seconds", report["call"]["median seconds"], high=1.5)
    return found


def table(report: dict[str, Any]) -> str:
    """Return the report as text; a value is followed by half the width of its 95% interval."""
    settings = report["settings"]
    images = ", ".join(f"{name} {count}" for name, count in report["images"].items() if name != "call")
    lines = [f"images a point: {images}; {settings['num_inference_steps']} steps", "VAE"]
    for name, row in report["vae"].items():
        if name == "judged right":
            lines.append("  judged right  " + "  ".join(f"{key} {value:.0%}" for key, value in row.items()))
        else:
            lines.append(f"  {name:<14}PSNR {_short(row['psnr'], '.1f')} dB   SSIM {_short(row['ssim'], '.3f')}")
    for task, rows in report["tasks"].items():
        lines += [task, *columns("strength", rows)]
    for name, row in report["examples"].items():
        said = "  ".join(f"{strength} {_short(value)}" for strength, value in row["said"].items())
        lines.append(f"example, {name}: sky and ground as said, by strength: {said}; "
                     f"difference of 0.75 and 1: {_short(row['ends'], '.3f')}")  # fmt: skip
    lines += ["guidance", *columns("scale", report["guidance"])]
    for name, rows in report["steps"].items():
        lines += [name, *columns("calls", rows)]
    lines += ["counted by colour", *columns("", report["duplicates"])]
    lines.append(f"one call: {report['call']['median seconds']:.2f} s")
    lines.append("asked for")
    for goal in goals(report):
        lines.append(f"  {goal.name:<48}{goal.asked:<32}{goal.reached}{'' if goal.met else '   MISSED'}")
    return "\n".join(lines)


def columns(axis: str, rows: dict[str, dict[str, Estimate]]) -> list[str]:
    """One column for each point of a curve, one line for each measure."""
    names = list(dict.fromkeys(name for row in rows.values() for name in row))
    lines = [f"  {axis:<34}" + "".join(f"{key:>12}" for key in rows)]
    for name in names:
        form = ".3f" if name in ("change", "clipped", "oversaturated", "spread") else ".2f"
        lines.append(
            f"  {name:<34}" + "".join(f"{_short(row[name], form) if name in row else '':>12}" for row in rows.values())
        )
    return lines


def _short(estimate: Estimate, form: str = ".2f") -> str:
    return f"{estimate['value']:{form}}±{(estimate['high'] - estimate['low']) / 2:{form}}".replace("±0.", "±.")


def fill_card(text: str, card: Path) -> None:
    """Put a table into a model's card, between its two marks."""
    before, begin, rest = card.read_text(encoding="utf-8").partition("<!-- evaluate -->\n")
    _, end, after = rest.partition("<!-- /evaluate -->")
    if not (begin and end):
        raise InputError(f"{card.name} must have the marks <!-- evaluate --> and <!-- /evaluate -->")
    card.write_text(f"{before}{begin}```\n{text}\n```\n{end}{after}", encoding="utf-8")


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="tiny", help="a diffusers folder (default: the bundled model)")
    parser.add_argument("--count", type=int, default=FULL, help="images a point (default %(default)s)")
    parser.add_argument("--device", help="default: a GPU if there is one")
    parser.add_argument("--runtime", default=openvino.TORCH, choices=openvino.RUNTIMES, help="of the U-Net")
    parser.add_argument("--parts", nargs="+", choices=MEASUREMENTS, default=list(MEASUREMENTS), help="default: all")
    parser.add_argument(
        "--results", type=Path, default=Path("results/tiny"), help="where the JSON goes (default %(default)s)"
    )
    given = parser.parse_args(arguments)
    pipe = load_pipeline(given.model, device=given.device, dtype=torch.float32, runtime=given.runtime)
    file = given.results / "evaluate.json"
    report = evaluate(pipe, given.count, given.parts, file)
    if not all(name in report for name in MEASUREMENTS):
        print(f"{file.name} has {', '.join(name for name in MEASUREMENTS if name in report)}")
        return
    print(table(report))
    card = (MODELS["tiny"].source if given.model == "tiny" else Path(given.model)) / "README.md"
    if card.is_file():
        fill_card(table(report), card)


if __name__ == "__main__":
    main()
