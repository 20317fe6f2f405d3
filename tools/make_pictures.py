"""Make the pictures of the README: ``python tools/make_pictures.py`` (two minutes on two cores)."""

from collections.abc import Sequence
from pathlib import Path

import matplotlib

matplotlib.use("agg")

import matplotlib.pyplot as plt
from PIL import Image

import decinb

STRENGTHS = [0.2, 0.5, 0.7, 0.75, 0.8, 0.85, 0.9, 1.0]
SEED = 11  # of the first picture: with it, things change one after the other
SEEDS = [0, 1, 2]
HERO = [
    ("strokes", "a painting of a red house, poplar trees, mountains and a path on grass at sunset"),
    ("day", "a painting of a blue house, round trees and mountains on snow at night"),
    ("sketch", "a watercolour of a red house, pine trees and mountains on grass by day"),
]
DEPTH = [
    ("valley", "a painting of a yellow house and pine trees on snow at night"),
    ("winter", "a watercolour of a red house and pine trees in autumn at sunset"),
]


def draw(rows: Sequence[tuple[str, Sequence[Image.Image]]], titles: Sequence[str], file: str, edge: float) -> None:
    """Draw images in rows, with a title above each and the prompt below each row, and save the figure.

    Args:
        rows: prompts, each with its images.
        titles: of the columns.
        file: the name of the figure, in this folder.
        edge: the fraction of the height to leave free above and below.
    """
    figure, axes = plt.subplots(len(rows), len(titles), figsize=(13.5, 0.4 + 1.85 * len(rows)), layout="constrained")
    for line, (prompt, images) in zip(axes.tolist(), rows, strict=True):
        for ax, image, title in zip(line, images, titles, strict=True):
            ax.imshow(image)
            ax.axis("off")
            ax.set_title(title, fontsize=9)
        line[0].text(0, 143, f"to: {prompt}", fontsize=10).set_in_layout(False)
    figure.get_layout_engine().set(hspace=0.14, rect=(0, edge, 1, 1 - 1.5 * edge))
    figure.savefig(Path(__file__).parents[1] / "docs" / file, dpi=110)


def sweep_images(pipes: Sequence, name: str, prompt: str, **axes: Sequence) -> list[Image.Image]:
    """Return an input and the images that each pipeline makes from it in every cell of a grid."""
    image = decinb.load_image(name, size=128)
    sweeps = [decinb.run_sweep(pipe, image, prompt, decinb.grid(**axes), progress=False) for pipe in pipes]
    return [image, *(made for sweep in sweeps for made in sweep.images)]


tiny, depth = decinb.load_pipeline("tiny"), decinb.load_pipeline("tiny-depth")
rows = [(prompt, sweep_images([tiny], name, prompt, strength=STRENGTHS, seed=[SEED])) for name, prompt in HERO]
draw(rows, ["input", *(f"strength {strength}" for strength in STRENGTHS)], "hero.png", 0.03)
rows = [(prompt, sweep_images([depth, tiny], name, prompt, strength=[1.0], seed=SEEDS)) for name, prompt in DEPTH]
titles = [f"{name}, strength 1" for name in ("tiny-depth", "tiny") for _ in SEEDS]
draw(rows, ["input", *titles], "depth.png", 0.06)
