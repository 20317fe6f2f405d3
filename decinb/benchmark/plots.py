"""Plot what the other modules of ``decinb.benchmark`` count and measure."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING

import matplotlib.pyplot as plt

from decinb.benchmark.latency import extrapolate, ratio
from decinb.benchmark.options import describe
from decinb.figures.page import finish

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from decinb.benchmark.counting import Block, Cost
    from decinb.benchmark.latency import Measurement, Timing

COLOURS = {"U-Net-NAS": "#2a6fbb", "SD v1.5": "#c9772b"}
KINDS = {"ResNets": "#7a9cc6", "Transformers": "#d9843b", "samplers": "#b5b5b5"}


def plot_blocks(costs: Mapping[str, Cost]) -> None:
    """Plot the FLOPs of every block of each U-Net as bars, from the input down and back up.

    Blocks of the same size are at the same height; each bar is labelled with its number of ResNets (R) and
    Transformers (T).

    Args:
        costs: what ``counting.count`` returns, by U-Net.
    """
    stages = list(dict.fromkeys(stage for cost in costs.values() for stage, _ in _staged(cost)))
    stages.sort(
        key=lambda stage: (("down", "middle", "up").index(stage[0]), stage[1] * (1 if stage[0] == "up" else -1))
    )
    figure, axes = plt.subplots(1, len(costs), figsize=(9, 4.2), sharex=True, sharey=True, layout="constrained")
    for ax, (name, cost) in zip(axes, costs.items(), strict=True):
        for stage, block in _staged(cost):
            _stack(ax, stages.index(stage), block)
        ax.set_title(f"{name}: {cost.flops / 1e12:.3f} TFLOP, {cost.parameters / 1e6:.0f} M parameters", fontsize=10)
        ax.set_xlabel("GFLOP in one row of a U-Net call")
        ax.spines[["top", "right"]].set_visible(False)
    axes[0].set_yticks(range(len(stages)), [f"{side} x {side}, {way}" for way, side in stages])
    axes[0].invert_yaxis()
    axes[0].set_xlim(0, 1.15 * max(block.flops for cost in costs.values() for block in cost.blocks) / 1e9)
    handles = [plt.Rectangle((0, 0), 1, 1, color=colour) for colour in KINDS.values()]
    figure.legend(handles, KINDS, loc="outside lower center", ncols=3, frameon=False)
    finish(figure)


def _staged(cost: Cost) -> list[tuple[tuple[str, int], Block]]:
    """Return every block with its stage: down, middle or up, and its size."""
    blocks = [block for block in cost.blocks if block.side]
    way = {"d": "down", "m": "middle", "u": "up"}
    return [((way[block.name[0]], block.side), block) for block in blocks]


def _stack(ax: Axes, place: int, block: Block) -> None:
    other = block.flops - block.resnet_flops - block.transformer_flops
    left = 0.0
    for part, colour in zip((block.resnet_flops, block.transformer_flops, other), KINDS.values(), strict=True):
        ax.barh(place, part / 1e9, left=left, height=0.7, color=colour)
        left += part / 1e9
    ax.text(left + 3, place, f"{block.resnets}R {block.transformers}T", va="center", fontsize=9)


def plot_timings(timings: Mapping[str, Mapping[str, Timing]]) -> None:
    """Plot measured times: a bar for the median, a line from the fastest to the slowest, and a dot for every time.

    Args:
        timings: times by work, then by network.
    """
    figure, axes = plt.subplots(
        1, len(timings), figsize=(3.6 * len(timings) + 0.6, 3.6), squeeze=False, layout="constrained"
    )
    for ax, (work, by_name) in zip(axes[0], timings.items(), strict=True):
        for place, (name, timing) in enumerate(by_name.items()):
            reach = [[timing.median - timing.fastest], [timing.slowest - timing.median]]
            ax.bar(place, timing.median, width=0.6, color=COLOURS.get(name), alpha=0.8, yerr=reach, capsize=8)
            ax.plot([place + 0.2] * len(timing.seconds), timing.seconds, "o", color="black", markersize=3, alpha=0.6)
            ax.annotate(
                f"{timing.median:.3g} s", (place, 0), (0, 4), textcoords="offset points", ha="center", color="w"
            )
        ax.set_xticks(range(len(by_name)), by_name)
        ax.set_title(work)
        ax.spines[["top", "right"]].set_visible(False)
    axes[0][0].set_ylabel("seconds (median, fastest to slowest)")
    finish(figure)


def plot_chain(seconds: Mapping[str, float]) -> None:
    """Plot times in a row, and between two of them the factor by which the second is faster.

    Args:
        seconds: seconds per image, by name.
    """
    figure, ax = plt.subplots(figsize=(8, 3.4), layout="constrained")
    values = list(seconds.values())
    bars = ax.bar(
        range(len(values)), values, width=0.55, color=[COLOURS["SD v1.5"]] + [COLOURS["U-Net-NAS"]] * len(values)
    )
    ax.bar_label(bars, fmt="%.2f s", padding=2)
    for place, (before, after) in enumerate(pairwise(values)):
        ax.text(place + 0.5, after / 2, f"÷ {before / after:.2f}", ha="center", fontsize=11)
    ax.set_xticks(range(len(values)), seconds)
    ax.set_ylabel("seconds per image")
    ax.margins(y=0.12)
    ax.spines[["top", "right"]].set_visible(False)
    finish(figure)


def plot_ratios(
    ratios: Mapping[str, Sequence[float]], xlabel: str = "SD v1.5 / U-Net-NAS", estimated: Collection[str] = ()
) -> None:
    """Plot how many times longer one takes than the other: a dot, or a dot on a line.

    Args:
        ratios: by name, one number, or the least, the median and the most.
        xlabel: the label of the horizontal axis.
        estimated: the names of ratios that were not measured; they are drawn dashed and hollow, and named so.
    """
    names = list(ratios)
    figure, ax = plt.subplots(figsize=(8, 0.5 * len(ratios) + 1), layout="constrained")
    for place, found in enumerate(ratios.values()):
        middle = found[len(found) // 2]
        is_estimate = names[place] in estimated
        ax.plot([found[0], found[-1]], [place, place], "--" if is_estimate else "-", color="#888888", linewidth=2)
        ax.plot(middle, place, "o", color=COLOURS["U-Net-NAS"], fillstyle="none" if is_estimate else "full")
        ax.annotate(f"{middle:.2f}", (middle, place), (0, 6), textcoords="offset points", ha="center", fontsize=9)
    ax.axvline(1, color="black", linewidth=0.8)
    ax.set_yticks(range(len(names)), [f"{name}, estimated" if name in estimated else name for name in names])
    ax.set_ylim(len(names) - 0.5, -0.8)  # from the top down, with room for the first number
    ax.set_xlabel(xlabel)
    ax.spines[["top", "right"]].set_visible(False)
    finish(figure)


def plot_rows(timings: Mapping[str, Mapping[str, Timing]]) -> None:
    """Plot the seconds per row against the number of rows in a call, one line per U-Net.

    Args:
        timings: times by work, then by U-Net; only works named ``<number> row(s)`` are plotted.
    """
    figure, ax = plt.subplots(figsize=(7, 3.4), layout="constrained")
    works = {int(work.split()[0]): by_name for work, by_name in timings.items() if work.split()[1].startswith("row")}
    for name in next(iter(works.values())):
        per_row = [by_name[name].per(rows) for rows, by_name in works.items()]
        colour = COLOURS.get(name)
        ax.plot(list(works), [timing.median for timing in per_row], "o-", color=colour, label=name)
        ax.vlines(list(works), [t.fastest for t in per_row], [t.slowest for t in per_row], color=colour)
    ax.set_xscale("log", base=2)
    ax.set_xticks(list(works), list(works))
    ax.set(xlabel="rows in a U-Net call", ylabel="seconds per row", ylim=(0, None))
    ax.legend(frameon=False)
    ax.spines[["top", "right"]].set_visible(False)
    finish(figure)


def plot_whole_calls(timings: Mapping[str, Mapping[str, Timing]], most: int = 50) -> None:
    """Plot the seconds of image-to-image calls against their steps: measured dots, and the line through them.

    Beyond the most steps that were measured, the line is an estimate: it is dashed and named so.

    Args:
        timings: times by work, then by U-Net; only works named ``image, <number> step(s)`` are plotted.
        most: steps up to which the line is drawn.
    """
    figure, ax = plt.subplots(figsize=(7, 3.4), layout="constrained")
    works = {int(work.split()[1]): by_name for work, by_name in timings.items() if work.startswith("image")}
    measured = [min(works), max(works)]
    for name in next(iter(works.values())):
        ends = {steps: extrapolate(timings, steps)[name].median for steps in (*measured, most)}
        ax.plot(measured, [ends[steps] for steps in measured], color=COLOURS.get(name), label=f"{name}, measured")
        if most > measured[1]:
            beyond = [measured[1], most]
            label = f"{name}, estimated"
            ax.plot(beyond, [ends[steps] for steps in beyond], "--", color=COLOURS.get(name), label=label)
        for steps, by_name in works.items():
            taken = by_name[name].seconds
            ax.plot([steps] * len(taken), taken, "o", color=COLOURS.get(name), markersize=4)
    ax.set(xlabel="steps that run", ylabel="seconds per call", xlim=(0, None), ylim=(0, None))
    ax.legend(frameon=False)
    ax.spines[["top", "right"]].set_visible(False)
    finish(figure)


def plot_parts(seconds: Mapping[str, float]) -> None:
    """Plot what the seconds of a call are spent on, as one stacked bar.

    Args:
        seconds: seconds by name.
    """
    figure, ax = plt.subplots(figsize=(8, 1.5), layout="constrained")
    left = 0.0
    for part, taken in seconds.items():
        ax.barh(0, taken, left=left, label=f"{part} {taken:.3g} s")
        left += taken
    ax.set_yticks([])
    ax.set_xlabel("seconds")
    ax.legend(ncols=len(seconds), loc="lower center", bbox_to_anchor=(0.5, 1), frameon=False)
    ax.spines[["top", "right", "left"]].set_visible(False)
    finish(figure)


def plot_options(measurements: Mapping[str, Measurement]) -> None:
    """Plot how many times faster each option is than the pipeline as it was loaded.

    Args:
        measurements: what ``options.compare_options`` returns, by title; each gets a colour.
    """
    names = list(dict.fromkeys(name for measurement in measurements.values() for name in measurement.timings))
    figure, ax = plt.subplots(figsize=(8, 0.32 * len(names) * len(measurements) + 1.6), layout="constrained")
    height = 0.8 / len(measurements)
    for i, (title, measurement) in enumerate(measurements.items()):
        label: str | None = title  # on the first bar only
        for name, timings in measurement.timings.items():
            before, after = timings.values()
            least, median, most = ratio(before, after)
            place = names.index(name) + (i - (len(measurements) - 1) / 2) * height
            ax.barh(place, median, height * 0.9, color=f"C{i}", label=label)
            ax.plot([least, most], [place, place], color="black", linewidth=1)
            ax.text(most + 0.03, place, ", ".join(describe(measurement, name)), va="center", fontsize=9)
            label = None
    ax.axvline(1, color="black", linewidth=0.8)
    ax.set_yticks(range(len(names)), names)
    ax.invert_yaxis()
    ax.set_xlabel("times faster than as loaded; PSNR of the images with and without; seconds of the first call")
    ax.margins(x=0.35)
    figure.legend(loc="outside upper center", frameon=False, fontsize=9)
    ax.spines[["top", "right"]].set_visible(False)
    finish(figure)


def plot_faster(measurement: Measurement) -> None:
    """Plot how many times faster each way is than the first of its work: the median of the paired ratios.

    Args:
        measurement: what ``runtimes.compare`` or ``compiled.compare`` returns. A line goes from the least ratio to the
            most.
    """
    found = {
        f"{way} ({work})": ratio(next(iter(timings.values())), timing)
        for work, timings in measurement.timings.items()
        for way, timing in timings.items()
    }
    plot_ratios(found, "times faster than the first way of the same work")


def plot_calls(strengths: Sequence[float], calls: Mapping[int, Sequence[int]]) -> None:
    """Plot counted U-Net calls against strength as dots, and strength x steps as a line.

    Args:
        strengths: the strengths, in the order of the counts.
        calls: the counted calls, by number of requested steps.
    """
    figure, ax = plt.subplots(figsize=(7, 3.6), layout="constrained")
    for steps, counted in calls.items():
        line = ax.plot([0, 1], [0, steps], linewidth=1, alpha=0.6)[0]
        ax.plot(strengths, counted, "o", color=line.get_color(), label=f"{steps} steps requested")
    ax.set_xlabel("strength")
    ax.set_ylabel("U-Net calls counted")
    ax.legend(frameon=False)
    ax.spines[["top", "right"]].set_visible(False)
    finish(figure)
