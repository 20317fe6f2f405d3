"""Measure the bundled model: ``python -m decinb.tiny.evaluate``.

How well the VAE draws scenes again, how often text becomes the scene it names, and how well image to image changes one
thing and keeps the rest. The scenes are drawn from seeds that no training uses; the judge looks at what comes out.
"""

import argparse
import datetime
import importlib.metadata
import json
import platform
import random
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from decinb.errors import InputError
from decinb.metrics import named_attributes, psnr, ssim
from decinb.pipeline import MODELS, DeciDiffusionImg2ImgPipeline, load_pipeline
from decinb.tiny.judge import Judge, accuracy, through_vae
from decinb.tiny.scenes import ATTRIBUTES, HOUSE, IMAGE_SIZE, Scene, caption, house_mask, random_scene, render

STEPS = 30
GUIDANCE = 5.0
STRENGTHS = [i / 10 for i in range(3, 11)]
BATCH = 32
FULL = {"vae": 500, "text": 500, "changes": 64}  # scenes, prompts, pairs
QUICK = {"vae": 100, "text": 100, "changes": 16}

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
    """Make pictures from complete captions alone (strength 1) and let the judge say what is right."""
    prompts = [caption(scene) for scene in _scenes("text", count)]
    grey = Image.new("RGB", (IMAGE_SIZE, IMAGE_SIZE), (127, 127, 127))
    images = _run(pipe, [grey] * count, prompts, strength=1.0)
    right: dict[str, list[bool]] = {name: [] for name in ATTRIBUTES}
    everything = []
    for prompt, seen in zip(prompts, Judge.load().see(images), strict=True):
        answers = {name: seen.get(name) == value for name, value in named_attributes(prompt).items()}
        for name, answer in answers.items():
            right[name].append(answer)
        everything.append(all(answers.values()))
    shares = {name: float(np.mean(answers)) for name, answers in right.items() if answers}
    return {"prompts": count, "right": shares, "all_right": float(np.mean(everything))}


def evaluate_changes(pipe: DeciDiffusionImg2ImgPipeline, count: int) -> dict[str, Any]:
    """Change one thing of a scene by its prompt at every strength.

    Reported by strength: ``changed``, the share where the judge sees the new value; ``kept``, the share right of
    everything else the prompt names; ``overlap``, how well the house stayed in its place (see ``find_house``). At
    strength 1 the image is forgotten, so the overlap there is what chance gives.
    """
    pairs = list(_pairs(count))
    images = [render(scene) for _, scene, _ in pairs]
    prompts = [caption(target) for *_, target in pairs]
    report: dict[str, Any] = {"pairs": count, "strengths": {}}
    for strength in STRENGTHS:
        rows: dict[str, list[tuple[float, float, float]]] = {name: [] for name in ("all", *CHANGES)}
        made = _run(pipe, images, prompts, strength)
        for (name, _, target), image, seen in zip(pairs, made, Judge.load().see(made), strict=True):
            answers = {key: seen.get(key) == value for key, value in named_attributes(caption(target)).items()}
            changed = answers.pop(CHANGES[name][0])
            row = (
                changed,
                float(np.mean(list(answers.values()))),
                overlap(find_house(image, target), house_mask(target)),
            )
            rows[name].append(row)
            rows["all"].append(row)
        report["strengths"][f"{strength:g}"] = {
            name: dict(zip(("changed", "kept", "overlap"), np.mean(values, axis=0).tolist(), strict=True))
            for name, values in rows.items()
        }
    return report


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


def _pairs(count: int) -> Iterator[tuple[str, Scene, Scene]]:
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


def _run(
    pipe: DeciDiffusionImg2ImgPipeline, images: Sequence[Image.Image], prompts: Sequence[str], strength: float
) -> list[Image.Image]:
    made = []
    for start in range(0, len(prompts), BATCH):
        rows = slice(start, start + BATCH)
        made += pipe(
            prompt=list(prompts[rows]),
            image=list(images[rows]),
            strength=strength,
            guidance_scale=GUIDANCE,
            num_inference_steps=STEPS,
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
        "environment": {
            "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
            "python": platform.python_version(),
            **{library: importlib.metadata.version(library) for library in ("torch", "diffusers", "transformers")},
            "device": pipe.device.type,
            "dtype": str(pipe.dtype).removeprefix("torch."),
            "threads": torch.get_num_threads(),
            "parameters": {
                name: sum(parameter.numel() for parameter in part.parameters())
                for name, part in pipe.components.items()
                if isinstance(part, torch.nn.Module)
            },
        },
    }
    for name, measure in {"vae": evaluate_vae, "text": evaluate_text, "changes": evaluate_changes}.items():
        started = time.monotonic()
        report[name] = measure(pipe, (QUICK if quick else FULL)[name])
        report[name]["seconds"] = round(time.monotonic() - started, 1)
    return report


def table(report: dict[str, Any]) -> str:
    """The report as text."""
    vae, text, changes = report["vae"], report["text"], report["changes"]
    lines = [f"VAE, {vae['scenes']} scenes, {vae['seconds']:.0f} s"]
    for name in ("all", *ATTRIBUTES["style"]):
        lines.append(f"  {name:<20} PSNR {vae[name]['psnr']:5.1f} dB   SSIM {vae[name]['ssim']:.3f}")
    lines.append(
        "  judged right         " + "  ".join(f"{key} {share:.0%}" for key, share in vae["judged_right"].items())
    )
    lines.append(f"Text to image, {text['prompts']} prompts, {text['seconds']:.0f} s")
    lines.append("  right                " + "  ".join(f"{key} {share:.0%}" for key, share in text["right"].items()))
    lines.append(f"  all of the prompt    {text['all_right']:.0%}")
    lines.append(f"Image to image, {changes['pairs']} pairs that differ in one thing, {changes['seconds']:.0f} s")
    lines.append(f"  {'strength':<27}" + "".join(f"{strength:>7}" for strength in changes["strengths"]))
    for name in ("all", *CHANGES):
        for key in ("changed", "kept", "overlap") if name == "all" else ("changed", "overlap"):
            values = "".join(f"{shares[name][key]:7.2f}" for shares in changes["strengths"].values())
            lines.append(f"  {name + ', ' + key:<27}" + values)
    return "\n".join(lines)


def write_card(report: dict[str, Any], card: Path) -> None:
    """Put the table into a model's card, between its two marks, so that no number there is typed by hand."""
    before, begin, rest = card.read_text(encoding="utf-8").partition("<!-- evaluate -->\n")
    _, end, after = rest.partition("<!-- /evaluate -->")
    if not (begin and end):
        raise InputError(f"{card.name} has no marks <!-- evaluate --> and <!-- /evaluate --> to put the table between")
    card.write_text(f"{before}{begin}```\n{table(report)}\n```\n{end}{after}", encoding="utf-8")


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
    if given.model == "tiny" and not given.quick:
        write_card(report, MODELS["tiny"].source / "README.md")


if __name__ == "__main__":
    main()
