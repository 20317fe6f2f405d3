"""Pictures of pictures: the guide's row of images, labelled grids of a sweep. Draws what others have made."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image

from decinb.errors import InputError
from decinb.sweep import SHORT, Sweep, label, plain

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def plot_images(images: Sequence[Image.Image], values: Sequence[Any], title: str) -> None:
    """Show images side by side, each under ``title: value``, and save the row as ``{title}_experiments.png``.

    This is the helper of Deci's guide: the same arguments, the same picture.

    Raises:
        InputError: there are no images, or not as many values as images.
    """
    _check(images, values, "values")
    import matplotlib.pyplot as plt

    name = title.rstrip(": ")  # the guide calls one of them "Steps:", which is no file name everywhere
    figure, axes = plt.subplots(1, len(values), figsize=(15, 5), squeeze=False)
    for ax, image, value in zip(axes[0], images, values, strict=True):
        _put(ax, image, f"{name}: {plain(value)}")
    figure.tight_layout()
    finish(figure, f"{name}_experiments.png")


def plot_grid(
    images: Sequence[Image.Image],
    titles: Sequence[str],
    columns: int = 3,
    file: str | Path | None = None,
) -> None:
    """Show images in rows of ``columns``, each under its own title, and save the grid if a file is named."""
    _check(images, titles, "titles")
    import matplotlib.pyplot as plt

    rows = -(-len(images) // columns)
    figure, axes = plt.subplots(rows, columns, figsize=(3.2 * columns, 3.5 * rows), squeeze=False, layout="constrained")
    for ax in axes.flat:
        ax.axis("off")
    for ax, image, title in zip(axes.flat, images, titles, strict=False):
        _put(ax, image, title)
    finish(figure, file)


def plot_sweep(sweep: Sweep, rows: str | None = None, cols: str | None = None, file: str | Path | None = None) -> None:
    """Show a sweep with one argument down the side and another along the top, the input before them.

    Args:
        sweep: from ``run_sweep``.
        rows, cols: names of arguments that the cells differ in; left out, the arguments that do are taken, the one with
            more values along the top. With more than two, the cells are shown one after another.
        file: where to save the picture, if anywhere.

    Raises:
        InputError: an argument is not one that every cell names, or two cells fall on one place.
    """
    if not sweep.images:
        raise InputError("the sweep has no finished cell to show")
    varied = [name for name in SHORT if len({cell.get(name) for cell in sweep.cells}) > 1]
    if rows is None and cols is None:
        if len(varied) > 2 or not varied:
            plot_grid([sweep.image, *sweep.images], ["input", *map(label, sweep.cells)], file=file)
            return
        varied.sort(key=lambda name: len({cell[name] for cell in sweep.cells}))
        rows, cols = varied if len(varied) == 2 else (None, varied[0])
    for name in filter(None, (rows, cols)):
        if any(name not in cell for cell in sweep.cells):
            raise InputError(
                f"{name!r} is not an argument of every cell; these differ in {', '.join(varied) or 'nothing'}"
            )
    row_values, col_values = _values(sweep, rows), _values(sweep, cols)
    at = {}
    for cell, image in zip(sweep.cells, sweep.images, strict=True):
        place = (cell.get(rows), cell.get(cols))
        if place in at:
            shared = label(dict(zip((rows, cols), place, strict=True)))
            raise InputError(f"two cells fall on {shared}: name the argument they differ in")
        at[place] = image
    import matplotlib.pyplot as plt

    size = min(2.0, 15 / (len(col_values) + 1))
    figure, axes = plt.subplots(
        len(row_values),
        len(col_values) + 1,
        figsize=(size * (len(col_values) + 1), (size + 0.35) * len(row_values)),
        squeeze=False,
        layout="constrained",
    )
    for ax in axes.flat:
        ax.axis("off")
    for i, row in enumerate(row_values):
        if i == 0:
            _put(axes[0, 0], sweep.image, "input")
        for j, col in enumerate(col_values):
            if (row, col) not in at:
                continue
            told = [f"{SHORT.get(name, name)} {plain(value)}" for name, value in ((rows, row), (cols, col)) if name]
            _put(axes[i, j + 1], at[row, col], "\n".join(told))
    finish(figure, file)


def _values(sweep: Sweep, name: str | None) -> list[Any]:
    """The values of an argument, in the order they first appear."""
    return list(dict.fromkeys(cell.get(name) for cell in sweep.cells)) if name else [None]


def _put(ax: Axes, image: Image.Image, title: str) -> None:
    ax.imshow(image)
    ax.set_title(title, fontsize=9 if len(title) > 14 or "\n" in title else None)
    ax.axis("off")


def finish(figure: Figure, file: str | Path | None = None) -> None:
    """Save a figure if a file is named, show it where there is a screen or a notebook, and let go of it."""
    import matplotlib.pyplot as plt

    if file is not None:
        Path(file).parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(file)
    if plt.get_backend().lower() != "agg":
        plt.show()
    plt.close(figure)


def _check(images: Sequence[Image.Image], told: Sequence[Any], name: str) -> None:
    if not images:
        raise InputError("images is empty: there is nothing to show")
    if len(images) != len(told):
        raise InputError(f"{name} must be as many as images: got {len(told)} for {len(images)}")
