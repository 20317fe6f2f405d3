"""The checks that diffusers applies to its own pipelines and models, for those parts that are ours.

The names are those of diffusers' ``PipelineTesterMixin`` (and of the mixins and tests of the stock image to image) and
``ModelTesterMixin``. What only exercises diffusers' own code is left to diffusers.
"""

import inspect

import accelerate
import diffusers
import numpy as np
import pytest
import torch
from diffusers import (
    StableDiffusionImg2ImgPipeline,
    StableDiffusionPipeline,
)
from diffusers.hooks import apply_group_offloading
from diffusers.schedulers import KarrasDiffusionSchedulers
from PIL import Image

import decinb
from decinb import DeciDiffusionImg2ImgPipeline, InputError, UNetNAS
from decinb.utils import validation
from tests.helpers.fake_hub import SMALL_UNET

SAME = 1e-4  # diffusers allows as much or more
PROMPT = "a painting of a red house"


@pytest.fixture(scope="module")
def folder(tiny, tmp_path_factory):
    """Save the trained model; the latents of an untrained one would magnify rounding errors a thousand times."""
    folder = tmp_path_factory.mktemp("tiny") / "model"
    tiny.save_pretrained(folder)
    return folder


@pytest.fixture
def pipe(folder) -> DeciDiffusionImg2ImgPipeline:
    return quiet(decinb.load_pipeline(folder, device="cpu"))


def quiet(pipe):
    pipe.set_progress_bar_config(disable=True)
    return pipe


def sample(colour: str = "teal") -> Image.Image:
    image = Image.new("RGB", (64, 64), colour)
    image.paste("white", (16, 16, 40, 48))
    return image


def dummy(**changes) -> dict:
    """Return arguments for a call, as ``get_dummy_inputs`` does, with a new generator."""
    given = {"prompt": PROMPT, "image": sample(), "strength": 1.0, "num_inference_steps": 2, "guidance_scale": 6.0}
    return {**given, "generator": torch.Generator().manual_seed(0), "output_type": "np", **changes}


def difference(one, other) -> float:
    one, other = np.asarray(one, float), np.asarray(other, float)
    assert one.shape == other.shape
    return np.abs(one - other).max()


# --- the pipeline: PipelineTesterMixin --------------------------------------------------------------------------------


def test_pipeline_call_signature(pipe):
    ours = list(inspect.signature(type(pipe).__call__).parameters)
    stock = list(inspect.signature(StableDiffusionImg2ImgPipeline.__call__).parameters)
    assert ours[:5] == stock[:5]


def test_components_function(pipe):
    names = set(inspect.signature(type(pipe).__init__).parameters) - {"self", "requires_safety_checker"}
    assert pipe.components.keys() == names


def test_save_load_optional_components(pipe, tmp_path):
    for name in pipe._optional_components:
        setattr(pipe, name, None)
    pipe.save_pretrained(tmp_path)
    again = quiet(DeciDiffusionImg2ImgPipeline.from_pretrained(tmp_path))
    assert all(getattr(again, name) is None for name in pipe._optional_components)
    assert difference(pipe(**dummy()).images, again(**dummy()).images) < SAME


def test_inference_batch_single_identical(pipe):
    generators = [torch.Generator().manual_seed(seed) for seed in (0, 1)]
    batch = pipe(**dummy(prompt=[PROMPT, "a sketch"], image=[sample(), sample("brown")], generator=generators)).images
    alone = pipe(**dummy(prompt="a sketch", image=sample("brown"), generator=torch.Generator().manual_seed(1))).images
    assert difference(batch[:1], pipe(**dummy()).images) < SAME
    assert difference(batch[1:], alone) < SAME


def test_dict_tuple_outputs_equivalent(pipe):
    assert difference(pipe(**dummy()).images, pipe(**dummy(return_dict=False))[0]) == 0


def test_float16_inference_no_nan(pipe):  # bfloat16 on the CPU, where half precision is slow
    full = pipe(**dummy()).images
    half = pipe.to(torch.bfloat16)(**dummy()).images
    assert np.isfinite(half).all()
    assert np.abs(full - half).mean() < 0.05


@pytest.mark.parametrize(("number", "prompts"), [(2, 1), (2, 2)])
def test_num_images_per_prompt(pipe, number, prompts):
    images = pipe(**dummy(prompt=[PROMPT] * prompts, image=[sample()] * prompts, num_images_per_prompt=number)).images
    assert len(images) == number * prompts


def test_cfg_and_negative_prompt(pipe):
    plain, guided, negated = (
        pipe(**dummy(**more)).images for more in ({"guidance_scale": 1.0}, {}, {"negative_prompt": "trees"})
    )
    assert difference(plain, guided) > 1e-3 and difference(guided, negated) > SAME


def test_callback_inputs(pipe):
    seen = []

    def all_inputs(pipe, step, timestep, tensors):
        assert set(tensors) == set(pipe._callback_tensor_inputs)
        seen.append(step)
        if step == pipe.num_timesteps - 1:
            tensors["latents"] = torch.zeros_like(tensors["latents"])
        return tensors

    options = {"callback_on_step_end": all_inputs, "output_type": "latent"}
    latents = pipe(**dummy(**options, callback_on_step_end_tensor_inputs=pipe._callback_tensor_inputs)).images
    assert seen == [0, 1] and not latents.any()

    def one_input(pipe, step, timestep, tensors):
        assert set(tensors) == {"latents"}
        return tensors

    pipe(**dummy(callback_on_step_end=one_input, callback_on_step_end_tensor_inputs=["latents"]))
    with pytest.raises(ValueError, match="bogus"):
        pipe(**dummy(callback_on_step_end=one_input, callback_on_step_end_tensor_inputs=["bogus"]))


def test_callback_cfg(pipe):
    def increase(pipe, step, timestep, tensors):
        pipe._guidance_scale += 1.0
        return tensors

    pipe(**dummy(callback_on_step_end=increase))
    assert pipe.guidance_scale == 6.0 + pipe.num_timesteps


def test_img2img_interrupt(pipe):
    kept = []

    def keep(pipe, step, timestep, tensors):
        kept.append(tensors["latents"])
        return tensors

    def stop(pipe, step, timestep, tensors):
        pipe._interrupt = step == 1
        return tensors

    pipe(**dummy(num_inference_steps=3, callback_on_step_end=keep, output_type="latent"))
    stopped = pipe(**dummy(num_inference_steps=3, callback_on_step_end=stop, output_type="latent")).images
    assert torch.equal(stopped, kept[1])


def test_sequential_offload_forward_pass(pipe):  # with the hooks alone: to the CPU from the CPU
    before = pipe(**dummy()).images
    for model in (pipe.unet, pipe.vae, pipe.text_encoder):
        accelerate.cpu_offload(model, torch.device("cpu"), offload_buffers=True)
    for _ in range(2):  # the second call shows whether the first removed its own hooks only
        assert difference(before, pipe(**dummy()).images) < SAME


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of scipy, in DEIS
def test_karras_schedulers_are_accepted(tiny):
    config = {**tiny.scheduler.config, "skip_prk_steps": True}  # PNDM would need more steps otherwise
    for scheduler in KarrasDiffusionSchedulers:
        if scheduler.name not in ("LMSDiscreteScheduler", "DPMSolverSDEScheduler"):  # need scipy, torchsde
            validation.late_start(3, getattr(diffusers, scheduler.name).from_config(config))


def test_encode_prompt_works_in_isolation(pipe):
    alone = DeciDiffusionImg2ImgPipeline(None, pipe.text_encoder, pipe.tokenizer, None, None)
    with torch.no_grad():
        embeds, negative = alone.encode_prompt(PROMPT, torch.device("cpu"), 1, True)
    without = quiet(DeciDiffusionImg2ImgPipeline(**{**pipe.components, "tokenizer": None, "text_encoder": None}))
    images = without(**dummy(prompt=None, prompt_embeds=embeds, negative_prompt_embeds=negative)).images
    assert difference(images, pipe(**dummy()).images) < SAME


def test_from_pipe_consistent_config(pipe):
    stock = StableDiffusionPipeline.from_pipe(pipe, unet=pipe.unet)  # diffusers leaves out a U-Net of another class
    again = DeciDiffusionImg2ImgPipeline.from_pipe(stock)
    assert dict(again.config).keys() == dict(pipe.config).keys()
    assert all(getattr(again, name) is part for name, part in pipe.components.items())


def test_freeu_is_refused(tiny):  # the stages that it scales are not those of U-Net-NAS
    with pytest.raises(InputError, match="FreeU.*run it without"):
        tiny.enable_freeu(s1=0.9, s2=0.2, b1=1.2, b2=1.4)


# --- the U-Net: ModelTesterMixin --------------------------------------------------------------------------------------


@pytest.fixture
def unet() -> UNetNAS:
    torch.manual_seed(0)
    return UNetNAS(SMALL_UNET, sample_size=16).eval()


@torch.no_grad()
def answer(unet, **more):
    generator = torch.Generator().manual_seed(0)
    sample = torch.randn(2, 4, 16, 16, generator=generator).to(unet.dtype)
    text = torch.randn(2, 7, SMALL_UNET["cross_attention_dim"], generator=generator).to(unet.dtype)
    return unet(sample, torch.tensor([10, 500]), encoder_hidden_states=text, **more)


def test_forward_signature():
    assert list(inspect.signature(UNetNAS.forward).parameters)[1:3] == ["sample", "timestep"]


def test_determinism_and_output_shape(unet):
    assert torch.equal(answer(unet).sample, answer(unet).sample)
    assert answer(unet).sample.shape == (2, 4, 16, 16)


def test_outputs_equivalence(unet):
    assert torch.equal(answer(unet).sample, answer(unet, return_dict=False)[0])


@pytest.mark.parametrize("variant", [None, "fp16"])
def test_from_save_pretrained_and_variant(unet, tmp_path, variant):
    unet.save_pretrained(tmp_path, variant=variant)
    again = UNetNAS.from_pretrained(tmp_path, variant=variant)
    assert torch.equal(answer(unet).sample, answer(again).sample)
    if variant:
        with pytest.raises(OSError):
            UNetNAS.from_pretrained(tmp_path)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_from_save_pretrained_dtype(unet, tmp_path, dtype):
    unet.to(dtype).save_pretrained(tmp_path)
    assert UNetNAS.from_pretrained(tmp_path, torch_dtype=dtype).dtype == dtype


def test_sharded_checkpoints(unet, tmp_path):
    unet.save_pretrained(tmp_path, max_shard_size="300KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    assert torch.equal(answer(unet).sample, answer(UNetNAS.from_pretrained(tmp_path)).sample)


def test_getattr_is_correct(unet):
    assert unet.config.sample_size == SMALL_UNET["sample_size"]
    with pytest.raises(AttributeError, match="does_not_exist"):
        _ = unet.does_not_exist


def test_training(unet):
    unet.train()
    generator = torch.Generator().manual_seed(0)
    text = torch.randn(1, 7, SMALL_UNET["cross_attention_dim"], generator=generator)
    unet(torch.randn(1, 4, 16, 16, generator=generator), 10, encoder_hidden_states=text).sample.mean().backward()
    grads = [parameter.grad for parameter in unet.parameters()]
    assert all(grad is not None and grad.isfinite().all() for grad in grads)


def test_group_and_sequential_offload(unet):
    before = answer(unet).sample
    other = UNetNAS.from_config(unet.config)
    other.load_state_dict(unet.state_dict())
    accelerate.cpu_offload(unet, torch.device("cpu"))
    apply_group_offloading(
        other.eval(), torch.device("cpu"), offload_type="block_level", num_blocks_per_group=1, use_stream=False
    )
    assert torch.allclose(before, answer(unet).sample, atol=1e-5)
    assert torch.allclose(before, answer(other).sample, atol=1e-5)


def test_layerwise_casting(unet):
    unet.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
    assert answer(unet).sample.isfinite().all()
