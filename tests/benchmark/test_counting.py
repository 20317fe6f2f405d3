"""Counted parameters, FLOPs and U-Net calls, for notebook 06."""

import pytest
import torch
from diffusers import DDIMScheduler, PNDMScheduler, StableDiffusionImg2ImgPipeline

from decinb.benchmark import counting
from tests.helpers.small import small_nas, small_vae

FLOPS_TOLERANCE = 0.005  # the known counts are given to three digits
GROWTH = 3.5  # for four times the pixels: the layers for the prompt and the timestep cost the same


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Run on one thread: for small networks a second one costs more than it saves, much more on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def costs():
    return {name: counting.count(network) for name, network in counting.NETWORKS.items()}


@pytest.fixture(scope="module")
def small_cost():
    return counting.count(small_nas, size=8)


@pytest.mark.parametrize(
    ("name", "parameters", "tflop"), [("U-Net-NAS", 814746884, 0.614), ("SD v1.5", 859520964, 0.803)]
)
def test_the_two_unets_have_their_known_cost(costs, name, parameters, tflop):
    cost = costs[name]
    assert cost.parameters == parameters
    assert cost.flops / 1e12 == pytest.approx(tflop, rel=FLOPS_TOLERANCE)
    assert sum(block.flops for block in cost.blocks) == cost.flops
    assert sum(block.parameters for block in cost.blocks) == cost.parameters
    assert cost.blocks[-1].name == "rest"


def test_blocks_are_in_the_order_they_run_with_their_contents(costs):
    nas, sd = (costs[name].blocks[:-1] for name in ("U-Net-NAS", "SD v1.5"))
    assert [(b.name, b.side, b.transformers) for b in nas] == [
        ("down_blocks.0", 64, 0),
        ("down_blocks.1", 32, 1),
        ("down_blocks.2", 16, 3),
        ("mid_block", 8, 2),
        ("up_blocks.0", 16, 6),
        ("up_blocks.1", 32, 3),
        ("up_blocks.2", 64, 0),
    ]
    assert [b.side for b in sd] == [64, 32, 16, 8, 8, 8, 16, 32, 64]
    assert [b.resnets for b in sd] == [2, 2, 2, 2, 2, 3, 3, 3, 3]
    for block in (*nas, *sd):
        assert block.resnet_flops > 0
        assert (block.transformer_flops > 0) == (block.transformers > 0)
        assert block.resnet_flops + block.transformer_flops <= block.flops


def test_a_built_model_counts_like_its_factory_and_is_not_changed(small_cost):
    model = small_nas()
    before = {name: weight.clone() for name, weight in model.named_parameters()}
    assert counting.count(model, size=8) == small_cost
    assert all(torch.equal(weight, before[name]) for name, weight in model.named_parameters())
    assert model(torch.zeros(1, 4, 8, 8), 1, torch.zeros(1, 7, 16)).sample.device.type == "cpu"


def test_flops_grow_with_the_size_of_the_latent(small_cost):
    assert counting.count(small_nas, size=16).flops > GROWTH * small_cost.flops


def test_the_other_networks_can_be_counted():
    vae = counting.count(counting.sd15_vae, inputs=(torch.empty(1, 3, 64, 64, device="meta"),))
    text = counting.count(counting.sd15_text_encoder, inputs=(torch.zeros(1, 77, dtype=torch.long, device="meta"),))
    assert (vae.parameters, text.parameters) == (83653863, 123060480)
    assert [block.name for block in vae.blocks] == ["encoder", "decoder", "rest"]
    assert text.flops > 0


# --- counting calls ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pipe():
    scheduler = DDIMScheduler(steps_offset=1, clip_sample=False)
    pipe = StableDiffusionImg2ImgPipeline(
        small_vae(), None, None, small_nas(), scheduler, None, None, requires_safety_checker=False
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def run(pipe, **arguments):
    text = torch.zeros(1, 7, 16)
    image = torch.full((1, 3, 64, 64), 0.5)
    pipe(image=image, prompt_embeds=text, negative_prompt_embeds=text, output_type="latent", **arguments)


@pytest.mark.parametrize(("guidance_scale", "rows"), [(7.5, 10), (1.0, 5)])
def test_real_calls_and_rows_are_counted(pipe, guidance_scale, rows):
    with counting.count_unet_calls(pipe) as counted:
        run(pipe, strength=0.5, num_inference_steps=10, guidance_scale=guidance_scale)
    assert (counted.calls, counted.rows) == (5, rows)


def test_calls_are_counted_where_the_formula_is_off_by_one(pipe):
    ddim = pipe.scheduler
    pipe.scheduler = PNDMScheduler(steps_offset=1, skip_prk_steps=True)
    try:
        with counting.count_unet_calls(pipe) as counted:
            run(pipe, strength=0.5, num_inference_steps=10, guidance_scale=1.0)
    finally:
        pipe.scheduler = ddim
    assert counted.calls == 6


def test_counting_ends_with_the_block_even_after_an_error(pipe):
    with pytest.raises(RuntimeError, match="stop"), counting.count_unet_calls(pipe) as counted:
        raise RuntimeError("stop")
    run(pipe, strength=0.5, num_inference_steps=2)
    assert counted.calls == 0
