"""One page of pictures in rows and columns, with labels that always fit: drawn on one canvas, measured in inches."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate, groupby, pairwise
from pathlib import Path
from typing import TYPE_CHECKING

from PIL import Image

from decinb.figures.layout import Head, Place
from decinb.utils.labels import wrap

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# All in inches: a picture's width is between the two, so that a full page is about as wide.
SMALLEST, LARGEST, FULL = 1.1, 2.2, 13.0
GAP, GROUP_GAP, MARGIN, PAD = 0.06, 0.2, 0.12, 0.05
HEAD_WIDTH, HEAD_HEIGHT, TITLE_HEIGHT = 1.8, 0.85, 0.7  # the most that a label may take

SIZES = (10, 9.5, 9, 8.5, 8, 7.5, 7)  # of letters, in points: the first at which all labels of a level fit
LINE, DESCENT = 1.25, 0.24  # a line's height, and how far letters reach below it, in letter sizes
NOTE_SIZE = 8
NOTE_HEIGHT = NOTE_SIZE * LINE / 72 + PAD
SHARPNESS = 200  # pixels an inch that are kept of a picture

INK, GREY, FAINT, EMPTY = "#222222", "#777777", "#cccccc", "#f6f6f6"
INPUT: Head = ("input",)


@dataclass(frozen=True)
class Tile:
    """What stands in one place: a picture with a note under it, or an empty box of a shape with the note inside."""

    image: Image.Image | None
    note: str = ""
    title: str = ""
    shape: tuple[int, int] = (1, 1)

    @property
    def aspect(self) -> float:
        """Its height for a width of 1."""
        width, height = self.image.size if self.image else self.shape
        return height / width


def shrunk(image: Image.Image) -> Image.Image:
    """A picture of no more pixels than can be seen, so that a page of large ones fits into memory."""
    width = min(image.width, round(SHARPNESS * LARGEST))
    return image.resize((width, max(1, round(width * image.height / image.width)))) if width < image.width else image


@dataclass(frozen=True)
class Sheet:
    """One figure: labels of the rows and columns, and what stands in the places."""

    rows: list[Head]
    columns: list[Head]
    tiles: dict[Place, Tile]

    def with_inputs(self, side: int, tiles: Mapping[int, Tile]) -> Sheet:
        """The same with one more column before the others (side 0), or one more row (side 1), for the inputs."""
        if side == 0:
            moved = {(row, column + 1): tile for (row, column), tile in self.tiles.items()}
            return Sheet(self.rows, [INPUT, *self.columns], moved | {(at, 0): tile for at, tile in tiles.items()})
        moved = {(row + 1, column): tile for (row, column), tile in self.tiles.items()}
        return Sheet([INPUT, *self.rows], self.columns, moved | {(0, at): tile for at, tile in tiles.items()})

    def draw(self, footer: str = "") -> Figure:
        """Lay everything out in inches, then draw it on one canvas. The caller closes the figure."""
        import matplotlib.pyplot as plt

        tiles = self.tiles.values()
        width = min(LARGEST, max(SMALLEST, FULL / len(self.columns)))
        height = width * max(tile.aspect for tile in tiles)
        title_size, titles = _fit([(tile.title, width, TITLE_HEIGHT) for tile in tiles])
        above = max(_height(title, title_size) for title in titles)
        below = NOTE_HEIGHT if any(tile.note and tile.image for tile in tiles) else 0.0

        columns, x, right = _side(self.columns, width, lambda length: (length, HEAD_HEIGHT))
        rows, y, bottom = _side(self.rows, above + height + below, lambda length: (HEAD_WIDTH, length))
        left = MARGIN + sum(level.width + 2 * PAD for level in rows)
        top = MARGIN + sum(level.height + PAD for level in columns)
        right, bottom = left + right + MARGIN, top + bottom + (NOTE_HEIGHT if footer else MARGIN)

        figure = plt.figure(figsize=(right, bottom))
        ax = figure.add_axes((0, 0, 1, 1))
        ax.axis("off")
        at = MARGIN
        for level in columns:
            at += level.height + PAD
            for text, start, end in level.labels:
                _write(ax, left + (start + end) / 2, at - PAD, text, level.size, "center", "bottom")
                if text and level.groups:
                    ax.plot((left + start, left + end), (at - PAD / 2, at - PAD / 2), color=FAINT, linewidth=1)
        at = MARGIN
        for level in rows:
            at += level.width + 2 * PAD
            for text, start, end in level.labels:
                start, end = top + start + above, top + end - below
                _write(ax, at - 2 * PAD, (start + end) / 2, text, level.size, "right", "center")
                if text and level.groups:
                    ax.plot((at - PAD, at - PAD), (start, end), color=FAINT, linewidth=1)
        for ((row, column), tile), title in zip(self.tiles.items(), titles, strict=True):
            corner = left + x[column], top + y[row] + above
            middle, under = corner[0] + width / 2, corner[1] + height
            _write(ax, middle, corner[1] - PAD, title, title_size, "center", "bottom")
            if tile.image:
                _show(ax, tile.image, corner, width, height)
                _write(ax, middle, under + PAD / 2, tile.note, NOTE_SIZE, "center", "top", GREY)
            else:
                ax.add_patch(plt.Rectangle(corner, width, height, facecolor=EMPTY, edgecolor=FAINT, linewidth=0.8))
                _write(ax, middle, under - height / 2, tile.note, NOTE_SIZE, "center", "center", GREY)
        _write(ax, right - MARGIN, bottom - PAD, footer, NOTE_SIZE, "right", "bottom", GREY)
        ax.set(xlim=(0, right), ylim=(bottom, 0))
        return figure


@dataclass(frozen=True)
class _Level:
    """Labels in one line along a side: their text in lines, where each begins and ends, and the size of the letters."""

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
    """The labels along a side, slower ones first; where each place begins; and where the last one ends.

    Groups stand apart. ``room`` says for the length that a label spans how wide and high it may be.
    """
    depth = max(map(len, heads))
    padded = [("",) * (depth - len(head)) + head for head in heads]
    gaps = [GAP if _group(one) == _group(two) else GROUP_GAP for one, two in pairwise(heads)]
    starts = list(accumulate((size + gap for gap in gaps), initial=0.0))
    levels = []
    for level in range(depth):
        runs = [list(run) for _, run in groupby(range(len(heads)), key=lambda at, n=level + 1: padded[at][:n])]
        spans = [(starts[run[0]], starts[run[-1]] + size) for run in runs]
        letters, texts = _fit(
            [(padded[run[0]][level], *room(end - start)) for run, (start, end) in zip(runs, spans, strict=True)]
        )
        labels = [(text, *span) for text, span in zip(texts, spans, strict=True)]
        levels.append(_Level(labels, letters, groups=level < depth - 1))
    return levels, starts, starts[-1] + size


def _group(head: Head) -> Head:
    return head if head is INPUT else head[:-1]


def _fit(boxes: Sequence[tuple[str, float, float]]) -> tuple[float, list[str]]:
    """Letters of one size for texts that each have a width and a height in inches, and the texts in lines.

    What does not fit at the smallest size is cut off, with a sign that it is.
    """
    for size in SIZES:
        wrapped = ["\n".join(wrap(text, _fits(width, size))) for text, width, _ in boxes]
        whole = all(_fits(width, size)(word) for text, width, _ in boxes for word in text.split(" "))
        if whole and all(_height(text, size) <= box[2] for text, box in zip(wrapped, boxes, strict=True)):
            return size, wrapped
    cut = [_cut(*box, size) for box in boxes]
    meant: dict[str, set[str]] = {}
    for box, text in zip(boxes, cut, strict=True):
        meant.setdefault(text, set()).add(box[0])
    # Where the beginnings that fit are the same, the ends may tell texts apart.
    return size, [
        _cut(*box, size, end=True) if len(meant[text]) > 1 else text for box, text in zip(boxes, cut, strict=True)
    ]


def _cut(text: str, width: float, height: float, size: float, end: bool = False) -> str:
    """As many lines of a text as there is room for, from its beginning or up to its end."""
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
    """In inches, at a size of one point. On screen letters are moved to whole pixels, which can make them wider."""
    from matplotlib.font_manager import FontProperties
    from matplotlib.textpath import text_to_path

    return 1.04 * text_to_path.get_text_width_height_descent(line, FontProperties(size=1), ismath=False)[0] / 72


def _write(ax: Axes, x: float, y: float, text: str, size: float, across: str, down: str, colour: str = INK) -> None:
    if not text:
        return
    if down == "bottom":  # on one line with its neighbours, whether or not its letters reach below it
        down, y = "baseline", y - DESCENT * size / 72
    ax.text(
        x, y, text, size=size, ha=across, va=down, color=colour, linespacing=1.1,
        multialignment="center" if across == "center" else "left",
        parse_math=False,  # a prompt may hold dollar signs, and is no mathematics
    )  # fmt: skip


def _show(ax: Axes, image: Image.Image, corner: tuple[float, float], width: float, height: float) -> None:
    """A picture in its box, in the middle if the box has another shape."""
    shown = width * image.height / image.width
    top = corner[1] + (height - shown) / 2
    ax.imshow(image, extent=(corner[0], corner[0] + width, top + shown, top), aspect="auto")


def finish(figure: Figure, file: str | Path | None = None) -> None:
    """Save a figure if a file is named, show it where there is a screen or a notebook, and let go of it."""
    import matplotlib.pyplot as plt

    if file is not None:
        Path(file).parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(file)
    if plt.get_backend().lower() != "agg":
        plt.show()
    plt.close(figure)
