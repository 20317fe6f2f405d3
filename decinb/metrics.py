"""Numbers for pictures: how far one went from another, and how much of what a prompt names is in it."""

import math
from collections.abc import Sequence

import numpy as np
from PIL import Image

from decinb.errors import InputError


def mean_abs_difference(image: Image.Image, original: Image.Image) -> float:
    """The mean absolute difference of two pictures of the same size, from 0 (equal) to 1 (black against white)."""
    first, second = _pair(image, original)
    return float(np.abs(first - second).mean())


def clipped_fraction(images: Image.Image | Sequence[Image.Image]) -> float:
    """The share of pixels, 0 to 1, in which a channel is within 2 of black or white; over all images given."""
    images = [images] if isinstance(images, Image.Image) else images
    pixels = np.concatenate([np.asarray(image.convert("RGB")).reshape(-1, 3) for image in images])
    return float(((pixels <= 2) | (pixels >= 253)).any(axis=1).mean())


def oversaturated(images: Image.Image | Sequence[Image.Image]) -> float:
    """The share of pixels, 0 to 1, purer in colour than 95% (HSV saturation), very dark ones aside; over all images."""
    images = [images] if isinstance(images, Image.Image) else images
    pixels = np.concatenate([np.asarray(image.convert("RGB"), dtype=int).reshape(-1, 3) for image in images])
    most, least = pixels.max(axis=1), pixels.min(axis=1)
    return float(((most >= 32) & (most - least > 0.95 * most)).mean())  # below 32 of 255, purity is rounding


def psnr(image: Image.Image, original: Image.Image) -> float:
    """The peak signal-to-noise ratio of two pictures of the same size, in dB; infinite if they are equal."""
    first, second = _pair(image, original)
    squared = float(np.square(first - second).mean())
    return -10 * math.log10(squared) if squared else math.inf


def ssim(image: Image.Image, original: Image.Image) -> float:
    """The structural similarity of two pictures of the same size, at most 1 (equal); each side at least 11 pixels.

    Source: Wang et al., "Image Quality Assessment: From Error Visibility to Structural Similarity" (2004), with its
    window (a Gaussian of deviation 1.5 over 11 x 11 pixels) and constants, averaged over the three colours.
    """
    first, second = _pair(image, original)
    window = np.exp(-0.5 * (np.arange(-5, 6) / 1.5) ** 2)
    window /= window.sum()

    def local(values: np.ndarray) -> np.ndarray:
        for axis in (0, 1):
            values = np.lib.stride_tricks.sliding_window_view(values, len(window), axis=axis) @ window
        return values

    mean1, mean2 = local(first), local(second)
    variances = local(first**2) - mean1**2 + local(second**2) - mean2**2
    covariance = local(first * second) - mean1 * mean2
    c1, c2 = 0.01**2, 0.03**2
    similar = (2 * mean1 * mean2 + c1) * (2 * covariance + c2) / ((mean1**2 + mean2**2 + c1) * (variances + c2))
    return float(similar.mean())


def _pair(image: Image.Image, original: Image.Image) -> tuple[np.ndarray, np.ndarray]:
    if image.size != original.size:
        raise InputError(f"the pictures must be of one size, got {image.size} and {original.size}")
    first, second = (np.asarray(picture.convert("RGB"), dtype=np.float64) / 255 for picture in (image, original))
    return first, second
