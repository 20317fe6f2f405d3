"""Show a sweep while it runs: a progress bar in rows of the U-Net, and in a notebook a grid that fills."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from time import perf_counter
from typing import Any

import numpy as np
import torch
from diffusers import DiffusionPipeline
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion_img2img import retrieve_latents
from PIL import Image, ImageChops
from torch import Tensor
from torch.nn.functional import interpolate
from tqdm.auto import tqdm

from decinb.figures.layout import CellValues, in_sequence, lay_out
from decinb.figures.page import SMALLEST, Page, Tile, compose
from decinb.sampling.adapters import adapter_of
from decinb.utils.environment import in_notebook

PAUSE = 0.5  # seconds between two updates of the grid, at least
DISPLAY_FRACTION = 0.05  # of the running time, at most, goes into updating the grid

SIDE = 960  # pixels of the longer side of the grid, at most
RESOLUTION = 100  # pixels per inch, at most
READABLE = 50  # pixels per inch below which labels are left out

FITTED = 128  # pixels of the longer side of the image on which the colours of previews are fitted


def progress_bar(total_rows: int, show: bool = True) -> tqdm:
    """Make a bar that counts rows of the U-Net, which take nearly all the time, and estimates the time left.

    It is a widget in a notebook and text in a terminal. Use it in a ``with`` block.
    """
    # Little smoothing: the average rate of all rows predicts better than that of the last few.
    return tqdm(total=total_rows, desc="sweep", unit="row", disable=not show, leave=False, smoothing=0.1)


class LiveGrid:
    """In a notebook, show a grid of all cells that fills while they are made. Do nothing anywhere else.

    The grid is one image that is replaced at most twice a second, and less often if updates would slow down the sweep.
    Cells in progress appear as previews: their latents, turned into colours without the VAE.

    Args:
        pipe: the pipeline that makes the images.
        image: the input, on which the colours of previews are fitted; None shows no previews.
        cells: the arguments of every cell, in the order of their numbers, with ``image_size`` (width, height).
    """

    def __init__(self, pipe: DiffusionPipeline, image: Image.Image | None, cells: Sequence[CellValues]):
        self._canvas: Canvas | None = None
        if not in_notebook():
            return
        from IPython.display import display

        self._canvas = Canvas(cells, image)
        self._matrix = None if image is None or not adapter_of(pipe).exposes_latents else latent_to_rgb(pipe, image)
        self._latents: dict[int, Tensor] = {}  # received since the last update
        self._missing = set(range(len(cells)))
        self._handle = display(self._shown(), display_id=True)
        self._next = perf_counter() + PAUSE

    def show(self, index: int, image: Image.Image) -> None:
        """Show the finished image of cell ``index``."""
        if self._canvas is None:
            return
        self._latents.pop(index, None)
        self._missing.discard(index)
        self._canvas.put(index, image)
        self._update(now=not self._missing)

    def preview(self, index: int, latents: Tensor) -> None:
        """Show the unfinished latents of cell ``index``, (1, channels, height, width)."""
        if self._canvas is None or self._matrix is None or index not in self._missing:
            return
        self._latents[index] = latents
        self._update()

    def close(self) -> None:
        """Show what was received since the last update."""
        if self._canvas is not None:
            self._update(now=True)

    def _update(self, now: bool = False) -> None:
        started = perf_counter()
        if started < self._next and not now:
            return
        for index, latents in self._latents.items():
            self._canvas.put(index, preview(latents, self._matrix))
        self._latents.clear()
        self._handle.update(self._shown())
        ended = perf_counter()
        self._next = ended + max(PAUSE, (ended - started) / DISPLAY_FRACTION)

    def _shown(self) -> Any:
        from IPython.display import Image as DisplayedImage

        return DisplayedImage(data=self._canvas.png(), format="png")


class Canvas:
    """The page of a sweep as an image in pixels, with empty boxes at first; images are pasted into the boxes.

    It looks like the printed figure. If its labels would be too small to read, the cells follow each other without
    labels instead.

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
                # Rounded down, so that no box reaches into the next.
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


@torch.no_grad()
def latent_to_rgb(pipe: DiffusionPipeline, image: Image.Image) -> Tensor:
    """Fit a linear map from latent pixels to colours that approximates the decoder of the pipeline's VAE.

    The fit is by least squares on an image as the VAE encodes it, averaged down to the size of the latents. Six
    colourings of the image are used, since its own colours alone would say nothing about others.

    Returns:
        A matrix (latent channels + 1, 3), whose last row is the constant; colours are from 0 to 1.
    """
    factor, adapter = pipe.vae_scale_factor, adapter_of(pipe)
    scale = min(1, FITTED / max(image.size))
    width, height = (max(1, round(side * scale / factor)) * factor for side in image.size)
    red, green, blue = image.convert("RGB").resize((width, height)).split()
    rotated = [Image.merge("RGB", bands) for bands in ((red, green, blue), (green, blue, red), (blue, red, green))]

    pixels = adapter.preprocess([*rotated, *map(ImageChops.invert, rotated)])
    latents = adapter.scale(retrieve_latents(adapter.encode(pixels), sample_mode="argmax"))
    colours = interpolate(pixels.float() / 2 + 0.5, latents.shape[-2:], mode="area")
    # The default driver on a CPU needs full rank, which an image of one colour does not give.
    return torch.linalg.lstsq(_with_one(latents), colours.movedim(1, -1).flatten(0, 2).cpu(), driver="gelsd").solution


def preview(latents: Tensor, matrix: Tensor) -> Image.Image:
    """Turn the latents of one cell into a small image, one pixel each, with the matrix of ``latent_to_rgb``."""
    colours = (_with_one(latents[:1]) @ matrix).reshape(*latents.shape[-2:], 3)
    return Image.fromarray((255 * colours.nan_to_num().clamp(0, 1)).round().to(torch.uint8).numpy())


def _with_one(latents: Tensor) -> Tensor:
    """Return one row for each latent pixel: its channels, and a 1."""
    pixels = latents.detach().float().cpu().movedim(1, -1).flatten(0, 2)
    return torch.cat([pixels, torch.ones(len(pixels), 1)], dim=1)
