"""Dummy pipelines: the real classes with random weights, built from a seed, run, saved and loaded like any other."""

import diffusers
import numpy as np
import pytest
import torch
from diffusers import AutoPipelineForImage2Image, DiffusionPipeline

import decinb
from decinb.checkpoints.dummies import DUMMIES, SIZE, dummy

CLASSES = {
    "sd-v1-5": "StableDiffusionImg2ImgPipeline",
    "sd-2-depth": "StableDiffusionDepth2ImgPipeline",
    "sdxl-base": "StableDiffusionXLImg2ImgPipeline",
    "sdxl-refiner": "StableDiffusionXLImg2ImgPipeline",
    "kandinsky-2-2": "KandinskyV22Img2ImgCombinedPipeline",
}
SCHEDULERS = {
    "sd-v1-5": "PNDMScheduler",
    "sd-2-depth": "PNDMScheduler",
    "sdxl-base": "EulerDiscreteScheduler",
    "sdxl-refiner": "EulerDiscreteScheduler",
    "kandinsky-2-2": "DDPMScheduler",
}

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore:In CPU autocast")  # diffusers, of itself


def draw(pipeline: DiffusionPipeline, prompt: str = "a red house", size: int = SIZE) -> np.ndarray:
    """Return the image that two steps make of a sample, as floats from 0 to 1."""
    pipeline.set_progress_bar_config(disable=True)
    kandinsky = {"height": size, "width": size, "prior_num_inference_steps": 2}
    return pipeline(
        prompt=prompt,
        image=decinb.load_image("day", size=size),
        strength=1.0,
        num_inference_steps=2,
        generator=torch.Generator().manual_seed(0),
        output_type="np",
        **kandinsky if isinstance(pipeline, diffusers.KandinskyV22Img2ImgCombinedPipeline) else {},
    ).images[0]


def weights(pipeline: DiffusionPipeline) -> torch.Tensor:
    models = [part for _, part in sorted(pipeline.components.items()) if isinstance(part, torch.nn.Module)]
    return torch.cat([parameter.flatten() for model in models for parameter in model.parameters()])


@pytest.fixture(scope="module", params=DUMMIES)
def name(request):
    return request.param


@pytest.fixture(scope="module")
def pipeline(name):
    return dummy(name)


@pytest.fixture(scope="module")
def drawn(pipeline):
    return draw(pipeline)


def test_it_has_the_classes_of_the_published_model(name, pipeline):
    assert type(pipeline) is getattr(diffusers, CLASSES[name])
    assert type(pipeline.scheduler) is getattr(diffusers, SCHEDULERS[name])
    assert not any(part.training for part in pipeline.components.values() if isinstance(part, torch.nn.Module))


def test_it_is_small(pipeline):
    assert weights(pipeline).numel() < 3e6


def test_it_draws_noise(pipeline, drawn):
    for image, size in ((drawn, SIZE), (draw(pipeline, size=2 * SIZE), 2 * SIZE)):
        assert image.shape == (size, size, 3)
        assert np.isfinite(image).all()
        assert image.std() > 0.05


def test_it_follows_its_prompt(pipeline, drawn):
    assert np.abs(drawn - draw(pipeline, prompt="a blue tree")).max() > 0.01


def test_a_seed_gives_the_same_weights(name, pipeline):
    random_state = torch.random.get_rng_state()
    assert torch.equal(weights(pipeline), weights(dummy(name)))
    assert not torch.equal(weights(pipeline), weights(dummy(name, seed=1)))
    assert torch.equal(torch.random.get_rng_state(), random_state), "the caller's random state changed"


def test_it_is_saved_and_loaded(name, pipeline, drawn, tmp_path):
    pipeline.save_pretrained(tmp_path)
    loaders = [DiffusionPipeline, AutoPipelineForImage2Image]
    if name == "sd-2-depth":
        loaders.remove(AutoPipelineForImage2Image)  # it has no pipeline that takes depth
    for loader in loaders:
        loaded = loader.from_pretrained(tmp_path, local_files_only=True)
        assert type(loaded) is type(pipeline)
        assert torch.equal(weights(loaded), weights(pipeline))
    # Loaded weights are at other addresses in memory, which changes the rounding of sums.
    assert np.abs(draw(loaded) - drawn).max() < 0.05


def test_the_text_encoders_of_xl_and_its_refiner():
    base, refiner = dummy("sdxl-base"), dummy("sdxl-refiner")
    assert base.text_encoder is not None and base.text_encoder_2 is not None
    assert not base.config.requires_aesthetics_score
    assert refiner.text_encoder is None and refiner.tokenizer is None
    assert refiner.config.requires_aesthetics_score


def test_the_depth_of_the_input_is_a_fifth_channel():
    pipeline = dummy("sd-2-depth")
    assert pipeline.unet.config.in_channels == 5
    image = decinb.load_image("day", size=SIZE)
    depth = pipeline.prepare_depth_map([image], None, 1, False, torch.float32, torch.device("cpu"))
    assert depth.shape == (1, 1, SIZE // 8, SIZE // 8)
    assert (depth.min().item(), depth.max().item()) == pytest.approx((-1, 1))


def test_an_unknown_name_raises_one_line():
    with pytest.raises(decinb.InputError, match=r"^dummy has no 'sd-3'; it has sd-v1-5, .*kandinsky-2-2$"):
        dummy("sd-3")
