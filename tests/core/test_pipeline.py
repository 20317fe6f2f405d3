"""The DeciDiffusion pipelines equal those of diffusers, except for defaults and input validation."""

import json
import os
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import (
    AutoPipelineForImage2Image,
    AutoPipelineForText2Image,
    DiffusionPipeline,
    StableDiffusionDepth2ImgPipeline,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionPipeline,
)
from diffusers.utils import logging as diffusers_logging
from PIL import Image

import decinb
from decinb.checkpoints.dummies import dummy
from decinb.loading import load_pipeline
from decinb.models import MODELS
from decinb.unet_nas import UNetNAS
from tests.helpers.fake_hub import SMALL_UNET, digest, small_model

SAME_MACHINE = 1e-4  # the same float32 sums in another process, on pixels from 0 to 1
IMAGE = Image.new("RGB", (64, 64), "teal")


@pytest.fixture(scope="module")
def small(tiny, tmp_path_factory) -> Path:
    return small_model(tiny, tmp_path_factory.mktemp("small") / "model")


def load(folder: Path, **options) -> decinb.DeciDiffusionImg2ImgPipeline:
    return load_pipeline(folder, device="cpu", **options)


def unet_calls(pipe, *args, **kwargs) -> int:
    calls = []
    hook = pipe.unet.register_forward_pre_hook(lambda *_: calls.append(1))
    try:
        pipe(*args, output_type="latent", **kwargs)
    finally:
        hook.remove()
    return len(calls)


def test_the_default_is_thirty_steps(small):
    pipe = load(small)
    assert unet_calls(pipe, "a red house", IMAGE, strength=0.1) == 3
    assert unet_calls(pipe, prompt="a red house", image=IMAGE, strength=0.1, num_inference_steps=None) == 3
    assert unet_calls(pipe, prompt="a red house", image=IMAGE, strength=0.5, num_inference_steps=4) == 2
    assert unet_calls(pipe, "a red house", IMAGE, 0.5, 4) == 2


def test_the_guides_names_and_constructor(tiny, caplog, monkeypatch):
    monkeypatch.setattr(diffusers_logging.get_logger("diffusers"), "propagate", True)
    parts = {name: part for name, part in tiny.components.items() if name != "image_encoder"}
    pipe = decinb.DeciDiffusionPipeline_img2img(**parts, requires_safety_checker=False)
    decinb.DeciDiffusionImg2ImgPipeline(*(parts[n] for n in ("vae", "text_encoder", "tokenizer", "unet", "scheduler")))
    assert caplog.text == ""
    assert type(pipe) is decinb.DeciDiffusionImg2ImgPipeline
    assert (pipe.deci_default_number_of_iterations, pipe.deci_default_guidance_rescale) == (30, 0.7)


RELOAD = """
import sys, torch, numpy, decinb
from PIL import Image
folder, out = sys.argv[1:]
images = []
for name in ("DeciDiffusionImg2ImgPipeline", "DiffusionPipeline", "AutoPipelineForImage2Image"):
    print(name, file=sys.stderr)
    if name == "DiffusionPipeline":
        import diffusers
    cls = getattr(decinb if name.startswith("Deci") else diffusers, name)
    pipe = cls.from_pretrained(folder)
    assert type(pipe.unet) is decinb.unet_nas.UNetNAS
    assert (type(pipe) is cls) == (cls is decinb.DeciDiffusionImg2ImgPipeline)
    images.append(pipe("a red house", Image.new("RGB", (64, 64), "teal"), strength=0.5, num_inference_steps=4,
                       generator=torch.Generator().manual_seed(0), output_type="np").images)
numpy.save(out, numpy.concatenate(images))
try:
    diffusers.DiffusionPipeline.from_pretrained(folder, custom_pipeline=folder, trust_remote_code=True)
except ValueError as error:
    assert "DIFFUSERS_DISABLE_REMOTE_CODE" in str(error), error
else:
    raise SystemExit("remote code would have run")
"""


@pytest.mark.slow
def test_saved_pipeline_loads_in_a_fresh_process_by_three_classes(small, tmp_path):
    pipe = load(small)
    pipe.save_pretrained(tmp_path / "saved")
    (tmp_path / "saved" / "pipeline.py").write_text("raise SystemExit('code from a model folder ran')")
    assert json.loads((tmp_path / "saved" / "model_index.json").read_text())["_class_name"] == (
        "StableDiffusionImg2ImgPipeline"
    )
    child = subprocess.run(
        [sys.executable, "-c", RELOAD, tmp_path / "saved", tmp_path / "images.npy"],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(Path(decinb.__file__).parents[1])},
    )
    assert child.returncode == 0, child.stderr
    through_ours = child.stderr.partition("\nDiffusionPipeline\n")[0]
    assert not any(word in through_ours.lower() for word in ("warn", "expected", "safety", "ignored")), through_ours

    options = {"strength": 0.5, "num_inference_steps": 4, "generator": torch.Generator().manual_seed(0)}
    here = pipe("a red house", IMAGE, output_type="np", **options).images
    for image in np.load(tmp_path / "images.npy"):
        np.testing.assert_allclose(image, here[0], atol=SAME_MACHINE)


def test_the_bundled_folder_is_an_ordinary_diffusers_folder(tiny):
    stock = AutoPipelineForImage2Image.from_pretrained(MODELS["tiny"].source)
    stock.set_progress_bar_config(disable=True)
    options = {"strength": 0.5, "num_inference_steps": 4, "output_type": "np"}
    both = [
        pipe("a red house", IMAGE, **options, generator=torch.Generator().manual_seed(0)).images
        for pipe in (stock, tiny)
    ]
    np.testing.assert_array_equal(*both)


# From one task to another


def share_components(one: DiffusionPipeline, other: DiffusionPipeline) -> bool:
    return all(one.components[name] is other.components[name] for name in one.components)


def test_pipelines_of_other_tasks_share_components(tiny, capfd):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        text = load_pipeline(tiny, task="text-to-image")
        made = [text, decinb.DeciDiffusionPipeline.from_pipe(tiny), AutoPipelineForText2Image.from_pipe(tiny)]
        back = [load_pipeline(text), decinb.DeciDiffusionImg2ImgPipeline.from_pipe(text)]
        back.append(AutoPipelineForImage2Image.from_pipe(text))
    assert {type(pipe) for pipe in made} == {decinb.DeciDiffusionPipeline}
    assert {type(pipe) for pipe in back} == {decinb.DeciDiffusionImg2ImgPipeline}
    assert all(share_components(pipe, tiny) for pipe in (*made, *back))
    assert text.image_size == tiny.image_size
    assert capfd.readouterr() == ("", "")


def test_shared_components_keep_their_dtype(small):
    pipe = load(small, dtype="bfloat16")
    assert decinb.DeciDiffusionPipeline.from_pipe(pipe).unet.dtype == torch.bfloat16 == pipe.unet.dtype


# Text to image


@pytest.fixture(scope="module")
def text_to_image(small) -> decinb.DeciDiffusionPipeline:
    pipe = load(small, task="text-to-image")
    pipe.set_progress_bar_config(disable=True)
    return pipe


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_defaults_of_text_to_image(text_to_image):
    assert unet_calls(text_to_image, "a red house") == 30
    assert unet_calls(text_to_image, "a red house", 64, 64, 2) == 2
    stock = StableDiffusionPipeline(**text_to_image.components, requires_safety_checker=False)
    stock.set_progress_bar_config(disable=True)
    options = {"height": 64, "width": 64, "output_type": "np"}
    ours = text_to_image("a red house", generator=seeded(), **options).images
    by_hand = {"num_inference_steps": 30, "guidance_rescale": 0.7}
    np.testing.assert_array_equal(ours, stock("a red house", generator=seeded(), **options, **by_hand).images)
    unscaled = text_to_image("a red house", generator=seeded(), guidance_rescale=0.0, **options).images
    assert np.abs(ours - unscaled).max() > 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"height": 65}, "height must be a multiple of 8 from 8 to 2048, got 65"),
        ({"width": 4}, "width must be a multiple of 8 from 8 to 2048, got 4"),
        ({"width": "64"}, "width must be a multiple of 8"),
        ({"guidance_rescale": 2}, "guidance_rescale must be from 0 to 1, got 2"),
        ({"hieght": 64}, "unknown argument 'hieght'; did you mean 'height'?"),
        ({"image": IMAGE}, "unknown argument 'image'"),
        ({"strength": 0.5}, "unknown argument 'strength'"),
        ({"prompt": ["a", "b", "c"], "negative_prompt": ["x", "y"]}, "negative_prompt must have 1 or 3 items, got 2"),
        ({"prompt": None}, "prompt must be a string, got None"),
        ({"prompt": None, "prompt_embeds": [1, 2]}, "prompt_embeds must be a float tensor .*, got "),
        ({"prompt": None, "prompt_embeds": torch.zeros(1, 4, 7)}, r"prompt_embeds must be .*, got \(1, 4, 7\)"),
        ({"prompt": None, "prompt_embeds": torch.full((1, 4, 128), torch.nan)}, "prompt_embeds holds NaN"),
        (
            {
                "prompt": None,
                "prompt_embeds": torch.zeros(1, 4, 128),
                "negative_prompt_embeds": torch.zeros(1, 5, 128),
            },
            r"must have the same number of tokens, got prompt_embeds \(1, 4, 128\) and negative_prompt_embeds \(1, 5",
        ),
    ],
)
def test_text_to_image_refuses_bad_arguments(text_to_image, options, message):
    with pytest.raises(decinb.InputError, match=message) as caught:
        text_to_image(**{"prompt": "a red house", "num_inference_steps": 2, **options})
    assert "\n" not in str(caught.value)


def test_text_to_image_is_saved_as_a_diffusers_pipeline(text_to_image, tmp_path):
    text_to_image.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "model_index.json").read_text())["_class_name"] == "StableDiffusionPipeline"
    options = {"num_inference_steps": 2, "guidance_rescale": 0.7, "height": 64, "width": 64, "output_type": "np"}
    ours = text_to_image("a red house", generator=seeded(), **options).images
    for cls in (StableDiffusionPipeline, DiffusionPipeline):
        stock = cls.from_pretrained(tmp_path, local_files_only=True)
        assert type(stock) is StableDiffusionPipeline
        np.testing.assert_allclose(stock("a red house", generator=seeded(), **options).images, ours, atol=SAME_MACHINE)
    assert type(load(tmp_path)) is decinb.DeciDiffusionImg2ImgPipeline


# Latents instead of an image


def test_latents_give_the_same_image_as_in_diffusers(small, text_to_image):
    pipe = load(small)
    pipe.set_progress_bar_config(disable=True)
    latents = text_to_image(
        "a red house", 64, 64, num_inference_steps=2, generator=seeded(), output_type="latent"
    ).images
    stock = StableDiffusionImg2ImgPipeline(**pipe.components, requires_safety_checker=False)
    options = {"prompt": "a red house", "strength": 0.5, "num_inference_steps": 4, "output_type": "np"}
    ours = pipe(image=latents, generator=seeded(), **options).images
    np.testing.assert_array_equal(ours, stock(image=latents, generator=seeded(), **options).images)
    with pytest.raises(decinb.InputError, match="image holds latents with NaN or infinity"):
        pipe(image=latents * torch.nan, **options)


# Depth to image


@pytest.fixture(scope="module")
def depth(tiny) -> decinb.DeciDiffusionDepth2ImgPipeline:
    torch.manual_seed(0)
    dim = tiny.text_encoder.config.hidden_size
    unet = UNetNAS({**SMALL_UNET, "cross_attention_dim": dim}, sample_size=16, in_channels=5).eval()
    seeing = dummy("sd-2-depth")
    pipe = decinb.DeciDiffusionDepth2ImgPipeline(
        vae=tiny.vae,
        text_encoder=tiny.text_encoder,
        tokenizer=tiny.tokenizer,
        unet=unet,
        scheduler=tiny.scheduler,
        depth_estimator=seeing.depth_estimator,
        feature_extractor=seeing.feature_extractor,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_depth_to_image_equals_diffusers_except_for_the_steps(depth):
    image = decinb.load_image("day", size=64)
    assert unet_calls(depth, "a red house", image) == 24  # 30 at a strength of 0.8
    stock = StableDiffusionDepth2ImgPipeline(**depth.components)
    stock.set_progress_bar_config(disable=True)
    options = {"prompt": "a red house", "image": image, "strength": 0.5, "num_inference_steps": 4}
    options["output_type"] = "np"
    near = torch.linspace(0, 1, 64).expand(1, 64, 64)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        both = [depth(**options, depth_map=given, generator=seeded()).images for given in (None, near)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = [stock(**options, depth_map=given, generator=seeded()).images for given in (None, near)]
    np.testing.assert_array_equal(both, theirs)
    assert np.abs(both[0] - both[1]).max() > 0


def test_depth_to_image_is_saved_and_loaded(depth, tmp_path):
    depth.save_pretrained(tmp_path)
    loaded = load(tmp_path)
    assert type(loaded) is decinb.DeciDiffusionDepth2ImgPipeline and digest(loaded) == digest(depth)
    assert type(loaded.unet) is UNetNAS and loaded.image_size == depth.image_size
    for asked in (tmp_path, loaded):
        with pytest.raises(decinb.InputError, match="cannot do 'text-to-image'"):
            load_pipeline(asked, task="text-to-image")
    stock = DiffusionPipeline.from_pretrained(tmp_path, local_files_only=True)
    assert type(stock) is StableDiffusionDepth2ImgPipeline


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"image": torch.zeros(1, 4, 8, 8)}, "image must not be latents here"),
        ({"depth_map": torch.zeros(64, 64)}, r"depth_map must be a float tensor .*, got \(64, 64\)"),
        ({"depth_map": IMAGE}, "depth_map must be a float tensor"),
        ({"depth_map": torch.zeros(1, 64, 64)}, "depth_map is constant"),
        ({"depth_map": torch.full((1, 64, 64), torch.inf)}, "depth_map holds NaN or infinity"),
        (
            {"depth_map": torch.rand(3, 64, 64), "prompt": ["a", "b"]},
            "prompt must have 1 or 3 items, got 2 .image has 1, prompt has 2, depth_map has 3",
        ),
    ],
)
def test_depth_to_image_refuses_bad_arguments(depth, options, message):
    with pytest.raises(decinb.InputError, match=message):
        depth(**{"prompt": "a red house", "image": IMAGE, "num_inference_steps": 2, **options})
