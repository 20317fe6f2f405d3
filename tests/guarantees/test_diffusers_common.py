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
    AutoencoderKL,
    AutoencoderTiny,
    PNDMScheduler,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from diffusers.hooks import apply_group_offloading
from diffusers.schedulers import KarrasDiffusionSchedulers
from PIL import Image
from transformers import CLIPTextConfig, CLIPTextModel

import decinb
from decinb import DeciDiffusionImg2ImgPipeline, DeciDiffusionPipeline, InputError, UNetNAS
from decinb.pipeline import DeciDiffusionDepth2ImgPipeline
from decinb.utils import validation
from tests.helpers.fake_hub import SMALL_UNET
from tests.helpers.modes import IN_GROUPS

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


OURS = {  # what differs from diffusers: the publisher's defaults
    DeciDiffusionImg2ImgPipeline: {"num_inference_steps": 30},
    DeciDiffusionPipeline: {"num_inference_steps": 30, "guidance_rescale": 0.7},
    DeciDiffusionDepth2ImgPipeline: {"num_inference_steps": 30},
}


@pytest.mark.parametrize("cls", OURS)
def test_pipeline_call_signature(cls):
    stock = next(base for base in cls.__mro__ if base.__module__.startswith("diffusers."))
    theirs = {name: one.default for name, one in inspect.signature(stock.__call__).parameters.items()}
    ours = {name: one.default for name, one in inspect.signature(cls.__call__).parameters.items()}
    assert list(ours) == list(theirs) and ours == theirs | OURS[cls]
    assert "Args:" in inspect.getdoc(cls.__call__)


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
    with pytest.raises(InputError, match="FreeU.*U-Net-NAS does not have"):
        tiny.enable_freeu(s1=0.9, s2=0.2, b1=1.2, b2=1.4)


# --- on the components and inputs of diffusers' tests: 32 x 32 pixels, a VAE of factor 2, floats in batches -----------


@pytest.fixture(scope="module")
def parts(tiny) -> dict:
    """Components as in ``get_dummy_components`` of the stock image to image, with the bundled tokenizer."""
    torch.manual_seed(0)
    length = tiny.tokenizer.model_max_length
    text = CLIPTextConfig(
        vocab_size=len(tiny.tokenizer),
        max_position_embeddings=length,
        eos_token_id=tiny.tokenizer.eos_token_id,
        hidden_size=32,
        intermediate_size=37,
        num_attention_heads=4,
        num_hidden_layers=5,
    )
    unet = UNet2DConditionModel(
        sample_size=32,
        block_out_channels=(32, 64),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=32,
    )
    vae = AutoencoderKL(
        block_out_channels=(32, 64),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
    )
    return {
        "unet": unet.eval(),
        "vae": vae.eval(),
        "text_encoder": CLIPTextModel(text).eval(),
        "tokenizer": tiny.tokenizer,
        "scheduler": PNDMScheduler(skip_prk_steps=True, steps_offset=1),
        "safety_checker": None,
        "feature_extractor": None,
    }


@pytest.fixture
def pair(parts) -> tuple[DeciDiffusionImg2ImgPipeline, StableDiffusionImg2ImgPipeline]:
    """Our pipeline and the stock one, with the same components."""
    return tuple(quiet(cls(**parts)) for cls in (DeciDiffusionImg2ImgPipeline, StableDiffusionImg2ImgPipeline))


def pixels(images: int = 1, side: int = 32) -> torch.Tensor:
    return torch.rand(images, 3, side, side, generator=torch.Generator().manual_seed(0))


def as_numpy(images: torch.Tensor) -> np.ndarray:
    return images.permute(0, 2, 3, 1).numpy()


def as_pil(images: torch.Tensor) -> list[Image.Image]:
    return [Image.fromarray((255 * one).round().astype(np.uint8)) for one in as_numpy(images)]


def same_as_stock(pair, **changes) -> np.ndarray:
    ours, stock = (pipe(**dummy(**{"image": pixels(), **changes})).images for pipe in pair)
    assert difference(ours, stock) == 0
    return ours


def test_stable_diffusion_img2img_default_case_and_negative_prompt(pair):
    assert same_as_stock(pair).shape == (1, 32, 32, 3)
    assert difference(same_as_stock(pair), same_as_stock(pair, negative_prompt="french fries")) > SAME


@pytest.mark.filterwarnings("ignore:Passing `image` as a list of 4d")
def test_pt_np_pil_inputs_equivalent(pair):
    image = pixels(2)
    both = {"prompt": [PROMPT] * 2, "num_inference_steps": 1}
    by_tensor = same_as_stock(pair, image=image, **both)
    for given in (as_numpy(image), list(image), list(as_numpy(image)), [image[:1], image[1:]]):
        assert difference(by_tensor, same_as_stock(pair, image=given, **both)) == 0
    assert difference(by_tensor, same_as_stock(pair, image=as_pil(image), **both)) < 1e-2  # rounded to 256 levels
    same_as_stock(pair, image=image[0], num_inference_steps=1)


def test_pt_np_pil_outputs_equivalent(pair):
    by_numpy, by_tensor, by_pil = (
        pair[0](**dummy(image=pixels(), output_type=kind)).images for kind in ("np", "pt", "pil")
    )
    assert difference(by_numpy, as_numpy(by_tensor)) < SAME
    assert difference(by_numpy, np.asarray(by_pil[0])[None] / 255) < 1e-2


def test_stable_diffusion_img2img_multiple_init_images(pair):
    assert same_as_stock(pair, image=pixels(2), prompt=[PROMPT] * 2).shape == (2, 32, 32, 3)


def test_stable_diffusion_img2img_num_images_per_prompt(pair):
    assert len(same_as_stock(pair, num_images_per_prompt=2)) == 2
    assert len(pair[0](**dummy(image=pixels(), prompt=[PROMPT] * 2, num_images_per_prompt=2)).images) == 4


def test_one_image_for_several_prompts(pair, recwarn):
    prompts = [PROMPT, "a blue tree"]
    recwarn.clear()
    pair[0](**dummy(image=pixels(), prompt=prompts))
    assert not [one for one in recwarn if "initial images" in str(one.message)], "it is not deprecated here"
    assert len(same_as_stock(pair, prompt=prompts)) == 2
    assert len(same_as_stock(pair, prompt=prompts, num_images_per_prompt=2)) == 4
    same_as_stock(pair, prompt=prompts, image=torch.ones(1, 4, 8, 8))  # latents


def test_inference_batch_consistent(pair):
    for size in (2, 3):
        prompts = [" ".join([PROMPT] * (i + 1)) for i in range(size)]
        generators = [torch.Generator().manual_seed(i) for i in range(size)]
        images = pair[0](**dummy(image=pixels(size), prompt=prompts, generator=generators)).images
        assert images.shape == (size, 32, 32, 3)


def test_latents_input(pair):
    pipe, image = pair[0], pixels()
    with torch.no_grad():
        latents = pipe.vae.encode(2 * image - 1).latent_dist.mode() * pipe.vae.config.scaling_factor
    assert same_as_stock(pair, image=latents).shape == (1, 32, 32, 3)


@pytest.mark.parametrize(
    "scheduler", ["LCMScheduler", "EulerAncestralDiscreteScheduler", "DPMSolverMultistepScheduler"]
)
def test_stable_diffusion_img2img_with_other_schedulers(parts, scheduler):
    changed = {**parts, "scheduler": getattr(diffusers, scheduler).from_config(parts["scheduler"].config)}
    classes = (DeciDiffusionImg2ImgPipeline, StableDiffusionImg2ImgPipeline)
    same_as_stock([quiet(cls(**changed)) for cls in classes], num_inference_steps=4, strength=0.75)


def test_stable_diffusion_img2img_tiny_autoencoder(parts):
    torch.manual_seed(0)
    small = {"encoder_block_out_channels": (32, 32), "decoder_block_out_channels": (32, 32)}
    vae = AutoencoderTiny(**small, num_encoder_blocks=(1, 1), num_decoder_blocks=(1, 1)).eval()
    classes = (DeciDiffusionImg2ImgPipeline, StableDiffusionImg2ImgPipeline)
    same_as_stock([quiet(cls(**{**parts, "vae": vae})) for cls in classes])


def test_attention_slicing_and_vae_slicing_and_tiling_forward_pass(pair):
    pipe = pair[0]
    plain = pipe(**dummy(image=pixels(2), prompt=[PROMPT] * 2)).images
    pipe.enable_attention_slicing()
    pipe.vae.enable_slicing()
    sliced = pipe(**dummy(image=pixels(2), prompt=[PROMPT] * 2)).images
    pipe.disable_attention_slicing()
    pipe.vae.disable_slicing()
    assert difference(plain, sliced) < 1e-3
    pipe.vae.enable_tiling()
    assert pipe(**dummy(image=pixels())).images.shape == (1, 32, 32, 3)
    pipe.vae.disable_tiling()


@pytest.mark.parametrize("variant", [None, "fp16"])
def test_save_load_local_and_variants(pipe, tmp_path, variant):
    pipe.save_pretrained(tmp_path, variant=variant)
    again = quiet(DeciDiffusionImg2ImgPipeline.from_pretrained(tmp_path, variant=variant))
    assert difference(pipe(**dummy()).images, again(**dummy()).images) < SAME
    assert type(again.scheduler) is type(pipe.scheduler)
    if variant:
        assert all(variant in file.name for file in tmp_path.rglob("*.safetensors"))


def test_to_dtype(pipe):
    networks = (pipe.unet, pipe.vae, pipe.text_encoder)
    assert all(network.dtype == torch.float32 for network in networks)
    pipe.to(dtype=torch.float64)
    assert all(network.dtype == torch.float64 for network in networks)


def test_callback_of_older_versions(pair):
    seen = []
    for pipe in pair:
        with pytest.warns(FutureWarning, match="callback"):
            more = {"callback": lambda step, timestep, latents: seen.append((step, tuple(latents.shape)))}
            pipe(**dummy(image=pixels(), callback_steps=1, **more))
    half = len(seen) // 2
    assert half and seen[:half] == seen[half:] and seen[0][1] == (1, 4, 16, 16)


# --- beyond them: what diffusers would take or refuse late -----------------------------------------------------------


@pytest.mark.parametrize("size", [(2, 6), (10, 4), (33, 31)])
def test_the_smallest_image_is_one_latent_pixel(pair, size):
    image = as_pil(pixels(1, 33))[0].crop((0, 0, *size))
    made = pair[0](**dummy(image=image)).images
    assert made.shape == (1, size[1] // 2 * 2, size[0] // 2 * 2, 3)


@pytest.mark.parametrize("size", [(8, 8), (8, 24), (40, 16)])
def test_the_smallest_image_of_unet_nas(pipe, size):
    assert pipe(**dummy(image=sample().resize(size))).images.shape == (1, size[1], size[0], 3)
    with pytest.raises(InputError, match="at least 8 x 8 pixels, got 7 x 8"):
        pipe(**dummy(image=sample().resize((7, 8))))


def test_one_pixel_in_each_group_of_a_group_norm_is_refused(parts):
    vae = AutoencoderKL(
        block_out_channels=(32, 32),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
    )
    pipe = quiet(DeciDiffusionImg2ImgPipeline(**{**parts, "vae": vae}))
    with pytest.raises(InputError, match="image is too small for the group norms of this model"):
        pipe(**dummy(image=pixels(1, 2)))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image": 2 * pixels() - 1}, "from 0 to 1, got -.* to .*; halve it and add 0.5"),
        ({"image": pixels() * float("nan")}, "image holds NaN or infinity"),
        ({"image": pixels().to("meta")}, "image must be an ordinary tensor, got one that is on the meta device"),
        ({"image": [pixels()[0], pixels(1, 16)[0]]}, r"image\[1\] has 16 x 16 pixels and image\[0\] 32 x 32"),
        ({"image": pixels(3), "prompt": [PROMPT] * 2}, "image has 3, prompt has 2"),
        ({"clip_skip": 50}, "clip_skip must be an integer from 0 to 5, got 50"),
        ({"clip_skip": -1}, "clip_skip must be an integer from 0 to 5, got -1"),
        ({"cross_attention_kwargs": 5}, "cross_attention_kwargs must be a dict"),
        ({"ip_adapter_image": sample()}, "ip_adapter_image must be left out"),
        ({"timesteps": [9, 5]}, "timesteps must be left out: PNDMScheduler takes no custom timesteps"),
        ({"timesteps": [9, 5], "sigmas": [1.0, 0.5]}, "leave out one of them"),
        ({"callback": print, "callback_steps": 1.5}, "callback_steps must be an integer"),
    ],
)
def test_what_diffusers_refuses_late_is_refused_first(pair, changes, message):
    with pytest.raises(InputError, match=message) as caught:
        pair[0](**dummy(**{"image": pixels(), **changes}))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["vae", "unet", "scheduler", "text_encoder", "tokenizer"])
def test_a_component_that_was_taken_away_is_named(pair, name):
    setattr(pair[0], name, None)
    with pytest.raises(InputError, match=f"this pipeline has no {name}: set it, as in pipe.{name} = ..."):
        pair[0](**dummy(image=pixels()))


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


@pytest.mark.skipif(not IN_GROUPS, reason="diffusers 0.39 offloads in groups only with an accelerator")
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
