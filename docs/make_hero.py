"""Make the picture at the top of the README: ``python docs/make_hero.py`` (a minute on two cores)."""

from pathlib import Path

import matplotlib

matplotlib.use("agg")

import matplotlib.pyplot as plt

import decinb

STRENGTHS = [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.8, 1.0]
ROWS = [
    ("day", "a painting of a blue house, round trees and mountains on grass at night"),
    ("sketch", "a painting of a blue house, pine trees and mountains on grass at sunset"),
    ("day", "a painting of a blue house, round trees and mountains on snow by day"),
]

pipe = decinb.load_pipeline("tiny")
figure, axes = plt.subplots(len(ROWS), len(STRENGTHS) + 1, figsize=(13.5, 5.9), layout="constrained")
for row, (name, prompt) in zip(axes.tolist(), ROWS, strict=True):
    image = decinb.load_image(name)
    sweep = decinb.run_sweep(pipe, image, prompt, decinb.grid(strength=STRENGTHS), progress=False)
    titles = ["input", *(f"strength {strength}" for strength in STRENGTHS)]
    for ax, shown, title in zip(row, [image, *sweep.images], titles, strict=True):
        ax.imshow(shown)
        ax.axis("off")
        ax.set_title(title, fontsize=9)
    row[0].text(0, 143, f"to: {prompt}", fontsize=10).set_in_layout(False)
figure.get_layout_engine().set(hspace=0.14, rect=(0, 0.03, 1, 0.97))
figure.savefig(Path(__file__).with_name("hero.png"), dpi=110)
