"""The networks of the bundled model, untrained: tokenizer, VAE, text encoder, U-Net-NAS, scheduler."""

import json
import random
from pathlib import Path
from typing import Any

from diffusers import AutoencoderKL, DDIMScheduler
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from decinb.scenes import IMAGE_SIZE, caption, random_scene
from decinb.unet_nas import UNetNAS

CONFIGURATIONS = {
    "down_blocks_in_channels": [96, 96, 96],
    "down_blocks_out_channels": [96, 96, 128],
    "down_blocks_num_resnets": [2, 2, 1],
    "down_blocks_num_attentions": [0, 1, 2],
    "add_downsample": [True, True, True],
    "mid_num_resnets": 1,
    "mid_num_attentions": 1,
    "add_upsample_mid_block": True,
    "prev_output_channels": [128, 128, 96],
    "up_blocks_num_resnets": [2, 3, 3],
    "up_blocks_num_attentions": [2, 2, 0],
    "add_upsample": [True, True, False],
    "mix_block_in_forward": True,
    "num_attention_heads": 4,
    "cross_attention_dim": 128,
    "temb_dim": 256,
    "resnet_eps": 1e-5,
    "resnet_act_fn": "silu",
    "sample_size": IMAGE_SIZE // 8,
}
"""The U-Net-NAS of ``tiny``: 7.7 million parameters, 0.99 GFLOP a row.

As in the published architecture there is no Transformer at the finest resolution.
"""

TOKENS = 48  # a complete caption takes up to 37, the guide's prompt 34

VAE_WIDTHS = (32, 64, 96, 128)
"""Channels of the VAE of ``tiny`` at each resolution: 3.4 million parameters, 2.1 GFLOP to encode, 6.6 to decode."""


def make_tokenizer(folder: Path) -> CLIPTokenizer:
    """Train a byte-pair CLIP tokenizer on captions and save it to a folder. It knows every byte, so any text works."""
    rng = random.Random(0)
    captions = [caption(random_scene(rng), rng) for _ in range(20_000)]
    tokenizer = Tokenizer(models.BPE(end_of_word_suffix="</w>", unk_token="<|endoftext|>"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
    words = pre_tokenizers.Sequence([pre_tokenizers.Whitespace(), pre_tokenizers.ByteLevel(add_prefix_space=False)])
    tokenizer.pre_tokenizer = words
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=1024, initial_alphabet=alphabet, end_of_word_suffix="</w>", show_progress=False
    )
    tokenizer.train_from_iterator(captions, trainer)
    merges = [tuple(pair) for pair in json.loads(tokenizer.to_str())["model"]["merges"]]
    characters = alphabet + [character + "</w>" for character in alphabet]
    pieces = characters + ["".join(pair) for pair in merges if "".join(pair) not in set(characters)]
    vocabulary = {piece: i for i, piece in enumerate([*pieces, "<|startoftext|>", "<|endoftext|>"])}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps(vocabulary, ensure_ascii=False), encoding="utf-8")
    lines = ["#version: 0.2", *(" ".join(pair) for pair in merges), ""]
    (folder / "merges.txt").write_text("\n".join(lines), encoding="utf-8")
    made = CLIPTokenizer.from_pretrained(folder, model_max_length=TOKENS)
    made.save_pretrained(folder)
    return made


def make_vae(widths: tuple[int, ...] = VAE_WIDTHS, size: int = IMAGE_SIZE) -> AutoencoderKL:
    """Make a VAE with 4 latent channels and, by default, a factor of 8.

    Args:
        widths: channels at each resolution, multiples of 8; each but the first halves height and width.
        size: height and width of the images in pixels.
    """
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * len(widths),
        up_block_types=("UpDecoderBlock2D",) * len(widths),
        block_out_channels=widths,
        layers_per_block=1,
        norm_num_groups=8,
        sample_size=size,
        scaling_factor=1.0,  # `normalise_latent` gives the latent unit deviation
    )


def make_text_encoder(tokenizer: CLIPTokenizer, width: int = CONFIGURATIONS["cross_attention_dim"]) -> CLIPTextModel:
    """Make a CLIP text encoder of two layers."""
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=width,
            intermediate_size=4 * width,
            projection_dim=width,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=TOKENS,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def make_unet(configurations: dict[str, Any] = CONFIGURATIONS) -> UNetNAS:
    """Make a U-Net-NAS, by default that of ``tiny``."""
    return UNetNAS(configurations=configurations, sample_size=configurations["sample_size"])


def make_scheduler() -> DDIMScheduler:
    """Make a DDIM scheduler with the noise levels of Stable Diffusion, rescaled to end in pure noise.

    At strength 1 nothing of the input is left, so text to image needs no other model.

    Source: Lin et al., "Common Diffusion Noise Schedules and Sample Steps are Flawed" (2023), arXiv:2305.08891.
    """
    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,  # diffusers warns without it; trailing spacing ignores it
        prediction_type="v_prediction",
        rescale_betas_zero_snr=True,
        timestep_spacing="trailing",
    )
