"""The stand-ins are the real classes with random weights: built from a seed, run, saved and loaded like any other."""

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
    """The picture that two steps make of the sample picture, as floats from 0 to 1."""
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


def test_it_is_of_the_published_models_classes(name, pipeline):
    assert type(pipeline) is getattr(diffusers, CLASSES[name])
    assert type(pipeline.scheduler) is getattr(diffusers, SCHEDULERS[name])
    assert not any(part.training for part in pipeline.components.values() if isinstance(part, torch.nn.Module))


def test_it_is_small(pipeline):
    assert weights(pipeline).numel() < 3e6


@pytest.mark.parametrize("size", [SIZE, 2 * SIZE])
def test_it_draws_noise(pipeline, size):
    drawn = draw(pipeline, size=size)
    assert drawn.shape == (size, size, 3)
    assert np.isfinite(drawn).all()
    assert drawn.std() > 0.05


def test_it_heeds_its_prompt(pipeline):
    assert np.abs(draw(pipeline) - draw(pipeline, prompt="a blue tree")).max() > 0.01


def test_a_seed_gives_the_same_weights(name, pipeline):
    assert torch.equal(weights(pipeline), weights(dummy(name)))
    assert not torch.equal(weights(pipeline), weights(dummy(name, seed=1)))


def test_random_numbers_of_the_caller_stay_as_they_were(name):
    before = torch.random.get_rng_state()
    dummy(name)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_it_is_saved_and_loaded_again(name, pipeline, tmp_path):
    pipeline.save_pretrained(tmp_path)
    loaders = [DiffusionPipeline, AutoPipelineForImage2Image]
    if name == "sd-2-depth":
        loaders.remove(AutoPipelineForImage2Image)  # it knows no pipeline that takes depth
    for loader in loaders:
        loaded = loader.from_pretrained(tmp_path, local_files_only=True)
        assert type(loaded) is type(pipeline)
        assert torch.equal(weights(loaded), weights(pipeline))
        # Read from a file, weights lie in memory at other addresses, which rounds sums another way.
        assert np.abs(draw(loaded) - draw(pipeline)).max() < 0.05


def test_the_two_text_encoders_and_the_refiners_one():
    base, refiner = dummy("sdxl-base"), dummy("sdxl-refiner")
    assert base.text_encoder is not None and base.text_encoder_2 is not None
    assert not base.config.requires_aesthetics_score
    assert refiner.text_encoder is None and refiner.tokenizer is None
    assert refiner.config.requires_aesthetics_score


def test_the_depth_of_a_picture_goes_into_a_fifth_channel():
    pipeline = dummy("sd-2-depth")
    assert pipeline.unet.config.in_channels == 5
    image = decinb.load_image("day", size=SIZE)
    depth = pipeline.prepare_depth_map([image], None, 1, False, torch.float32, torch.device("cpu"))
    assert depth.shape == (1, 1, SIZE // 8, SIZE // 8)
    assert (depth.min().item(), depth.max().item()) == pytest.approx((-1, 1))


def test_an_unknown_name_is_one_line():
    with pytest.raises(decinb.InputError, match=r"^dummy has no 'sd-3'; it has sd-v1-5, .*kandinsky-2-2$"):
        dummy("sd-3")
