"""Measure images: how far one is from another, how saturated its colours are, and how much detail it has."""

import math
from collections.abc import Sequence

import numpy as np
from PIL import Image

from decinb.errors import InputError
from decinb.utils import validation


def mean_abs_difference(image: Image.Image, original: Image.Image) -> float:
    """Return the mean absolute difference of two images of the same size, from 0 (equal) to 1 (black and white).

    Raises:
        InputError: one is not an image, or the images differ in size.
    """
    first, second = _pair(image, original)
    return float(np.abs(first - second).mean())


def clipped_fraction(images: Image.Image | Sequence[Image.Image]) -> float:
    """Return the fraction of pixels, 0 to 1, with a channel within 2 of 0 or 255, over all images given."""
    pixels = _pixels(images)
    return float(((pixels <= 2) | (pixels >= 253)).any(axis=1).mean())


def oversaturated(images: Image.Image | Sequence[Image.Image]) -> float:
    """Return the fraction of pixels, 0 to 1, with an HSV saturation above 95%, over all images given.

    Pixels whose channels are all below 32 of 255 do not count, since their saturation is mostly rounding.
    """
    pixels = _pixels(images).astype(int)
    most, least = pixels.max(axis=1), pixels.min(axis=1)
    return float(((most >= 32) & (most - least > 0.95 * most)).mean())


def detail(image: Image.Image) -> float:
    """Return the mean absolute difference of neighbouring pixels, in both directions together, from 0 to 2."""
    pixels = np.asarray(image.convert("RGB"), dtype=float) / 255
    return float(np.abs(np.diff(pixels, axis=0)).mean() + np.abs(np.diff(pixels, axis=1)).mean())


def psnr(image: Image.Image, original: Image.Image) -> float:
    """Return the peak signal-to-noise ratio of two images of the same size, in dB; infinity if they are equal.

    Raises:
        InputError: one is not an image, or the images differ in size.
    """
    first, second = _pair(image, original)
    mean_square = float(np.square(first - second).mean())
    return -10 * math.log10(mean_square) if mean_square else math.inf


def ssim(image: Image.Image, original: Image.Image) -> float:
    """Return the structural similarity of two images of the same size, at most 1 (equal); sides of 11 pixels or more.

    Raises:
        InputError: one is not an image, or the images differ in size.

    Source: Wang et al., "Image Quality Assessment: From Error Visibility to Structural Similarity" (2004), with its
    window (a Gaussian with a standard deviation of 1.5 over 11 x 11 pixels) and constants, averaged over the channels.
    """
    first, second = _pair(image, original)
    window = np.exp(-0.5 * (np.arange(-5, 6) / 1.5) ** 2)
    window /= window.sum()

    def local_mean(values: np.ndarray) -> np.ndarray:
        for axis in (0, 1):
            values = np.lib.stride_tricks.sliding_window_view(values, len(window), axis=axis) @ window
        return values

    mean1, mean2 = local_mean(first), local_mean(second)
    variances = local_mean(first**2) - mean1**2 + local_mean(second**2) - mean2**2
    covariance = local_mean(first * second) - mean1 * mean2
    c1, c2 = 0.01**2, 0.03**2
    similarity = (2 * mean1 * mean2 + c1) * (2 * covariance + c2) / ((mean1**2 + mean2**2 + c1) * (variances + c2))
    return float(similarity.mean())


def _pair(image: Image.Image, original: Image.Image) -> tuple[np.ndarray, np.ndarray]:
    """Return two images as arrays (height, width, 3) in [0, 1]."""
    validation.pil_image(image, "image")
    validation.pil_image(original, "original")
    if image.size != original.size:
        raise InputError(f"the images must have the same size, got {image.size} and {original.size}")
    first, second = (np.asarray(one.convert("RGB"), dtype=np.float64) / 255 for one in (image, original))
    return first, second


def _pixels(images: Image.Image | Sequence[Image.Image]) -> np.ndarray:
    """Return the pixels of all images as bytes, (pixels, 3)."""
    shown = validation.pil_images(images, "images")
    if not len(shown):
        raise InputError("images is empty: there is nothing to measure")
    return np.concatenate([np.asarray(image.convert("RGB")).reshape(-1, 3) for image in shown])
