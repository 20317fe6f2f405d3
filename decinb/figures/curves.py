"""Draw measurements as curves, with their confidence intervals as bands."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import cycle
from pathlib import Path
from typing import TYPE_CHECKING

from decinb.errors import InputError
from decinb.figures.page import finish

if TYPE_CHECKING:
    from matplotlib.figure import Figure

NOT_HERE = "This cannot be measured for this model: look at the images instead."

Point = float | Mapping[str, float]
"""A number, or a measured value as {"value", "low", "high"}."""

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7")  # told apart by the colour-blind (Okabe and Ito, 2008)
MARKERS, MARKED = "osD^", 30  # longer curves have no markers


def plot_curves(
    x: Sequence[float],
    panels: Mapping[str, Sequence[Point] | Mapping[str, Sequence[Point]]],
    xlabel: str,
    file: str | Path | None = None,
    alt: str = "",
) -> None:
    """Plot measurements against one argument, a panel for each measure, with 95% intervals as bands.

    Args:
        x: the values of the argument.
        panels: by the label of the vertical axis, the measured points; or several named curves of them.
        xlabel: the label of the horizontal axis, with its unit.
        file: where to save the figure.
        alt: what the figure shows, for readers who do not see it.

    A panel without a known value (nan everywhere) is left out; if none is left, one line says so.

    Raises:
        InputError: a curve has more or fewer points than ``x``.
    """
    import matplotlib.pyplot as plt

    named = {label: curves if isinstance(curves, Mapping) else {"": curves} for label, curves in panels.items()}
    for label, curves in named.items():
        for name, points in curves.items():
            if len(points) != len(x):
                where = f"{label}, {name}" if name else label
                raise InputError(f"panels: {where} has {len(points)} points, x has {len(x)}")
    known = {
        label: curves
        for label, curves in named.items()
        if any(not math.isnan(_value(point)) for points in curves.values() for point in points)
    }
    if not known:
        print(NOT_HERE)
        return
    width = min(11.0, max(6.0, 3.7 * len(known)))
    figure, axes = plt.subplots(1, len(known), figsize=(width, 3.4), layout="constrained", squeeze=False)
    for ax, (label, curves) in zip(axes[0], known.items(), strict=True):
        for (name, points), colour, marker in zip(curves.items(), cycle(COLOURS), cycle(MARKERS), strict=False):
            marker = marker if len(x) <= MARKED else ""
            ax.plot(x, [_value(point) for point in points], marker=marker, color=colour, label=name or None)
            if any(isinstance(point, Mapping) for point in points):
                low = [_end(point, "low") for point in points]
                high = [_end(point, "high") for point in points]
                ax.fill_between(x, low, high, color=colour, alpha=0.2, linewidth=0)
        ax.set(xlabel=xlabel, ylabel=label, ylim=(0, None))
        ax.margins(y=0.1)
        if all(isinstance(value, int) for value in x):
            ax.xaxis.get_major_locator().set_params(integer=True)  # no tick between two links or two rows
        ax.grid(alpha=0.3)
        ax.spines[["top", "right"]].set_visible(False)
        if len(curves) > 1:
            ax.legend(frameon=False)
    finish(figure, file, alt or _text(x, known, xlabel))


def plot_bars(names: Sequence[str], groups: Mapping[str, Sequence[Point]], xlabel: str, alt: str = "") -> None:
    """Plot measurements of named things as bars side by side, with 95% intervals as lines.

    Args:
        names: one for each thing, from top to bottom.
        groups: by the name of a colour, the measured points, one for each thing.
        xlabel: the label of the horizontal axis, with its unit.
    """
    import matplotlib.pyplot as plt

    if all(math.isnan(_value(point)) for points in groups.values() for point in points):
        print(NOT_HERE)
        return
    figure, ax = plt.subplots(figsize=(8, 1.2 + 0.5 * len(names)), layout="constrained")
    height = 0.8 / len(groups)
    for number, ((name, points), colour) in enumerate(zip(groups.items(), cycle(COLOURS), strict=False)):
        y = [place + number * height for place in range(len(names))]
        values = [_value(point) for point in points]
        away = [[value - _end(point, "low") for value, point in zip(values, points, strict=True)]]
        away += [[_end(point, "high") - value for value, point in zip(values, points, strict=True)]]
        ax.barh(y, values, 0.9 * height, xerr=away, color=colour, label=name, error_kw={"ecolor": "#333333"})
    ax.set_yticks([place + height * (len(groups) - 1) / 2 for place in range(len(names))], names)
    ax.invert_yaxis()
    ax.set(xlabel=xlabel, xlim=(0, None))
    ax.spines[["top", "right"]].set_visible(False)
    ax.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=len(groups), frameon=False)  # above the bars
    said = "; ".join(
        f"{thing}: " + ", ".join(f"{_value(points[row]):.3g} {name}" for name, points in groups.items())
        for row, thing in enumerate(names)
    )
    finish(figure, alt=alt or f"Bars of {xlabel}. {said}.")


def plot_maps(
    panels: Mapping[str, Sequence[Sequence[Point]]],
    x: Sequence[float],
    y: Sequence[float],
    xlabel: str,
    ylabel: str,
    alt: str = "",
) -> None:
    """Show measures of two arguments as maps side by side, with the value written in each place.

    Args:
        panels: by name, the measured points, a row for each value of ``y`` and a column for each of ``x``.
        x, y: the values of the two arguments.
    """
    import matplotlib.pyplot as plt

    values = {name: [[_value(point) for point in row] for row in rows] for name, rows in panels.items()}
    values = {name: rows for name, rows in values.items() if not all(math.isnan(v) for row in rows for v in row)}
    if not values:
        print(NOT_HERE)
        return
    width = min(11.0, 5.5 * len(values))
    figure, axes = plt.subplots(1, len(values), figsize=(width, 3.2), layout="constrained", squeeze=False)
    for ax, (name, rows) in zip(axes[0], values.items(), strict=True):
        shown = ax.imshow(rows, cmap="cividis", aspect="auto")
        middle = (max(map(max, rows)) + min(map(min, rows))) / 2
        for row, line in enumerate(rows):
            for column, value in enumerate(line):
                colour = "black" if value > middle else "white"
                ax.text(column, row, f"{value:.2f}", ha="center", va="center", color=colour)
        ax.set_xticks(range(len(x)), [f"{value:g}" for value in x])
        ax.set_yticks(range(len(y)), [f"{value:g}" for value in y])
        ax.set(title=name, xlabel=xlabel, ylabel=ylabel)
        figure.colorbar(shown, ax=ax)
    said = "; ".join(
        f"{name} from {min(map(min, rows)):.2f} to {max(map(max, rows)):.2f}" for name, rows in values.items()
    )
    finish(figure, alt=alt or f"Maps over {xlabel} and {ylabel}: {said}.")


def show_figure(figure: Figure, alt: str = "", file: str | Path | None = None) -> None:
    """Show a figure of your own with a text for readers who do not see it, and close it.

    Args:
        alt: what the figure shows; by default the text that is written in it.
        file: where to save it.
    """
    finish(figure, file, alt)


def _text(x: Sequence[float], panels: Mapping[str, Mapping[str, Sequence[Point]]], xlabel: str) -> str:
    """Say the first and the last value of every curve."""
    parts = []
    for label, curves in panels.items():
        for name, points in curves.items():
            ends = f"{_value(points[0]):.3g} at {x[0]:.3g} and {_value(points[-1]):.3g} at {x[-1]:.3g}"
            parts.append(f"{label}{f', {name}' if name else ''}: {ends}")
    return f"Curves against {xlabel}. {'; '.join(parts)}."


def _value(point: Point) -> float:
    return point["value"] if isinstance(point, Mapping) else point


def _end(point: Point, name: str) -> float:
    return point[name] if isinstance(point, Mapping) else point
