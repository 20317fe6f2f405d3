"""Draw one page of images in rows and columns, with labels that always fit. All lengths are in inches.

A printed figure and the grid that fills during a sweep are both such a page.
"""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import accumulate, groupby, pairwise
from pathlib import Path
from typing import TYPE_CHECKING

from PIL import Image

from decinb.errors import InputError
from decinb.figures.layout import CellValues, Head, Layout, Place
from decinb.utils import validation
from decinb.utils.environment import in_notebook
from decinb.utils.files import write_output
from decinb.utils.labels import printable, wrap

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SMALLEST, LARGEST, FULL = 1.1, 2.2, 8.8  # least and greatest width of an image; width of all images of a full row
GAP, GROUP_GAP, MARGIN, PAD = 0.06, 0.2, 0.12, 0.05
HEAD_WIDTH, HEAD_HEIGHT, TITLE_HEIGHT = 1.8, 0.85, 0.7  # the most that a label may take

SIZES = (10, 9.5, 9, 8.5)  # font sizes in points; the first at which all labels of a level fit is used
LINE, DESCENT = 1.25, 0.24  # height of a line and depth of its descenders, in font sizes
NOTE_SIZE = 8.5
NOTE_HEIGHT = NOTE_SIZE * LINE / 72 + PAD
DOTS = 96  # pixels of a page per inch of a figure, so that 8.5 points are 11 pixels
SHARPNESS = 200  # pixels per inch to which images are reduced

INK, GREY, FAINT, EMPTY = "#222222", "#777777", "#cccccc", "#f6f6f6"
INPUT: Head = ("input",)

Box = tuple[float, float, float, float]  # left, top, width, height


@dataclass(frozen=True)
class Tile:
    """The content of one place: an image with a note below it, or an empty box of some shape with the note inside."""

    image: Image.Image | None
    note: str = ""
    title: str = ""
    shape: tuple[int, int] = (1, 1)  # width and height of the empty box, in any unit
    cell: int | None = None  # the index of the cell shown; None for an input

    @property
    def aspect(self) -> float:
        """Height divided by width."""
        width, height = self.image.size if self.image else self.shape
        return height / width


class Page:
    """One figure: labels of rows and columns, and tiles in their places.

    Args:
        rows, columns: the labels along the sides, one head for each row and column.
        tiles: what to show, by row and column.
        footer: a line in the lower right corner.

    Attributes:
        size: width and height of the page.
        boxes: for every tile, where its image goes: left, top, width, height, measured from the upper left corner.
    """

    def __init__(self, rows: Sequence[Head], columns: Sequence[Head], tiles: Mapping[Place, Tile], footer: str = ""):
        self.tiles, self.footer = dict(tiles), footer
        width = min(LARGEST, max(SMALLEST, FULL / len(columns)))
        height = width * max(tile.aspect for tile in tiles.values())
        self._title_size, titles = fit([(tile.title, width, TITLE_HEIGHT) for tile in tiles.values()])
        self._titles = dict(zip(tiles, titles, strict=True))
        self._above = max(_height(title, self._title_size) for title in titles)
        self._below = NOTE_HEIGHT if any(tile.note and tile.image for tile in tiles.values()) else 0.0

        self._columns, x, right = _side(columns, width, lambda length: (length, HEAD_HEIGHT))
        self._rows, y, bottom = _side(rows, self._above + height + self._below, lambda length: (HEAD_WIDTH, length))
        self._left = MARGIN + sum(level.width + 2 * PAD for level in self._rows)
        self._top = MARGIN + sum(level.height + PAD for level in self._columns)
        self.size = self._left + right + MARGIN, self._top + bottom + (NOTE_HEIGHT if footer else MARGIN)
        self.boxes: dict[Place, Box] = {}
        for (row, column), tile in tiles.items():
            shown = width * tile.aspect  # less than the height of the row where images differ in shape
            top = self._top + y[row] + self._above + (height - shown) / 2
            self.boxes[row, column] = (self._left + x[column], top, width, shown)

    def draw(self, figure: Figure) -> Figure:
        """Draw the page on an empty figure, which takes on its size."""
        figure.set_size_inches(*self.size)
        ax = figure.add_axes((0, 0, 1, 1))
        ax.axis("off")
        self._write_columns(ax)
        self._write_rows(ax)
        self._draw_tiles(ax)
        right, bottom = self.size
        _write(ax, right - MARGIN, bottom - PAD, self.footer, NOTE_SIZE, "right", "bottom", GREY)
        ax.set(xlim=(0, right), ylim=(bottom, 0))
        return figure

    def _write_columns(self, ax: Axes) -> None:
        y = MARGIN
        for level in self._columns:
            y += level.height + PAD
            for text, start, end in level.labels:
                start, end = self._left + start, self._left + end
                _write(ax, (start + end) / 2, y - PAD, text, level.size, "center", "bottom")
                if text and level.groups:
                    ax.plot((start, end), (y - PAD / 2, y - PAD / 2), color=FAINT, linewidth=1)

    def _write_rows(self, ax: Axes) -> None:
        x = MARGIN
        for level in self._rows:
            x += level.width + 2 * PAD
            for text, start, end in level.labels:
                start, end = self._top + start + self._above, self._top + end - self._below
                _write(ax, x - 2 * PAD, (start + end) / 2, text, level.size, "right", "center")
                if text and level.groups:
                    ax.plot((x - PAD, x - PAD), (start, end), color=FAINT, linewidth=1)

    def _draw_tiles(self, ax: Axes) -> None:
        from matplotlib.collections import PatchCollection
        from matplotlib.patches import Rectangle

        empty = []
        for place, tile in self.tiles.items():
            left, top, width, height = self.boxes[place]
            middle, bottom = left + width / 2, top + height
            _write(ax, middle, top - PAD, self._titles[place], self._title_size, "center", "bottom")
            if tile.image:
                ax.imshow(tile.image, extent=(left, left + width, bottom, top), aspect="auto")
                _write(ax, middle, bottom + PAD / 2, tile.note, NOTE_SIZE, "center", "top", GREY)
            else:
                empty.append(Rectangle((left, top), width, height))
                _write(ax, middle, top + height / 2, tile.note, NOTE_SIZE, "center", "center", GREY)
        if empty:  # in one collection, since adding a thousand patches one by one takes seconds
            ax.add_collection(PatchCollection(empty, facecolor=EMPTY, edgecolor=FAINT, linewidth=0.8), autolim=False)


def compose(
    layout: Layout,
    cells: Sequence[CellValues],
    tile: Callable[[int], Tile],
    inputs: Mapping[str, Image.Image],
    footer: str = "",
) -> Page:
    """Fill a layout with tiles, and put inputs along a side on which each of them stays the same.

    Args:
        layout: of the cells, or a page of it.
        cells: the arguments of all cells.
        tile: makes the tile of a cell from its index.
        inputs: the input images, by the name that the cells give as ``image``.
        footer: a line in the lower right corner.
    """
    tiles = {place: replace(tile(index), cell=index) for place, index in layout.places.items()}
    given = {name: Tile(shrunk(image)) for name, image in inputs.items()}
    if layout.titles is not None:
        tiles = {place: replace(shown, title=layout.titles[shown.cell]) for place, shown in tiles.items()}
        if len(given) == 1 and (0, 0) not in tiles:
            tiles[0, 0] = replace(*given.values(), title="input")
        return Page(layout.rows, layout.columns, tiles, footer)
    for side in (0, 1) if given else ():
        names: dict[int, set[str]] = {}
        for place, index in sorted(layout.places.items()):
            names.setdefault(place[side], set()).add(cells[index]["image"])
        if all(len(some) == 1 for some in names.values()):
            first = {name: at for at, (name,) in sorted(names.items(), reverse=True)}
            beside = {at: given[name] for name, at in first.items() if name in given}
            if side == 0:
                tiles = {(row, column + 1): shown for (row, column), shown in tiles.items()}
                tiles |= {(row, 0): shown for row, shown in beside.items()}
                return Page(layout.rows, [INPUT, *layout.columns], tiles, footer)
            tiles = {(row + 1, column): shown for (row, column), shown in tiles.items()}
            tiles |= {(0, column): shown for column, shown in beside.items()}
            return Page([INPUT, *layout.rows], layout.columns, tiles, footer)
    return Page(layout.rows, layout.columns, tiles, footer)


def shrunk(image: Image.Image) -> Image.Image:
    """Reduce an image to the pixels that can be seen, so that a page of large images fits into memory."""
    width = min(image.width, round(SHARPNESS * LARGEST))
    return image.resize((width, max(1, round(width * image.height / image.width)))) if width < image.width else image


@dataclass(frozen=True)
class _Level:
    """One line of labels along a side: the text of each, broken into lines, with its start and end; one font size."""

    labels: list[tuple[str, float, float]]
    size: float
    groups: bool

    @property
    def width(self) -> float:
        return max(_width(line, self.size) for text, _, _ in self.labels for line in text.split("\n"))

    @property
    def height(self) -> float:
        return max(_height(text, self.size) for text, _, _ in self.labels)


def _side(
    heads: Sequence[Head], size: float, room: Callable[[float], tuple[float, float]]
) -> tuple[list[_Level], list[float], float]:
    """Place the labels of one side, with a larger gap between groups.

    Args:
        heads: one for each row or column.
        size: length of a row or column along the side.
        room: from the length that a label spans to the width and height it may take.

    Returns:
        The levels of labels, slower ones first; the start of each row or column; the end of the last one.
    """
    depth = max(map(len, heads))
    padded = [("",) * (depth - len(head)) + head for head in heads]
    gaps = [GAP if _group(one) == _group(two) else GROUP_GAP for one, two in pairwise(heads)]
    starts = list(accumulate((size + gap for gap in gaps), initial=0.0))
    levels = []
    for level in range(depth):
        runs = [list(run) for _, run in groupby(range(len(heads)), key=lambda at, n=level + 1: padded[at][:n])]
        spans = [(starts[run[0]], starts[run[-1]] + size) for run in runs]
        font_size, texts = fit(
            [(padded[run[0]][level], *room(end - start)) for run, (start, end) in zip(runs, spans, strict=True)]
        )
        labels = [(text, *span) for text, span in zip(texts, spans, strict=True)]
        levels.append(_Level(labels, font_size, groups=level < depth - 1))
    return levels, starts, starts[-1] + size


def _group(head: Head) -> Head:
    return head if head is INPUT else head[:-1]


def fit(boxes: Sequence[tuple[str, float, float]]) -> tuple[float, list[str]]:
    """Find one font size at which every text fits its width and height, and break the texts into lines.

    Texts that do not fit at the smallest size are cut off, which an ellipsis shows.
    """
    for size in SIZES:
        wrapped = ["\n".join(wrap(text, _fits(width, size))) for text, width, _ in boxes]
        whole = all(_fits(width, size)(word) for text, width, _ in boxes for word in text.split(" "))
        if whole and all(_height(text, size) <= box[2] for text, box in zip(wrapped, boxes, strict=True)):
            return size, wrapped
    cut = [_cut(*box, size) for box in boxes]
    originals: dict[str, set[str]] = {}
    for box, text in zip(boxes, cut, strict=True):
        originals.setdefault(text, set()).add(box[0])
    # Texts that begin alike may differ at their ends.
    return size, [
        _cut(*box, size, end=True) if len(originals[text]) > 1 else text for box, text in zip(boxes, cut, strict=True)
    ]


def _cut(text: str, width: float, height: float, size: float, end: bool = False) -> str:
    """Keep as many lines of a text as there is room for, from its beginning or from its end."""
    room = max(1, int((height - PAD) / (size * LINE / 72)))
    return "\n".join(wrap(text, _fits(width, size), room, end))


def _fits(width: float, size: float) -> Callable[[str], bool]:
    return lambda line: _width(line, size) <= width


def _height(text: str, size: float) -> float:
    return (text.count("\n") + 1) * size * LINE / 72 + PAD if text else 0.0


def _width(line: str, size: float) -> float:
    return size * _width_of_a_point(line)


@lru_cache(10_000)
def _width_of_a_point(line: str) -> float:
    """Return the width at a font size of one point, with an allowance for characters moved to whole pixels."""
    from matplotlib.font_manager import FontProperties
    from matplotlib.textpath import text_to_path

    return (
        1.04 * text_to_path.get_text_width_height_descent(printable(line), FontProperties(size=1), ismath=False)[0] / 72
    )


def _write(ax: Axes, x: float, y: float, text: str, size: float, across: str, down: str, colour: str = INK) -> None:
    if not text:
        return
    if down == "bottom":  # aligned with its neighbours, whether or not a text has descenders
        down, y = "baseline", y - DESCENT * size / 72
    ax.text(
        x, y, printable(text), size=size, ha=across, va=down, color=colour, linespacing=1.1,
        multialignment="center" if across == "center" else "left",
        parse_math=False,  # a prompt may hold dollar signs
    )  # fmt: skip


def finish(figure: Figure, file: str | Path | None = None, alt: str = "") -> None:
    """Save a figure if a file is named, show it if there is a screen or a notebook, and close it.

    Args:
        alt: what the figure shows, for readers who do not see it; by default the text that is written in it.

    Raises:
        InputError: the file's ending is not one of a format for figures, or the file cannot be written.
    """
    import matplotlib.pyplot as plt

    try:
        if file is not None:
            _save(figure, figure_file(file))
        if in_notebook():
            from IPython.display import HTML, display

            display(HTML(as_html(figure, alt)))
        elif plt.get_backend().lower() != "agg":
            plt.show()
    finally:
        plt.close(figure)


def figure_file(file: str | Path) -> Path:
    """Validate the path of a figure; without an ending it is a PNG."""
    path = validation.file(file)
    return path if path.suffix else path.with_suffix(".png")


def _save(figure: Figure, file: Path) -> None:
    formats = figure.canvas.get_supported_filetypes()
    if (ending := file.suffix[1:].lower()) not in formats:
        raise InputError(f"file must end in one of {', '.join(formats)}, got {validation.short_repr(file.name)}")
    data = io.BytesIO()
    figure.savefig(data, format=ending)
    write_output(file, data.getvalue())


def as_html(figure: Figure, alt: str = "") -> str:
    """Return a figure as an HTML image with a text for readers who do not see it.

    The image is never made smaller than it was drawn, so that its text stays readable; where it is wider than the page,
    it can be scrolled.
    """
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=2 * DOTS)
    return png_as_html(file.getvalue(), round(figure.get_size_inches()[0] * DOTS), alt or written(figure))


def png_as_html(png: bytes, width: int, alt: str) -> str:
    """Return the bytes of a PNG as an HTML image, ``width`` pixels wide, with a text for readers who do not see it."""
    text, data = html.escape(" ".join(alt.split())), base64.b64encode(png).decode()
    return (
        f'<div style="overflow-x: auto"><img alt="{text}" width="{width}" style="max-width: none" '
        f'src="data:image/png;base64,{data}"></div>'
    )


def written(figure: Figure) -> str:
    """Return the text in a figure: titles, labels of the axes, names of curves, and what is written beside images."""
    parts = [figure.get_suptitle()]
    for ax in figure.axes:
        legend = ax.get_legend()
        curves = ", ".join(text.get_text() for text in legend.get_texts()) if legend else ""
        over = f"{ax.get_ylabel()} against {ax.get_xlabel()}" if ax.get_xlabel() and ax.get_ylabel() else ""
        texts = [text.get_text() for text in ax.texts]
        parts += [ax.get_title(), over or ax.get_ylabel() or ax.get_xlabel(), curves, *texts]
    return "; ".join(dict.fromkeys(" ".join(part.split()) for part in parts if part.strip())) or "a figure"
