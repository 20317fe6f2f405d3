"""Make the picture of depth to image in the README: ``python docs/make_depth.py`` (half a minute on two cores)."""

from pathlib import Path

import matplotlib

matplotlib.use("agg")

import matplotlib.pyplot as plt

import decinb

ROWS = [
    ("valley", "a painting of a yellow house on sand at sunset"),
    ("sketch", "a painting of a blue house on snow at night"),
]
SEEDS = [0, 1, 2]

models = {name: decinb.load_pipeline(name) for name in ("tiny-depth", "tiny")}
figure, axes = plt.subplots(len(ROWS), 1 + 2 * len(SEEDS), figsize=(13.5, 4.6), layout="constrained")
for row, (name, prompt) in zip(axes.tolist(), ROWS, strict=True):
    image = decinb.load_image(name, size=128)
    shown, titles = [image], ["input"]
    for model, pipe in models.items():
        sweep = decinb.run_sweep(pipe, image, prompt, decinb.grid(strength=[1.0], seed=SEEDS), progress=False)
        shown += sweep.images
        titles += [f"{model}, strength 1"] * len(SEEDS)
    for ax, picture, title in zip(row, shown, titles, strict=True):
        ax.imshow(picture)
        ax.axis("off")
        ax.set_title(title, fontsize=9)
    row[0].text(0, 143, f"to: {prompt}", fontsize=10).set_in_layout(False)
figure.get_layout_engine().set(hspace=0.14, rect=(0, 0.06, 1, 0.91))
figure.savefig(Path(__file__).with_name("depth.png"), dpi=110)
