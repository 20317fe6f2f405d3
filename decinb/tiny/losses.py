"""The losses that training minimizes: that of a VAE, and that of a denoiser."""

import random
from contextlib import nullcontext

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DDIMScheduler
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import CLIPTextModel

from decinb.unet_nas import UNetNAS

KL_WEIGHT = 5e-4
SNR_LIMIT = 5.0
"""The signal-to-noise ratio above which timesteps count less, or the many easy ones would dominate the gradient."""


def image_loss(decoded: Tensor, images: Tensor) -> Tensor:
    """Return the mean absolute difference of images and, with equal weight, that of their edges."""
    decoded, images = decoded.float(), images.float()
    edges = sum(F.l1_loss(decoded.diff(dim=dim), images.diff(dim=dim)) for dim in (-1, -2))
    return F.l1_loss(decoded, images) + edges


def vae_loss(
    vae: AutoencoderKL, images: Tensor, generator: torch.Generator, turned: random.Random | None = None
) -> Tensor:
    """Return the error of images after encoding and decoding, plus a small KL divergence of the latent.

    Args:
        images: (images, 3, height, width) in [-1, 1].
        generator: draws the latents.
        turned: turns and shrinks images and latents alike before decoding, so that the latent changes as the image
            does; None leaves them as they are.

    Source: Kouzelis et al., "EQ-VAE" (2025), arXiv:2502.09509.
    """
    posterior = vae.encode(images).latent_dist
    latents = posterior.sample(generator)
    mean, variance = posterior.mean.float(), posterior.var.float()
    kl = 0.5 * (mean.square() + variance - 1 - posterior.logvar.float()).mean()
    if turned is not None:
        quarters, scale = turned.randrange(4), turned.choice((0.5, 0.75, 1.0))
        images, latents = (_turn(values, quarters, scale) for values in (images, latents))
    return image_loss(vae.decode(latents).sample, images) + KL_WEIGHT * kl


def _turn(values: Tensor, quarters: int, scale: float) -> Tensor:
    if scale < 1:
        size = [round(scale * side) for side in values.shape[-2:]]
        values = F.interpolate(values.float(), size=size, mode="bilinear", antialias=True).to(values.dtype)
    return values.rot90(quarters, dims=(-2, -1))


def diffusion_loss(
    unet: UNetNAS,
    text_encoder: CLIPTextModel,
    scheduler: DDIMScheduler,
    latents: Tensor,
    noise: Tensor,
    tokens: Tensor,
    timesteps: Tensor,
    depth: Tensor | None = None,
) -> Tensor:
    """Return the squared error of the predicted velocity at one timestep a row, weighted by min-SNR.

    Args:
        latents, noise: (rows, 4, height, width), float32: in bfloat16 a little noise would be lost.
        tokens: (rows, TOKENS); on a CPU each distinct caption is encoded once.
        timesteps: (rows,).
        depth: (rows, 1, height, width), for a U-Net that takes it as a fifth channel.

    Source: Salimans & Ho (2022), arXiv:2202.00512 (velocity); Hang et al. (2023), arXiv:2303.09556 (min-SNR).
    """
    noisy = scheduler.add_noise(latents, noise, timesteps)
    velocity = scheduler.get_velocity(latents, noise, timesteps)
    if depth is not None:
        noisy = torch.cat([noisy, depth], dim=1)
    on_cpu = latents.device.type == "cpu"
    # Counting what is distinct would wait for a GPU, which encodes captions faster than that.
    distinct, which = tokens.unique(dim=0, return_inverse=True) if on_cpu else (tokens, slice(None))
    # On a CPU the backward pass of fused attention takes a fifth of a training step; that of plain attention is fast.
    with sdpa_kernel(SDPBackend.MATH) if on_cpu else nullcontext():
        embeddings = text_encoder(distinct)[0][which]
        predicted = unet(noisy.to(unet.dtype), timesteps, embeddings).sample
    error = (predicted.float() - velocity).square().mean(dim=(1, 2, 3))
    signal = scheduler.alphas_cumprod.to(latents.device)[timesteps]  # snr = signal / (1 - signal)
    weight = ((SNR_LIMIT + 1) * (1 - signal)).clamp(max=1)  # min(snr + 1, limit + 1) / (snr + 1)
    return (weight * error).mean()
