"""Pictures of pictures: the guide's row of images, labelled grids of a sweep. Draws what others have made."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image

from decinb.errors import InputError
from decinb.figures.layout import Axis, Layout, Record, either, lay_out
from decinb.figures.page import Sheet, Tile, finish, shrunk
from decinb.images import load_image, read_input
from decinb.utils.environment import in_notebook
from decinb.utils.labels import describe, plain, wrap

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from decinb.execution.chains import Chain
    from decinb.execution.plan import Plan
    from decinb.sweep import Sweep

PAGE = 12  # rows and columns of one figure
TITLE = 34  # letters in a line above a picture
UNBROKEN = str.maketrans({" ": "\u00a0", "-": "\u2011"})  # no line of a tab's name ends there
MAX_PAGE = 40  # at their smallest, pictures of so many rows and columns still make a figure that can be opened


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


def show_gallery(
    images: Sequence[Image.Image], groups: Sequence[str], titles: Sequence[str] | None = None, width: int = 150
) -> None:
    """Show many images in a notebook, a tab for each group, with ipyplot; without either, one labelled grid.

    Args:
        images: of any size; the notebook keeps them as JPEG, no wider than twice ``width``.
        groups: the name of the tab that each belongs to. Tabs come in the order in which they are named first.
        titles: a line above each image, under its number.
        width: of an image in the page, in pixels.

    Raises:
        InputError: there are no images, or not as many groups or titles as images.
    """
    _check(images, groups, "groups")
    if titles is not None:
        _check(images, titles, "titles")
    if not in_notebook() or find_spec("ipyplot") is None:
        told = groups if titles is None else [f"{one}\n{title}" for one, title in zip(groups, titles, strict=True)]
        plot_grid(images, told, columns=6)
        return
    import ipyplot
    from IPython.utils.capture import capture_output

    tabs = [group.translate(UNBROKEN) for group in groups]
    with capture_output() as shown:  # it shows all twice: as a page, and as the source of that page
        ipyplot.plot_class_tabs(
            [_jpeg(image, 2 * width) for image in images],
            tabs,
            tabs_order=list(dict.fromkeys(tabs)),
            custom_texts=None if titles is None else list(titles),
            max_imgs_per_tab=len(images),
            img_width=width,
            show_url=False,
        )
    shown.outputs[-1].display()


def _jpeg(image: Image.Image, widest: int) -> str:
    """A picture as the address of itself, in few letters."""
    image = image.convert("RGB")
    image.thumbnail((widest, 4 * widest))
    file = io.BytesIO()
    image.save(file, "JPEG", quality=85)
    return f"data:image/jpeg;base64,{base64.b64encode(file.getvalue()).decode()}"


def plot_sweep(
    sweep: Sweep,
    rows: Axis = None,
    cols: Axis = None,
    where: Mapping[str, Any] | None = None,
    show_input: bool = True,
    seconds: bool = False,
    file: str | Path | None = None,
    page: int = PAGE,
) -> None:
    """Show a sweep as a table of pictures: arguments down the side and along the top, the input before them.

    Args:
        sweep: from ``run_sweep``.
        rows, cols: the name of an argument, or a pair of names, the slower one first. With neither, the arguments that
            the cells differ in are taken, the one with more values along the top; with one, the other takes the rest.
            Where those are more than four, or most places would stay empty, the cells are shown one after another.
        where: which cells to show, such as ``{"seed": 0, "strength": [0.5, 0.75]}``.
        show_input: put the input picture before the others.
        seconds: say under each picture how long it took.
        file: where to save the picture, if anywhere; several pages become ``name-1.png``, ``name-2.png`` and so on.
        page: the most rows and columns of one figure, 1 to 40.

    Raises:
        InputError: the sweep is empty, a name is unknown or comes twice, ``where`` leaves nothing, two cells would fall
            on one place, or the page is too large.
    """
    if not len(sweep):
        raise InputError("the sweep has no finished cell to show")
    if where is not None and not isinstance(where, Mapping):
        raise InputError(f"where must be a dict such as {{'seed': 0}}, got {where!r}")
    if where:
        there, sweep = sweep, sweep.select(**where)
        if not len(sweep):
            has = "; ".join(f"{name} is {either(record[name] for record in there.records)}" for name in where)
            raise InputError(f"where={where!r} leaves no cell: {has}")
    records = sweep.records

    def tile(index: int) -> Tile:
        taken = records[index].get("seconds") if seconds else None
        note = "" if taken is None else f"{taken:.2f} s" if taken < 10 else f"{taken:.1f} s"
        return Tile(shrunk(sweep.images[index]), note)

    _plot(records, rows, cols, tile, _inputs(sweep) if show_input else {}, file, page)


def plot_plan(
    plan: Plan,
    rows: Axis = None,
    cols: Axis = None,
    show_input: bool = True,
    file: str | Path | None = None,
    page: int = PAGE,
) -> None:
    """Show the grid that a sweep will fill: an empty box for every cell, and in it how many steps will run.

    Args:
        plan: from ``plan``.
        rows, cols, show_input, file, page: as of ``plot_sweep``.

    Raises:
        InputError: as ``plot_sweep``.
    """
    records = plan.records

    def tile(index: int) -> Tile:
        steps = records[index]["steps_run"]
        return Tile(None, f"{steps} step{'s' * (steps != 1)}", shape=tuple(records[index]["image_size"]))

    inputs = {record["image"]: job.image for record, job in zip(records, plan.jobs, strict=True) if job.image}
    _plot(records, rows, cols, tile, inputs if show_input else {}, file, page)


def plot_chain(
    chain: Chain, columns: int | None = None, show_input: bool = True, file: str | Path | None = None
) -> None:
    """Show the pictures of a chain one after the other, each under what its link was told.

    Args:
        chain: from ``run_chain``.
        columns: pictures in a row; None puts up to four there.
        show_input: put the input picture, where there was one, before the others.
        file: where to save the picture, if anywhere.

    Raises:
        InputError: no link of the chain was finished.
    """
    if not len(chain):
        raise InputError("the chain has no finished link to show")
    images, titles = list(chain.images), [_of_link(record["chain"][-1]) for record in chain.records]
    if show_input and chain.image is not None:
        images, titles = [chain.image, *images], ["input", *titles]
    plot_grid(images, titles, columns or min(len(images), 4), file)


def _of_link(link: Record) -> str:
    """What a link was told, and what it was handed, in a few lines."""
    lines = wrap(link["prompt"], lambda line: len(line) <= TITLE, most=3)
    if link["strength"] is None:
        return "\n".join([*lines, "text to image"])
    return "\n".join([*lines, f"{describe('strength', link['strength'])}, from the {link['takes']}"])


def _inputs(sweep: Sweep) -> dict[str, Image.Image]:
    """The input pictures by their names in the records."""
    inputs: dict[str, Image.Image] = {}
    sources = getattr(sweep.images, "sources", sweep.images)
    for record, cell, source in zip(sweep.records, sweep.cells, sources, strict=True):
        if record["image"] in inputs or record["image"] is None:  # or made from text alone
            continue
        if isinstance(source, Path):
            inputs[record["image"]] = read_input(source)
        else:
            inputs[record["image"]] = load_image(cell["image"]) if "image" in cell else sweep.image
    return inputs


def _plot(
    records: Sequence[Record],
    rows: Axis,
    cols: Axis,
    tile: Callable[[int], Tile],
    inputs: Mapping[str, Image.Image],
    file: str | Path | None,
    page: int,
) -> None:
    if isinstance(page, bool) or not isinstance(page, int) or not 1 <= page <= MAX_PAGE:
        raise InputError(f"page must be a whole number from 1 to {MAX_PAGE}, got {page!r}")
    layout = lay_out(records, rows, cols, free=1 if len(inputs) == 1 else 0)
    parts = list(layout.pages(page))
    for number, part in enumerate(parts, 1):
        sheet = _sheet(part, records, tile, inputs)
        if len(parts) == 1:
            finish(sheet.draw(), file)
        else:
            numbered = file and Path(file).with_stem(f"{Path(file).stem}-{number}")
            finish(sheet.draw(f"page {number} of {len(parts)}"), numbered)


def _sheet(
    part: Layout, records: Sequence[Record], tile: Callable[[int], Tile], inputs: Mapping[str, Image.Image]
) -> Sheet:
    """One page with its pictures, and with the inputs along a side on which each of them stays the same."""
    tiles = {place: tile(index) for place, index in part.places.items()}
    if part.titles is not None:
        tiles = {place: replace(tiles[place], title=part.titles[index]) for place, index in part.places.items()}
        if len(inputs) == 1 and (0, 0) not in tiles:
            tiles[0, 0] = Tile(*inputs.values(), title="input")
        return Sheet(part.rows, part.columns, tiles)
    sheet = Sheet(part.rows, part.columns, tiles)
    for side in (0, 1) if inputs else ():
        names: dict[int, set[str]] = {}
        for place, index in sorted(part.places.items()):
            names.setdefault(place[side], set()).add(records[index]["image"])
        if all(len(some) == 1 for some in names.values()):
            first = {name: at for at, (name,) in sorted(names.items(), reverse=True)}
            return sheet.with_inputs(side, {at: Tile(inputs[name]) for name, at in first.items() if name in inputs})
    return sheet


def _put(ax: Axes, image: Image.Image, title: str) -> None:
    ax.imshow(image)
    ax.set_title(title, fontsize=9 if len(title) > 14 or "\n" in title else None)
    ax.axis("off")


def _check(images: Sequence[Image.Image], told: Sequence[Any], name: str) -> None:
    if not images:
        raise InputError("images is empty: there is nothing to show")
    if len(images) != len(told):
        raise InputError(f"{name} must be as many as images: got {len(told)} for {len(images)}")
