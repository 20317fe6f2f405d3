"""Make the untrained networks of the bundled model: tokenizer, VAE, text encoder, U-Net-NAS, scheduler."""

import json
import random
from pathlib import Path
from typing import Any

from diffusers import AutoencoderKL, DDIMScheduler
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from decinb.scenes.scenes import IMAGE_SIZE, caption, random_scene
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
"""The U-Net-NAS of ``tiny``: narrower than the published one, and also without Transformers at full resolution."""

TOKENS = 40  # a complete caption has about 20, the prompt of the guide 34


def make_tokenizer(folder: Path) -> CLIPTokenizer:
    """Train a byte-pair tokenizer in CLIP's format on captions, and save it in ``folder``.

    All 256 bytes are tokens, so that it can encode any text.
    """
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
    single = alphabet + [character + "</w>" for character in alphabet]
    tokens = single + ["".join(pair) for pair in merges if "".join(pair) not in set(single)]
    vocabulary = {token: i for i, token in enumerate([*tokens, "<|startoftext|>", "<|endoftext|>"])}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps(vocabulary, ensure_ascii=False), encoding="utf-8")
    lines = ["#version: 0.2", *(" ".join(pair) for pair in merges), ""]
    (folder / "merges.txt").write_text("\n".join(lines), encoding="utf-8")
    made = CLIPTokenizer.from_pretrained(folder, model_max_length=TOKENS)
    made.save_pretrained(folder)
    return made


def make_vae(widths: tuple[int, ...] = (16, 32, 64, 128), size: int = IMAGE_SIZE) -> AutoencoderKL:
    """Make a VAE with 4 latent channels, as the published one; by default with factor 8 and an eighth of its width.

    Args:
        widths: channels at each resolution, multiples of 8; height and width are halved from each to the next.
        size: height and width of the images, in pixels.
    """
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * len(widths),
        up_block_types=("UpDecoderBlock2D",) * len(widths),
        block_out_channels=widths,
        layers_per_block=1,
        norm_num_groups=8,
        sample_size=size,
        scaling_factor=1.0,  # `normalise_latent` brings the latent to a standard deviation of 1
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
    """Make a DDIM scheduler with Stable Diffusion's noise schedule, rescaled to zero terminal SNR.

    At the last timestep nothing of the image is left, so that strength 1 does not depend on the input.

    Source: Lin et al., "Common Diffusion Noise Schedules and Sample Steps are Flawed" (2023), arXiv:2305.08891.
    """
    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,  # without it diffusers warns; trailing spacing does not use it
        prediction_type="v_prediction",
        rescale_betas_zero_snr=True,
        timestep_spacing="trailing",
    )
