"""Samples, files, sizes, and PNGs with a record inside. Bad images are in test_bad_inputs.py."""

import numpy as np
import pytest
from PIL import Image

import decinb
from decinb import images
from decinb.errors import InputError
from decinb.images import SAMPLES, load_image, read_input, read_record, save_image

MAX_ROUNDING = 1  # of 255: a change of mode may round


def photo(width=200, height=120):
    """Return an image in which each pixel tells its position."""
    x, y = np.meshgrid(np.arange(width), np.arange(height))
    return Image.fromarray(np.stack([x, y, (x + y) // 2], axis=-1).astype(np.uint8))


@pytest.mark.parametrize("name", SAMPLES)
def test_every_sample_has_its_size(name):
    image = load_image(name)
    assert image.mode == "RGB" and image.size == (SAMPLES[name][1],) * 2
    assert len(image.getcolors(10**6)) > 20


def test_a_sample_is_drawn_at_any_size():
    assert load_image("day", size=256).size == (256, 256)
    assert load_image("valley").size == (512, 512)


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp"])
def test_a_file_is_read_by_str_and_by_path(tmp_path, suffix):
    file = tmp_path / f"photo.{suffix}"
    photo().save(file)
    for source in (str(file), file):
        assert load_image(source).size == (200, 120)


def test_size_crops_the_largest_square_in_the_middle(tmp_path):
    made = np.asarray(load_image(photo(256, 128), size=128), dtype=int)
    assert made.shape == (128, 128, 3)
    assert abs(made[0, 0, 0] - 64) <= MAX_ROUNDING and abs(made[0, -1, 0] - 191) <= MAX_ROUNDING


def test_without_size_an_image_is_cropped_to_a_multiple_of_8():
    made = load_image(photo(203, 125))
    assert made.size == (200, 120)
    assert made.getpixel((0, 0)) == photo(203, 125).getpixel((1, 2))


def test_a_large_photo_is_scaled_down():
    assert max(load_image(Image.new("RGB", (5000, 2500))).size) == images.MAX_SIDE


@pytest.mark.parametrize("size", [100, 0, 63, 4096, 128.5, True, "128"])
def test_other_sizes_are_refused(size):
    with pytest.raises(InputError, match="size must be a multiple of 8 from 64 to 2048"):
        load_image("day", size=size)


def test_a_png_contains_its_record(tmp_path):
    record = {"prompt": "ein Häuschen 漢字 🙂\n", "strength": 0.75, "negative_prompt": None}
    save_image(photo(), tmp_path / "made.png", record)
    assert read_record(tmp_path / "made.png") == record
    assert [file.name for file in tmp_path.iterdir()] == ["made.png"]
    photo().save(tmp_path / "other.png")
    with pytest.raises(InputError, match="not a PNG that decinb saved"):
        decinb.read_record(tmp_path / "other.png")


def test_a_png_contains_its_input_without_loss(tmp_path):
    noisy = Image.fromarray(np.random.default_rng(0).integers(0, 256, (72, 64, 3), dtype=np.uint8))
    save_image(photo(), tmp_path / "made.png", {}, noisy)
    assert read_input(tmp_path / "made.png").tobytes() == noisy.tobytes()
    save_image(photo(), tmp_path / "alone.png", {})
    with pytest.raises(InputError, match="does not contain the image"):
        read_input(tmp_path / "alone.png")


def test_a_truncated_png_is_refused(tmp_path):
    save_image(photo(), tmp_path / "made.png", {"key": "0"}, photo())
    whole = (tmp_path / "made.png").read_bytes()
    for length in (0, 20, len(whole) // 3, len(whole) // 2, len(whole) - 30):
        (tmp_path / "cut.png").write_bytes(whole[:length])
        with pytest.raises(InputError, match="not a PNG that decinb saved, or is damaged"):
            read_record(tmp_path / "cut.png")
