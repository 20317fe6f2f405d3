"""Samples, files, sizes, and PNGs with a record inside. Bad images are in test_bad_inputs.py."""

import os

import numpy as np
import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo

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
    assert load_image(np.zeros((200, 300, 3), np.uint8), size=128.0).size == (128, 128)
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
    with pytest.raises(InputError, match="size must be a multiple of 8 from 8 to 2048"):
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


def text_chunk(record: str) -> PngInfo:
    info = PngInfo()
    info.add_itxt(images.RECORD, record)
    return info


def test_files_that_are_not_our_pngs_are_refused(tmp_path):
    Image.new("1", (13_000, 13_000)).save(tmp_path / "giant.png", pnginfo=text_chunk("{}"))
    Image.new("RGB", (64, 64)).save(tmp_path / "deep.png", pnginfo=text_chunk("[" * 100_000))
    Image.new("RGB", (64, 64)).save(tmp_path / "list.png", pnginfo=text_chunk("[]"))
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "zeros.png").symlink_to("/dev/zero")
    with (tmp_path / "sparse.png").open("wb") as file:
        file.truncate(2**40)
    for name, message in [
        ("giant", "too many pixels"),
        ("deep", "the record has too many parts"),
        ("list", "the record is not a dict"),
        ("pipe", "not an ordinary file"),
        ("zeros", "not an ordinary file"),
        ("sparse", "at most 64,000,000 are allowed"),
        ("missing", "No such file"),
    ]:
        with pytest.raises(InputError, match=f"{name}.png' is not a PNG that decinb saved, .*{message}") as caught:
            read_record(tmp_path / f"{name}.png")
        assert "\n" not in str(caught.value)
    for name in ("pipe", "zeros", "sparse"):
        with pytest.raises(InputError, match=f"{name}.png'"):
            load_image(tmp_path / f"{name}.png")


@pytest.mark.parametrize("path", [None, 3, "", "a\0b", "\ud800"])
def test_what_is_no_path_is_refused(path):
    with pytest.raises(InputError, match="path must be a path, got"):
        read_record(path)
    with pytest.raises(InputError, match="at most 255 bytes, got 300"):
        read_record("x" * 300)


def test_a_file_name_that_is_not_utf8(tmp_path):
    name = os.fsencode(tmp_path) + b"/caf\xe9.png"
    with open(name, "wb") as file:
        photo().save(file, "PNG")
    assert load_image(os.fsdecode(name)).size == (200, 120)
    with pytest.raises(InputError) as caught:
        read_record(os.fsdecode(name))
    str(caught.value).encode()
