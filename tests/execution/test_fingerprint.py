"""What a pipeline's fingerprint tells apart, and what it does not."""

import copy
import functools

import pytest
import torch
from diffusers import StableDiffusionImg2ImgPipeline
from diffusers.models.attention_processor import AttnProcessor
from peft import LoraConfig
from torch import nn

import decinb
from decinb.benchmark.counting import count_unet_calls
from decinb.execution.fingerprint import fingerprint
from decinb.execution.provenance import active_adapters
from tests.helpers.modes import MODES
from tests.helpers.small import small_pipe, small_sd


@pytest.fixture
def pipe(tiny):
    return small_pipe(tiny)


# --- the same function ---


@pytest.mark.parametrize("change", MODES, ids=lambda change: change.__name__)
def test_how_and_where_a_network_runs_does_not_count(pipe, change):
    before = fingerprint(pipe)
    assert not before.unknown
    change(pipe)
    assert fingerprint(pipe) == before


def test_running_and_counting_do_not_count(pipe):
    before = fingerprint(pipe)
    with count_unet_calls(pipe):
        assert fingerprint(pipe) == before
    image = decinb.load_image("day", 64)
    pipe("a house", image, num_inference_steps=2, strength=1.0)
    decinb.run_sweep(pipe, image, "a house", [{"num_inference_steps": 2, "strength": 1.0}], progress=False)
    assert fingerprint(pipe) == before


def test_another_folder_task_or_class_of_diffusers_does_not_count(tiny, tmp_path):
    before = fingerprint(tiny)
    tiny.save_pretrained(tmp_path)
    assert fingerprint(decinb.load_pipeline(tmp_path, device="cpu")) == before
    assert fingerprint(decinb.load_pipeline(tiny, task="text-to-image")) == before
    stock = StableDiffusionImg2ImgPipeline(**tiny.components, requires_safety_checker=False)
    assert fingerprint(stock) == before


# --- another function ---


class OwnProcessor(AttnProcessor):
    pass


def weight_through_data(pipe):
    next(pipe.unet.parameters()).data.view(-1)[7] += 1e-3


def scaling_factor(pipe):
    pipe.vae.register_to_config(scaling_factor=0.5)


def dropout_on(pipe):
    pipe.text_encoder.train()


def epsilon(pipe):
    next(part for part in pipe.unet.modules() if isinstance(part, nn.GroupNorm)).eps = 0.1


def processor(pipe):
    pipe.vae.set_attn_processor(OwnProcessor())


def resampling(pipe):
    pipe.image_processor.register_to_config(do_normalize=False)


def special_token(pipe):
    pipe.tokenizer = copy.deepcopy(pipe.tokenizer)
    pipe.tokenizer.add_tokens("house")


OTHER = [
    weight_through_data,
    scaling_factor,
    dropout_on,
    epsilon,
    resampling,
    special_token,
    lambda pipe: pipe.vae.enable_tiling(),
    lambda pipe: pipe.to(torch.bfloat16),
    lambda pipe: setattr(pipe.unet, "conv_out", nn.Sequential(pipe.unet.conv_out, nn.Identity())),
]


@pytest.mark.parametrize("change", OTHER, ids=lambda change: change.__name__)
def test_what_changes_images_counts(pipe, change):
    before = fingerprint(pipe)
    change(pipe)
    after = fingerprint(pipe)
    assert after.components != before.components and not after.unknown


def test_free_u_counts(tiny):
    pipe = StableDiffusionImg2ImgPipeline(**{**tiny.components, "unet": small_sd()}, requires_safety_checker=False)
    before = fingerprint(pipe)
    pipe.enable_freeu(s1=0.9, s2=0.2, b1=1.2, b2=1.4)
    assert fingerprint(pipe).components != before.components
    pipe.disable_freeu()
    pipe.enable_freeu(s1=0.8, s2=0.2, b1=1.2, b2=1.4)
    assert fingerprint(pipe).components != before.components


def test_adapters_count_with_their_scales(pipe):
    hashes = [fingerprint(pipe).components["unet"]]
    pipe.unet.add_adapter(LoraConfig(r=2, target_modules=["to_q"], init_lora_weights=False), adapter_name="style")
    assert active_adapters(pipe) == [["style", 1.0]]
    for scale in (1.0, 0.1, 2.0):
        pipe.set_adapters(["style"], [scale])
        assert active_adapters(pipe) == [["style", scale]]
        hashes.append(fingerprint(pipe).components["unet"])
    pipe.disable_lora()
    assert active_adapters(pipe) == []
    hashes.append(fingerprint(pipe).components["unet"])
    assert len(set(hashes)) == 5
    pipe.enable_lora()
    pipe.set_adapters(["style"], [1.0])
    assert fingerprint(pipe).components["unet"] == hashes[1]
    with torch.no_grad():
        next(weight for name, weight in pipe.unet.named_parameters() if "lora_A" in name).view(-1)[0] += 1
    assert fingerprint(pipe).components["unet"] != hashes[1]


# --- what cannot be hashed ---


def hook(pipe):
    pipe.unet.mid_block.register_forward_hook(lambda *_: None)


def pre_hook(pipe):
    pipe.vae.register_forward_pre_hook(functools.partial(print))


def own_forward(pipe):
    forward = pipe.unet.forward
    pipe.unet.forward = lambda *args, **kwargs: forward(*args, **kwargs)


def own_method(pipe):
    pipe.encode_prompt = lambda *args: None


def own_class(pipe):
    class Local(AttnProcessor):
        pass

    pipe.unet.set_attn_processor(Local())


@pytest.mark.parametrize(
    "change", [hook, pre_hook, own_forward, own_method, own_class, processor], ids=lambda one: one.__name__
)
def test_what_cannot_be_hashed_is_named(pipe, change):
    change(pipe)
    where = {
        "own_method": "pipeline.encode_prompt",
        "hook": "unet.mid_block (a hook, ",
        "pre_hook": "vae (a hook",
        "processor": "vae",
    }
    (first, *_) = fingerprint(pipe).unknown
    assert first.startswith(where.get(change.__name__, "unet"))
