"""Show a sweep while it runs: a progress bar that counts images, and in a notebook a grid that fills."""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Sequence
from time import perf_counter
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor
from tqdm.auto import tqdm

from decinb.figures.layout import CellValues, in_sequence, lay_out
from decinb.figures.page import SMALLEST, Page, Tile, compose, png_as_html
from decinb.figures.preview import Preview
from decinb.utils.environment import in_notebook

PAUSE = 0.5  # seconds between two updates of the grid, at least
DISPLAY_FRACTION = 0.1  # of the running time, at most, goes into updating the grid
PREVIEWS = 0.1  # seconds of an update in which previews are made; the others wait for the next update

SIDE = 960  # pixels of the longer side of the grid, at most
RESOLUTION = 100  # pixels per inch, at most
READABLE = 50  # pixels per inch below which labels are left out

BAR = "{desc} |{bar}| {percentage:3.0f}% [{elapsed}<{remaining}]"


class ProgressBar(tqdm):
    """A bar that says how many images are finished, and how long the rest will take.

    Its length and the time left follow the rows of the U-Net, which take nearly all the time, because the images of a
    packed sweep are all finished shortly before its end.
    """

    images, images_done = 0, 0

    def advance(self, rows: int, images: int) -> None:
        """Count rows that were computed and images that ended."""
        self.images_done += images
        plural = "s" * (self.images != 1)
        self.set_description_str(f"sweep: {self.images_done} of {self.images} image{plural}", refresh=images > 0)
        self.update(rows)


def progress_bar(images: int, total_rows: int, show: bool = True) -> ProgressBar:
    """Make the bar of a sweep: a widget in a notebook and text in a terminal. Use it in a ``with`` block."""
    # Little smoothing: the average rate of all rows predicts better than that of the last few.
    bar = ProgressBar(total=total_rows, disable=not show, leave=False, smoothing=0.1, bar_format=BAR)
    bar.images = images
    bar.advance(0, 0)
    return bar


class LiveGrid:
    """In a notebook, show a grid of all cells that fills while they are made. Do nothing anywhere else.

    The grid is one image that is replaced at most twice a second, and less often if updates would slow down the sweep.
    Cells in progress appear as previews of the clean image that is predicted, a few at each update.

    Args:
        preview: turns latents into small images; None shows no previews.
        image: the input, or None.
        cells: the arguments of every cell, in the order of their numbers, with ``image_size`` (width, height).
    """

    def __init__(self, preview: Preview | None, image: Image.Image | None, cells: Sequence[CellValues]):
        self._canvas: Canvas | None = None
        if not in_notebook():
            return
        from IPython.display import display

        self._canvas = Canvas(cells, image)
        self._preview = preview
        self._predictions: dict[int, Callable[[], Tensor | None]] = {}  # received since the last update
        self._number, self._missing = len(cells), set(range(len(cells)))
        self._handle = display(self._shown(), display_id=True)
        self._next = perf_counter() + PAUSE

    def show(self, index: int, image: Image.Image) -> None:
        """Show the finished image of cell ``index``."""
        if self._canvas is None:
            return
        self._predictions.pop(index, None)
        self._missing.discard(index)
        self._canvas.put(index, image)
        self._update(now=not self._missing)

    def preview(self, index: int, predict: Callable[[], Tensor | None]) -> None:
        """Show the clean latents of cell ``index``, (1, channels, height, width), that ``predict`` returns."""
        if self._canvas is None or self._preview is None or index not in self._missing:
            return
        self._predictions[index] = predict
        self._update()

    def close(self) -> None:
        """Show what was received since the last update."""
        if self._canvas is not None:
            self._update(now=True)

    def _update(self, now: bool = False) -> None:
        started = perf_counter()
        if started < self._next and not now:
            return
        while self._predictions and perf_counter() < started + PREVIEWS:
            index = next(iter(self._predictions))  # the one that waits longest
            if (latents := self._predictions.pop(index)()) is not None:
                self._canvas.put(index, self._preview(latents))
        self._handle.update(self._shown())
        ended = perf_counter()
        self._next = ended + max(PAUSE, (ended - started) / DISPLAY_FRACTION)

    def _shown(self) -> Any:
        from IPython.display import HTML

        done = f"{self._number - len(self._missing)} of {self._number} images finished"
        return HTML(png_as_html(self._canvas.png(), self._canvas.image.width, f"A sweep, {done}."))


class Canvas:
    """The page of a sweep as an image in pixels, with empty boxes at first; images are pasted into the boxes.

    It looks like the printed figure. If its labels would be too small to read, the cells are shown one after another
    without labels instead.

    Args:
        cells: the arguments of every cell, with ``image_size`` (width, height).
        image: the input, shown if all cells have the same.

    Attributes:
        image: all cells, at most ``SIDE`` pixels wide and high.
        boxes: left, top, right and lower edge of cells, by their index, in pixels. Of equal cells only one has a box.
    """

    def __init__(self, cells: Sequence[CellValues], image: Image.Image | None = None):
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

        page = _page(cells, image)
        resolution = _resolution(page)
        drawing = FigureCanvasAgg(page.draw(Figure(dpi=resolution, facecolor="white")))
        drawing.draw()
        self.image = Image.fromarray(np.asarray(drawing.buffer_rgba())).convert("RGB")
        self.boxes: dict[int, tuple[int, int, int, int]] = {}
        for place, tile in page.tiles.items():
            if tile.cell is not None:
                left, top, width, height = (length * resolution for length in page.boxes[place])
                # Rounded down, so that no box overlaps the next.
                left, top, width, height = round(left), round(top), max(1, int(width)), max(1, int(height))
                self.boxes[tile.cell] = left, top, left + width, top + height

    def put(self, index: int, image: Image.Image) -> None:
        """Paste an image of any size into the box of a cell."""
        if index in self.boxes:
            left, top, right, bottom = self.boxes[index]
            self.image.paste(image.convert("RGB").resize((right - left, bottom - top)), (left, top))

    def png(self) -> bytes:
        """Return the image as a PNG file."""
        file = io.BytesIO()
        self.image.save(file, "PNG", compress_level=1)  # several times faster than the default, and hardly larger
        return file.getvalue()


def _page(cells: Sequence[CellValues], image: Image.Image | None) -> Page:
    """Make the page of a sweep without its images, with labels only if they can be read."""

    def tile(index: int) -> Tile:
        return Tile(None, shape=tuple(cells[index]["image_size"]))

    inputs = {} if image is None or len({cell["image"] for cell in cells}) > 1 else {cells[0]["image"]: image}
    layout = lay_out(cells, free=len(inputs))
    if max(len(layout.rows), len(layout.columns)) * SMALLEST * READABLE <= SIDE:
        page = compose(layout, cells, tile, inputs)
        if _resolution(page) >= READABLE:
            return page
    columns = math.ceil(math.sqrt(len(cells) * tile(0).aspect))
    return compose(in_sequence(len(cells), columns), cells, tile, {})


def _resolution(page: Page) -> float:
    """Return the pixels per inch at which a page is shown."""
    return min(RESOLUTION, SIDE / max(page.size))
