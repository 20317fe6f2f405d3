"""Show latents as images: in a moment with a linear map from latents to colours, or exactly with the VAE."""

from time import perf_counter
from weakref import WeakKeyDictionary

import torch
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion_img2img import retrieve_latents
from PIL import Image, ImageChops
from torch import Tensor, nn
from torch.nn.functional import interpolate

from decinb.images import load_image
from decinb.sampling.batched import BatchedAdapter

SLOW = 0.3  # seconds of decoding beyond which previews are small: nobody wants to wait for them
TRIES = 3  # images that are decoded whatever they take, since the first may be slow

FITTED = 128  # pixels of the longer side of the image on which the colours of previews are fitted

_matrices: WeakKeyDictionary[nn.Module, Tensor] = WeakKeyDictionary()  # of the VAEs that were prepared


class Preview:
    """Turns the latents of a pipeline into images.

    Args:
        adapter: of the pipeline; it must expose its latents.
        image: on which the colours of small previews are fitted; None takes a sample.
    """

    def __init__(self, adapter: BatchedAdapter, image: Image.Image | None):
        self._adapter, self._image = adapter, image
        self._matrix = _matrices.get(adapter.pipe.vae)
        self._small_next = self._matrix is not None  # the first image is small where that takes no time
        self._seconds: list[float] = []  # that decoding took

    def prepare(self) -> None:
        """Fit the colours of small images now, so that the first preview of every later run takes a millisecond.

        They are not fitted again if the weights of the VAE change; small previews may then have wrong colours.
        """
        if self._adapter.pipe.vae not in _matrices:
            _matrices[self._adapter.pipe.vae] = self._fit()

    def __call__(self, latents: Tensor) -> Image.Image:
        """Return the decoded image if that is fast, else the small one. Latents: (1, channels, height, width).

        If ``prepare`` was called for this VAE, the first image is the small one, so that something is seen at once.
        """
        if self._small_next:
            self._small_next = False
            return self.small(latents)
        if len(self._seconds) < TRIES or min(self._seconds) < SLOW:
            started = perf_counter()
            image = self.decode(latents)
            self._seconds.append(perf_counter() - started)
            if image is not None:
                return image
        return self.small(latents)

    def small(self, latents: Tensor) -> Image.Image:
        """Return an image of one pixel per latent."""
        if self._matrix is None:
            self._matrix = self._fit()
        return preview(latents, self._matrix)

    def decode(self, latents: Tensor) -> Image.Image | None:
        """Return the image that the VAE makes of latents; None if it is not finite."""
        return self._adapter.decode_latents(latents)[0][0]

    def _fit(self) -> Tensor:
        return latent_to_rgb(self._adapter, load_image("day") if self._image is None else self._image)


@torch.no_grad()
def latent_to_rgb(adapter: BatchedAdapter, image: Image.Image) -> Tensor:
    """Fit a linear map from latent pixels to colours that approximates the decoder of the pipeline's VAE.

    The fit is by least squares on an image as the VAE encodes it, averaged down to the size of the latents. Six
    colourings of the image are used, since its own colours alone would say nothing about others.

    Returns:
        A matrix (latent channels + 1, 3), whose last row is the constant; colours are from 0 to 1.
    """
    factor = adapter.pipe.vae_scale_factor
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
