"""The pipelines around a U-Net-NAS: diffusers' own, but for the defaults and the door."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoPipelineForImage2Image
from diffusers.utils import logging as diffusers_logging
from PIL import Image

import decinb
from decinb.loading import load_pipeline
from decinb.models import MODELS
from tests.fake_hub import small_model

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


def test_thirty_steps_unless_told_otherwise(small):
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
