"""Tests of the metrics on images with known values."""

import numpy as np
import pytest
from PIL import Image

import decinb
from decinb.errors import InputError
from decinb.metrics import clipped_fraction, detail, mean_abs_difference, oversaturated, psnr, ssim
from decinb.scenes import Scene, render


def plain(grey: int, size: tuple[int, int] = (16, 16)) -> Image.Image:
    return Image.new("RGB", size, (grey, grey, grey))


def test_mean_abs_difference_of_grey_images():
    assert mean_abs_difference(plain(0), plain(255)) == 1
    assert mean_abs_difference(plain(7), plain(7)) == 0
    assert mean_abs_difference(plain(51), plain(102)) == pytest.approx(0.2)


def test_psnr_of_a_known_difference():
    assert psnr(plain(0), plain(255)) == 0
    assert psnr(plain(100), plain(100 + 51)) == pytest.approx(20 * np.log10(5))
    assert psnr(plain(9), plain(9)) == float("inf")


def test_ssim_depends_on_structure_more_than_on_brightness():
    image = render(Scene(house="red", trees="pine", mountains=True, layout=9))
    values = np.asarray(image).astype(float)
    # Two changes with the same mean square: more brightness, and noise.
    brighter = Image.fromarray((values + 12).clip(0, 255).astype(np.uint8))
    noise = np.random.default_rng(0).choice([-12, 12], values.shape)
    noisy = Image.fromarray((values + noise).clip(0, 255).astype(np.uint8))
    assert ssim(image, image) == pytest.approx(1)
    assert ssim(noisy, image) < 0.7 < 0.95 < ssim(brighter, image) < 1
    # Without structure only the means matter: (2 m n + c) / (m^2 + n^2 + c), with c = 0.01^2.
    assert ssim(plain(51), plain(102)) == pytest.approx((2 * 0.2 * 0.4 + 1e-4) / (0.2**2 + 0.4**2 + 1e-4))


@pytest.mark.parametrize("measure", [mean_abs_difference, psnr, ssim])
def test_images_of_different_sizes_are_refused(measure):
    with pytest.raises(InputError, match=r"\(16, 16\) and \(24, 16\)"):
        measure(plain(0), plain(0, size=(24, 16)))


def test_detail_is_the_difference_of_neighbours():
    stripes = np.zeros((8, 8, 3), np.uint8)
    stripes[:, ::2] = 255
    assert detail(Image.fromarray(stripes)) == 1.0
    assert detail(Image.new("RGB", (8, 8), "red")) == 0.0
    assert detail(Image.fromarray(stripes).resize((4, 4), Image.Resampling.BOX)) == 0.0  # blurred away


def test_clipped_fraction_counts_pixels_with_a_channel_at_a_limit():
    half = Image.fromarray(np.repeat([[[255, 90, 90]], [[90, 90, 90]]], 4, axis=1).astype(np.uint8))
    assert clipped_fraction(half) == 0.5
    assert clipped_fraction([half, Image.new("RGB", half.size, (9, 9, 9))]) == 0.25


def test_oversaturated_counts_pure_colours_but_no_dark_ones():
    red, nearly, grey, dark = (255, 0, 0), (200, 9, 60), (90, 90, 90), (0, 0, 31)
    row = np.array([[red, nearly, grey, dark]], dtype=np.uint8)
    assert oversaturated(Image.fromarray(row)) == 0.5
    assert oversaturated([Image.fromarray(row[:, :2]), Image.fromarray(row[:, 2:])]) == 0.5
    assert oversaturated([render(Scene(time=time, house="red")) for time in ("day", "sunset", "night")]) == 0.0


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda image: decinb.mean_abs_difference(image, 5), "original must be a PIL image, got 5"),
        (lambda image: decinb.mean_abs_difference([image], image), "image must be a PIL image, got"),
        (lambda image: clipped_fraction([image, "day"]), r"images\[1\] must be a PIL image, got 'day'"),
        (lambda image: oversaturated(7), "images must be a list of values, got 7"),
        (lambda image: clipped_fraction([]), "images is empty"),
        (lambda image: decinb.adherence([image, 5], "a red house"), r"images\[1\] must be a PIL image, got 5"),
        (lambda image: decinb.image_size(image), "pipe must be a pipeline, as load_pipeline returns it"),
    ],
)
def test_what_is_no_image_and_no_pipeline_is_refused_by_name(call, message):
    with pytest.raises(decinb.InputError, match=message):
        call(Image.new("RGB", (16, 16)))
