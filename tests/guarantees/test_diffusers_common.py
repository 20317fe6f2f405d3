"""The checks that diffusers applies to every pipeline and model of its own, written anew for ours.

Each test bears the name that its like has in diffusers' ``PipelineTesterMixin`` (and the mixins beside it, and the file
of the stock image to image) or, below, in ``ModelTesterMixin``; the tolerances are theirs or closer.
"""

import inspect

import accelerate
import diffusers
import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionPipeline,
)
from diffusers.hooks import apply_group_offloading
from diffusers.schedulers import KarrasDiffusionSchedulers
from PIL import Image

import decinb
from decinb import DeciDiffusionImg2ImgPipeline, InputError, UNetNAS
from tests.helpers.fake_hub import SMALL_UNET

SAME = 1e-4  # where diffusers allows as much or more
PROMPT = "a painting of a red house"


@pytest.fixture(scope="module")
def folder(tiny, tmp_path_factory):
    """The trained model: an untrained one makes latents in which the VAE magnifies rounding a thousand times."""
    folder = tmp_path_factory.mktemp("tiny") / "model"
    tiny.save_pretrained(folder)
    return folder


@pytest.fixture
def pipe(folder) -> DeciDiffusionImg2ImgPipeline:
    return quiet(decinb.load_pipeline(folder, device="cpu"))


def quiet(pipe):
    pipe.set_progress_bar_config(disable=True)
    return pipe


def picture(colour: str = "teal") -> Image.Image:
    image = Image.new("RGB", (64, 64), colour)
    image.paste("white", (16, 16, 40, 48))
    return image


def dummy(**changes) -> dict:
    """``get_dummy_inputs``: fresh, with a generator of its own."""
    given = {"prompt": PROMPT, "image": picture(), "strength": 1.0, "num_inference_steps": 2, "guidance_scale": 6.0}
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


def test_save_load_local(pipe, tmp_path):
    pipe.save_pretrained(tmp_path)
    again = quiet(DeciDiffusionImg2ImgPipeline.from_pretrained(tmp_path))
    assert difference(pipe(**dummy()).images, again(**dummy()).images) < SAME


def test_save_load_optional_components(pipe, tmp_path):
    for name in pipe._optional_components:
        setattr(pipe, name, None)
    pipe.save_pretrained(tmp_path)
    again = quiet(DeciDiffusionImg2ImgPipeline.from_pretrained(tmp_path))
    assert all(getattr(again, name) is None for name in pipe._optional_components)
    assert difference(pipe(**dummy()).images, again(**dummy()).images) < SAME


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_save_load_float16(pipe, tmp_path, dtype):
    pipe.to(dtype)
    pipe.save_pretrained(tmp_path)
    again = DeciDiffusionImg2ImgPipeline.from_pretrained(tmp_path, torch_dtype=dtype)
    for name in ("unet", "vae", "text_encoder"):
        mine, theirs = getattr(pipe, name).state_dict(), getattr(again, name).state_dict()
        assert getattr(again, name).dtype == dtype
        assert mine.keys() == theirs.keys() and all(torch.equal(mine[key], theirs[key]) for key in mine)


def test_loading_with_variants(pipe, tmp_path):
    pipe.save_pretrained(tmp_path, variant="fp16")
    assert (tmp_path / "unet" / "diffusion_pytorch_model.fp16.safetensors").is_file()
    again = quiet(DeciDiffusionImg2ImgPipeline.from_pretrained(tmp_path, variant="fp16"))
    assert difference(pipe(**dummy()).images, again(**dummy()).images) < SAME


def test_inference_batch_consistent(pipe):
    prompts = [PROMPT, "a sketch", "a very long prompt " * 3]
    for size in (1, 2, 3):
        assert len(pipe(**dummy(prompt=prompts[:size], image=[picture()] * size)).images) == size


def test_inference_batch_single_identical(pipe):
    generators = [torch.Generator().manual_seed(seed) for seed in (0, 1)]
    batch = pipe(**dummy(prompt=[PROMPT, "a sketch"], image=[picture(), picture("brown")], generator=generators)).images
    alone = pipe(**dummy(prompt="a sketch", image=picture("brown"), generator=torch.Generator().manual_seed(1))).images
    assert difference(batch[:1], pipe(**dummy()).images) < SAME
    assert difference(batch[1:], alone) < SAME


def test_stable_diffusion_img2img_multiple_init_images(pipe):
    assert pipe(**dummy(prompt=[PROMPT] * 2, image=[picture()] * 2)).images.shape == (2, 64, 64, 3)


def test_dict_tuple_outputs_equivalent(pipe):
    assert difference(pipe(**dummy()).images, pipe(**dummy(return_dict=False))[0]) == 0


def test_float16_inference_no_nan(pipe):  # bfloat16 on the CPU, where half precision is slow
    full = pipe(**dummy()).images
    half = pipe.to(torch.bfloat16)(**dummy()).images
    assert np.isfinite(half).all()
    assert np.abs(full - half).mean() < 0.05


def test_to_device_and_to_dtype(pipe):
    pipe.to("cpu")
    assert {part.device.type for part in (pipe.unet, pipe.vae, pipe.text_encoder)} == {"cpu"}
    pipe.to(dtype=torch.bfloat16)
    assert {part.dtype for part in (pipe.unet, pipe.vae, pipe.text_encoder)} == {torch.bfloat16}


@pytest.mark.parametrize(("number", "prompts"), [(1, 1), (2, 1), (1, 2), (2, 2)])
def test_num_images_per_prompt(pipe, number, prompts):
    images = pipe(**dummy(prompt=[PROMPT] * prompts, image=[picture()] * prompts, num_images_per_prompt=number)).images
    assert len(images) == number * prompts


def test_cfg(pipe):
    plain = pipe(**dummy(guidance_scale=1.0)).images
    assert difference(plain, pipe(**dummy(guidance_scale=6.0)).images) > 1e-3


def test_negative_prompt(pipe):  # of the file of the stock image to image
    assert difference(pipe(**dummy()).images, pipe(**dummy(negative_prompt="trees")).images) > 1e-4


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


@pytest.mark.parametrize("offload", ["sequential", "group"])
def test_offload_forward_pass(pipe, offload):  # with the hooks alone: to the CPU from the CPU
    before = pipe(**dummy()).images
    if offload == "sequential":
        for model in (pipe.unet, pipe.vae, pipe.text_encoder):
            accelerate.cpu_offload(model, torch.device("cpu"), offload_buffers=True)
    else:
        for model in (pipe.unet, pipe.vae):
            apply_group_offloading(model, torch.device("cpu"), offload_type="leaf_level", use_stream=False)
    for _ in range(2):  # once more: the hooks must leave it as they found it
        assert difference(before, pipe(**dummy()).images) < SAME


def test_model_cpu_offload_is_refused_clearly_without_a_gpu(pipe):
    if torch.cuda.is_available() or torch.backends.mps.is_available():
        pipe.enable_model_cpu_offload()
        assert np.isfinite(pipe(**dummy()).images).all()
    else:
        with pytest.raises(RuntimeError, match="requires accelerator"):
            pipe.enable_model_cpu_offload()


def test_layerwise_casting_inference(pipe):
    pipe.unet.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
    assert np.isfinite(pipe(**dummy()).images).all()


def test_attention_slicing_forward_pass(pipe):
    before = pipe(**dummy()).images
    pipe.enable_attention_slicing(slice_size=1)
    assert difference(before, pipe(**dummy()).images) < SAME


def test_vae_slicing_and_tiling(pipe):
    batch = {"prompt": [PROMPT] * 2, "image": [picture()] * 2}
    before = pipe(**dummy(**batch)).images
    pipe.vae.enable_slicing()
    pipe.vae.enable_tiling()
    assert difference(before, pipe(**dummy(**batch)).images) < 0.5  # tiles are blended: theirs is as wide
    pipe.vae.disable_tiling()
    assert difference(before, pipe(**dummy(**batch)).images) < SAME


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of scipy, in DEIS
def test_karras_schedulers_shape(pipe):
    config = {**pipe.scheduler.config, "skip_prk_steps": True}  # as there: PNDM else needs more steps
    shapes = {}
    for kind in KarrasDiffusionSchedulers:
        if kind.name not in ("LMSDiscreteScheduler", "DPMSolverSDEScheduler"):  # ask for scipy, torchsde
            pipe.scheduler = getattr(diffusers, kind.name).from_config(config)
            shapes[kind.name] = pipe(**dummy(num_inference_steps=3, output_type="latent")).images.shape
    assert len(shapes) > 10 and len(set(shapes.values())) == 1


def test_pt_np_pil_outputs_equivalent(pipe):
    np_image = pipe(**dummy(output_type="np")).images[0]
    pt_image = pipe(**dummy(output_type="pt")).images[0].permute(1, 2, 0).numpy()
    pil_image = pipe(**dummy(output_type="pil")).images[0]
    assert difference(np_image, pt_image) < SAME
    assert difference(np.round(np_image * 255), pil_image) == 0


def test_pt_np_pil_inputs_equivalent(pipe):
    array = np.asarray(picture(), np.float32)[None] / 255
    pil, as_np, as_pt = (
        pipe(**dummy(image=image)).images for image in (picture(), array, torch.tensor(array).permute(0, 3, 1, 2))
    )
    assert difference(pil, as_np) < SAME and difference(pil, as_pt) < SAME


def test_latent_output_decodes_to_the_picture(pipe):
    latents = pipe(**dummy(output_type="latent")).images
    with torch.no_grad():
        pixels = pipe.vae.decode(latents / pipe.vae.config.scaling_factor)[0]
    decoded = pipe.image_processor.postprocess(pixels, output_type="np")
    assert difference(decoded, pipe(**dummy()).images) < SAME


def test_encode_prompt_works_in_isolation(pipe):
    alone = DeciDiffusionImg2ImgPipeline(None, pipe.text_encoder, pipe.tokenizer, None, None)
    with torch.no_grad():
        embeds, negative = alone.encode_prompt(PROMPT, torch.device("cpu"), 1, True)
    without = quiet(DeciDiffusionImg2ImgPipeline(**{**pipe.components, "tokenizer": None, "text_encoder": None}))
    images = without(**dummy(prompt=None, prompt_embeds=embeds, negative_prompt_embeds=negative)).images
    assert difference(images, pipe(**dummy()).images) < SAME


def test_from_pipe_consistent_config_and_forward_pass(pipe):
    stock = StableDiffusionPipeline.from_pipe(pipe, unet=pipe.unet)  # which it does not take over unasked
    again = quiet(DeciDiffusionImg2ImgPipeline.from_pipe(stock))
    assert dict(again.config).keys() == dict(pipe.config).keys()
    assert difference(pipe(**dummy()).images, again(**dummy()).images) == 0
    assert all(getattr(again, name) is part for name, part in pipe.components.items())


def test_scheduler_can_be_replaced(pipe):
    before = pipe(**dummy()).images
    pipe.scheduler = DPMSolverMultistepScheduler.from_config(pipe.scheduler.config)
    assert difference(before, pipe(**dummy()).images) > 1e-3
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    assert np.isfinite(pipe(**dummy()).images).all()


def test_freeu(pipe):  # there it works, here it is refused: the stages it scales are not those of U-Net-NAS
    before = pipe(**dummy()).images
    with pytest.raises(InputError, match="FreeU.*run it without"):
        pipe.enable_freeu(s1=0.9, s2=0.2, b1=1.2, b2=1.4)
    pipe.disable_freeu()
    assert difference(before, pipe(**dummy()).images) == 0


def test_fused_qkv_projections(pipe):
    before = pipe(**dummy()).images
    pipe.fuse_qkv_projections()
    fused = pipe(**dummy()).images
    pipe.unfuse_qkv_projections()
    assert difference(before, fused) < 1e-2 and difference(before, pipe(**dummy()).images) < SAME


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
