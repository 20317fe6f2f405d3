"""Plot images: the guide's row, a plain grid, a gallery, and the labelled grids of sweeps, plans and chains."""

from __future__ import annotations

import base64
import html
import io
import re
from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image

from decinb.errors import InputError
from decinb.figures.gallery import gallery
from decinb.figures.layout import Axis, CellValues, either, lay_out
from decinb.figures.page import Tile, compose, figure_file, finish, fit, shrunk
from decinb.figures.viewer import Fragment
from decinb.images import load_image, read_input
from decinb.utils import validation
from decinb.utils.environment import in_notebook
from decinb.utils.labels import SELECTABLE, describe, plain, printable, wrap

if TYPE_CHECKING:
    from decinb.execution.chains import Chain
    from decinb.execution.plan import Plan
    from decinb.sweep import Sweep

PAGE = 12  # rows and columns of one figure
MAX_PAGE = 40  # a figure of more rows or columns is too large to open, even with images at their smallest
WIDTH, WIDEST = 11.0, 3.2  # inches: the most of a grid and of one of its images
TITLE_ROOM = 0.9  # inches: the most that a title may take
MAX_TITLE = 100  # characters of a title that become part of a file name
TITLE = 34  # characters in a line of a link's title
UNBREAKABLE = str.maketrans({" ": "\u00a0", "-": "\u2011"})  # keeps the name of a tab on one line


def plot_images(images: Sequence[Image.Image], values: Sequence[Any], title: str) -> None:
    """Show images side by side, each under ``title: value``, and save the row as ``{title}_experiments.png``.

    This is the helper of Deci's guide, with the same arguments and the same result. The file is always in the current
    folder: a title's slashes, and what not every system allows in a file name, become underscores.

    Raises:
        InputError: there are no images, or the number of values differs from that of images.
    """
    images, values = _check(images, values, "values")
    name = str(title).rstrip(": ")  # the guide has a title "Steps:"
    file = re.sub(r'[\x00-\x1f/\\:*?"<>|]+', "_", printable(name))[:MAX_TITLE].lstrip(".~ ")
    _draw_grid(images, [f"{name}: {plain(value)}" for value in values], len(images), f"{file}_experiments.png")


def plot_grid(
    images: Sequence[Image.Image],
    titles: Sequence[str],
    columns: int = 3,
    file: str | Path | None = None,
) -> None:
    """Show images in rows of ``columns``, each under its own title, and save the grid if a file is named.

    Raises:
        InputError: there are no images, the number of titles differs from that of images, or the file cannot be
            written.
    """
    images, titles = _check(images, titles, "titles")
    _draw_grid(images, titles, validation.count(columns, "columns"), file)


def show_gallery(
    images: Sequence[Image.Image],
    groups: Sequence[str],
    titles: Sequence[str] | None = None,
    width: int = 150,
    tabs: bool = False,
) -> None:
    """Show many images in a notebook, in a section for each group that opens and closes; elsewhere as a labelled grid.

    Args:
        images: of any size; the notebook stores them at most twice ``width`` wide.
        groups: for each image, the name of its group. Groups appear in the order in which they are first named.
        titles: a line below each image.
        width: of an image in the page, in pixels.
        tabs: show the groups as the tabs of ipyplot, if it is installed. These need a notebook that is trusted.

    Raises:
        InputError: there are no images, or the number of groups or titles differs from that of images.
    """
    images, groups = _check(images, groups, "groups")
    if titles is not None:
        images, titles = _check(images, titles, "titles")
    width = validation.count(width, "width")
    if not in_notebook():
        labels = groups if titles is None else [f"{one}\n{title}" for one, title in zip(groups, titles, strict=True)]
        plot_grid(images, labels, columns=6)
    elif tabs and find_spec("ipyplot") is not None:
        _show_tabs(images, groups, titles, width)
    else:
        from IPython.display import display

        display(Fragment(gallery(images, groups, titles, width)))


def _show_tabs(images: Sequence[Image.Image], groups: Sequence[str], titles: Sequence[str] | None, width: int) -> None:
    """Show a gallery with ipyplot, which puts all texts into its page unescaped."""
    import ipyplot
    from IPython.utils.capture import capture_output

    names = [html.escape(str(group)).translate(UNBREAKABLE) for group in groups]
    with capture_output() as captured:  # ipyplot displays everything twice: as a page, and as the page's source
        ipyplot.plot_class_tabs(
            [_data_url(image, 2 * width) for image in images],
            names,
            tabs_order=list(dict.fromkeys(names)),
            custom_texts=None if titles is None else [html.escape(str(title)) for title in titles],
            max_imgs_per_tab=len(images),
            img_width=width,
            show_url=False,
        )
    captured.outputs[-1].display()


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
    """Show a sweep as a table of images, with arguments down the side and along the top, and the input first.

    Args:
        sweep: from ``run_sweep``.
        rows, cols: the name of an argument, or a pair of names, the one that changes more slowly first. With neither,
            the arguments in which the cells differ are used, the one with more values along the top; with one, the
            other side takes the rest. If there are more than four, or most places would be empty, the cells are shown
            one after another.
        where: which cells to show, such as ``{"seed": 0, "strength": [0.5, 0.75]}``.
        show_input: put the input image first.
        seconds: write below each image how long it took.
        file: where to save the figure; several pages become ``name-1.png``, ``name-2.png`` and so on.
        page: the most rows and columns of one figure, 1 to 40.

    Raises:
        InputError: the sweep is empty, a name is unknown or named twice, ``where`` leaves no cell, two different cells
            would share a place, or the page is too large.
    """
    if not len(sweep):
        raise InputError("the sweep has no finished cell to show")
    if where is not None and not isinstance(where, Mapping):
        raise InputError(f"where must be a dict such as {{'seed': 0}}, got {validation.short_repr(where)}")
    if where:
        validation.known(where, SELECTABLE)
        all_cells, sweep = sweep, sweep.select(**where)
        if not len(sweep):
            values = "; ".join(f"{name} is {either(record[name] for record in all_cells.records)}" for name in where)
            raise InputError(f"where={validation.short_repr(where)} leaves no cell: {values}")
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
    """Show the grid that a sweep will fill: an empty box for every cell, with the number of steps that will run.

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
    """Show the images of a chain one after another, each under the prompt and the strength of its link.

    Args:
        chain: from ``run_chain``.
        columns: images in a row; by default all of them, up to four.
        show_input: put the input image first, if there was one.
        file: where to save the figure.

    Raises:
        InputError: no link of the chain was finished.
    """
    if not len(chain):
        raise InputError("the chain has no finished link to show")
    images, titles = list(chain.images), [_link_title(record["chain"][-1]) for record in chain.records]
    if show_input and chain.image is not None:
        images, titles = [chain.image, *images], ["input", *titles]
    plot_grid(images, titles, columns or min(len(images), 4), file)


def _plot(
    cells: Sequence[CellValues],
    rows: Axis,
    cols: Axis,
    tile: Callable[[int], Tile],
    inputs: Mapping[str, Image.Image],
    file: str | Path | None,
    page: int,
) -> None:
    """Lay out cells and draw them, on as many figures as they need."""
    if isinstance(page, bool) or not isinstance(page, int) or not 1 <= page <= MAX_PAGE:
        raise InputError(f"page must be an integer from 1 to {MAX_PAGE}, got {validation.short_repr(page)}")
    import matplotlib.pyplot as plt

    file = None if file is None else figure_file(file)
    layout = lay_out(cells, rows, cols, free=1 if len(inputs) == 1 else 0)
    parts = list(layout.pages(page))
    for number, part in enumerate(parts, 1):
        several = len(parts) > 1
        composed = compose(part, cells, tile, inputs, f"page {number} of {len(parts)}" if several else "")
        numbered = file.with_stem(f"{file.stem}-{number}") if file and several else file
        finish(composed.draw(plt.figure()), numbered)


def _inputs(sweep: Sweep) -> dict[str, Image.Image]:
    """Return the input images by their names in the records."""
    inputs: dict[str, Image.Image] = {}
    sources = getattr(sweep.images, "sources", sweep.images)
    for record, cell, source in zip(sweep.records, sweep.cells, sources, strict=True):
        if record["image"] in inputs or record["image"] is None:  # None for text to image
            continue
        if isinstance(source, Path):
            inputs[record["image"]] = read_input(source)
        else:
            inputs[record["image"]] = load_image(cell["image"]) if "image" in cell else sweep.image
    return inputs


def _link_title(link: CellValues) -> str:
    """Describe a link in a few lines: its prompt, its strength, and what it started from."""
    prompt = "\n".join(wrap(link["prompt"], lambda line: len(line) <= TITLE, most=3))
    if link["strength"] is None:
        return f"{prompt},\ntext to image"
    return f"{prompt},\n{describe('strength', link['strength'])}, from the {link['takes']}"


def _data_url(image: Image.Image, max_width: int) -> str:
    """Encode an image as a data URL, as a small JPEG."""
    image = image.convert("RGB")
    image.thumbnail((max_width, 4 * max_width))
    file = io.BytesIO()
    image.save(file, "JPEG", quality=85)
    return f"data:image/jpeg;base64,{base64.b64encode(file.getvalue()).decode()}"


def _draw_grid(images: Sequence[Image.Image], titles: Sequence[Any], columns: int, file: str | Path | None) -> None:
    """Draw images in rows, at most ``WIDTH`` inches wide, each under its title in the one size in which all fit."""
    import matplotlib.pyplot as plt

    titles = [" ".join(printable(str(title)).split()) for title in titles]
    width = min(WIDEST, WIDTH / columns)
    height = width * max(image.height / image.width for image in images)
    size, wrapped = fit([(title, 0.96 * width, TITLE_ROOM) for title in titles])
    above = 0.25 * max(title.count("\n") + 1 for title in wrapped)
    rows = -(-len(images) // columns)
    figure, axes = plt.subplots(
        rows, columns, figsize=(width * columns, (height + above) * rows), squeeze=False, layout="constrained"
    )
    for ax in axes.flat:
        ax.axis("off")
    for ax, image, title in zip(axes.flat, images, wrapped, strict=False):
        ax.imshow(image)
        ax.set_title(title, fontsize=size, parse_math=False)  # a prompt may hold dollar signs
    finish(figure, file, f"Images, each under its title: {'; '.join(titles)}")


def _check(images: Sequence[Image.Image], labels: Sequence[Any], name: str) -> tuple[Sequence[Any], Sequence[Any]]:
    """Return images and their labels, which may be given as generators."""
    images = validation.pil_images(images, "images")
    labels = validation.bounded_list(labels, name, validation.MAX_IMAGES)
    if not len(images):
        raise InputError("images is empty: there is nothing to show")
    if len(images) != len(labels):
        raise InputError(f"{name} must have one entry for each image: got {len(labels)} for {len(images)} images")
    return images, labels
