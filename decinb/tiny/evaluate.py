"""Measure the bundled model: ``python -m decinb.tiny.evaluate``.

The report says how well the VAE reconstructs scenes, how often an image shows what its prompt names, how well image to
image changes one attribute and keeps the rest, and what guidance and steps do. Scenes come from seeds that no training
uses, and prompts are worded as no training caption is; the judge looks at the images. ``goals`` compares the report
with what the model was meant to reach.
"""

import argparse
import itertools
import json
import random
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import DiffusionPipeline
from PIL import Image
from torch import nn

from decinb.errors import InputError
from decinb.loading import load_pipeline
from decinb.metrics import clipped_fraction, mean_abs_difference, oversaturated, psnr, ssim
from decinb.models import MODELS
from decinb.pipeline import DeciDiffusionImg2ImgPipeline
from decinb.scenes.adherence import named_attributes
from decinb.scenes.judge import Judge, accuracy, to_image, to_tensor
from decinb.scenes.scenes import ATTRIBUTES, HOUSE, IMAGE_SIZE, Scene, caption, house_mask, random_scene, render
from decinb.utils.environment import describe_pipeline

STEPS = 30
GUIDANCE = 5.0
STRENGTHS = [i / 10 for i in range(1, 11)]
GUIDANCES = [1, 2, 3, 5, 7.5, 10, 15, 20]
STEP_COUNTS = [5, 10, 20, 30, 50, 100]
BATCH = 32
FULL = {"vae": 500, "text": 500, "changes": 200, "guidance": 64, "steps": 64}
QUICK = {"vae": 100, "text": 100, "changes": 16, "guidance": 8, "steps": 8}
"""The numbers of scenes (for the VAE), pairs (for changes) and prompts (for all else)."""

GREY = Image.new("RGB", (IMAGE_SIZE, IMAGE_SIZE), (127, 127, 127))  # the input at strength 1, where it has no effect

CHANGES: dict[str, tuple[str, str, str]] = {  # (attribute, value in the input, value in the prompt)
    "day to night": ("time", "day", "night"),
    "grass to snow": ("ground", "grass", "snow"),
    "sketch to painting": ("style", "sketch", "painting"),
    "house colour": ("house", "", ""),  # from any colour to any other
}


def evaluate_vae(pipe: DeciDiffusionImg2ImgPipeline, count: int) -> dict[str, Any]:
    """Compare scenes with their reconstructions by the VAE: PSNR (dB), SSIM, and the accuracy of the judge on them."""
    scenes = list(_scenes("vae", count))
    images = [render(scene) for scene in scenes]
    reconstructed = reconstruct(images, pipe.vae)
    values = [
        (scene.style, psnr(*pair), ssim(*pair)) for scene, *pair in zip(scenes, reconstructed, images, strict=True)
    ]
    report: dict[str, Any] = {"scenes": count}
    for name, styles in {"all": ATTRIBUTES["style"], **{style: (style,) for style in ATTRIBUTES["style"]}}.items():
        chosen = [value[1:] for value in values if value[0] in styles]
        report[name] = dict(zip(("psnr", "ssim"), np.mean(chosen, axis=0).tolist(), strict=True)) if chosen else None
    judged = accuracy(Judge.load(), scenes, reconstructed)
    report["judge_accuracy"] = {name: judged[name] for name in ATTRIBUTES}
    return report


def evaluate_text(pipe: DeciDiffusionImg2ImgPipeline, count: int) -> dict[str, Any]:
    """Make images from prompts alone (strength 1), and let the judge say which attributes are correct."""
    prompts = _prompts(count)
    shown = Judge.load().classify(run_in_batches(pipe, [GREY] * count, prompts, strength=1.0))
    answers = [_answers(*pair) for pair in zip(prompts, shown, strict=True)]
    correct = {name: [answer[name] for answer in answers if name in answer] for name in ATTRIBUTES}
    return {
        "prompts": count,
        "correct": {name: float(np.mean(values)) for name, values in correct.items() if values},
        "all_correct": float(np.mean([all(answer.values()) for answer in answers])),
    }


def evaluate_changes(pipe: DeciDiffusionImg2ImgPipeline, count: int) -> dict[str, Any]:
    """Change one attribute of a scene through the prompt, at every strength.

    Reported for each strength: ``changed``, the fraction of images with the new value; ``kept``, the fraction of
    correct values among all else that the prompt names; ``adherence``, the fraction for both together; ``overlap``, how
    well the house stayed in place (see ``find_house``); ``distance``, the mean absolute difference from the input. At
    strength 1 the input has no effect, so the overlap there is due to chance. ``vae`` is the overlap in the targets
    after the VAE alone, an upper limit.
    """
    pairs = list(draw_pairs(count))
    reconstructed = reconstruct([render(target) for *_, target in pairs], pipe.vae)
    overlaps = [
        overlap(find_house(image, target), house_mask(target))
        for image, (*_, target) in zip(reconstructed, pairs, strict=True)
    ]
    report: dict[str, Any] = {"pairs": count, "vae": float(np.mean(overlaps)), "strengths": {}}
    for strength in STRENGTHS:
        report["strengths"][f"{strength:g}"] = measure_changes(pipe, pairs, strength)
    return report


def measure_changes(
    pipe: DiffusionPipeline, pairs: Sequence[tuple[str, Scene, Scene]], strength: float
) -> dict[str, dict[str, float]]:
    """Return what ``evaluate_changes`` reports for one strength: for all pairs, and by the name of the change."""
    images = [render(scene) for _, scene, _ in pairs]
    prompts = [caption(target) for *_, target in pairs]
    made = run_in_batches(pipe, images, prompts, strength)
    rows: dict[str, list[dict[str, float]]] = {name: [] for name in ("all", *CHANGES)}
    for (name, _, target), before, image, prompt, shown in zip(
        pairs, images, made, prompts, Judge.load().classify(made), strict=True
    ):
        answers = _answers(prompt, shown)
        adherence = float(np.mean(list(answers.values())))
        row = {
            "changed": float(answers.pop(CHANGES[name][0])),
            "kept": float(np.mean(list(answers.values()))),
            "adherence": adherence,
            "overlap": overlap(find_house(image, target), house_mask(target)),
            "distance": mean_abs_difference(image, before),
        }
        rows[name].append(row)
        rows["all"].append(row)
    return {name: _mean(values) for name, values in rows.items()}


def evaluate_guidance(pipe: DeciDiffusionImg2ImgPipeline, count: int) -> dict[str, Any]:
    """Measure what guidance does to images made from prompts alone: adherence, oversaturated and clipped pixels."""
    prompts = _prompts(count)
    report: dict[str, Any] = {"prompts": count, "scales": {}}
    for scale in GUIDANCES:
        made = run_in_batches(pipe, [GREY] * count, prompts, strength=1.0, guidance_scale=scale)
        report["scales"][f"{scale:g}"] = {
            "adherence": _adherence(made, prompts),
            "oversaturated": oversaturated(made),
            "clipped": clipped_fraction(made),
        }
    return report


def evaluate_steps(pipe: DeciDiffusionImg2ImgPipeline, count: int) -> dict[str, Any]:
    """Measure what steps do to images made from prompts alone: adherence, and distance from those of 200 steps."""
    prompts = _prompts(count)
    converged = run_in_batches(pipe, [GREY] * count, prompts, strength=1.0, num_inference_steps=2 * STEP_COUNTS[-1])
    report: dict[str, Any] = {"prompts": count, "steps": {}}
    for steps in STEP_COUNTS:
        made = run_in_batches(pipe, [GREY] * count, prompts, strength=1.0, num_inference_steps=steps)
        distance = float(np.mean([mean_abs_difference(*pair) for pair in zip(made, converged, strict=True)]))
        report["steps"][str(steps)] = {"adherence": _adherence(made, prompts), "distance": distance}
    return report


def evaluate_call(pipe: DeciDiffusionImg2ImgPipeline) -> dict[str, Any]:
    """Time one call of 30 steps at strength 0.75: the median of five after a first, in seconds."""
    image, prompt = render(Scene(house="red")), caption(Scene(house="red", time="night"))
    times = []
    for _ in range(6):
        started = time.monotonic()
        run_in_batches(pipe, [image], [prompt], strength=0.75)
        times.append(time.monotonic() - started)
    return {"median_seconds": float(np.median(times[1:]))}


def find_house(image: Image.Image, target: Scene) -> np.ndarray:
    """Find where an image shows the house of ``target``, as a boolean array (height, width), without the judge.

    A pixel belongs to the house if its distance from the target is less than two thirds of that from the target without
    its house. The margin keeps noise and other houses from counting. Outside the true place the two are equal, so
    nothing is found there.
    """
    pixels, with_house, without = (
        np.asarray(one, dtype=float)
        for one in (image, render(target, image.width), render(replace(target, house=None), image.width))
    )
    return np.abs(pixels - with_house).sum(axis=-1) < 2 / 3 * np.abs(pixels - without).sum(axis=-1)


def overlap(found: np.ndarray, true: np.ndarray) -> float:
    """Return the intersection over union of two masks, 0 to 1."""
    return float((found & true).sum() / (found | true).sum())


# --- scenes, prompts and images ---------------------------------------------------------------------------------------


def _scenes(purpose: str, count: int) -> Iterator[Scene]:
    rng = random.Random(f"evaluate {purpose}")
    return (random_scene(rng) for _ in range(count))


def draw_pairs(count: int) -> Iterator[tuple[str, Scene, Scene]]:
    """Yield the name of a change, and the scenes before and after it; every scene has a house."""
    rng = random.Random("evaluate changes")
    for i in range(count):
        name = list(CHANGES)[i % len(CHANGES)]
        attribute, before, after = CHANGES[name]
        colours = rng.sample(list(HOUSE), 2)
        if attribute == "house":
            before, after = colours
        scene = replace(random_scene(rng), style="painting", house=colours[0])
        yield name, replace(scene, **{attribute: before}), replace(scene, **{attribute: after})


def _prompts(count: int) -> list[str]:
    """Make complete prompts unlike all training captions: they name the style at the end, not at the start."""
    rng = random.Random("evaluate words")
    captions = (caption(scene, rng, left_out=0, always=["style"]) for scene in _scenes("text", count))
    return [", ".join(reversed(text.split(" of ", 1))) for text in captions]


def _answers(prompt: str, shown: dict[str, Any]) -> dict[str, bool]:
    """Return whether each attribute that a prompt names is shown."""
    return {name: shown.get(name) == value for name, value in named_attributes(prompt).items()}


def _adherence(images: Sequence[Image.Image], prompts: Sequence[str]) -> float:
    pairs = zip(prompts, Judge.load().classify(images), strict=True)
    return float(np.mean([np.mean(list(_answers(*pair).values())) for pair in pairs]))


def _mean(rows: Sequence[dict[str, float]]) -> dict[str, float]:
    return {key: float(np.mean([row[key] for row in rows])) for key in rows[0]}


@torch.inference_mode()
def reconstruct(images: Sequence[Image.Image], vae: nn.Module) -> list[Image.Image]:
    """Encode and decode images of 128 x 128 pixels with a VAE."""
    reconstructed = []
    for start in range(0, len(images), BATCH):
        pixels = torch.stack([to_tensor(image) for image in images[start : start + BATCH]]) * 2 - 1
        latents = vae.encode(pixels.to(vae.device, vae.dtype)).latent_dist.mode()
        decoded = vae.decode(latents).sample.float().cpu() / 2 + 0.5
        reconstructed.extend(to_image(image) for image in decoded)
    return reconstructed


def run_in_batches(
    pipe: DiffusionPipeline,
    images: Sequence[Image.Image],
    prompts: Sequence[str],
    strength: float,
    guidance_scale: float = GUIDANCE,
    num_inference_steps: int | None = None,
) -> list[Image.Image]:
    """Run an image-to-image pipeline on many images, each with its own prompt and seed; by default with ``STEPS``."""
    made = []
    for start in range(0, len(prompts), BATCH):
        rows = slice(start, start + BATCH)
        made += pipe(
            prompt=list(prompts[rows]),
            image=list(images[rows]),
            strength=strength,
            guidance_scale=guidance_scale,
            num_inference_steps=num_inference_steps or STEPS,
            generator=[torch.Generator().manual_seed(start + i) for i in range(len(prompts[rows]))],
        ).images
    return made


# --- the report -------------------------------------------------------------------------------------------------------


def evaluate(pipe: DeciDiffusionImg2ImgPipeline, quick: bool = False) -> dict[str, Any]:
    """Measure everything on fixed seeds.

    Args:
        pipe: the pipeline of the bundled model, or of one trained like it.
        quick: use a fifth of the scenes or fewer, for a rough answer in about a minute on two cores.

    Returns:
        The settings, the environment, and one report for each measurement.
    """
    pipe.set_progress_bar_config(disable=True)
    report: dict[str, Any] = {
        "settings": {"num_inference_steps": STEPS, "guidance_scale": GUIDANCE, "quick": quick},
        "environment": describe_pipeline(pipe),
    }
    report["call"] = evaluate_call(pipe)
    sizes = QUICK if quick else FULL
    for name, measure in {
        "vae": evaluate_vae,
        "text": evaluate_text,
        "changes": evaluate_changes,
        "guidance": evaluate_guidance,
        "steps": evaluate_steps,
    }.items():
        started = time.monotonic()
        report[name] = measure(pipe, sizes[name])
        report[name]["seconds"] = round(time.monotonic() - started, 1)
        print(f"{name}: {report[name]['seconds']:.0f} s", flush=True)
    return report


@dataclass(frozen=True)
class Goal:
    """A value that the model was meant to reach, what it reached, and whether that is enough."""

    name: str
    required: str
    reached: str
    met: bool


def goals(report: dict[str, Any]) -> list[Goal]:
    """Compare a report with the goals that were set before the bundled model was trained."""

    def at_least(name: str, value: float, least: float, form: str) -> Goal:
        return Goal(name, f"at least {least:{form}}", f"{value:{form}}", value >= least)

    vae, text, changes = report["vae"]["all"], report["text"], report["changes"]
    found = [
        at_least("VAE, PSNR in dB", vae["psnr"], 30.0, ".1f"),
        at_least("VAE, SSIM", vae["ssim"], 0.93, ".3f"),
        *(at_least(f"text, {name}", fraction, 0.95, ".1%") for name, fraction in text["correct"].items()),
        at_least("text, whole prompt", text["all_correct"], 0.85, ".1%"),
    ]
    for name, least in {
        "sketch to painting": 0.6,
        "house colour": 0.6,
        "day to night": 0.4,
        "grass to snow": 0.4,
    }.items():
        strength, row = _best(changes, name, 0.9)
        reached = f"{row['changed']:.0%} with overlap {row['overlap']:.2f}, at strength {strength}"
        required = f"at least 90% with overlap {least}"
        found.append(Goal(name, required, reached, row["changed"] >= 0.9 and row["overlap"] >= least))
    curves = {
        "distance rises with strength": ([row["all"]["distance"] for row in changes["strengths"].values()], 0.0),
        "adherence rises with strength": ([row["all"]["adherence"] for row in changes["strengths"].values()], 0.02),
        "adherence rises with guidance": ([row["adherence"] for row in report["guidance"]["scales"].values()], 0.02),
        "oversaturation rises with guidance": (
            [row["oversaturated"] for row in report["guidance"]["scales"].values()],
            0.0005,
        ),
        "distance falls with steps": ([-row["distance"] for row in report["steps"]["steps"].values()], 0.0),
        "adherence rises with steps": ([row["adherence"] for row in report["steps"]["steps"].values()], 0.02),
    }
    for name, (values, slack) in curves.items():  # the slack allows for chance and errors of the judge
        falls = max(before - after for before, after in itertools.pairwise(values))
        reached = f"from {abs(values[0]):.4f} to {abs(values[-1]):.4f}, largest reversal {max(falls, 0):.4f}"
        found.append(Goal(name, f"no reversal above {slack}", reached, falls <= slack and values[-1] > values[0]))
    seconds = report["call"]["median_seconds"]
    found.append(Goal("30 steps at strength 0.75", "at most 2 s", f"{seconds:.2f} s", seconds <= 2))
    return found


def _best(changes: dict[str, Any], name: str, least: float) -> tuple[str, dict[str, float]]:
    """Choose the strength with the largest overlap among those with enough changes; if none has, that with the most."""
    rows = {strength: row[name] for strength, row in changes["strengths"].items()}
    enough = {strength: row for strength, row in rows.items() if row["changed"] >= least}
    if enough:
        return max(enough.items(), key=lambda item: item[1]["overlap"])
    return max(rows.items(), key=lambda item: item[1]["changed"])


def table(report: dict[str, Any]) -> str:
    """Format the report as text."""
    vae, text, changes = report["vae"], report["text"], report["changes"]
    lines = [f"VAE, {vae['scenes']} scenes, {vae['seconds']:.0f} s"]
    for name in filter(vae.get, ("all", *ATTRIBUTES["style"])):
        lines.append(f"  {name:<20} PSNR {vae[name]['psnr']:5.1f} dB   SSIM {vae[name]['ssim']:.3f}")
    lines.append(
        "  judge accuracy       " + "  ".join(f"{key} {value:.0%}" for key, value in vae["judge_accuracy"].items())
    )
    lines.append(f"Text to image, {text['prompts']} prompts, {text['seconds']:.0f} s")
    lines.append("  correct              " + "  ".join(f"{key} {value:.0%}" for key, value in text["correct"].items()))
    lines.append(f"  whole prompt         {text['all_correct']:.0%}")
    lines.append(
        f"Image to image, {changes['pairs']} pairs that differ in one attribute, {changes['seconds']:.0f} s "
        f"(overlap after the VAE alone: {changes['vae']:.2f})"
    )
    lines.append(f"  {'strength':<27}" + "".join(f"{strength:>7}" for strength in changes["strengths"]))
    for name in ("all", *CHANGES):
        keys = ("changed", "kept", "adherence", "overlap", "distance") if name == "all" else ("changed", "overlap")
        for key in keys:
            values = "".join(f"{row[name][key]:7.2f}" for row in changes["strengths"].values())
            lines.append(f"  {name + ', ' + key:<27}" + values)
    for name, axis in {"guidance": "scales", "steps": "steps"}.items():
        lines.append(f"{name.capitalize()}, {report[name]['prompts']} prompts, {report[name]['seconds']:.0f} s")
        rows = report[name][axis]
        lines.append(f"  {axis:<27}" + "".join(f"{value:>7}" for value in rows))
        for key in next(iter(rows.values())):
            lines.append(f"  {key:<27}" + "".join(f"{row[key]:7.4f}" for row in rows.values()))
    lines.append("Goals")
    for goal in goals(report):
        lines.append(f"  {goal.name:<36}{goal.required:<32}{goal.reached}{'' if goal.met else '   MISSED'}")
    return "\n".join(lines)


def fill_card(text: str, card: Path) -> None:
    """Put a table between the two markers in a model card.

    Raises:
        InputError: the card has no markers.
    """
    before, begin, rest = card.read_text(encoding="utf-8").partition("<!-- evaluate -->\n")
    _, end, after = rest.partition("<!-- /evaluate -->")
    if not (begin and end):
        raise InputError(f"{card.name} must have the markers <!-- evaluate --> and <!-- /evaluate --> for the table")
    card.write_text(f"{before}{begin}```\n{text}\n```\n{end}{after}", encoding="utf-8")


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="tiny", help="a diffusers folder (default: the bundled model)")
    parser.add_argument("--quick", action="store_true", help="use fewer scenes: about a minute on two cores")
    parser.add_argument(
        "--results", type=Path, default=Path("results/tiny"), help="folder for the JSON file (default %(default)s)"
    )
    given = parser.parse_args(arguments)
    report = evaluate(load_pipeline(given.model), given.quick)
    print(table(report))
    given.results.mkdir(parents=True, exist_ok=True)
    file = given.results / ("evaluate-quick.json" if given.quick else "evaluate.json")
    file.write_text(json.dumps(report, indent=2) + "\n")
    print(f"saved {file.name}")
    card = (MODELS["tiny"].source if given.model == "tiny" else Path(given.model)) / "README.md"
    if card.is_file() and not given.quick:
        fill_card(table(report), card)


if __name__ == "__main__":
    main()
