"""Networks of the real classes, small enough to run in milliseconds on one thread."""

from diffusers import AutoencoderKL, UNet2DConditionModel

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


def small_nas() -> UNetNAS:
    return UNetNAS(SMALL, sample_size=8)


def small_sd() -> UNet2DConditionModel:
    return UNet2DConditionModel(
        sample_size=8, block_out_channels=(32, 32, 64, 64), cross_attention_dim=16, attention_head_dim=2
    )


def small_vae() -> AutoencoderKL:
    return AutoencoderKL(
        block_out_channels=(32,) * 4,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
    )
