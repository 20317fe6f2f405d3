"""What an outsider tried with sizes, names, numbers and threads: each attempt here once gave something else."""

import copy
import threading

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionImg2ImgPipeline, StableDiffusionPipeline, UNet2DConditionModel
from PIL import Image

import decinb
from decinb import InputError, load_image, plan, replay, run_sweep
from decinb.benchmark.counting import count_unet_calls
from decinb.execution.fingerprint import fingerprint
from decinb.execution.provenance import model_name
from decinb.models import MODELS, defaults_of, draws_scenes, known_model
from decinb.utils.quiet import quiet
from tests.helpers.small import small_text_encoder, small_vae
from tests.helpers.sweeps import levels

PROMPT = "a red house at night"
IMAGE = Image.new("RGB", (64, 64), (90, 120, 200))
ALMOST = 0.1 + 0.7  # 0.7999999999999999


@pytest.fixture
def pipe(tiny):
    """A pipeline that a test may break."""
    return copy.deepcopy(tiny)


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def small_text_pipe(tiny, sample_size: int | tuple[int, int] | list[int]) -> StableDiffusionPipeline:
    """Return an untrained pipeline of diffusers that makes images of this size, in latent pixels, from text."""
    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=sample_size,
        block_out_channels=(32, 64),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=16,
    )
    pipe = StableDiffusionPipeline(
        vae=small_vae().eval(),
        text_encoder=small_text_encoder().eval(),
        tokenizer=tiny.tokenizer,
        unet=unet.eval(),
        scheduler=copy.deepcopy(tiny.scheduler),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


# --- the size of images from text -------------------------------------------------------------------------------------


@pytest.mark.parametrize("sample_size", [(8, 12), [12, 8]])
def test_images_from_text_need_not_be_square(tiny, tmp_path, sample_size):
    pipe = small_text_pipe(tiny, sample_size)
    own = pipe(PROMPT, num_inference_steps=2, generator=seeded()).images[0]
    made = run_sweep(pipe, None, PROMPT, [{"num_inference_steps": 2}], folder=tmp_path, progress=False)
    assert (
        made.images[0].size
        == own.size
        == tuple(made.records[0]["image_size"])
        == (8 * sample_size[1], 8 * sample_size[0])
    )
    assert levels(made.images[0], own) <= 1
    assert levels(replay(next(tmp_path.glob("*.png")), pipe), own) <= 1
    assert decinb.image_size(pipe) == 96


def test_the_key_tells_a_tall_image_from_a_wide_one(tiny):
    pipe = small_text_pipe(tiny, (8, 12))
    decides = []
    for sample_size in ((8, 12), (12, 8), 12):
        pipe.unet.register_to_config(sample_size=sample_size)
        planned = plan(pipe, None, PROMPT, [{"num_inference_steps": 2}], timed=False)
        decides.append(planned.records[0]["decides"]["size"])
    assert decides == [[64, 96], [96, 64], 96]


# --- folders called like a known model --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["sd-v1-5", "tiny-lcm"])
def test_a_folder_called_like_a_known_model_is_not_that_model(tiny, tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    with quiet():
        small_text_pipe(tiny, 12).save_pretrained(name)
        pipe = StableDiffusionPipeline.from_pretrained(name)
    pipe.set_progress_bar_config(disable=True)
    assert pipe.config._name_or_path == name and known_model(pipe) is None
    assert model_name(pipe) == f"./{name}", "a record must not name the known model"
    assert decinb.image_size(pipe) == 96 and defaults_of(pipe) == {} and not draws_scenes(pipe)
    own = pipe(PROMPT, num_inference_steps=2, generator=seeded()).images[0]
    made = run_sweep(pipe, None, PROMPT, [{"num_inference_steps": 2}], progress=False)
    assert made.images[0].size == own.size and levels(made.images[0], own) <= 1
    record = plan(pipe, None, PROMPT, [{}], timed=False).records[0]
    assert (record["num_inference_steps"], record["guidance_scale"]) == (50, 7.5)


def test_what_is_made_of_a_known_model_is_known(tiny, tmp_path, monkeypatch):
    made = [
        tiny,
        copy.deepcopy(tiny),
        decinb.load_pipeline(tiny, task="text-to-image"),
        decinb.DeciDiffusionPipeline.from_pipe(tiny),
        StableDiffusionImg2ImgPipeline.from_pipe(tiny, unet=tiny.unet),
    ]
    assert all(known_model(pipe) is MODELS["tiny"] for pipe in made)
    monkeypatch.chdir(tmp_path)
    with quiet():
        tiny.save_pretrained("tiny")
        assert known_model(StableDiffusionPipeline.from_pretrained("tiny")) is None
    assert known_model(decinb.load_pipeline("./tiny", device="cpu")) is None


# --- pipelines that share a text encoder ------------------------------------------------------------------------------


def pair(pipe):
    """Return two pipelines that share all but the U-Net and the scheduler."""
    own = {"unet": copy.deepcopy(pipe.unet), "scheduler": copy.deepcopy(pipe.scheduler)}
    return pipe, type(pipe)(**{**pipe.components, **own})


def test_a_call_leaves_a_shared_text_encoder_as_it_is(pipe):
    one, other = pair(pipe)
    before, during = fingerprint(other), []

    def look(prompt, tokenizer):
        during.append((fingerprint(other), "text_model" in vars(other.text_encoder)))
        return prompt

    one.maybe_convert_prompt = look
    one.encode_prompt(PROMPT, "cpu", 1, False)
    one.encode_prompt(PROMPT, "cpu", 1, False, clip_skip=1)
    assert during == [(before, False)] * 2


def test_two_threads_skip_layers_of_one_text_encoder(pipe):
    one, other = pair(pipe)
    expected = one.encode_prompt(PROMPT, "cpu", 1, False, clip_skip=1)[0]
    inside, both_inside, first_ended = (threading.Event() for _ in range(3))
    made = []

    def of_the_first(prompt, tokenizer):
        inside.set()
        both_inside.wait(30)
        return prompt

    def of_the_second(prompt, tokenizer):
        both_inside.set()
        first_ended.wait(30)
        return prompt

    def encode():
        made.append(one.encode_prompt(PROMPT, "cpu", 1, False, clip_skip=1)[0])
        first_ended.set()

    one.maybe_convert_prompt, other.maybe_convert_prompt = of_the_first, of_the_second
    thread = threading.Thread(target=encode)
    thread.start()
    inside.wait(30)
    made.append(other.encode_prompt(PROMPT, "cpu", 1, False, clip_skip=1)[0])
    thread.join()
    assert len(made) == 2 and all(torch.equal(embeds, expected) for embeds in made)


# --- numbers ----------------------------------------------------------------------------------------------------------


def test_the_last_digit_of_a_strength_decides_a_step_as_in_diffusers(pipe, tmp_path):
    given = {"strength": ALMOST, "num_inference_steps": 10, "guidance_scale": 1.0}
    stock = StableDiffusionImg2ImgPipeline(**pipe.components, requires_safety_checker=False)
    stock.set_progress_bar_config(disable=True)
    expected = stock(PROMPT, IMAGE, **given, generator=seeded()).images[0]
    with count_unet_calls(pipe) as count:
        own = pipe(PROMPT, IMAGE, **given, generator=seeded()).images[0]
    assert count.calls == 7 and levels(own, expected) <= 1
    made = run_sweep(pipe, IMAGE, PROMPT, [given, {**given, "strength": 0.8}], folder=tmp_path, progress=False)
    assert [record["steps_run"] for record in made.records] == [7, 8]
    assert [record["strength"] for record in made.records] == [ALMOST, 0.8]
    assert levels(made.images[0], expected) <= 1 < levels(made.images[1], expected)
    assert len({record["key"] for record in made.records}) == 2
    (file,) = [file for file in tmp_path.glob("*.png") if made.records[0]["key"] in file.name]
    assert file.name.startswith("strength-0.8_") and levels(replay(file, pipe), expected) <= 1


@pytest.mark.parametrize(
    ("strength", "steps_run"),
    [(0.7, 7), (np.float32(0.7), 7), (torch.tensor(0.7), 7), (np.float64(ALMOST), 7), (sum([0.05] * 20), 10)],
)
def test_strengths_of_other_libraries_and_sums_above_1(tiny, strength, steps_run):
    cell = {"strength": strength, "num_inference_steps": 10}
    assert plan(tiny, IMAGE, PROMPT, [cell], timed=False).records[0]["steps_run"] == steps_run


def test_16_bits_without_a_large_value_are_not_taken_for_black(tmp_path):
    pixels = np.asarray(decinb.load_image("day", size=64)).astype(np.uint16)
    for array in (
        pixels,
        pixels.astype(">u2"),
        torch.from_numpy(pixels.astype(np.int32)).to(torch.uint16).permute(2, 0, 1),
    ):
        with pytest.raises(InputError, match="image of uint16 is from .* to 255, so its white may be 255 or 65535"):
            load_image(array)
    assert levels(load_image(pixels.astype(np.int32)), load_image(pixels.astype(np.uint8))) == 0
    assert levels(load_image(pixels * 257), load_image(pixels.astype(np.uint8))) == 0
    assert np.asarray(load_image(np.zeros((64, 64), np.uint16))).max() == 0
    Image.fromarray(np.full((64, 64), 200, np.uint16)).save(tmp_path / "dark.png")  # whose depth the file tells
    assert np.asarray(load_image(tmp_path / "dark.png")).max() == 0
