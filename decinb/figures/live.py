"""What is to be seen while a sweep runs: a bar that counts the U-Net's rows, and in a notebook a grid that fills."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from functools import lru_cache
from time import perf_counter
from types import TracebackType
from typing import Any

import torch
from diffusers import DiffusionPipeline
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion_img2img import retrieve_latents
from PIL import Image, ImageChops, ImageDraw, ImageFont
from torch import Tensor
from torch.nn.functional import interpolate
from tqdm.auto import tqdm

from decinb.figures.layout import Record, lay_out, titles
from decinb.sampling.adapters import adapter_of
from decinb.utils.environment import in_notebook
from decinb.utils.labels import wrap

PAUSE = 0.5  # seconds at least between two states of the grid
SHARE = 0.05  # of the time at most goes into showing it

SIDE = 960  # pixels of the grid at most, both ways
LARGEST = 224  # pixels of one picture's width at most
READABLE = 80  # pixels of width below which no title is written
GAP, LETTERS, LINE, LINES = 4, 11, 14, 2
PAPER, EMPTY, EDGE, INK = "#ffffff", "#f6f6f6", "#cccccc", "#222222"

FITTED = 128  # pixels of the longer side of the picture that the preview's colours are fitted on


class Bar:
    """A bar in rows of the U-Net, the one thing that takes time, with an estimate of the time left.

    A widget in a notebook, text in a terminal, nothing at all if it is not wanted. To be used in a ``with`` block.
    """

    def __init__(self, total_rows: int, show: bool = True):
        # Little smoothing: the rate of the last moments says less than that of all rows so far.
        self._bar = tqdm(total=total_rows, desc="sweep", unit="row", disable=not show, leave=False, smoothing=0.1)

    def update(self, rows: int) -> None:
        """So many more rows are done."""
        self._bar.update(rows)

    def close(self) -> None:
        """Take the bar away."""
        self._bar.close()

    def __enter__(self) -> Bar:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class LiveGrid:
    """In a notebook, a grid of all cells that fills while they are made. Anywhere else it does nothing.

    The grid is one picture that is replaced at most twice a second, and less often where that would take time from the
    sweep. Cells under way are shown as their latents, turned into colours without the VAE.

    Args:
        pipe: the pipeline that makes the images.
        image: the input, for the colours of the previews; without one there are none.
        records: the arguments of every cell, in the order of their numbers.
    """

    def __init__(self, pipe: DiffusionPipeline, image: Image.Image | None, records: Sequence[Record]):
        self._montage: Montage | None = None
        if not in_notebook():
            return
        from IPython.display import display

        self._montage = Montage(records, image.size if image else records[0]["image_size"])
        self._matrix = None if image is None or not adapter_of(pipe).exposes_latents else latent_to_rgb(pipe, image)
        self._latents: dict[int, Tensor] = {}  # that came since the grid was shown last
        self._missing = set(range(len(records)))
        self._handle = display(self._picture(), display_id=True)
        self._next = perf_counter() + PAUSE

    def show(self, index: int, image: Image.Image) -> None:
        """Cell ``index`` is finished."""
        if self._montage is None:
            return
        self._latents.pop(index, None)
        self._missing.discard(index)
        self._montage.put(index, image)
        self._refresh(now=not self._missing)

    def preview(self, index: int, latents: Tensor) -> None:
        """Cell ``index`` has come so far."""
        if self._montage is None or self._matrix is None or index not in self._missing:
            return
        self._latents[index] = latents
        self._refresh()

    def close(self) -> None:
        """Show what has come since the grid was shown last, if anything."""
        if self._montage is not None:
            self._refresh(now=True)

    def _refresh(self, now: bool = False) -> None:
        started = perf_counter()
        if started < self._next and not now:
            return
        for index, latents in self._latents.items():
            self._montage.put(index, preview(latents, self._matrix))
        self._latents.clear()
        self._handle.update(self._picture())
        ended = perf_counter()
        self._next = ended + max(PAUSE, (ended - started) / SHARE)

    def _picture(self) -> Any:
        from IPython.display import Image as Shown

        return Shown(data=self._montage.png(), format="png")


class Montage:
    """A picture of all cells in rows and columns, each under what tells it from the others; empty at first.

    Args:
        records: the arguments of every cell.
        size: width and height of the images to come.
    """

    def __init__(self, records: Sequence[Record], size: tuple[int, int]):
        layout = lay_out(records)
        aspect = size[1] / size[0]
        square = math.ceil(math.sqrt(len(records) * aspect))
        table = len(layout.rows), len(layout.columns)
        bunch = math.ceil(len(records) / square), square
        places = {index: place for place, index in layout.places.items()}
        self._title_height = LINES * LINE
        width = self._fitting_width(*table, aspect, size[0])
        told = [[""] for _ in records]
        if width < READABLE:
            self._title_height = 0
            width = self._fitting_width(*table, aspect, size[0])
            if (wider := self._fitting_width(*bunch, aspect, size[0])) > width:
                width, table = wider, bunch
                places = {index: divmod(index, square) for index in range(len(records))}
        else:
            told = [wrap(title, lambda line: _font().getlength(line) <= width, LINES) for title in titles(records)]
            self._title_height = LINE * max(map(len, told))
        self._size = width, max(1, int(width * aspect))
        self._corners = {index: self._corner(*place) for index, place in places.items()}
        right, bottom = self._corner(*table)
        self.image = Image.new("RGB", (right, bottom - self._title_height), PAPER)
        pen = ImageDraw.Draw(self.image)
        for index, (x, y) in self._corners.items():
            pen.rectangle((x, y, x + self._size[0] - 1, y + self._size[1] - 1), EMPTY, EDGE)
            for number, line in enumerate(reversed(told[index])):
                pen.text((x + width / 2, y - 4 - number * LINE), line, INK, _font(), anchor="ms")

    def put(self, index: int, image: Image.Image) -> None:
        """Put a picture of any size into a cell's place."""
        if index in self._corners:  # of cells that are the same in all, only the first has one
            self.image.paste(image.convert("RGB").resize(self._size), self._corners[index])

    def png(self) -> bytes:
        """The picture as a file."""
        file = io.BytesIO()
        self.image.save(file, "PNG", compress_level=1)  # several times faster than the usual, and not much larger
        return file.getvalue()

    def _fitting_width(self, rows: int, columns: int, aspect: float, most: int) -> int:
        across = (SIDE - GAP) / columns - GAP
        down = ((SIDE - GAP) / rows - GAP - self._title_height) / aspect
        return max(4, int(min(most, LARGEST, across, down)))

    def _corner(self, row: int, column: int) -> tuple[int, int]:
        width, height = self._size
        return GAP + column * (width + GAP), GAP + self._title_height + row * (height + self._title_height + GAP)


@lru_cache(1)
def _font() -> ImageFont.FreeTypeFont:
    """Pillow's own letters are Latin only; those of matplotlib are always there too, and know more."""
    from matplotlib import font_manager

    return ImageFont.truetype(font_manager.findfont("DejaVu Sans"), LETTERS)


@torch.no_grad()
def latent_to_rgb(pipe: DiffusionPipeline, image: Image.Image) -> Tensor:
    """From a latent pixel and a 1 to red, green and blue: the matrix that comes nearest to the pipeline's own VAE.

    It is fitted by least squares on the picture as the VAE encodes it, averaged down to the size of the latents. The
    picture is taken in six colourings, since its own colours alone would say nothing about others.

    Returns:
        A tensor of a row for each latent channel and one more, and three columns: colours from 0 to 1.
    """
    factor, adapter = pipe.vae_scale_factor, adapter_of(pipe)
    shrink = min(1, FITTED / max(image.size))
    width, height = (max(1, round(side * shrink / factor)) * factor for side in image.size)
    red, green, blue = image.convert("RGB").resize((width, height)).split()
    turned = [Image.merge("RGB", bands) for bands in ((red, green, blue), (green, blue, red), (blue, red, green))]
    coloured = [*turned, *map(ImageChops.invert, turned)]

    pixels = adapter.preprocess(coloured)
    latents = adapter.scale(retrieve_latents(adapter.encode(pixels), sample_mode="argmax"))
    colours = interpolate(pixels.float() / 2 + 0.5, latents.shape[-2:], mode="area")
    # The CPU's default cannot solve it where the picture is of one colour; this one can.
    return torch.linalg.lstsq(_with_one(latents), colours.movedim(1, -1).flatten(0, 2).cpu(), driver="gelsd").solution


def preview(latents: Tensor, matrix: Tensor) -> Image.Image:
    """A small picture of one cell's latents, a pixel for each of theirs, through the matrix of ``latent_to_rgb``."""
    colours = (_with_one(latents[:1]) @ matrix).reshape(*latents.shape[-2:], 3)
    return Image.fromarray((255 * colours.nan_to_num().clamp(0, 1)).round().to(torch.uint8).numpy())


def _with_one(latents: Tensor) -> Tensor:
    """A row for each latent pixel: its channels, and a 1."""
    pixels = latents.detach().float().cpu().movedim(1, -1).flatten(0, 2)
    return torch.cat([pixels, torch.ones(len(pixels), 1)], dim=1)
