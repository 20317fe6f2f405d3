"""Pictures as people have them: upright, transparent, deep, damaged, too large, behind a URL."""

import http.server
import io
import threading

import numpy as np
import pytest
from PIL import Image

import decinb
from decinb import images
from decinb.errors import InputError
from decinb.images import SAMPLES, load_image, read_input, read_record, save_image

MAX_ROUNDING = 1  # of 255: a change of mode may round


def photo(width=200, height=120):
    """A picture in which every pixel is different enough to tell where it went."""
    x, y = np.meshgrid(np.arange(width), np.arange(height))
    return Image.fromarray(np.stack([x, y, (x + y) // 2], axis=-1).astype(np.uint8))


@pytest.mark.parametrize("name", SAMPLES)
def test_every_sample_is_there_and_has_its_size(name):
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


def test_size_takes_the_largest_square_in_the_middle(tmp_path):
    made = np.asarray(load_image(photo(256, 128), size=128), dtype=int)
    assert made.shape == (128, 128, 3)
    assert abs(made[0, 0, 0] - 64) <= MAX_ROUNDING and abs(made[0, -1, 0] - 191) <= MAX_ROUNDING


def test_without_size_it_is_cut_to_a_multiple_of_8_and_never_squashed():
    made = load_image(photo(203, 125))
    assert made.size == (200, 120)
    assert made.getpixel((0, 0)) == photo(203, 125).getpixel((1, 2))


def test_a_large_photo_is_scaled_down():
    assert max(load_image(Image.new("RGB", (5000, 2500))).size) == images.MAX_SIDE


def test_transparency_is_laid_on_white():
    clear_red = Image.new("RGBA", (64, 64), (255, 0, 0, 0))
    assert load_image(clear_red).getpixel((5, 5)) == (255, 255, 255)


@pytest.mark.parametrize("mode", ["L", "1", "P", "LA", "CMYK", "RGBA", "YCbCr"])
def test_every_mode_becomes_rgb(mode):
    made = load_image(photo().convert("RGB").convert(mode))
    assert made.mode == "RGB" and made.size == (200, 120)


def test_sixteen_bits_are_scaled_not_cut():
    half = Image.fromarray(np.full((64, 64), 32768, dtype=np.uint16))
    assert abs(load_image(half).getpixel((0, 0))[0] - 127) <= MAX_ROUNDING


def test_a_phone_photo_is_turned_upright(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # lies on its side
    photo().save(tmp_path / "phone.jpg", exif=exif)
    assert load_image(tmp_path / "phone.jpg").size == (120, 200)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("no_such_file.png", "neither a file nor one of the samples: day"),
        (None, "image must be a sample's name, a path, a URL, bytes, an array or a PIL image, got NoneType"),
        (Image.new("RGB", (7, 64)), "at least 64 x 64 pixels, got 7 x 64"),
        ("file:///etc/hostname", "http or https"),
        ("http://127.0.0.1:9/x.png", "inside the own network"),
        ("http://user:word@example.com/x.png", "without a user name"),
    ],
)
def test_what_is_no_picture_is_refused_in_one_line(source, message):
    with pytest.raises(InputError, match=message) as caught:
        load_image(source)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("size", [100, 0, 63, 4096, 128.0, "128"])
def test_a_size_no_model_takes_is_refused(size):
    with pytest.raises(InputError, match="size must be a multiple of 8 from 64 to 2048"):
        load_image("day", size=size)


def test_a_damaged_file_and_a_false_one_are_named(tmp_path):
    whole = io.BytesIO()
    photo().save(whole, "PNG")
    (tmp_path / "cut.png").write_bytes(whole.getvalue()[:300])
    with pytest.raises(InputError, match=r"cut\.png' is damaged"):
        load_image(tmp_path / "cut.png")
    (tmp_path / "page.png").write_text("<html>not found</html>")
    with pytest.raises(InputError, match=r"page\.png' is not a PNG, JPEG, WEBP picture"):
        load_image(tmp_path / "page.png")


def test_a_bomb_is_refused_from_its_header(tmp_path):
    Image.new("1", (12000, 12000)).save(tmp_path / "bomb.png")
    with pytest.raises(InputError, match="12000 x 12000 pixels"):
        load_image(tmp_path / "bomb.png")


class Server(http.server.BaseHTTPRequestHandler):
    """A small picture server with bad habits."""

    def do_GET(self):
        body = io.BytesIO()
        photo().save(body, "PNG")
        if self.path == "/turn":
            self.send_response(302)
            self.send_header("location", "/photo.png")
            self.end_headers()
            return
        if self.path == "/round":
            self.send_response(302)
            self.send_header("location", "/round")
            self.end_headers()
            return
        self.send_response(404 if self.path == "/missing" else 200)
        self.end_headers()
        if self.path == "/endless":
            try:
                while True:
                    self.wfile.write(b"0" * 65536)
            except OSError:
                return
        self.wfile.write(b"<html></html>" if self.path == "/page" else body.getvalue())

    def log_message(self, *args):
        pass


@pytest.fixture(scope="module")
def server():
    serving = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Server)
    threading.Thread(target=serving.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{serving.server_port}"
    serving.shutdown()


def test_a_url_is_fetched_and_followed(server):
    assert load_image(f"{server}/photo.png", allow_private=True).size == (200, 120)
    assert load_image(f"{server}/turn", allow_private=True).size == (200, 120)


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("missing", "answered with status 404"),
        ("page", "is not a PNG"),
        ("endless", "more than 20 MB"),
        ("round", "redirected more than 3 times"),
    ],
)
def test_a_server_that_misbehaves_is_named(server, path, message):
    with pytest.raises(InputError, match=message):
        load_image(f"{server}/{path}", allow_private=True)


def test_a_png_brings_its_record_back(tmp_path):
    record = {"prompt": "ein Häuschen 漢字 🙂\n", "strength": 0.75, "negative_prompt": None}
    save_image(photo(), tmp_path / "made.png", record)
    assert read_record(tmp_path / "made.png") == record
    assert [file.name for file in tmp_path.iterdir()] == ["made.png"]
    photo().save(tmp_path / "other.png")
    with pytest.raises(InputError, match="not a whole PNG with a record"):
        decinb.read_record(tmp_path / "other.png")


def test_a_png_holds_the_picture_it_was_made_from_to_the_last_bit(tmp_path):
    noisy = Image.fromarray(np.random.default_rng(0).integers(0, 256, (72, 64, 3), dtype=np.uint8))
    save_image(photo(), tmp_path / "made.png", {}, noisy)
    assert read_input(tmp_path / "made.png").tobytes() == noisy.tobytes()
    save_image(photo(), tmp_path / "alone.png", {})
    with pytest.raises(InputError, match="does not hold the picture"):
        read_input(tmp_path / "alone.png")


def test_a_png_that_was_cut_short_is_not_taken_for_a_good_one(tmp_path):
    save_image(photo(), tmp_path / "made.png", {"key": "0"}, photo())
    whole = (tmp_path / "made.png").read_bytes()
    for length in (0, 20, len(whole) // 3, len(whole) // 2, len(whole) - 30):
        (tmp_path / "cut.png").write_bytes(whole[:length])
        with pytest.raises(InputError, match="not a whole PNG"):
            read_record(tmp_path / "cut.png")
