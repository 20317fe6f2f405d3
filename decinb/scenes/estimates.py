"""Measurements with 95% confidence intervals."""

from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from decinb.metrics import mean_abs_difference
from decinb.scenes.judge import frechet_distance

Z = 1.96


class Estimate(dict[str, float]):
    """A measured value as {"value", "low", "high"}: the ends are those of its 95% confidence interval.

    In a text it is formatted as one number, with its interval: ``f"{estimate:.0%}"`` is "83% (75% to 89%)".
    """

    def __format__(self, form: str) -> str:
        value, low, high = (format(self[name], form or ".2f") for name in ("value", "low", "high"))
        return f"{value} ({low} to {high})"

    def __str__(self) -> str:
        return format(self)


def mean(values: Sequence[float]) -> Estimate:
    """Return the mean of some values."""
    numbers = np.asarray(values, dtype=float)
    error = Z * numbers.std(ddof=1) / np.sqrt(len(numbers)) if len(numbers) > 1 else 0.0
    return _estimate(numbers.mean(), numbers.mean() - error, numbers.mean() + error)


def mean_fraction(values: Sequence[float]) -> Estimate:
    """Return the mean of values from 0 to 1; its interval ends there too."""
    found = mean(values)
    return _estimate(found["value"], max(0.0, found["low"]), min(1.0, found["high"]))


def fraction(answers: Sequence[bool]) -> Estimate:
    """Return how many answers are true, from 0 to 1. The interval is Wilson's, which holds near 0 and 1."""
    count, share = len(answers), float(np.mean(answers))
    middle = (share + Z**2 / (2 * count)) / (1 + Z**2 / count)
    error = Z / (1 + Z**2 / count) * np.sqrt(share * (1 - share) / count + Z**2 / (4 * count**2))
    return _estimate(share, min(share, middle - error), max(share, middle + error))


def change(images: Sequence[Image.Image], originals: Sequence[Image.Image]) -> Estimate:
    """Return the mean difference of images from what each was made of, 0 to 1."""
    return mean([mean_abs_difference(*pair) for pair in zip(images, originals, strict=True)])


def spread(images: Sequence[Image.Image]) -> Estimate:
    """Return the mean difference of any two of some images, 0 to 1, with an interval by leaving out each in turn.

    Args:
        images: of the same size, at least three for an interval.
    """
    differences = np.array([[mean_abs_difference(one, other) for other in images] for one in images])
    count = len(images)
    value = differences.sum() / (count * (count - 1))
    if count < 3:
        return _estimate(value, value, value)
    others = (differences.sum() - 2 * differences.sum(axis=0)) / ((count - 1) * (count - 2))
    error = Z * np.sqrt((count - 1) * np.mean((others - others.mean()) ** 2))
    return _estimate(value, max(0.0, value - error), value + error)


def frechet(features: Tensor, reference: Tensor, blocks: int = 10) -> Estimate:
    """Return the Fréchet distance of features to a reference, with an interval by leaving out each block in turn.

    Args:
        features, reference: (images, features), at least two images for each block.
        blocks: number of blocks of the jackknife.
    """
    value = frechet_distance(features, reference)
    parts = torch.arange(len(features)).chunk(blocks)
    if min(map(len, parts)) < 2:
        return _estimate(value, value, value)
    left = [torch.cat([part for j, part in enumerate(parts) if j != i]) for i in range(len(parts))]
    others = np.array([frechet_distance(features[rows], reference) for rows in left])
    error = Z * np.sqrt((len(others) - 1) * np.mean((others - others.mean()) ** 2))
    return _estimate(value, max(0.0, value - error), value + error)


def _estimate(value: float, low: float, high: float) -> Estimate:
    return Estimate(value=float(value), low=float(low), high=float(high))
