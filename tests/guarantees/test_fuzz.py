"""Inputs that nobody thought of: whatever comes in, an InputError or a result that holds comes out.

Each run tries the same hundred of each; ``make fuzz`` tries others, and many more.
"""

import io
import resource
import struct
import time
import warnings
import zlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays, scalar_dtypes
from PIL import Image

from decinb import InputError, load_image, plan
from decinb.images import read_record, save_image
from decinb.utils import validation
from decinb.utils.validation import MAX_SIDE, MIN_SIDE, MULTIPLE
from tests.helpers.fuzz import fuzz

MAX_SECONDS = 5  # for one input; most take a millisecond
MAX_GROWTH = 1_000_000  # kB, whatever a header says

PICTURE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (72, 80, 3), dtype=np.uint8))


def outcome(function, *values, **more):
    """What comes of a call, or its InputError, of one line; any other exception fails the test."""
    started = time.monotonic()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return function(*values, **more)
        except InputError as error:
            assert "\n" not in str(error) and len(str(error)) < 1000
            return error
        finally:
            assert time.monotonic() - started < MAX_SECONDS


# --- parameters -------------------------------------------------------------------------------------------------------

text = st.text(st.characters(), max_size=30) | st.sampled_from(["house " * 60, "\ud800", "x" * 5000, "a\0b", "\n"])
numbers = (
    st.integers()
    | st.floats()
    | st.fractions()
    | st.decimals()
    | st.complex_numbers()
    | st.floats(0, 1)
    | st.integers(0, 40)
    | st.sampled_from([10**400, np.int64(7), np.float16("inf"), np.bool_(True), True, 2**63])
)
plain = st.none() | st.booleans() | numbers | text | st.binary(max_size=20) | st.sampled_from([object(), int, ...])
array = arrays(scalar_dtypes(), st.sampled_from([(), (1,), (2, 2)]))
keys = st.text(max_size=3) | st.integers()
anything = st.recursive(
    plain | array,
    lambda inner: st.lists(inner, max_size=3) | st.tuples(inner) | st.dictionaries(keys, inner, max_size=3),
    max_leaves=4,
)


@fuzz
@given(anything)
def test_a_value_is_understood_or_refused(value):
    for read, kind in [
        (validation.strength, float),
        (validation.guidance_scale, float),
        (validation.num_inference_steps, int),
        (validation.seed, int),
    ]:
        made = outcome(read, value)
        assert isinstance(made, InputError) or type(made) is kind
    for read in (validation.text, validation.texts, validation.fraction, validation.count):
        outcome(read, value, "it")
    outcome(validation.folder, value)
    outcome(validation.generators, value, 1)
    outcome(validation.choice, value, "it", ["pil", "np"])
    assert len(validation.short_repr(value)) <= validation.MAX_REPR + 1 and "\n" not in validation.short_repr(value)


names = st.sampled_from(["strength", "guidance_scale", "num_inference_steps", "seed", "prompt", "negative_prompt"])
likely = {
    "strength": st.floats(0, 1),
    "guidance_scale": st.floats(0, 40),
    "num_inference_steps": st.integers(1, 999),
    "seed": st.integers(0, 2**63 - 1),
    "prompt": text,
    "negative_prompt": st.none() | text,
}
one_cell = st.fixed_dictionaries({}, optional=likely)
spoilt = st.builds(lambda cell, name, value: {**cell, name: value}, one_cell, names | text, anything)


sweeps = st.fixed_dictionaries(
    {"prompt": text | anything}, optional={"negative_prompt": anything, "seed": anything, "folder": st.none() | numbers}
)


def a_plan_or_refused(pipe, cells, **arguments):
    planned = outcome(plan, pipe, PICTURE, cells=cells, timed=False, **arguments)
    if not isinstance(planned, InputError):
        assert len(planned.records) == len(cells) and str(planned)
        assert all(record["steps_run"] >= 1 for record in planned.records)


@fuzz
@given(st.lists(one_cell | spoilt, min_size=1, max_size=3) | anything)
def test_a_plan_of_any_cells_is_made_or_refused(tiny, cells):
    a_plan_or_refused(tiny, cells, prompt="a house")


@fuzz
@given(sweeps)
def test_a_plan_of_any_arguments_is_made_or_refused(tiny, arguments):
    a_plan_or_refused(tiny, [{"strength": 0.5}], **arguments)


# --- pictures ---------------------------------------------------------------------------------------------------------


def whole(form, picture=PICTURE, **options):
    file = io.BytesIO()
    picture.save(file, form, **options)
    return file.getvalue()


EXIF = Image.Exif()
EXIF[0x0112] = 6
EXIF[0x010E] = "a picture"
WHOLE = [
    whole("PNG"),
    whole("PNG", PICTURE.convert("RGBA"), exif=EXIF),
    whole("PNG", PICTURE.quantize(16), transparency=3),
    whole("PNG", Image.new("I;16", (64, 64), 999)),
    whole("JPEG", exif=EXIF),
    whole("JPEG", PICTURE.convert("CMYK"), progressive=True),
    whole("WEBP", exif=EXIF),
    whole("WEBP", PICTURE.convert("RGBA"), lossless=True),
    whole("WEBP", save_all=True, append_images=[PICTURE.rotate(90)]),
]


@st.composite
def damaged(draw):
    """A real file with some of its bytes changed, cut out, cut off, or doubled."""
    data = bytearray(draw(st.sampled_from(WHOLE)))
    for _ in range(draw(st.integers(0, 6))):
        # Headers are a hundredth of a file, and half of what can go wrong.
        at = draw(st.integers(0, min(len(data), 200)) | st.integers(0, len(data)))
        length = draw(st.integers(1, 8))
        match draw(st.sampled_from(["change", "cut out", "cut off", "double"])):
            case "change":
                data[at : at + length] = draw(st.binary(min_size=length, max_size=length))
            case "cut out":
                del data[at : at + length]
            case "cut off":
                del data[max(at, 12) :]
            case "double":
                data[at:at] = data[at : at + 10 * length]
    return bytes(data)


def a_picture_or_refused(data):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    made = outcome(load_image, data)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss < before + MAX_GROWTH
    if isinstance(made, InputError):
        return
    assert made.mode == "RGB" and len(made.tobytes()) == 3 * made.width * made.height
    assert all(MIN_SIDE <= side <= MAX_SIDE and side % MULTIPLE == 0 for side in made.size)


@fuzz
@given(damaged() | st.binary(max_size=100))
def test_a_damaged_file_is_a_picture_or_refused(data):
    a_picture_or_refused(data)


sides = st.integers(0, 2**14) | st.sampled_from([2**16 - 1, 2**24 - 1, 2**31 - 1, 2**32 - 1])


@fuzz
@given(sides, sides, st.sampled_from([1, 2, 4, 8, 16, 3]), st.integers(0, 7))
def test_a_png_whose_header_lies_is_refused(width, height, depth, colour):
    data = WHOLE[0]
    header = struct.pack(">II", width, height) + bytes([depth, colour]) + data[26:29]
    check = struct.pack(">I", zlib.crc32(b"IHDR" + header))
    a_picture_or_refused(data[:16] + header + check + data[33:])


modest = st.integers(0, 1500) | st.just(2**14 - 1)  # what is within the limits is decoded, which takes its time


@fuzz
@given(modest, modest, st.sampled_from(WHOLE[4:]))
def test_a_jpeg_or_webp_whose_header_lies_is_refused(width, height, data):
    if data[:4] == b"RIFF" and data[12:16] == b"VP8X":
        data = data[:24] + struct.pack("<I", width)[:3] + struct.pack("<I", height)[:3] + data[30:]
    elif data[:2] == b"\xff\xd8":
        at = max(data.find(b"\xff\xc0"), data.find(b"\xff\xc2"))
        data = data[: at + 5] + struct.pack(">HH", height, width) + data[at + 9 :]
    a_picture_or_refused(data)


shapes = st.sampled_from([(64, 64), (64, 64, 3), (3, 64, 64), (64, 64, 4), (64,), (0, 64), (2, 64, 64, 3)])


@fuzz
@given(arrays(scalar_dtypes(), shapes))
def test_an_array_is_a_picture_or_refused(array):
    a_picture_or_refused(array)


@fuzz
@given(st.integers(0, 10_000), st.binary(min_size=1, max_size=4))
def test_a_png_of_ours_that_was_damaged_is_whole_or_refused(tmp_path_factory, at, other):
    file = tmp_path_factory.mktemp("fuzz") / "made.png"
    save_image(PICTURE, file, {"key": "0"}, PICTURE)
    data = file.read_bytes()
    at %= len(data)
    file.write_bytes(data[:at] + other + data[at + len(other) :])
    record = outcome(read_record, file)
    assert isinstance(record, (InputError, dict))


@pytest.mark.parametrize("data", WHOLE, ids=range(len(WHOLE)))
def test_the_files_to_be_damaged_are_whole(data):
    assert isinstance(load_image(data), Image.Image)
