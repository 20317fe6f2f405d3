"""Tests of UNetNAS: the published architecture, exactly, and what diffusers users expect of a U-Net."""

import copy
import itertools
import json
import math
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionImg2ImgPipeline, UNet2DConditionModel
from diffusers.models.attention_processor import (
    Attention,
    AttnProcessor,
    AttnProcessor2_0,
    FusedAttnProcessor2_0,
    SlicedAttnProcessor,
)
from diffusers.utils import logging
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from PIL import Image
from safetensors.torch import load_file, save_file

import decinb
from decinb.errors import InputError, ModelError
from decinb.unet_nas import UNetNAS
from tests.helpers.fake_hub import FORMAT, ORDINARY_UNET, SMALL_UNET, forbid, write_json

FIXTURES = Path(__file__).parents[1] / "fixtures"
REFERENCE = json.loads((FIXTURES / "unet_nas_reference.json").read_text())
V1_PARAMETERS = 814_746_884

REFERENCE_ROUNDING = (
    2.5e-5  # the reference is float32, this is float64; without the mid block's second pass the error is 6e-5
)
FLOAT32_ROUNDING = 1e-4  # both are float32
ROUNDING = 1e-5  # the same sums in another order, in float32, on outputs of order one
HALF = {torch.bfloat16: 0.05, torch.float16: 0.01}  # 8 and 11 bits of precision, rounded at about thirty layers


def wave(shape: tuple[int, ...], offset: float) -> torch.Tensor:
    return torch.sin(0.918273 * torch.arange(math.prod(shape), dtype=torch.float64) + offset).float().reshape(shape)


def fill(model: torch.nn.Module) -> None:
    """Set the weights by a formula, so that they are the same on every system and in every version."""
    for k, (name, parameter) in enumerate(sorted(model.state_dict().items())):
        i = torch.arange(parameter.numel(), dtype=torch.float64)
        value = torch.sin(0.7390851 * i + 1.6180339 * k)
        if parameter.ndim >= 2:
            value = value / math.sqrt(parameter[0].numel())
        else:
            value = 0.1 * value + name.endswith("weight")
        parameter.copy_(value.reshape(parameter.shape))


def inputs(batch: int = 2, height: int = 16, width: int = 16, tokens: int = 7, dim: int = 24) -> tuple:
    timesteps = torch.tensor([981, 500, 1][:batch])
    return wave((batch, 4, height, width), 0.1), timesteps, wave((batch, tokens, dim), 0.5)


@pytest.fixture
def small() -> UNetNAS:
    torch.manual_seed(0)
    return UNetNAS(SMALL_UNET, sample_size=16).eval()


@torch.no_grad()
def run(model: UNetNAS, *given: torch.Tensor, **options) -> torch.Tensor:
    return model(*(given or inputs()), **options).sample


@pytest.mark.parametrize("name", REFERENCE)
def test_outputs_equal_those_of_the_published_definition(name):
    case = REFERENCE[name]
    model = UNetNAS(case["configurations"], sample_size=16).eval()
    assert {key: list(tensor.shape) for key, tensor in model.state_dict().items()} == case["keys"]
    assert sum(parameter.numel() for parameter in model.parameters()) == case["params"]
    fill(model)

    dim = case["configurations"]["cross_attention_dim"]
    sample, _, text = inputs(case["batch"], case["height"], case["width"], case["tokens"], dim)
    timesteps = torch.tensor(case["timesteps"])
    single = run(model, sample, timesteps, text)
    double = run(model.double(), sample.double(), timesteps, text.double())
    for out, tolerance in ((single, FLOAT32_ROUNDING), (double, REFERENCE_ROUNDING)):
        assert out.shape == sample.shape
        flat = out.double().flatten()
        for values, expected in ((flat[:32], case["first"]), (flat[-32:], case["last"])):
            torch.testing.assert_close(values, torch.tensor(expected).double(), atol=tolerance, rtol=0)
        assert flat.mean().item() == pytest.approx(case["mean"], abs=tolerance)
        assert flat.std().item() == pytest.approx(case["std"], abs=tolerance)
        assert flat.abs().sum().item() == pytest.approx(case["abs_sum"], abs=tolerance * flat.numel())


@pytest.mark.parametrize(
    ("mixed", "order"),
    [
        (True, ["RR", "RTR", "RTTT", "RRTRTRRR", "RTRTTTTT", "RTRTRT", "RRR"]),
        (False, ["RR", "RRT", "RTTT", "RRRRRRTT", "RRTTTTTT", "RRRTTT", "RRR"]),
    ],
)
def test_resnets_and_transformers_run_in_the_published_order(mixed, order):
    """Includes the second run of the mid block's first ResNet, on which the reference values depend little."""
    configurations = {**REFERENCE["small"]["configurations"], "mix_block_in_forward": mixed}
    model = UNetNAS(configurations, sample_size=16)
    blocks, ran = [*model.down_blocks, model.mid_block, *model.up_blocks], []
    for block in blocks:
        for member in block.modules_list:
            member.register_forward_pre_hook(lambda module, _, block=block: ran.append((block, module)))
    run(model, *inputs(dim=configurations["cross_attention_dim"]))
    assert ["".join(type(module).__name__[0] for at, module in ran if at is block) for block in blocks] == order
    assert [block for block, _ in itertools.groupby(block for block, _ in ran)] == blocks
    at_mid = [module for block, module in ran if block is model.mid_block]
    assert at_mid == [model.mid_block.modules_list[0], *model.mid_block.modules_list]


def test_the_default_has_the_parameters_of_the_published_checkpoint():
    with torch.device("meta"):
        model = UNetNAS()
    expected = json.loads((FIXTURES / "unet_nas_v1_state_dict.json").read_text())
    assert {key: list(tensor.shape) for key, tensor in model.state_dict().items()} == expected
    assert sum(parameter.numel() for parameter in model.parameters()) == V1_PARAMETERS


def publish_unet(folder: Path, tensors: dict[str, torch.Tensor], configurations: dict = SMALL_UNET) -> Path:
    write_json(folder / "flexible_unet" / "config.json", {**ORDINARY_UNET, "configurations": configurations})
    save_file(tensors, folder / "flexible_unet" / "diffusion_pytorch_model.safetensors", FORMAT)
    return folder


def test_the_published_layout_loads_without_a_warning_or_a_second_unet(small, tmp_path, monkeypatch, caplog):
    publish_unet(tmp_path, small.state_dict())
    forbid(monkeypatch, UNet2DConditionModel)
    built, register = [], torch.nn.Module.register_parameter

    def count(module, name, parameter):
        built.append(parameter.numel() if parameter is not None else 0)
        register(module, name, parameter)

    monkeypatch.setattr(torch.nn.Module, "register_parameter", count)
    monkeypatch.setattr(logging.get_logger("diffusers"), "propagate", True)
    model = UNetNAS.from_pretrained(tmp_path, subfolder="flexible_unet")

    assert sum(built) == sum(parameter.numel() for parameter in small.parameters())
    assert caplog.text == ""
    assert model.config.configurations == SMALL_UNET
    torch.testing.assert_close(run(model), run(small), atol=0, rtol=0)


@pytest.mark.parametrize("error", ["missing", "unexpected", "shape"])
def test_weights_that_do_not_fit_are_refused_by_name(small, tmp_path, error):
    tensors, name = small.state_dict(), "mid_block.modules_list.0.conv1.weight"
    if error == "missing":
        del tensors[name]
    elif error == "unexpected":
        tensors[name := "mid_block.surplus.weight"] = torch.zeros(1)
    else:
        tensors[name] = torch.zeros(1, 2, 3)
    publish_unet(tmp_path, tensors)
    with pytest.raises(ModelError, match=f"flexible_unet.*{name}"):
        UNetNAS.from_pretrained(tmp_path, subfolder="flexible_unet")


def test_other_configurations_are_refused(tmp_path):
    publish_unet(tmp_path, {})
    write_json(tmp_path / "flexible_unet" / "config.json", ORDINARY_UNET)
    with pytest.raises(ModelError, match="configurations"):
        UNetNAS.from_pretrained(tmp_path, subfolder="flexible_unet")
    with pytest.raises(InputError, match=r"missing keys \['temb_dim'\], unknown keys \['tembdim'\]"):
        UNetNAS({"tembdim" if key == "temb_dim" else key: value for key, value in SMALL_UNET.items()})
    with pytest.raises(InputError, match="same length"):
        UNetNAS({**SMALL_UNET, "up_blocks_num_resnets": [2, 2]})


@pytest.mark.slow
def test_saving_and_loading_changes_no_byte(small, tmp_path):
    small.half().save_pretrained(tmp_path / "a")
    again = UNetNAS.from_pretrained(tmp_path / "a", torch_dtype=torch.float16)
    again.save_pretrained(tmp_path / "b")
    a, b = (tmp_path / x / "diffusion_pytorch_model.safetensors" for x in "ab")
    assert a.read_bytes() == b.read_bytes()
    assert again.config.configurations == SMALL_UNET
    for name, tensor in load_file(a).items():
        assert torch.equal(tensor, small.state_dict()[name]), name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(small, dtype):
    expected = run(small)
    small.to(dtype)
    assert {parameter.dtype for parameter in small.parameters()} == {dtype}
    sample, timesteps, text = inputs()
    out = run(small, sample.to(dtype), timesteps, text.to(dtype))
    assert out.dtype == dtype
    assert (out.float() - expected).norm() < HALF[dtype] * expected.norm()


@pytest.mark.parametrize("size", [(17, 16), (10, 13), (8, 24)])
def test_latents_of_any_size(small, size):
    sample, timesteps, text = inputs(1, *size)
    assert run(small, sample, timesteps, text).shape == (1, 4, *size)


def test_rows_of_a_batch_are_independent(small):
    sample, timesteps, text = inputs(batch=3)
    together = run(small, sample, timesteps, text)
    alone = [run(small, sample[i : i + 1], timesteps[i], text[i : i + 1]) for i in range(3)]
    torch.testing.assert_close(together, torch.cat(alone), atol=ROUNDING, rtol=ROUNDING)
    assert torch.equal(run(small, sample, 981, text), run(small, sample, torch.tensor(981), text))


def test_other_conditions_are_refused(small):
    with pytest.raises(InputError, match="timestep and text only"):
        small(*inputs(), added_cond_kwargs={"image_embeds": torch.zeros(1)})


@pytest.mark.slow
def test_compiles_as_one_graph(small):
    torch._dynamo.reset()
    compiled = torch.compile(small, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(run(compiled), run(small), atol=ROUNDING, rtol=ROUNDING)


def test_gradient_checkpointing_gives_the_same_gradients(small):
    def gradients(model: UNetNAS) -> dict[str, torch.Tensor]:
        model.train().zero_grad()
        model(*inputs()).sample.square().mean().backward()
        return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}

    plain = gradients(small)
    recomputed = []
    small.enable_gradient_checkpointing()
    first = small.down_blocks[0].modules_list[0]
    first.register_forward_pre_hook(lambda *_: recomputed.append(1))
    checkpointed = gradients(small)
    assert len(recomputed) == 2, "the block was not run again in the backward pass"
    for name, gradient in plain.items():
        torch.testing.assert_close(checkpointed[name], gradient, atol=ROUNDING, rtol=ROUNDING, msg=name)


def attention_layers(model: UNetNAS) -> list[Attention]:
    return [module for module in model.modules() if isinstance(module, Attention)]


def test_attention_processors_agree(small):
    assert len(small.attn_processors) == len(attention_layers(small)) == 2 * (0 + 1 + 2 + 1 + 2 + 1 + 0)
    small.set_attn_processor(AttnProcessor())
    slow = run(small)
    small.set_attn_processor(AttnProcessor2_0())
    assert {type(processor) for processor in small.attn_processors.values()} == {AttnProcessor2_0}
    torch.testing.assert_close(run(small), slow, atol=ROUNDING, rtol=ROUNDING)


def test_texts_of_one_latent_share_the_blocks_without_transformers(small):
    sample, timesteps, text = inputs(batch=3)
    latent_of = torch.tensor([1, 0, 1])
    rows = []
    for block in small.down_blocks[:2]:
        block.register_forward_hook(lambda module, _, output: rows.append(len(output[0])))
    together = run(small, sample[:2], timesteps[:2], text, latent_of=latent_of)
    assert rows == [2, 3], "only the first block has no Transformer"
    torch.testing.assert_close(
        together, run(small, sample[latent_of], timesteps[latent_of], text), atol=ROUNDING, rtol=0
    )


def test_fused_projections_agree(small):
    plain = run(small)
    small.fuse_qkv_projections()
    assert all(module.fused_projections for module in attention_layers(small))
    assert {type(processor) for processor in small.attn_processors.values()} == {FusedAttnProcessor2_0}
    torch.testing.assert_close(run(small), plain, atol=ROUNDING, rtol=ROUNDING)
    small.unfuse_qkv_projections()
    torch.testing.assert_close(run(small), plain, atol=ROUNDING, rtol=ROUNDING)


def test_sliced_attention_agrees(small):
    plain = run(small)
    small.set_attention_slice("max")
    assert {type(processor) for processor in small.attn_processors.values()} == {SlicedAttnProcessor}
    torch.testing.assert_close(run(small), plain, atol=ROUNDING, rtol=ROUNDING)


@pytest.mark.slow
def test_lora_trains_saves_loads_and_scales(tmp_path):
    pipe = decinb.load_pipeline("tiny", device="cpu")
    image = Image.new("RGB", (64, 64), "teal")

    def generate(**options) -> torch.Tensor:
        generator = torch.Generator().manual_seed(0)
        given = {"num_inference_steps": 2, "strength": 1.0, "generator": generator, "output_type": "latent"}
        return pipe("a red house", image, **given, **options).images

    before = generate()
    trained = copy.deepcopy(pipe.unet)
    trained.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_k", "to_v", "to_out.0"], init_lora_weights=False))
    layers = get_peft_model_state_dict(trained)
    assert len(layers) == 2 * 4 * len(pipe.unet.attn_processors)
    StableDiffusionImg2ImgPipeline.save_lora_weights(tmp_path, unet_lora_layers=layers)

    pipe.load_lora_weights(tmp_path, weight_name="pytorch_lora_weights.safetensors")
    assert pipe.get_active_adapters() == ["default_0"]
    changed = generate()
    assert not torch.allclose(changed, before, atol=1e-2)
    torch.testing.assert_close(generate(cross_attention_kwargs={"scale": 0.0}), before, atol=ROUNDING, rtol=ROUNDING)
    pipe.unload_lora_weights()
    torch.testing.assert_close(generate(), before, atol=ROUNDING, rtol=ROUNDING)
