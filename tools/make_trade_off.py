"""Draw what ``python -m decinb.tiny.evaluate`` measured of image to image: ``python tools/make_trade_off.py``.

The figure shows changes made against layout kept for all strengths, as in SDEdit (Meng et al., 2021, arXiv:2108.01073).
"""

import json
from pathlib import Path

import matplotlib

matplotlib.use("agg")

import matplotlib.pyplot as plt

ROOT = Path(__file__).parents[1]

changes = json.loads((ROOT / "results" / "tiny" / "evaluate.json").read_text())["changes"]
strengths = list(changes["strengths"])
figure, axes = plt.subplots(1, 4, figsize=(13, 3.4), sharex=True, sharey=True, layout="constrained")
for ax, name in zip(axes, ["day to night", "grass to snow", "sketch to painting", "house colour"], strict=True):
    rows = [row[name] for row in changes["strengths"].values()]
    ax.axhline(changes["vae"], linestyle=":", color="gray")
    ax.plot([row["changed"] for row in rows], [row["overlap"] for row in rows], "-", color="lightgray")
    shown = ax.scatter(
        [row["changed"] for row in rows],
        [row["overlap"] for row in rows],
        c=[float(strength) for strength in strengths],
        cmap="viridis",
        zorder=2,
    )
    ax.set(title=name, xlabel="fraction of images with the change", xlim=(-0.05, 1.05), ylim=(0, 1))
axes[0].set_ylabel("overlap of the house with its place")
figure.colorbar(shown, ax=axes, label="strength", pad=0.01)
figure.savefig(ROOT / "docs" / "trade_off.png", dpi=80)
