"""Networks of the real classes, small enough to run in milliseconds on one thread."""

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel

from decinb.pipeline import DeciDiffusionImg2ImgPipeline
from decinb.unet_nas import V1_CONFIGURATIONS, UNetNAS

SMALL = {
    **V1_CONFIGURATIONS,
    "down_blocks_in_channels": [32, 32, 32],
    "down_blocks_out_channels": [32, 32, 64],
    "prev_output_channels": [64, 64, 32],
    "cross_attention_dim": 16,
    "temb_dim": 32,
    "num_attention_heads": 2,
}
"""A configuration of ``UNetNAS``."""


def small_nas(sample_size: int = 8) -> UNetNAS:
    """Return a small U-Net-NAS."""
    return UNetNAS(SMALL, sample_size=sample_size)


def small_sd() -> UNet2DConditionModel:
    """Return a small U-Net with the blocks of Stable Diffusion v1.5."""
    return UNet2DConditionModel(
        sample_size=8, block_out_channels=(32, 32, 64, 64), cross_attention_dim=16, attention_head_dim=2
    )


def small_vae() -> AutoencoderKL:
    """Return a small VAE with the factor 8 of Stable Diffusion's."""
    return AutoencoderKL(
        block_out_channels=(32,) * 4,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
    )


def small_text_encoder() -> CLIPTextModel:
    """Return a small text encoder with the vocabulary and the length of Stable Diffusion's."""
    config = CLIPTextConfig(hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2)
    return CLIPTextModel(config)


def small_pipe(tiny: DeciDiffusionImg2ImgPipeline) -> DeciDiffusionImg2ImgPipeline:
    """Return an untrained pipeline for images of 64 x 64 pixels, with the tokenizer and the scheduler of ``tiny``."""
    torch.manual_seed(0)
    pipe = DeciDiffusionImg2ImgPipeline(
        vae=small_vae().eval(),
        text_encoder=small_text_encoder().eval(),
        tokenizer=tiny.tokenizer,
        unet=small_nas().eval(),
        scheduler=tiny.scheduler,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe
