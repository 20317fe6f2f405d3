"""Sketches for the derivations of notebook 00: a step on a circle, guidance, points on a plane."""

from __future__ import annotations

from collections.abc import Sequence
from math import acos, cos, sin
from typing import TYPE_CHECKING

from decinb.figures.page import finish

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from torch import Tensor

BLUE, ORANGE, GREEN, GREY = "#0072b2", "#d55e00", "#009e73", "#777777"


def plot_step(signal: float, next_signal: float) -> None:
    """Draw one step of DDIM: a latent is a point on a circle of signal and noise, and a step turns it to less noise.

    Args:
        signal: the weight of the clean latent before the step, 0 to 1.
        next_signal: its weight after the step, larger than ``signal``.
    """
    import matplotlib.pyplot as plt
    import numpy as np

    start, end = acos(signal), acos(next_signal)
    figure, ax = plt.subplots(figsize=(5.2, 4.6), layout="constrained")
    arc = np.linspace(0, np.pi / 2, 100)
    ax.plot(np.cos(arc), np.sin(arc), ":", color=GREY)
    _arrow(ax, (0, 0), (cos(start), sin(start)), BLUE, "$x_t$")
    _arrow(ax, (0, 0), (cos(end), sin(end)), GREEN, "$x_{t'}$")
    tip = (cos(start) - 0.45 * sin(start), sin(start) + 0.45 * cos(start))
    _arrow(ax, (cos(start), sin(start)), tip, ORANGE, "$v$")
    turn = np.linspace(start, end, 30)
    ax.plot(0.93 * np.cos(turn), 0.93 * np.sin(turn), color=GREEN, linewidth=2)
    ax.set(xlim=(-0.35, 1.25), ylim=(-0.08, 1.4), aspect="equal")
    ax.set(xlabel=r"weight of the clean latent $x_0$", ylabel=r"weight of the noise $\varepsilon$")
    ax.spines[["top", "right"]].set_visible(False)
    finish(
        figure,
        alt="A quarter of a circle with the clean latent to the right and the noise above. A step turns the latent "
        "along the circle towards the clean latent; v is the tangent.",
    )


def plot_guidance(scales: Sequence[float]) -> None:
    """Draw guidance: from the prediction without the prompt along the difference to the one with it, and beyond."""
    import matplotlib.pyplot as plt

    figure, ax = plt.subplots(figsize=(7.5, 3.4), layout="constrained")
    without, step = (0.9, 1.5), (0.7, -0.14)
    tip = (without[0] + step[0], without[1] + step[1])
    _arrow(ax, (0, 0), without, GREY, "without")
    _arrow(ax, (0, 0), tip, BLUE, "with")
    longest = max(scales)
    ax.plot(
        (without[0], without[0] + longest * step[0]), (without[1], without[1] + longest * step[1]), ":", color=ORANGE
    )
    for scale in scales:
        x, y = without[0] + scale * step[0], without[1] + scale * step[1]
        ax.plot(x, y, "o", color=ORANGE)
        ax.annotate(f"scale {scale:g}", (x, y), (-6, -16), textcoords="offset points")
    ax.set(xlim=(-0.1, without[0] + longest * step[0] + 0.6), ylim=(-0.1, 1.9), aspect="equal")
    ax.axis("off")
    finish(
        figure,
        alt="Two arrows from one point, the predictions without and with the prompt. The guided predictions lie on the "
        f"line through their tips, at {', '.join(f'{scale:g}' for scale in scales)} times their difference.",
    )


def plot_points(clouds: Sequence[Tensor], titles: Sequence[str], data: Tensor, start: Tensor) -> None:
    """Draw clouds of points on a plane, over the points that the data lie around.

    Args:
        clouds: (points, 2) each.
        titles: one for each cloud.
        data: (centres, 2).
        start: (2,), the input.
    """
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, len(clouds), figsize=(11, 2.6), layout="constrained", sharex=True, sharey=True)
    for ax, cloud, title in zip(axes, clouds, titles, strict=True):
        ax.scatter(*data.T, s=160, color="#dddddd")
        ax.scatter(*cloud.T, s=5, color=BLUE)
        ax.scatter(*start, marker="x", s=70, color=ORANGE, linewidths=2.5)
        ax.set_title(title, fontsize=10)
        ax.set(aspect="equal", xticks=[], yticks=[], xlim=(-4.2, 4.2), ylim=(-4.2, 4.2))
    finish(
        figure,
        alt="Points on a plane at several strengths. At low strength they lie at the input, at middle strength on the "
        f"nearest cluster of the data, at high strength on all clusters. {'; '.join(titles)}.",
    )


def _arrow(ax: Axes, start: tuple[float, float], end: tuple[float, float], colour: str, name: str) -> None:
    ax.annotate("", end, start, arrowprops={"arrowstyle": "-|>", "color": colour, "linewidth": 2})
    ax.annotate(name, end, (6, 6), textcoords="offset points", color=colour, fontsize=12)
