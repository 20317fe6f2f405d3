"""Draw what ``python -m decinb.tiny.evaluate`` measured of image to image: ``python tools/make_trade_off.py``.

The figure shows changes made against layout kept for all strengths, as in SDEdit (Meng et al., 2021, arXiv:2108.01073).
"""

import json
from pathlib import Path

import matplotlib

matplotlib.use("agg")

import matplotlib.pyplot as plt

ROOT = Path(__file__).parents[1]


def draw(report: dict, file: Path) -> None:
    """Draw a report of ``decinb.tiny.evaluate``, one plot for each task."""
    figure, axes = plt.subplots(
        1, len(report["tasks"]), figsize=(13, 3.4), sharex=True, sharey=True, layout="constrained"
    )
    for ax, (task, rows) in zip(axes, report["tasks"].items(), strict=True):
        changed, kept = ([row[name]["value"] for row in rows.values()] for name in ("changed", "layout"))
        ax.plot(changed, kept, "-", color="lightgray")
        shown = ax.scatter(changed, kept, c=[float(strength) for strength in rows], cmap="viridis", zorder=2)
        ax.set(title=task, xlabel="fraction of images with the change", xlim=(-0.05, 1.05), ylim=(0, 1))
    axes[0].set_ylabel("how much of the building\nis in its place")
    figure.colorbar(shown, ax=axes, label="strength", pad=0.01)
    figure.savefig(file, dpi=80)
    plt.close(figure)


if __name__ == "__main__":
    draw(json.loads((ROOT / "results" / "tiny" / "evaluate.json").read_text()), ROOT / "docs" / "trade_off.png")
