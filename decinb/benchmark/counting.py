"""Count the parameters and FLOPs of a network, block by block, and the U-Net calls of a pipeline.

FLOPs are counted on torch's meta device, which does no arithmetic, so it takes half a second and no memory. One FLOP is
one addition or one multiplication; torch counts those of matrix products, convolutions and attention, nearly all.
"""

import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.flop_counter import FlopCounterMode
from transformers import CLIPTextConfig, CLIPTextModel

from decinb.unet_nas import UNetNAS

# --- the networks -----------------------------------------------------------------------------------------------------


def sd15_unet() -> UNet2DConditionModel:
    """Return the U-Net of Stable Diffusion v1.5."""
    return UNet2DConditionModel(
        sample_size=64, block_out_channels=(320, 640, 1280, 1280), cross_attention_dim=768, attention_head_dim=8
    )


def sd15_vae() -> AutoencoderKL:
    """Return the VAE of Stable Diffusion v1.5, which DeciDiffusion also uses."""
    return AutoencoderKL(
        sample_size=512,
        block_out_channels=(128, 256, 512, 512),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=2,
    )


def sd15_text_encoder() -> CLIPTextModel:
    """Return the text encoder of Stable Diffusion v1.5, that of CLIP ViT-L/14, which DeciDiffusion also uses."""
    return CLIPTextModel(
        CLIPTextConfig(hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12)
    )


NETWORKS: dict[str, Callable[[], nn.Module]] = {"U-Net-NAS": UNetNAS, "SD v1.5": sd15_unet}
"""Functions that build the two U-Nets that are compared, by name."""


def random_model(
    factory: Callable[[], nn.Module], device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
) -> nn.Module:
    """Return a network with random weights, built in seconds and without extra memory.

    Weights are normal with a variance of 1 / inputs of the layer, norms are 1 and biases 0, so that activations keep
    their scale, as in a trained network: none overflows, and none becomes a denormal, which would be slow.

    Args:
        factory: a function that builds the network.
        device, dtype: where and with which precision.
    """
    with torch.device("meta"):
        model = factory()
    nn.Module.to(model, dtype)  # diffusers' own `to` warns about layers to keep in float32, of which there are none
    model.to_empty(device=device).eval().requires_grad_(False)
    # Random numbers take longer to draw than to copy, so a pool of them is drawn once and copied repeatedly.
    pool = torch.randn(1 << 20, generator=torch.Generator().manual_seed(0)).to(device, dtype)
    for name, weight in model.named_parameters():
        if weight.dim() < 2:
            weight.fill_(float(name.endswith("weight")))
        else:
            scaled = pool * weight[0].numel() ** -0.5
            for piece in weight.view(-1).split(len(scaled)):
                piece.copy_(scaled[: len(piece)])
    return model


# --- counting ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Block:
    """One block of a network: how many ResNets and Transformers it has, and the cost of one row of a forward call.

    ``side`` is the height and width of its feature maps, in latent pixels; 0 for the block ``rest``.
    """

    name: str
    side: int
    resnets: int
    transformers: int
    parameters: int
    flops: int
    resnet_flops: int
    transformer_flops: int


@dataclass(frozen=True)
class Cost:
    """The cost of one row of a forward call: in total, and of each block in the order they run, ``rest`` last."""

    parameters: int
    flops: int
    blocks: tuple[Block, ...]


def count(
    model: nn.Module | Callable[[], nn.Module], size: int = 64, tokens: int = 77, inputs: tuple | None = None
) -> Cost:
    """Count the parameters of a network, and the FLOPs of one row of a forward call.

    Args:
        model: a network, which is not changed, or a function that builds one, which then takes no memory.
        size: height and width of a U-Net's latent.
        tokens: the length of its prompt embedding.
        inputs: the inputs of a network other than a U-Net: tensors on the meta device, with a batch of one.
    """
    if not isinstance(model, nn.Module):
        with torch.device("meta"):
            model = model()
    inputs = unet_inputs(model, 1, size, tokens, "meta") if inputs is None else inputs
    shadow = {name: t.to("meta") for name, t in itertools.chain(model.named_parameters(), model.named_buffers())}
    sides: dict[str, int] = {}
    hooks = [_note_side(block, name, sides) for name, block in _blocks(model).items()]
    try:
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            functional_call(model, shadow, inputs)
    finally:
        for hook in hooks:
            hook.remove()

    spent = {name: sum(by_kind.values()) for name, by_kind in counter.get_flop_counts().items()}
    blocks = [_block(model, name, side, spent) for name, side in sides.items()]  # in the order they ran
    parameters, flops = _parameters(model), counter.get_total_flops()
    others = parameters - sum(b.parameters for b in blocks), flops - sum(b.flops for b in blocks)
    return Cost(parameters, flops, (*blocks, Block("rest", 0, 0, 0, *others, 0, 0)))


def _blocks(model: nn.Module) -> dict[str, nn.Module]:
    """Return the children that contain ResNets or Transformers, by name; of a list, its elements."""
    parts = {}
    for name, child in model.named_children():
        opened = {f"{name}.{i}": c for i, c in enumerate(child)} if isinstance(child, nn.ModuleList) else {name: child}
        parts.update({n: c for n, c in opened.items() if _parts(c, ResnetBlock2D) or _parts(c, Transformer2DModel)})
    return parts


def _parts(module: nn.Module, kind: type) -> list[str]:
    return [name for name, part in module.named_modules() if isinstance(part, kind)]


def _parameters(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def _note_side(block: nn.Module, name: str, sides: dict[str, int]) -> Any:
    # A ResNet keeps the size of its input; a block may end in a down- or upsampler.
    def note(module: nn.Module, args: tuple, output: Tensor) -> None:
        sides[name] = output.shape[-1]

    return block.get_submodule(_parts(block, ResnetBlock2D)[0]).register_forward_hook(note)


def _block(model: nn.Module, name: str, side: int, spent: dict[str, int]) -> Block:
    module, root = model.get_submodule(name), f"{type(model).__name__}.{name}"
    resnets, transformers = _parts(module, ResnetBlock2D), _parts(module, Transformer2DModel)
    return Block(
        name,
        side,
        len(resnets),
        len(transformers),
        _parameters(module),
        spent[root],
        sum(spent[f"{root}.{part}"] for part in resnets),
        sum(spent[f"{root}.{part}"] for part in transformers),
    )


def unet_inputs(unet: nn.Module, rows: int, size: int, tokens: int, device: torch.device | str) -> tuple[Tensor, ...]:
    """Return random inputs of a U-Net: latents (rows, channels, size, size), timesteps, and prompt embeddings."""
    kind = {"device": device, "dtype": next(unet.parameters()).dtype}
    latent = torch.randn(rows, unet.config["in_channels"], size, size, **kind)
    return latent, torch.full((rows,), 500, device=device), torch.randn(rows, tokens, text_width(unet), **kind)


def text_width(unet: nn.Module) -> int:
    """Return the width of the prompt embeddings that a U-Net takes."""
    return unet.config.get("configurations", unet.config)["cross_attention_dim"]


@dataclass
class UNetCalls:
    """How often a U-Net was called, and with how many rows in total: two per image with guidance, else one."""

    calls: int = 0
    rows: int = 0


@contextmanager
def count_unet_calls(pipe: Any) -> Iterator[UNetCalls]:
    """Count the calls of a pipeline's U-Net while the ``with`` block runs; they can differ from the requested steps."""
    counted = UNetCalls()

    def note(module: nn.Module, args: tuple, output: Any) -> None:
        counted.calls += 1
        counted.rows += output[0].shape[0]

    hook = pipe.unet.register_forward_hook(note)
    try:
        yield counted
    finally:
        hook.remove()
