"""The forty bad inputs: what people really give, and the one clear line or the right picture that they get."""

import http.server
import io
import shutil
import socket
import ssl
import subprocess
import sys
import threading
import time
import warnings
import zlib
from contextlib import contextmanager, suppress

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, EulerDiscreteScheduler, PNDMScheduler
from PIL import Image, ImageCms

import decinb
from decinb import InputError, grid, load_image, plan, run_sweep
from decinb.benchmark.counting import count_unet_calls
from decinb.utils import url as fetching

PROMPT = "a red house on snow at night"
IMAGE = Image.new("RGB", (64, 64), "teal")
QUICK = {"num_inference_steps": 2, "strength": 1.0}
MAX_ROUNDING = 1  # of 255: a change of mode may round
MAX_LOSS = 12  # of 255: JPEG and CMYK lose more
MAX_GROWTH = 50_000  # kB


@contextmanager
def idle(pipe):
    """No part of the model is called inside."""
    called = []
    parts = (pipe.text_encoder, pipe.vae.encoder, pipe.unet)
    hooks = [part.register_forward_pre_hook(lambda part, _: called.append(type(part).__name__)) for part in parts]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
    assert not called


def by_pipe(pipe, **given):
    """One picture through the pipeline's own door."""
    return pipe(**{"prompt": PROMPT, "image": IMAGE, **QUICK, **given}, generator=torch.Generator().manual_seed(0))


def by_sweep(pipe, **given):
    """The same through the door of a sweep, as its second cell."""
    return run_sweep(pipe, IMAGE, PROMPT, [QUICK, {**QUICK, **given}], progress=False)


BOTH = pytest.mark.parametrize("door", [by_pipe, by_sweep])


def refusal(pipe, door, message, **given):
    """The error's words: one line, before any work."""
    with idle(pipe), pytest.raises(InputError, match=message) as caught:
        door(pipe, **given)
    assert "\n" not in str(caught.value)
    return str(caught.value).removeprefix("cell 1: ")


def warned(door, *given, **more):
    """What a door warns of: single lines, told at the line that called it."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        made = door(*given, **more)
    mine = [one for one in caught if one.category is UserWarning]
    assert all(one.filename == __file__ and "\n" not in str(one.message) for one in mine)
    return made, [str(one.message) for one in mine]


def close(made, other, most=MAX_ROUNDING):
    return np.abs(np.asarray(made, int) - np.asarray(other, int)).max() <= most


def photo(width=200, height=120):
    """A picture in which every pixel is different enough to tell where it went."""
    x, y = np.meshgrid(np.arange(width), np.arange(height))
    return Image.fromarray(np.stack([x, y, (x + y) // 2], axis=-1).astype(np.uint8))


# --- numbers ----------------------------------------------------------------------------------------------------------


@BOTH
@pytest.mark.parametrize(
    ("case", "given", "message"),
    [
        ("E1", {"strength": 0}, "strength must be above 0 and at most 1, got 0"),
        ("E2", {"strength": 0.01, "num_inference_steps": 8}, "leaves 0 steps.*smallest strength at 8 steps is 0.125"),
        ("E3", {"strength": -0.1}, "strength must be above 0 and at most 1, got -0.1"),
        ("E4", {"strength": 1.2}, "strength must be above 0 and at most 1, got 1.2"),
        ("E5", {"strength": float("nan")}, "strength must be a number above 0 and at most 1, got nan"),
        ("E6", {"strength": "0.5"}, "strength must be a number above 0 and at most 1, got '0.5'"),
        ("E6", {"strength": None}, "strength must be a number above 0 and at most 1, got None"),
        ("E7", {"strength": True}, "strength must be a number above 0 and at most 1, got True"),
        ("E10", {"num_inference_steps": 0}, "num_inference_steps must be a whole number from 1 to 999, got 0"),
        ("E11", {"num_inference_steps": -1}, "num_inference_steps must be a whole number from 1 to 999, got -1"),
        ("E12", {"num_inference_steps": 2.5}, "num_inference_steps must be a whole number from 1 to 999, got 2.5"),
        ("E13", {"num_inference_steps": 1001}, "num_inference_steps must be a whole number from 1 to 999, got 1001"),
        ("E14", {"num_inference_steps": 1000}, "num_inference_steps must be a whole number from 1 to 999, got 1000"),
        ("E16", {"guidance_scale": float("nan")}, "guidance_scale must be a number from 0 to 10000, got nan"),
        ("E16", {"guidance_scale": float("inf")}, "guidance_scale must be a number from 0 to 10000, got inf"),
        ("E17", {"guidance_scale": -7.5}, "guidance_scale must be from 0 to 10000, got -7.5"),
        ("E18", {"guidance_scale": 1e38}, r"guidance_scale must be from 0 to 10000, got 1e\+38"),
        ("E20", {"guidence_scale": 3}, "unknown argument 'guidence_scale'; did you mean 'guidance_scale'?"),
        ("E23", {"prompt": None}, "prompt must be a string, got None"),
        ("E25", {"prompt": "a \ud800 house"}, "prompt has half a letter at position 2"),
        ("E25", {"prompt": "house " * 200_000}, "prompt must have at most 4000 letters, got 1200000"),
        ("E25", {"negative_prompt": "\udfff"}, "negative_prompt.* has half a letter at position 0"),
    ],
)
def test_a_value_that_cannot_run_is_refused_at_both_doors(tiny, happened, door, case, given, message):
    told = refusal(tiny, door, message, **given)
    if door is by_pipe:
        happened(case, told)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"num_inference_steps": "8"}, "num_inference_steps must be a whole number"),
        ({"num_inference_steps": float("inf")}, "num_inference_steps must be a whole number"),
        ({"num_inference_steps": 10**5000}, "num_inference_steps must be a whole number.* a value of type int"),
        ({"guidance_scale": True}, "guidance_scale must be a number"),
        ({"guidance_scale": [7.5, 1]}, r"guidance_scale must be a number from 0 to 10000, got \[7.5, 1\]"),
        ({"strength": np.array([0.5, 1.0])}, "strength must be a number"),
    ],
)
@BOTH
def test_what_is_no_number_at_all_is_refused_too(tiny, door, given, message):
    refusal(tiny, door, message, **given)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"num_images_per_prompt": 0}, "num_images_per_prompt must be a whole number from 1 to 1000, got 0"),
        ({"eta": 2}, "eta must be from 0 to 1, got 2"),
        ({"output_type": "jpeg"}, "output_type must be one of pil, np, pt, latent, got 'jpeg'"),
        ({"generator": 42}, "generator must be a torch.Generator.*got 42"),
        ({"generator": [torch.Generator()] * 3}, "one for each of the 1 images, got 3"),
    ],
)
def test_what_only_the_pipeline_takes_is_checked_there(tiny, given, message):
    with idle(tiny), pytest.raises(InputError, match=message):
        tiny(**{"prompt": PROMPT, "image": IMAGE, **QUICK, **given})


def test_a_schedule_of_ones_own_counts_its_steps(tiny):
    before = tiny.scheduler
    tiny.scheduler = EulerDiscreteScheduler.from_config(before.config, rescale_betas_zero_snr=False)
    try:
        with count_unet_calls(tiny) as count:
            by_pipe(tiny, strength=0.5, timesteps=[999, 600, 300, 1], num_inference_steps=None)
        assert count.calls == 2
        refusal(tiny, by_pipe, "strength 0.2 of 4 steps leaves 0 steps", strength=0.2, timesteps=[999, 600, 300, 1])
    finally:
        tiny.scheduler = before


@pytest.mark.parametrize("kind", [PNDMScheduler, EulerDiscreteScheduler])
def test_the_limits_are_the_same_for_every_scheduler(tiny, happened, kind):
    config = {**tiny.scheduler.config, "rescale_betas_zero_snr": False, "timestep_spacing": "leading"}
    before, tiny.scheduler = tiny.scheduler, kind.from_config(config, skip_prk_steps=True)
    try:
        for door in (by_pipe, by_sweep):
            refusal(tiny, door, "leaves 0 steps to run", strength=0.01, num_inference_steps=8)
            refusal(tiny, door, "from 1 to 999", num_inference_steps=1000)
    finally:
        tiny.scheduler = before


def test_numbers_of_other_libraries_are_numbers(tiny):
    for value in (np.float32(0.5), np.array(0.5), torch.tensor(0.5)):
        cell = {"strength": value, "num_inference_steps": np.int32(2), "guidance_scale": 8}
        record = plan(tiny, IMAGE, PROMPT, [cell], timed=False).records[0]
        assert (record["strength"], record["num_inference_steps"]) == (0.5, 2)
        assert type(record["strength"]) is float and type(record["num_inference_steps"]) is int


def test_steps_are_cut_off_as_diffusers_does_and_told(tiny, happened):
    given = {"strength": 0.58, "num_inference_steps": 50, "guidance_scale": 1}
    with count_unet_calls(tiny) as count:
        by_pipe(tiny, **given)
        record = run_sweep(tiny, IMAGE, PROMPT, [given], progress=False).records[0]
    assert count.calls == 2 * 28
    assert record["steps_run"] == 28 == plan(tiny, IMAGE, PROMPT, [given], timed=False).calls
    happened("E8", f"{count.calls // 2} calls of the U-Net at either door, steps_run is {record['steps_run']}")


def test_settings_that_come_to_one_image_are_made_once(tiny, happened):
    cells = grid(strength=[0.50, 0.56, 0.62], num_inference_steps=[8])
    with count_unet_calls(tiny) as count:
        sweep, told = warned(run_sweep, tiny, IMAGE, PROMPT, cells, progress=False)
    assert count.calls == 4 and sweep.cells == cells and len(sweep.images) == 3
    assert len(told) == 1 and "strength 0.5, steps 8; strength 0.56, steps 8; strength 0.62, steps 8" in told[0]
    planned, _ = warned(plan, tiny, IMAGE, PROMPT, cells, timed=False)
    assert told[0] in str(planned)
    happened("E9", told[0])


def test_steps_that_begin_below_full_noise_are_told(tiny, happened):
    before = tiny.scheduler
    leading = DDIMScheduler.from_config(before.config, timestep_spacing="leading", rescale_betas_zero_snr=False)
    tiny.scheduler = leading
    short = {"num_inference_steps": 600, "strength": 1 / 600 + 1e-6, "guidance_scale": 1}
    try:
        for door in (by_pipe, by_sweep):
            _, told = warned(door, tiny, **short)
            assert len(told) == 1 and "600 begins at noise level 600 of 1000 with DDIMScheduler" in told[0]
        happened("E15", told[0])
        for steps in (*range(1, 167), 200, 250, 333, 500):
            assert decinb.utils.validation.late_start(steps, leading) is None
    finally:
        tiny.scheduler = before
    assert warned(by_pipe, tiny, **short)[1] == []  # trailing spacing begins at the top


def test_a_guidance_that_burns_out_is_told(tiny, happened):
    for door in (by_pipe, by_sweep):
        _, told = warned(door, tiny, guidance_scale=1e4)
        assert told == ["guidance_scale 10000 burns the picture out; above 30 nothing else is to be seen"]
    happened("E18", told[0])
    assert warned(by_pipe, tiny, guidance_scale=30)[1] == []


def test_a_seed_is_a_whole_number_in_reach(tiny, happened):
    for seed in (1.5, 2**64, -1, "42", True):
        happened("E21", refusal(tiny, by_sweep, "seed must be a whole number from 0 to 9223372036854775807", seed=seed))
    made = [plan(tiny, IMAGE, PROMPT, [{**QUICK, "seed": seed}], timed=False).records[0] for seed in (7, np.int64(7))]
    assert made[0] == made[1] and type(made[1]["seed"]) is int
    happened("E22", f"{np.int64(7)!r} is seed {made[1]['seed']}, with the same key")


# --- words ------------------------------------------------------------------------------------------------------------


def test_a_negative_prompt_without_guidance_is_told(tiny, happened):
    cells = grid(guidance_scale=[0, 0.5, 1], **{name: [value] for name, value in QUICK.items()})
    for scale in (0, 1):
        _, told = warned(by_pipe, tiny, guidance_scale=scale, negative_prompt="trees")
        assert told == [f"negative_prompt is unused at guidance_scale {scale}: it takes a scale above 1"]
    happened("E19", told[0])
    _, told = warned(plan, tiny, IMAGE, PROMPT, cells[:1], negative_prompt="trees", timed=False)
    assert told == ["negative_prompt is unused at guidance_scale 0: it takes a scale above 1, cell 0"]

    # A cell that names both means it, as notebook 03 does to show that nothing happens: the plan mentions it, no more.
    cell = {**QUICK, "guidance_scale": 1, "negative_prompt": "trees"}
    planned, told = warned(plan, tiny, IMAGE, PROMPT, [cell], timed=False)
    assert not told and "negative_prompt is unused in cell 0" in str(planned)
    assert warned(by_pipe, tiny, negative_prompt="trees")[1] == []


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ([], "prompt is an empty list: give at least one"),
        (["a", None], r"prompt\[1\] must be a string, got None"),
        ([["a"]], r"prompt\[0\] must be a string, got \['a'\]"),
        (b"a house", "prompt must be a string, got b'a house'"),
        ({"a": 1}, "prompt must be a string, got {'a': 1}"),
    ],
)
def test_a_prompt_that_is_none_is_named_by_its_place(tiny, happened, prompt, message):
    happened("E23", refusal(tiny, by_pipe, message, prompt=prompt))
    with pytest.raises(InputError, match="prompt must be a string"):
        run_sweep(tiny, IMAGE, prompt, [QUICK])


def test_words_that_are_not_read_are_told_and_recorded(tiny, happened, caplog, capfd):
    long = " ".join(f"word {i}" for i in range(150))
    for name, shown in (("prompt", "prompt"), ("negative_prompt", "negative_prompt")):
        for door in (by_pipe, by_sweep):
            made, told = warned(door, tiny, **{name: long})
            assert len(told) == 1 and told[0].startswith(f"{shown} is too long for the text encoder")
        lost = made.records[1]["truncated"][name]
        assert made.records[0]["truncated"] == {}
        assert long.endswith(lost) and len(lost) > len(long) / 2
        assert lost[:60] in told[0]
        room = tiny.tokenizer.model_max_length - 2
        assert len(tiny.tokenizer(long.removesuffix(lost), add_special_tokens=False).input_ids) == room
        happened("E24", told[0])
    assert not caplog.text and not capfd.readouterr().err  # nor do the libraries say it again, in pages


def test_prompts_and_pictures_go_together(tiny, happened):
    for given in ({"guidance_scale": 1}, {"guidance_scale": 5}):
        told = refusal(
            tiny,
            by_pipe,
            "negative_prompt must be one, or as many as the others: image has 3, prompt has 3, negative_prompt has 2",
            prompt=["a", "b", "c"],
            negative_prompt=["d", "e"],
            image=[IMAGE] * 3,
            **given,
        )
    happened("E26", told)
    seeds = [torch.Generator().manual_seed(0) for _ in range(2)]
    for given in ({"prompt": [PROMPT, PROMPT]}, {"image": [IMAGE, IMAGE]}, {"negative_prompt": ["trees", "trees"]}):
        made = tiny(**{"prompt": PROMPT, "image": IMAGE, "negative_prompt": "trees", **QUICK, **given}, generator=seeds)
        assert len(made.images) == 2


# --- pictures ---------------------------------------------------------------------------------------------------------


def test_what_is_no_picture_is_named(tiny, happened, tmp_path):
    (tmp_path / "notes.txt").write_text("no picture")
    (tmp_path / "pictures").mkdir()
    (tmp_path / "empty.png").touch()
    for given, message in [
        (None, "image must be a sample's name, a path, a URL, bytes, an array or a PIL image, got NoneType"),
        (("a", 5), r"image\[0\]: image 'a' is neither a file"),
        (tmp_path / "missing.png", r"missing.png' is neither a file nor one of the samples: day, sunset"),
        (str(tmp_path / "pictures"), "pictures' is a folder: give a file in it"),
        (tmp_path / "notes.txt", "notes.txt' is not a PNG, JPEG, WEBP picture"),
        (tmp_path / "empty.png", "empty.png' is not a PNG, JPEG, WEBP picture: it is empty"),
        ("x" * 5000, "cannot be read|neither a file"),
        ("~nobody-at-all/x.png", "cannot be read"),
        ([], "image is an empty list: give at least one"),
    ]:
        told = refusal(tiny, by_pipe, message, image=given)
        if message[0] != "c" and given != []:
            happened("E27", told)
        if not isinstance(given, (list, tuple)):
            refusal(tiny, by_sweep, message, image=given)
            with idle(tiny), pytest.raises(InputError, match=message):
                run_sweep(tiny, given, PROMPT, [QUICK])


def test_the_pipeline_takes_what_load_image_takes(tiny, tmp_path):
    day = load_image("day", 64)
    day.save(tmp_path / "day.png")
    plain = by_pipe(tiny, image=day).images[0]
    tensor = torch.tensor(np.asarray(day)).permute(2, 0, 1) / 255
    for given in (tmp_path / "day.png", (tmp_path / "day.png").read_bytes(), np.asarray(day), tensor, tensor[None]):
        assert close(by_pipe(tiny, image=given).images[0], plain)


def faded(image):
    """The same with an edge that cannot be seen, in a colour that must not show."""
    image = image.convert("RGBA")
    image.paste((255, 0, 0, 0), (0, 0, 20, image.height))
    return image


def test_transparency_is_laid_on_white(tiny, happened, tmp_path):
    picture = faded(Image.new("RGB", (512, 512), "teal"))
    picture.save(tmp_path / "clear.png")
    white = Image.new("RGB", (512, 512), "teal")
    white.paste("white", (0, 0, 20, 512))
    for source in (picture, tmp_path / "clear.png"):
        assert close(load_image(source), white)
    small, opaque = (one.resize((64, 64), Image.Resampling.NEAREST) for one in (picture, white))
    for door in (by_pipe, by_sweep):
        made, same = (door(tiny, image=one).images[-1] for one in (small, opaque))
        assert made.size == (64, 64) and close(made, same)
    happened("E28", f"transparent pixels are {load_image(picture).getpixel((5, 5))}, {load_image(picture).size}")


@pytest.mark.parametrize("mode", ["CMYK", "LA", "P", "PA", "RGBX", "RGBa", "La", "YCbCr", "HSV"])
def test_every_mode_becomes_rgb_and_no_latent(tiny, happened, tmp_path, mode):
    grey = Image.linear_gradient("L").resize((200, 120))
    white = grey.convert("RGB")
    if mode in ("LA", "RGBa", "La", "P"):
        clear = faded(grey)
        white.paste("white", (0, 0, 20, 120))
        through = "LA" if mode == "La" else "RGBA"
        picture = clear.quantize(256) if mode == "P" else clear.convert(through).convert(mode)
    else:
        picture = white.convert("LA" if mode == "PA" else "RGB").convert(mode)
    sources = [picture]
    if suffix := {"CMYK": "jpg", "LA": "png", "P": "png"}.get(mode):
        picture.save(tmp_path / f"it.{suffix}")
        sources.append(tmp_path / f"it.{suffix}")
    for source in sources:
        made = load_image(source)
        assert made.mode == "RGB" and made.size == (200, 120) and close(made, white, MAX_LOSS)
    made = by_pipe(tiny, image=picture.resize((64, 64))).images[0] if mode in ("CMYK", "LA") else None
    assert made is None or made.size == (64, 64)
    if suffix:
        happened("E29", f"{mode}: {load_image(sources[-1]).mode} of {load_image(sources[-1]).size}")


def test_colours_measured_otherwise_are_converted_too():
    brown = Image.new("RGB", (64, 64), (120, 100, 90))
    profiles = (ImageCms.createProfile(name) for name in ("sRGB", "LAB"))
    assert close(load_image(ImageCms.profileToProfile(brown, *profiles, outputMode="LAB")), brown, MAX_LOSS)


def test_half_grey_stays_half_grey(happened, tmp_path):
    half = {
        "L": Image.new("L", (64, 64), 127),
        "I;16": Image.fromarray(np.full((64, 64), 32768, np.uint16)),
        "I": Image.new("I", (64, 64), 32768),
        "F": Image.new("F", (64, 64), 0.5),
        "1": Image.new("L", (64, 64), 127).convert("1"),
    }
    half["I;16"].save(tmp_path / "deep.png")
    half["a 16-bit PNG"] = tmp_path / "deep.png"
    for kind, picture in half.items():
        made = np.asarray(load_image(picture))
        assert made.shape == (64, 64, 3) and abs(made.mean() - 127) <= MAX_ROUNDING, kind
        happened("E30", f"{kind}: half grey is {made.mean():.0f} of 255")
    with pytest.raises(InputError, match="floats of an image must be from 0 to 1, got 0 to 255; divide"):
        load_image(Image.fromarray(np.linspace(0, 255, 4096, dtype=np.float32).reshape(64, 64)))


TURNS = {  # of EXIF: what a camera did to an upright picture before it stored it
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_90,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_270,
}


@pytest.mark.parametrize("orientation", TURNS)
def test_a_phone_photo_is_turned_upright(happened, tmp_path, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    photo().transpose(TURNS[orientation]).save(tmp_path / "phone.png", exif=exif)
    photo().transpose(TURNS[orientation]).save(tmp_path / "phone.jpg", exif=exif, quality=95)
    assert close(load_image(tmp_path / "phone.png"), photo(), 0)
    assert close(load_image(tmp_path / "phone.jpg"), photo(), MAX_LOSS)
    happened("E31", f"{orientation}: upright, {load_image(tmp_path / 'phone.jpg').size}")


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp"])
def test_a_file_cut_short_is_damaged(happened, tmp_path, suffix):
    photo().save(tmp_path / f"whole.{suffix}")
    whole = (tmp_path / f"whole.{suffix}").read_bytes()
    file = tmp_path / f"cut.{suffix}"
    for length in (len(whole) // 2, len(whole) * 9 // 10):
        file.write_bytes(whole[:length])
        with pytest.raises(InputError, match=rf"cut\.{suffix}' is (damaged|not a)") as caught:
            load_image(file)
    happened("E32", caught.value)


def test_a_web_page_is_no_picture(happened, tmp_path):
    (tmp_path / "page.png").write_text("<!DOCTYPE html><html>not found</html>")
    with pytest.raises(InputError, match=r"page\.png' is not a PNG, JPEG, WEBP picture: it is a web page") as caught:
        load_image(tmp_path / "page.png")
    happened("E32", caught.value)
    IMAGE.save(tmp_path / "moving.gif")
    with pytest.raises(InputError, match="is not a PNG, JPEG, WEBP picture"):
        load_image(tmp_path / "moving.gif")


@BOTH
def test_a_picture_too_small_is_refused_and_one_too_long_is_told(tiny, happened, door):
    for size in ((1, 1), (7, 64), (63, 65)):
        told = refusal(tiny, door, f"at least 64 x 64 pixels, got {size[0]} x {size[1]}", image=Image.new("RGB", size))
        happened("E33", told)
    told = refusal(tiny, door, "of 9000 x 99 pixels is too long.* less than 64", image=Image.new("RGB", (9000, 99)))
    long = Image.new("RGB", (64, 2000), "teal")
    made, told = warned(door, tiny, image=long, strength=0.5, guidance_scale=1)
    assert told == ["image of 64 x 2000 pixels is longer than 4:1, which no model has learnt"]
    assert made.images[-1].size == (64, 2000)
    happened("E33", told[0])


def test_a_size_is_cut_never_squashed_and_recorded(tiny, happened):
    picture = photo(513, 511)
    assert load_image(picture).size == (512, 504)
    assert load_image(picture).getpixel((0, 0)) == picture.getpixel((0, 3))
    record = plan(tiny, picture, PROMPT, [QUICK], timed=False).records[0]
    assert (record["original_size"], record["image_size"]) == ([513, 511], [512, 504])
    happened("E34", f"cut from {record['original_size']} to {record['image_size']}, both recorded")
    small = photo(75, 67)
    made = by_pipe(tiny, image=small).images[0]
    assert made.size == (72, 64) and close(made, by_pipe(tiny, image=small.crop((1, 1, 73, 65))).images[0])


GROWTH = """
import resource, sys
from decinb import InputError, load_image
load_image("day")
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for file in sys.argv[1:]:
    try:
        load_image(file)
    except InputError as error:
        print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before, error)
"""


def hollow_png(side):
    """A black picture of one bit a pixel, packed as PNG packs it, without ever drawing it."""

    def chunk(kind, data):
        return len(data).to_bytes(4, "big") + kind + data + zlib.crc32(kind + data).to_bytes(4, "big")

    packer = zlib.compressobj(9)
    row = bytes(1 + -(-side // 8))
    packed = b"".join(packer.compress(row) for _ in range(side)) + packer.flush()
    header = side.to_bytes(4, "big") * 2 + bytes([1, 0, 0, 0, 0])
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", packed) + chunk(b"IEND", b"")


def test_a_bomb_is_refused_from_its_header(happened, tmp_path):
    files = [tmp_path / f"{side}.png" for side in (12000, 20000)]
    for file in files:
        file.write_bytes(hollow_png(int(file.stem)))
        assert file.stat().st_size < 60_000
    child = subprocess.run([sys.executable, "-c", GROWTH, *files], capture_output=True, text=True, check=True)
    assert len(child.stdout.splitlines()) == 2
    for line in child.stdout.splitlines():
        growth, told = line.split(maxsplit=1)
        assert int(growth) < MAX_GROWTH and "pixels" in told
        happened("E35", told)


def test_arrays_are_pictures_or_refused(happened, tmp_path):
    whole = np.asarray(photo())
    deep = whole.astype(np.uint16) * 257
    for made in (whole, whole / 255, (whole / 255).astype(np.float32), whole.astype(np.int64), deep):
        assert close(load_image(made), whole)
    assert close(load_image(whole[..., 0]), Image.fromarray(whole[..., 0]).convert("RGB"))
    assert load_image(np.dstack([whole, np.zeros((120, 200), np.uint8)])).getpixel((5, 5)) == (255, 255, 255)
    assert close(load_image(torch.tensor(whole).permute(2, 0, 1)), whole)
    happened("E36", f"uint8: {load_image(whole).mode} of {load_image(whole).size}")
    broken = whole / 255
    broken[3, 3, 0] = np.nan
    for array, message in [
        (whole.astype(np.float32), "floats of an image must be from 0 to 1, got 0 to 199; divide bytes by 255"),
        (broken, "image holds NaN or infinity"),
        (whole.transpose(2, 0, 1), r"got \(3, 120, 200\), which looks like CHW"),
        (torch.tensor(whole), r"got \(120, 200, 3\), which looks like HWC"),
        (torch.zeros(4, 64, 64), "4 channels, as latents have"),
        (np.zeros((64, 64, 4)), "4 channels, as latents have"),
        (np.full((64, 64, 3), "x"), "must hold whole numbers or floats"),
        (np.full((64, 64), -5), "whole numbers of an image must be from 0 to 255"),
        (np.zeros((0, 64, 3)), "must have the shape"),
        (np.zeros(5), "must have the shape"),
    ]:
        with pytest.raises(InputError, match=message) as caught:
            load_image(array)
        if message[0] != "m" and "latents" not in message:
            happened("E36", caught.value)


def test_pictures_of_one_call_are_of_one_size(tiny, happened):
    message = r"image\[1\] has 128 x 128 pixels and image\[0\] 64 x 64"
    happened("E37", refusal(tiny, by_pipe, message, image=[IMAGE, load_image("day")], prompt=[PROMPT] * 2))
    refusal(tiny, by_pipe, r"image\[1\]: image must be at least", image=[IMAGE, IMAGE.resize((9, 9))])
    pair = by_pipe(tiny, prompt=[PROMPT] * 2, image=[IMAGE, IMAGE.convert("RGBA")]).images
    assert [made.size for made in pair] == [(64, 64)] * 2
    happened("E37", f"RGB beside RGBA: {[made.size for made in pair]}")


# --- pictures from elsewhere ------------------------------------------------------------------------------------------

PNG = io.BytesIO()
photo().save(PNG, "PNG")


class Server(http.server.BaseHTTPRequestHandler):
    """A picture server with every bad habit, one under each path."""

    def do_GET(self):
        name, _, rest = self.path[1:].partition("?")
        getattr(self, name.partition(".")[0])(rest)

    def answer(self, status, body, **headers):
        self.send_response(status)
        for header, value in headers.items():
            self.send_header(header.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(body)

    def photo(self, _):
        self.answer(200, PNG.getvalue())

    def missing(self, _):
        self.answer(404, PNG.getvalue(), content_type="image/png")

    def broken(self, _):
        self.answer(503, PNG.getvalue(), content_type="image/png")

    def page(self, _):
        self.answer(200, b"<html>please log in</html>", content_type="text/html; charset=utf-8")

    def unnamed(self, _):
        self.answer(200, b"<html>please log in</html>")

    def packed(self, _):
        self.answer(200, zlib.compress(PNG.getvalue()), content_encoding="deflate")

    def cut(self, _):
        self.answer(200, PNG.getvalue()[:100], content_length=str(len(PNG.getvalue())))

    def to(self, where):
        self.answer(302, b"", location=where)

    def round(self, count):
        self.answer(302, b"", location=f"/round?{int(count or 0) + 1}")

    def huge(self, _):
        self.answer(200, b"", content_length=str(10**12))

    def endless(self, _):
        self.answer(200, b"")
        while True:
            self.wfile.write(b"0" * 65536)

    def drip(self, seconds):
        self.answer(200, b"", content_length="100000")
        self.slowly(b"\x89PNG" * 1000, seconds)

    def heading(self, seconds):
        self.slowly(b"HTTP/1.0 200 OK\r\n" + b"x-slow: yes\r\n" * 1000, seconds)

    def chunks(self, seconds):
        self.answer(200, b"", transfer_encoding="chunked")
        self.slowly(b"1\r\n0\r\n" * 1000, seconds)

    def silent(self, _):
        time.sleep(5)

    def slowly(self, data, seconds):
        for i in range(len(data)):
            self.wfile.write(data[i : i + 1])
            self.wfile.flush()
            time.sleep(float(seconds))

    def handle(self):
        with suppress(OSError):  # the one who asked is gone, as it should be
            super().handle()

    def log_message(self, *args):
        pass


class Serving(http.server.ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False


@pytest.fixture(scope="module")
def server():
    serving = Serving(("127.0.0.1", 0), Server)
    threading.Thread(target=serving.serve_forever, args=(0.05,), daemon=True).start()
    yield f"http://127.0.0.1:{serving.server_port}"
    serving.shutdown()
    serving.server_close()


@pytest.fixture
def outside(monkeypatch):
    """The server counts as one of the world outside; every other address is what it is."""
    judged = fetching.is_public
    monkeypatch.setattr(fetching, "is_public", lambda address: address == "127.0.0.1" or judged(address))


def test_a_picture_is_fetched_and_followed(tiny, server, outside):
    for path in ("photo.png", "photo?a=b c&ü", "to?/photo", "to?photo.png", f"to?{server}/photo"):
        assert close(load_image(f"{server}/{path}"), photo())
    assert load_image(f"{server}/photo".replace("http", "HTTP")).size == (200, 120)
    assert load_image(f"{server}/photo".replace("127.0.0.1", "localhost"), allow_private=True).size == (200, 120)
    assert by_pipe(tiny, image=f"{server}/photo", strength=0.5).images[0].size == (200, 120)
    record = plan(tiny, f"{server}/photo.png?secret=1", PROMPT, [QUICK], timed=False).records[0]
    assert record["image"] == "photo.png"


@pytest.mark.skipif(not shutil.which("openssl"), reason="makes the certificate")
def test_a_secure_server_is_believed_only_with_a_certificate(outside, tmp_path, monkeypatch):
    make = "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 2 -subj /CN=localhost"
    names = ["-addext", "subjectAltName=DNS:localhost", "-keyout", "key.pem", "-out", "certificate.pem"]
    subprocess.run([*make.split(), *names], cwd=tmp_path, check=True, capture_output=True)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(tmp_path / "certificate.pem", tmp_path / "key.pem")
    with Serving(("127.0.0.1", 0), Server) as serving:
        serving.socket = context.wrap_socket(serving.socket, server_side=True)
        threading.Thread(target=serving.serve_forever, args=(0.05,), daemon=True).start()
        monkeypatch.setattr(fetching, "is_public", lambda address: True)
        url = f"https://localhost:{serving.server_port}/photo.png"
        with pytest.raises(InputError, match="could not be fetched from localhost: SSLCertVerificationError"):
            load_image(url)
        monkeypatch.setattr("requests.certs.where", lambda: tmp_path / "certificate.pem")
        assert close(load_image(url), photo())
        with pytest.raises(InputError, match="could not be fetched from 127.0.0.1: SSLCertVerificationError"):
            load_image(url.replace("localhost", "127.0.0.1"))
        serving.shutdown()


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("missing.png", "missing.png': 127.0.0.1 answered with status 404$"),
        ("broken.png", "answered with status 503$"),
        ("page.png", r"127.0.0.1, status 200: a web page \('text/html; charset=utf-8'\) and no picture$"),
        ("unnamed.png", "unnamed.png' from 127.0.0.1, status 200 is not a PNG, JPEG, WEBP picture: it is a web page$"),
        ("packed.png", "packed.png' from 127.0.0.1, status 200 is not a PNG"),
        ("cut.png", "status 200: the connection broke after 100 of [0-9]+ bytes$"),
        ("round", "round' was redirected more than 3 times, last by 127.0.0.1 to 'http://127.0.0.1:[0-9]+/round.4'$"),
        ("to?http://127.0.0.2:1/x.png", "leads to 127.0.0.2, inside the own network; allow_private=True"),
        ("to?http://2130706434/x.png", "leads to 2130706434, inside the own network"),
        ("to?http://[::1]/x.png", "leads to ::1, inside the own network"),
        ("to?http://[::ffff:127.0.0.2]/x.png", "leads to ::ffff:127.0.0.2, inside the own network"),
        ("to?http://169.254.169.254/latest", "leads to 169.254.169.254, inside the own network"),
        ("to?http://10.0.0.1/x.png", "leads to 10.0.0.1, inside the own network"),
        ("to?file:///etc/hostname", r"must be an http or https URL without a user name \(it leads to 'file:///etc"),
        ("to?http://me:word@127.0.0.1/x.png", "without a user name .it leads to 'http://…@127.0.0.1/x.png'"),
        ("to?https://[::1", "could not be fetched"),
    ],
)
def test_a_server_that_misleads_is_named(server, outside, happened, path, message):
    with pytest.raises(InputError, match=message) as caught:
        load_image(f"{server}/{path}")
    assert "\n" not in str(caught.value)
    happened("E38", caught.value)


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("file:///etc/hostname", "must be an http or https URL without a user name"),
        ("FILE:/etc/hostname", "must be an http or https URL"),
        ("data:image/png;base64," + "A" * 10_000, "must be an http or https URL"),
        ("ftp://127.0.0.1/x.png", "must be an http or https URL"),
        ("http://", "must be an http or https URL"),
        ("http://127.0.0.1:9/x.png", "inside the own network; allow_private=True of load_image permits that"),
        ("http://0.0.0.0:9/x.png", "inside the own network"),
        ("http://localhost:9/x.png", "inside the own network"),
        ("http://127.0.0.1:99999/x.png", "could not be fetched|is not known"),
        ("http://" + "a" * 70 + ".example/x.png", "is not known"),
        ("http://no-such-host.invalid/x.png", "the host 'no-such-host.invalid' is not known"),
    ],
)
def test_a_url_that_leads_nowhere_good_is_refused(tiny, happened, url, message):
    with pytest.raises(InputError, match=message) as caught:
        load_image(url)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 300
    if url[:4] in ("file", "data"):
        happened("E38", caught.value)
    refusal(tiny, by_pipe, message, image=url)


def test_a_server_that_is_not_there_is_named():
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        with pytest.raises(InputError, match="could not be fetched from 127.0.0.1: ConnectionRefusedError"):
            load_image(f"http://127.0.0.1:{closed.getsockname()[1]}/x.png", allow_private=True)


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("endless", "127.0.0.1, status 200: more than 20 MB$"),
        ("huge", "127.0.0.1, status 200: more than 20 MB$"),
        ("drip?0.05", "127.0.0.1 took more than 0.6 s$"),
        ("heading?0.05", "127.0.0.1 took more than 0.6 s$"),
        ("chunks?0.05", "127.0.0.1 took more than 0.6 s$"),
        ("drip?2", "127.0.0.1 does not answer$"),
        ("silent", "127.0.0.1 does not answer$"),
    ],
)
def test_a_server_that_never_ends_is_left(server, outside, happened, monkeypatch, path, message):
    assert (fetching.MAX_BYTES, fetching.MAX_SECONDS) == (20_000_000, 20)
    monkeypatch.setattr(fetching, "MAX_SECONDS", 0.6)
    monkeypatch.setattr(fetching, "READ_SECONDS", 0.3)
    if "MB" in message:
        monkeypatch.undo()
        monkeypatch.setattr(fetching, "is_public", lambda address: True)
    started = time.monotonic()
    with pytest.raises(InputError, match=message) as caught:
        load_image(f"{server}/{path}")
    assert time.monotonic() - started < 2
    happened("E39", caught.value)


# --- sweeps -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cells", [[], (), {}, None, "strength", 5, {"strength": 1}])
def test_a_sweep_of_nothing_is_refused(tiny, happened, cells):
    with idle(tiny), pytest.raises(InputError, match="cells must be a list of at least one dict, got") as caught:
        run_sweep(tiny, IMAGE, PROMPT, cells)
    if cells == []:
        happened("E40", caught.value)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"folder": 5}, "folder must be a path, got 5"),
        ({"folder": "a\0b"}, "folder must be a path"),
        ({"pack": 0}, "pack must be a whole number from 1 to 1000, got 0"),
        ({"guidance_rescale": 2}, "guidance_rescale must be from 0 to 1, got 2"),
        ({"negative_prompt": ["a"]}, r"negative_prompt must be a string, got \['a'\]"),
    ],
)
def test_an_argument_of_the_whole_sweep_is_checked(tiny, given, message):
    with idle(tiny), pytest.raises(InputError, match=message):
        run_sweep(tiny, IMAGE, PROMPT, [QUICK], **given)


def test_equal_cells_are_made_once(tiny, happened):
    with count_unet_calls(tiny) as count:
        sweep, told = warned(run_sweep, tiny, IMAGE, PROMPT, [QUICK, dict(QUICK)], progress=False)
    assert count.calls == 2 and len(sweep) == 2
    assert told[0].startswith("1 of 2 cells repeat another and are not computed again: cells 0, 1 give the same image")
    happened("E40", told[0])


def test_more_cells_than_memory_holds_are_refused():
    with pytest.raises(InputError, match="at most 100,000 cells, got 3,000,000,000; random_design draws some of them"):
        grid(seed=range(10**9), strength=[0.5, 0.6, 0.7])


def test_very_many_cells_are_told_before_they_run(tiny, happened):
    cells = [{**QUICK, "seed": seed} for seed in range(1001)]
    _, told = warned(plan, tiny, IMAGE, PROMPT, cells, timed=False)
    assert len(told) == 1 and told[0].startswith("1,001 images are to be made")
    happened("E40", told[0])
    assert warned(plan, tiny, IMAGE, PROMPT, cells[:1000], timed=False)[1] == []


def test_a_huge_grid_is_drawn_in_pages(tiny, happened, tmp_path):
    cells = grid(seed=range(14), guidance_scale=[1 + i for i in range(14)])
    planned = plan(tiny, IMAGE, PROMPT, cells, timed=False)
    planned.plot(file=tmp_path / "plan.png")
    pages = sorted(tmp_path.glob("plan-*.png"))
    sizes = [Image.open(page).size for page in pages]
    assert len(pages) == 4 and all(width * height < 20_000_000 for width, height in sizes)
    happened("E40", f"a grid of 14 x 14 is {len(pages)} pages")
