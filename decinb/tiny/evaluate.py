"""Measure the bundled model: ``python -m decinb.tiny.evaluate``.

How well the VAE draws scenes again, how often text becomes the scene it names, how well image to image changes one
thing and keeps the rest, what guidance and steps do. The scenes are drawn from seeds that no training uses, the prompts
are worded as no caption of the training is; the judge looks at what comes out. ``goals`` says what was asked for.
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

from decinb.errors import InputError
from decinb.loading import load_pipeline
from decinb.metrics import clipped_fraction, mean_abs_difference, oversaturated, psnr, ssim
from decinb.models import MODELS
from decinb.pipeline import DeciDiffusionImg2ImgPipeline
from decinb.scenes.adherence import named_attributes
from decinb.scenes.judge import Judge, accuracy, through_vae
from decinb.scenes import ATTRIBUTES, HOUSE, IMAGE_SIZE, Scene, caption, house_mask, random_scene, render
from decinb.utils.environment import describe

STEPS = 30
GUIDANCE = 5.0
STRENGTHS = [i / 10 for i in range(1, 11)]
GUIDANCES = [1, 2, 3, 5, 7.5, 10, 15, 20]
STEP_COUNTS = [5, 10, 20, 30, 50, 100]
BATCH = 32
FULL = {
    "vae": 500,
    "text": 500,
    "changes": 200,
    "guidance": 64,
    "steps": 64,
}  # scenes, prompts, pairs, prompts, prompts
QUICK = {"vae": 100, "text": 100, "changes": 16, "guidance": 8, "steps": 8}

CHANGES: dict[str, tuple[str, str, str]] = {  # (attribute, value in the image, value in the prompt)
    "day to night": ("time", "day", "night"),
    "grass to snow": ("ground", "grass", "snow"),
    "sketch to painting": ("style", "sketch", "painting"),
    "house colour": ("house", "", ""),  # any colour to any other
}


def evaluate_vae(pipe: DeciDiffusionImg2ImgPipeline, count: int) -> dict[str, Any]:
    """Compare scenes with themselves after the VAE: PSNR (dB), SSIM, and what the judge still sees right."""
    scenes = list(_scenes("vae", count))
    images = [render(scene) for scene in scenes]
    back = through_vae(images, pipe.vae)
    values = [(scene.style, psnr(*pair), ssim(*pair)) for scene, *pair in zip(scenes, back, images, strict=True)]
    report: dict[str, Any] = {"scenes": count}
    for name, styles in {"all": ATTRIBUTES["style"], **{style: (style,) for style in ATTRIBUTES["style"]}}.items():
        chosen = [value[1:] for value in values if value[0] in styles]
        report[name] = dict(zip(("psnr", "ssim"), np.mean(chosen, axis=0).tolist(), strict=True)) if chosen else None
    judged = accuracy(Judge.load(), scenes, back)
    report["judged_right"] = {name: judged[name] for name in ATTRIBUTES}
    return report


def evaluate_text(pipe: DeciDiffusionImg2ImgPipeline, count: int) -> dict[str, Any]:
    """Make pictures from words alone (strength 1) and let the judge say what is right."""
    prompts = _prompts(count)
    seen = Judge.load().see(run_in_batches(pipe, [_GREY] * count, prompts, strength=1.0))
    answers = [_answers(*pair) for pair in zip(prompts, seen, strict=True)]
    shares = {name: [answer[name] for answer in answers if name in answer] for name in ATTRIBUTES}
    return {
        "prompts": count,
        "right": {name: float(np.mean(right)) for name, right in shares.items() if right},
        "all_right": float(np.mean([all(answer.values()) for answer in answers])),
    }


def evaluate_changes(pipe: DeciDiffusionImg2ImgPipeline, count: int) -> dict[str, Any]:
    """Change one thing of a scene by its prompt at every strength.

    Reported by strength: ``changed``, the share where the judge sees the new value; ``kept``, the share right of
    everything else the prompt names; ``adherence``, of both; ``overlap``, how well the house stayed in its place (see
    ``find_house``); ``distance``, the mean difference from the input. At strength 1 the image is forgotten, so the
    overlap there is what chance gives. ``vae`` is the overlap that the VAE alone leaves of the targets: the best there
    can be.
    """
    pairs = list(draw_pairs(count))
    redrawn = through_vae([render(target) for *_, target in pairs], pipe.vae)
    best = [
        overlap(find_house(image, target), house_mask(target))
        for image, (*_, target) in zip(redrawn, pairs, strict=True)
    ]
    report: dict[str, Any] = {"pairs": count, "vae": float(np.mean(best)), "strengths": {}}
    for strength in STRENGTHS:
        report["strengths"][f"{strength:g}"] = measure_changes(pipe, pairs, strength)
    return report


def measure_changes(
    pipe: DiffusionPipeline, pairs: Sequence[tuple[str, Scene, Scene]], strength: float
) -> dict[str, dict[str, float]]:
    """What ``evaluate_changes`` reports of one strength: of all pairs, and by the name of their change."""
    images = [render(scene) for _, scene, _ in pairs]
    prompts = [caption(target) for *_, target in pairs]
    made = run_in_batches(pipe, images, prompts, strength)
    rows: dict[str, list[dict[str, float]]] = {name: [] for name in ("all", *CHANGES)}
    for (name, _, target), before, image, prompt, seen in zip(
        pairs, images, made, prompts, Judge.load().see(made), strict=True
    ):
        answers = _answers(prompt, seen)
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
    """What more guidance does to pictures made from words: adherence, over-saturated pixels, pixels at a limit."""
    prompts = _prompts(count)
    report: dict[str, Any] = {"prompts": count, "scales": {}}
    for scale in GUIDANCES:
        made = run_in_batches(pipe, [_GREY] * count, prompts, strength=1.0, guidance_scale=scale)
        report["scales"][f"{scale:g}"] = {
            "adherence": _adherence(made, prompts),
            "oversaturated": oversaturated(made),
            "at a limit": clipped_fraction(made),
        }
    return report


def evaluate_steps(pipe: DeciDiffusionImg2ImgPipeline, count: int) -> dict[str, Any]:
    """What more steps do to pictures made from words: adherence, and how far each is from that of twice the most."""
    prompts = _prompts(count)
    settled = run_in_batches(pipe, [_GREY] * count, prompts, strength=1.0, num_inference_steps=2 * STEP_COUNTS[-1])
    report: dict[str, Any] = {"prompts": count, "steps": {}}
    for steps in STEP_COUNTS:
        made = run_in_batches(pipe, [_GREY] * count, prompts, strength=1.0, num_inference_steps=steps)
        unsettled = float(np.mean([mean_abs_difference(*pair) for pair in zip(made, settled, strict=True)]))
        report["steps"][str(steps)] = {"adherence": _adherence(made, prompts), "unsettled": unsettled}
    return report


def evaluate_call(pipe: DeciDiffusionImg2ImgPipeline) -> dict[str, Any]:
    """The time of one call of 30 steps at strength 0.75: the median of five, in seconds."""
    image, prompt = render(Scene(house="red")), caption(Scene(house="red", time="night"))
    times = []
    for _ in range(6):
        started = time.monotonic()
        run_in_batches(pipe, [image], [prompt], strength=0.75)
        times.append(time.monotonic() - started)
    return {"median_seconds": float(np.median(times[1:]))}


def find_house(image: Image.Image, target: Scene) -> np.ndarray:
    """Where a picture shows the house of ``target``, as a boolean array (height, width), without asking the judge.

    A pixel is of the house if its colour is nearer, by a third, to the target drawn with its house than to the target
    drawn without. (By a third, so that noise and houses elsewhere count for little. Outside its true place both
    drawings are the same, so nothing is found there.)
    """
    pixels, with_house, without = (
        np.asarray(picture, dtype=float)
        for picture in (image, render(target, image.width), render(replace(target, house=None), image.width))
    )
    return np.abs(pixels - with_house).sum(axis=-1) < 2 / 3 * np.abs(pixels - without).sum(axis=-1)


def overlap(found: np.ndarray, true: np.ndarray) -> float:
    """Intersection over union of two masks, from 0 to 1."""
    return float((found & true).sum() / (found | true).sum())


# --- what is drawn and made -------------------------------------------------------------------------------------------


def _scenes(purpose: str, count: int) -> Iterator[Scene]:
    rng = random.Random(f"evaluate {purpose}")
    return (random_scene(rng) for _ in range(count))


def draw_pairs(count: int) -> Iterator[tuple[str, Scene, Scene]]:
    """The name of the change, the scene before and the scene after it; every scene has a house."""
    rng = random.Random("evaluate changes")
    for i in range(count):
        name = list(CHANGES)[i % len(CHANGES)]
        attribute, before, after = CHANGES[name]
        colours = rng.sample(list(HOUSE), 2)
        if attribute == "house":
            before, after = colours
        scene = replace(random_scene(rng), style="painting", house=colours[0])
        yield name, replace(scene, **{attribute: before}), replace(scene, **{attribute: after})


_GREY = Image.new("RGB", (IMAGE_SIZE, IMAGE_SIZE), (127, 127, 127))  # at strength 1 any picture will do


def _prompts(count: int) -> list[str]:
    """Complete prompts that no training has seen: they name the style last, where captions begin with it."""
    rng = random.Random("evaluate words")
    said = (caption(scene, rng, left_out=0, always=["style"]) for scene in _scenes("text", count))
    return [", ".join(reversed(words.split(" of ", 1))) for words in said]


def _answers(prompt: str, seen: dict[str, Any]) -> dict[str, bool]:
    return {name: seen.get(name) == value for name, value in named_attributes(prompt).items()}


def _adherence(images: Sequence[Image.Image], prompts: Sequence[str]) -> float:
    pairs = zip(prompts, Judge.load().see(images), strict=True)
    return float(np.mean([np.mean(list(_answers(*pair).values())) for pair in pairs]))


def _mean(rows: Sequence[dict[str, float]]) -> dict[str, float]:
    return {key: float(np.mean([row[key] for row in rows])) for key in rows[0]}


def run_in_batches(
    pipe: DiffusionPipeline,
    images: Sequence[Image.Image],
    prompts: Sequence[str],
    strength: float,
    guidance_scale: float = GUIDANCE,
    num_inference_steps: int | None = None,
) -> list[Image.Image]:
    """Call an image-to-image pipeline on many images, each with its own prompt and seed; by default in ``STEPS``."""
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
        quick: use a fifth or less of the scenes: a rough answer in about a minute on two cores.

    Returns:
        What is to be stored: the settings, the environment, and one report each of ``vae``, ``text`` and ``changes``.
    """
    pipe.set_progress_bar_config(disable=True)
    report: dict[str, Any] = {
        "settings": {"num_inference_steps": STEPS, "guidance_scale": GUIDANCE, "quick": quick},
        "environment": describe(pipe),
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
    """A figure that was asked for, what was reached, and whether that is enough."""

    name: str
    asked: str
    reached: str
    met: bool


def goals(report: dict[str, Any]) -> list[Goal]:
    """Hold a report against what was asked of the bundled model before it was trained."""

    def at_least(name: str, value: float, least: float, form: str) -> Goal:
        return Goal(name, f"at least {least:{form}}", f"{value:{form}}", value >= least)

    vae, text, changes = report["vae"]["all"], report["text"], report["changes"]
    found = [
        at_least("VAE, PSNR in dB", vae["psnr"], 30.0, ".1f"),
        at_least("VAE, SSIM", vae["ssim"], 0.93, ".3f"),
        *(at_least(f"text, {name}", share, 0.95, ".1%") for name, share in text["right"].items()),
        at_least("text, all of a prompt", text["all_right"], 0.85, ".1%"),
    ]
    for name, least in {
        "sketch to painting": 0.6,
        "house colour": 0.6,
        "day to night": 0.4,
        "grass to snow": 0.4,
    }.items():
        strength, row = _best(changes, name, 0.9)
        reached = f"{row['changed']:.0%} with overlap {row['overlap']:.2f}, at strength {strength}"
        asked = f"at least 90% with overlap {least}"
        found.append(Goal(name, asked, reached, row["changed"] >= 0.9 and row["overlap"] >= least))
    curves = {
        "distance rises with strength": ([row["all"]["distance"] for row in changes["strengths"].values()], 0.0),
        "adherence rises with strength": ([row["all"]["adherence"] for row in changes["strengths"].values()], 0.02),
        "adherence rises with guidance": ([row["adherence"] for row in report["guidance"]["scales"].values()], 0.02),
        "oversaturation rises with guidance": (
            [row["oversaturated"] for row in report["guidance"]["scales"].values()],
            0.0005,
        ),
        "pictures settle with steps": ([-row["unsettled"] for row in report["steps"]["steps"].values()], 0.0),
        "adherence rises with steps": ([row["adherence"] for row in report["steps"]["steps"].values()], 0.02),
    }
    for name, (values, slack) in curves.items():  # the slack is what the judge's errors and chance move a share by
        falls = max(before - after for before, after in itertools.pairwise(values))
        reached = f"from {abs(values[0]):.4f} to {abs(values[-1]):.4f}, never back by more than {max(falls, 0):.4f}"
        found.append(Goal(name, f"no fall above {slack}", reached, falls <= slack and values[-1] > values[0]))
    seconds = report["call"]["median_seconds"]
    found.append(Goal("30 steps at strength 0.75", "at most 2 s", f"{seconds:.2f} s", seconds <= 2))
    return found


def _best(changes: dict[str, Any], name: str, least: float) -> tuple[str, dict[str, float]]:
    """The strength with the largest overlap among those that make the change often enough, or that make it most."""
    rows = {strength: row[name] for strength, row in changes["strengths"].items()}
    enough = {strength: row for strength, row in rows.items() if row["changed"] >= least}
    if enough:
        return max(enough.items(), key=lambda item: item[1]["overlap"])
    return max(rows.items(), key=lambda item: item[1]["changed"])


def table(report: dict[str, Any]) -> str:
    """The report as text."""
    vae, text, changes = report["vae"], report["text"], report["changes"]
    lines = [f"VAE, {vae['scenes']} scenes, {vae['seconds']:.0f} s"]
    for name in filter(vae.get, ("all", *ATTRIBUTES["style"])):
        lines.append(f"  {name:<20} PSNR {vae[name]['psnr']:5.1f} dB   SSIM {vae[name]['ssim']:.3f}")
    lines.append(
        "  judged right         " + "  ".join(f"{key} {share:.0%}" for key, share in vae["judged_right"].items())
    )
    lines.append(f"Text to image, {text['prompts']} prompts, {text['seconds']:.0f} s")
    lines.append("  right                " + "  ".join(f"{key} {share:.0%}" for key, share in text["right"].items()))
    lines.append(f"  all of the prompt    {text['all_right']:.0%}")
    lines.append(
        f"Image to image, {changes['pairs']} pairs that differ in one thing, {changes['seconds']:.0f} s "
        f"(overlap: the VAE alone leaves {changes['vae']:.2f})"
    )
    lines.append(f"  {'strength':<27}" + "".join(f"{strength:>7}" for strength in changes["strengths"]))
    for name in ("all", *CHANGES):
        keys = ("changed", "kept", "adherence", "overlap", "distance") if name == "all" else ("changed", "overlap")
        for key in keys:
            values = "".join(f"{shares[name][key]:7.2f}" for shares in changes["strengths"].values())
            lines.append(f"  {name + ', ' + key:<27}" + values)
    for name, axis in {"guidance": "scales", "steps": "steps"}.items():
        lines.append(f"More {name}, {report[name]['prompts']} prompts, {report[name]['seconds']:.0f} s")
        rows = report[name][axis]
        lines.append(f"  {axis:<27}" + "".join(f"{value:>7}" for value in rows))
        for key in next(iter(rows.values())):
            lines.append(f"  {key:<27}" + "".join(f"{row[key]:7.4f}" for row in rows.values()))
    lines.append("Asked for")
    for goal in goals(report):
        lines.append(f"  {goal.name:<36}{goal.asked:<32}{goal.reached}{'' if goal.met else '   MISSED'}")
    return "\n".join(lines)


def fill_card(text: str, card: Path) -> None:
    """Put a table into a model's card, between its two marks, so that no number there is typed by hand."""
    before, begin, rest = card.read_text(encoding="utf-8").partition("<!-- evaluate -->\n")
    _, end, after = rest.partition("<!-- /evaluate -->")
    if not (begin and end):
        raise InputError(f"{card.name} has no marks <!-- evaluate --> and <!-- /evaluate --> to put the table between")
    card.write_text(f"{before}{begin}```\n{text}\n```\n{end}{after}", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="tiny", help="a diffusers folder (default: the bundled model)")
    parser.add_argument("--quick", action="store_true", help="fewer scenes: about a minute on two cores")
    parser.add_argument(
        "--results", type=Path, default=Path("results/tiny"), help="where the JSON goes (default %(default)s)"
    )
    given = parser.parse_args()
    report = evaluate(load_pipeline(given.model), given.quick)
    print(table(report))
    given.results.mkdir(parents=True, exist_ok=True)
    file = given.results / ("evaluate-quick.json" if given.quick else "evaluate.json")
    file.write_text(json.dumps(report, indent=2) + "\n")
    print(f"wrote {file.name}")
    card = (MODELS["tiny"].source if given.model == "tiny" else Path(given.model)) / "README.md"
    if card.is_file() and not given.quick:
        fill_card(table(report), card)


if __name__ == "__main__":
    main()
