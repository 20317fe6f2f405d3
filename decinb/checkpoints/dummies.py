"""Dummy pipelines: small, with random weights, and of the classes of published models, for runs without their weights.

They make noise, but run the same code as the published model. Each configuration below is the published one where it
decides which code runs (block types, conditioning, scheduler), and as small as the classes allow everywhere else.
"""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    DDPMScheduler,
    DiffusionPipeline,
    EulerDiscreteScheduler,
    KandinskyV22Img2ImgCombinedPipeline,
    PNDMScheduler,
    PriorTransformer,
    StableDiffusionDepth2ImgPipeline,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionXLImg2ImgPipeline,
    UnCLIPScheduler,
    UNet2DConditionModel,
    VQModel,
)
from torch import nn
from transformers import (
    BitConfig,
    CLIPImageProcessor,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
    DPTConfig,
    DPTForDepthEstimation,
    DPTImageProcessor,
    PreTrainedModel,
)

from decinb.errors import InputError
from decinb.utils.quiet import quiet

SIZE = 64
"""Height and width of a dummy's images in pixels. Latents of 8 x 8 are the smallest that can be halved three times."""

WIDTH = 32  # of embeddings and of the finest feature maps: one channel for each of GroupNorm's 32 groups
LEVELS = (WIDTH, WIDTH, 2 * WIDTH, 2 * WIDTH)

UNET = {"sample_size": SIZE // 8, "layers_per_block": 1, "cross_attention_dim": WIDTH, "attention_head_dim": 4}
TEXT_TIME = {"addition_embed_type": "text_time", "addition_time_embed_dim": 8, "use_linear_projection": True}
IMAGE = {"addition_embed_type": "image", "encoder_hid_dim_type": "image_proj", "encoder_hid_dim": WIDTH}

VAE = {
    "block_out_channels": (WIDTH,) * 4,
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "latent_channels": 4,
    "sample_size": SIZE,
}
MOVQ = {
    **VAE,
    "down_block_types": ("DownEncoderBlock2D",) * 3 + ("AttnDownEncoderBlock2D",),
    "up_block_types": ("AttnUpDecoderBlock2D",) + ("UpDecoderBlock2D",) * 3,
    "num_vq_embeddings": WIDTH,
    "vq_embed_dim": 4,
    "norm_type": "spatial",
}

TRANSFORMER = {
    "hidden_size": WIDTH,
    "intermediate_size": 2 * WIDTH,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}

BETAS = {"beta_start": 0.00085, "beta_end": 0.012}
PNDM = {**BETAS, "beta_schedule": "scaled_linear", "skip_prk_steps": True, "steps_offset": 1}
EULER = {**BETAS, "beta_schedule": "scaled_linear", "timestep_spacing": "leading", "steps_offset": 1}

tokenizer = partial(
    CLIPTokenizer.from_pretrained, Path(__file__).parents[1] / "tiny" / "model" / "tokenizer", local_files_only=True
)


def text_encoder(kind: type[CLIPTextModel] | type[CLIPTextModelWithProjection], hidden_act: str) -> PreTrainedModel:
    """Return a CLIP text encoder for the bundled tokenizer."""
    tokens = tokenizer()
    config = CLIPTextConfig(
        vocab_size=len(tokens),
        max_position_embeddings=tokens.model_max_length,
        bos_token_id=tokens.bos_token_id,
        eos_token_id=tokens.eos_token_id,
        pad_token_id=tokens.pad_token_id,
        hidden_act=hidden_act,
        projection_dim=WIDTH,
        **TRANSFORMER,
    )
    return kind(config)


def image_encoder() -> CLIPVisionModelWithProjection:
    """Return a CLIP image encoder for images of ``SIZE`` pixels."""
    config = CLIPVisionConfig(image_size=SIZE, patch_size=16, hidden_act="gelu", projection_dim=WIDTH, **TRANSFORMER)
    return CLIPVisionModelWithProjection(config)


def prior() -> PriorTransformer:
    """Return a prior from text embeddings to image embeddings, whose outputs differ between prompts."""
    model = PriorTransformer(
        num_attention_heads=4,
        attention_head_dim=WIDTH // 4,
        num_layers=2,
        embedding_dim=WIDTH,
        num_embeddings=tokenizer().model_max_length,
    )
    nn.init.ones_(model.clip_std)  # it scales the output, and is zero until it is trained
    return model


def depth_estimator() -> DPTForDepthEstimation:
    """Return a DPT hybrid, a Transformer on top of convolutions, for images of ``SIZE`` pixels."""
    convolutions = BitConfig(
        layer_type="bottleneck",
        global_padding="same",
        embedding_dynamic_padding=True,
        embedding_size=WIDTH,
        depths=[1, 1, 1],
        hidden_sizes=[WIDTH] * 3,
        num_groups=8,  # must divide the channels of a bottleneck, WIDTH / 4
        out_features=["stage1", "stage2", "stage3"],
    )
    config = DPTConfig(
        is_hybrid=True,
        backbone_config=convolutions,
        backbone_featmap_shape=[1, WIDTH, SIZE // 16, SIZE // 16],
        image_size=SIZE,
        neck_hidden_sizes=[WIDTH] * 4,
        reassemble_factors=[1, 1, 1, 0.5],
        readout_type="project",
        fusion_hidden_size=WIDTH,
        **TRANSFORMER | {"num_hidden_layers": 4},
        backbone_out_indices=[0, 1, 2, 3],
    )
    return DPTForDepthEstimation(config)


DUMMIES: dict[str, tuple[Callable[..., DiffusionPipeline], dict[str, Callable[[], Any]]]] = {
    "sd-v1-5": (
        partial(
            StableDiffusionImg2ImgPipeline, safety_checker=None, feature_extractor=None, requires_safety_checker=False
        ),
        {
            "vae": partial(AutoencoderKL, **VAE),
            "text_encoder": partial(text_encoder, CLIPTextModel, "quick_gelu"),
            "tokenizer": tokenizer,
            "unet": partial(UNet2DConditionModel, **UNET, block_out_channels=LEVELS),
            "scheduler": partial(PNDMScheduler, **PNDM),
        },
    ),
    "sd-2-depth": (
        StableDiffusionDepth2ImgPipeline,
        {
            "vae": partial(AutoencoderKL, **VAE),
            "text_encoder": partial(text_encoder, CLIPTextModel, "gelu"),
            "tokenizer": tokenizer,
            "unet": partial(
                UNet2DConditionModel,
                **UNET,
                block_out_channels=LEVELS,
                in_channels=5,  # the fifth is the depth
                use_linear_projection=True,
            ),
            "scheduler": partial(PNDMScheduler, **PNDM),
            "depth_estimator": depth_estimator,
            "feature_extractor": partial(DPTImageProcessor, size={"height": SIZE, "width": SIZE}),
        },
    ),
    "sdxl-base": (
        StableDiffusionXLImg2ImgPipeline,
        {
            "vae": partial(AutoencoderKL, **VAE, scaling_factor=0.13025),
            "text_encoder": partial(text_encoder, CLIPTextModel, "quick_gelu"),
            "text_encoder_2": partial(text_encoder, CLIPTextModelWithProjection, "gelu"),
            "tokenizer": tokenizer,
            "tokenizer_2": tokenizer,
            "unet": partial(
                UNet2DConditionModel,
                **UNET | TEXT_TIME | {"cross_attention_dim": 2 * WIDTH},  # both text encoders, side by side
                projection_class_embeddings_input_dim=WIDTH + 6 * 8,  # prompt; size, corner of the crop, target size
                block_out_channels=LEVELS[:3],
                down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
                up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
                transformer_layers_per_block=(1, 1, 2),
            ),
            "scheduler": partial(EulerDiscreteScheduler, **EULER),
        },
    ),
    "sdxl-refiner": (
        partial(
            StableDiffusionXLImg2ImgPipeline,
            text_encoder=None,
            tokenizer=None,
            requires_aesthetics_score=True,
            force_zeros_for_empty_prompt=False,
        ),
        {
            "vae": partial(AutoencoderKL, **VAE, scaling_factor=0.13025),
            "text_encoder_2": partial(text_encoder, CLIPTextModelWithProjection, "gelu"),
            "tokenizer_2": tokenizer,
            "unet": partial(
                UNet2DConditionModel,
                **UNET | TEXT_TIME,
                projection_class_embeddings_input_dim=WIDTH + 5 * 8,  # prompt; size, corner, aesthetic score
                block_out_channels=LEVELS,
                down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
                up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            ),
            "scheduler": partial(EulerDiscreteScheduler, **EULER),
        },
    ),
    "kandinsky-2-2": (
        KandinskyV22Img2ImgCombinedPipeline,
        {
            "unet": partial(
                UNet2DConditionModel,
                **UNET | IMAGE,
                out_channels=8,  # the noise, and its variance
                block_out_channels=LEVELS,
                down_block_types=("ResnetDownsampleBlock2D",) + ("SimpleCrossAttnDownBlock2D",) * 3,
                mid_block_type="UNetMidBlock2DSimpleCrossAttn",
                up_block_types=("SimpleCrossAttnUpBlock2D",) * 3 + ("ResnetUpsampleBlock2D",),
                resnet_time_scale_shift="scale_shift",
            ),
            "scheduler": partial(DDPMScheduler, **BETAS, beta_schedule="linear", steps_offset=1),
            "movq": partial(VQModel, **MOVQ),
            "prior_prior": prior,
            "prior_image_encoder": image_encoder,
            "prior_text_encoder": partial(text_encoder, CLIPTextModelWithProjection, "gelu"),
            "prior_tokenizer": tokenizer,
            "prior_scheduler": partial(UnCLIPScheduler, prediction_type="sample", clip_sample_range=10.0),
            "prior_image_processor": partial(CLIPImageProcessor, size={"shortest_edge": SIZE}, crop_size=SIZE),
        },
    ),
}
"""By the name of the published model: its pipeline class, and a function for each component of its model_index.json."""


def dummy(name: str, seed: int = 0) -> DiffusionPipeline:
    """Return a dummy pipeline: small, with random weights, of the classes of a published model.

    Args:
        name: one of ``DUMMIES``.
        seed: the seed of the weights; the same seed gives the same weights.

    Returns:
        The model's image-to-image pipeline, in float32 on the CPU, for images of ``SIZE`` pixels or a multiple of it.
        ``kandinsky-2-2`` takes height and width as arguments, whatever the size of the input image.

    Raises:
        InputError: there is no dummy of that name.
    """
    if name not in DUMMIES:
        raise InputError(f"dummy has no {name!r}; it has {', '.join(DUMMIES)}")
    cls, components = DUMMIES[name]
    with quiet(), torch.random.fork_rng(devices=[]):  # the caller's random state stays the same
        torch.default_generator.manual_seed(seed)
        pipe = cls(**{component: build() for component, build in components.items()})
    for component in pipe.components.values():
        if isinstance(component, nn.Module):
            component.eval()  # as from_pretrained does
    return pipe
