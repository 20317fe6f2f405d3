"""Train the depth-to-image model that belongs to the bundled model: ``python -m decinb.tiny.train_depth``.

Two networks are new: a depth estimator, and a U-Net-NAS with depth as a fifth input channel. VAE, text encoder,
tokenizer and scheduler are those of the bundled model. The U-Net starts from the bundled one, with zeros for the new
channel, and learns to take shapes from the depth and everything else from the prompt.

Source: the depth-conditioned model of Stable Diffusion 2 (Rombach et al. 2022, arXiv:2112.10752), as diffusers'
``StableDiffusionDepth2ImgPipeline`` runs it.
"""

import argparse
import copy
import json
import random
from collections.abc import Collection, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTokenizer, DPTConfig, DPTForDepthEstimation, DPTImageProcessor

from decinb.errors import InputError
from decinb.loading import load_pipeline
from decinb.scenes.scenes import ATTRIBUTES, IMAGE_SIZE, Scene, caption, depth_map, random_scene, twin
from decinb.tiny.data import Example, cached, draw_all, house_weights, noised, to_input, to_tokens
from decinb.tiny.networks import make_scheduler
from decinb.tiny.stage import Stage
from decinb.tiny.train import check_same_run, encode_all, image_loss, tidy_configs, training_dtype, unet_loss
from decinb.unet_nas import UNetNAS
from decinb.utils.quiet import quiet

INDEX = {
    "_class_name": "StableDiffusionDepth2ImgPipeline",
    "depth_estimator": ["transformers", "DPTForDepthEstimation"],
    "feature_extractor": ["transformers", "DPTImageProcessor"],
    "unet": ["decinb.unet_nas", "UNetNAS"],
}
"""The ``model_index.json`` of the folder, which has only the new parts."""

FALSE_CAPTION_RATE = 0.5
"""The fraction of captions with random shapes, which teaches the U-Net to take shapes from the depth instead."""

FAR = 0.2
"""The depth up to which something counts as far: mountains, and the ground near the horizon."""


# --- networks ---------------------------------------------------------------------------------------------------------


def make_estimator(width: int = 96, size: int = IMAGE_SIZE) -> DPTForDepthEstimation:
    """Make a DPT with four layers on patches of 8 x 8 pixels.

    Args:
        width: of its layers, a multiple of 4.
        size: height and width of the images, in pixels.
    """
    config = DPTConfig(
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=4,
        num_attention_heads=4,
        backbone_out_indices=[0, 1, 2, 3],
        image_size=size,
        patch_size=8,
        reassemble_factors=[2, 1, 0.5, 0.25],  # half the published factors, since the patches are half as large
        neck_hidden_sizes=[width // 3, width // 2, width // 2, width // 2],
        fusion_hidden_size=width // 3,
        use_auxiliary_head=False,
    )
    return DPTForDepthEstimation(config)


def make_feature_extractor(size: int = IMAGE_SIZE) -> DPTImageProcessor:
    """Make the preprocessor that brings images to the size and the range, [-1, 1], of the estimator."""
    with quiet():
        return DPTImageProcessor(
            size={"height": size, "width": size}, image_mean=[0.5, 0.5, 0.5], image_std=[0.5, 0.5, 0.5]
        )


@torch.no_grad()
def with_depth(unet: UNetNAS) -> UNetNAS:
    """Copy a U-Net and add an input channel with zero weights, which does not change its output."""
    config = {**unet.config, "in_channels": unet.config.in_channels + 1}
    extended = UNetNAS.from_config(config)
    weights = unet.state_dict()
    weights["conv_in.weight"] = F.pad(weights["conv_in.weight"], (0, 0, 0, 0, 0, 1))
    extended.load_state_dict(weights)
    return nn.Module.to(extended, unet.dtype)  # diffusers' own `to` warns about layers to keep in float32


# --- data and losses --------------------------------------------------------------------------------------------------


def draw_scenes(places: int, seed: int) -> list[Scene]:
    """Choose random scenes, each followed by a twin with the same depth."""
    rng = random.Random(f"depth {seed}")
    scenes = []
    for _ in range(places):
        scene = random_scene(rng)
        looks = ["style", "time", "ground", *(["house"] * 2 if scene.house else [])]
        scenes += [scene, twin(scene, rng, among=looks)]
    return scenes


def partly_false_caption(scene: Scene, rng: random.Random, always: Collection[str] = ()) -> str:
    """Describe a scene; at ``FALSE_CAPTION_RATE`` with random trees and mountains, and a house where there is none."""
    if rng.random() < FALSE_CAPTION_RATE:
        scene = replace(
            scene,
            trees=rng.choice(ATTRIBUTES["trees"]),
            mountains=rng.choice(ATTRIBUTES["mountains"]),
            house=scene.house or rng.choice(ATTRIBUTES["house"]),
        )
    return caption(scene, rng, always=always)


def prepare(depth: Tensor, side: int) -> Tensor:
    """Scale depth for the U-Net: to the size of the latent, from -1 for the farthest to 1 for the nearest point.

    Args:
        depth: as an estimator predicts it, (rows, height, width).
        side: height and width of the latent.

    Returns:
        (rows, 1, side, side), in the dtype of ``depth``.

    Source: ``StableDiffusionDepth2ImgPipeline.prepare_depth_map`` of diffusers.
    """
    depth = F.interpolate(depth[:, None], size=(side, side), mode="bicubic", align_corners=False)
    low, high = depth.amin(dim=(1, 2, 3), keepdim=True), depth.amax(dim=(1, 2, 3), keepdim=True)
    return 2 * (depth - low) / (high - low) - 1


@torch.no_grad()
def estimate(estimator: DPTForDepthEstimation, images: np.ndarray, device: torch.device, batch: int = 32) -> Tensor:
    """Estimate the depth of images (bytes), (images, height, width), float32."""
    rows = range(0, len(images), batch)
    inputs = (to_input(images[start : start + batch], device, estimator.dtype) for start in rows)
    return torch.cat([estimator(pixels).predicted_depth.float() for pixels in inputs])


def depth_loss(predicted: Tensor, true: Tensor) -> Tensor:
    """Return the error of depth, plus that of the far part enlarged: mountains are only a tenth nearer than the sky."""
    return image_loss(predicted, true) + image_loss(predicted.clamp(max=FAR) / FAR, true.clamp(max=FAR) / FAR)


# --- stages -----------------------------------------------------------------------------------------------------------


def train_estimator(
    images: np.ndarray,
    depths: np.ndarray,
    minutes: float,
    folder: Path,
    device: torch.device,
    seed: int = 0,
    batch: int = 16,
    begin: DPTForDepthEstimation | None = None,
    dtype: torch.dtype = torch.bfloat16,
) -> DPTForDepthEstimation:
    """Train a depth estimator on images and their true depth.

    Args:
        images: bytes, (images, 3, height, width).
        depths: of each image, (images, height, width).
        minutes: the budget.
        folder: for the checkpoint and the log.
        device: to train on.
        seed: of weights and batches.
        batch: images in a step.
        begin: an estimator to train; None makes a new one.
        dtype: of the computation; the weights are kept in float32.
    """
    torch.manual_seed(seed)
    estimator = begin or make_estimator()
    stage = Stage("depth_estimator", {"depth_estimator": estimator}, minutes, 1.5e-3, folder, device, dtype)
    layers = estimator.head.head
    # Without its last ReLU, which would soon output 0 everywhere, since the depth of half an image is 0.
    last, layers[-1] = layers[-1], nn.Identity()

    def loss_of(step: int) -> Tensor:
        rows = np.random.default_rng((seed, step)).integers(len(images), size=batch)
        chosen, true = images[rows], torch.tensor(depths[rows], device=device)
        if step % 2:
            chosen, true = chosen[..., ::-1], true.flip(-1)
        return depth_loss(estimator(to_input(chosen, device, stage.dtype)).predicted_depth.float(), true)

    stage.run(loss_of)
    layers[-1] = last
    return estimator


def train_unet(
    scenes: Sequence[Scene],
    moments: Tensor,
    depths: Tensor,
    parts: tuple[UNetNAS, CLIPTextModel, CLIPTokenizer],
    minutes: float,
    folder: Path,
    device: torch.device,
    seed: int = 0,
    batch: int = 32,
    learning_rate: float = 5e-4,
    dtype: torch.dtype = torch.bfloat16,
) -> UNetNAS:
    """Train a U-Net with a depth channel as ``decinb.tiny.train.train_unet`` does, but with a frozen text encoder.

    Args:
        scenes: every second one is the twin of the one before it, with the same depth.
        moments: of their latents, as ``encode`` gives them.
        depths: one or several for each scene, as ``prepare`` gives them: (several, scenes, 1, height, width).
        parts: the U-Net to train, with five input channels, its text encoder and its tokenizer.
        minutes: the budget.
        folder: for the checkpoint and the log.
        device: to train on.
        seed: of batches.
        batch: rows in a step.
        learning_rate: the maximum.
        dtype: of the computation; the weights are kept in float32.
    """
    unet, text_encoder, tokenizer = parts
    scheduler = make_scheduler()
    stage = Stage("unet", {"unet": unet}, minutes, learning_rate, folder, device, dtype)
    text_encoder = nn.Module.to(copy.deepcopy(text_encoder), device, dtype).requires_grad_(False)
    weights = house_weights(scenes, moments.shape[-1]).to(moments.device)

    def loss_of(step: int) -> Tensor:
        rng = random.Random(f"{seed} {step}")
        generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
        examples = [
            Example.draw(scenes, rng, len(scheduler.alphas_cumprod), partly_false_caption) for _ in range(batch)
        ]
        latents, noise = noised(examples, moments, scheduler, generator)
        chosen = [rng.randrange(len(depths)) for _ in examples], [example.source for example in examples]
        return unet_loss(
            unet,
            text_encoder,
            scheduler,
            latents.to(device),
            noise.to(device),
            to_tokens(tokenizer, [example.prompt for example in examples]).to(device),
            torch.tensor([example.timestep for example in examples]),
            weights[[example.target for example in examples]],
            depths[chosen].to(device),
        )

    stage.run(loss_of)
    return unet


def train(
    folder: Path,
    places: int,
    estimator_minutes: float,
    unet_minutes: float,
    seed: int,
    device: torch.device,
    begin: str | Path = "tiny",
    batch: int = 32,
    dtype: torch.dtype | None = None,
) -> Path:
    """Run both stages in ``folder`` and save the new parts in ``folder/depth``.

    Args:
        folder: for the log, the checkpoints and the parts.
        places: how many scenes to draw, each with a twin.
        estimator_minutes: for the depth estimator.
        unet_minutes: for the U-Net.
        seed: of scenes, weights and batches.
        device: to train on.
        begin: the model whose parts are shared, and whose U-Net is the start.
        batch: rows in a step of the U-Net.
        dtype: of the computation; None chooses with ``training_dtype``.

    Raises:
        InputError: a stage has no minutes, or ``folder`` holds a run with other settings.
    """
    if not (estimator_minutes > 0 and unet_minutes > 0):
        raise InputError(
            f"estimator_minutes and unet_minutes must be above 0, got {estimator_minutes:g} and {unet_minutes:g}"
        )
    dtype = dtype or training_dtype(device)
    folder.mkdir(parents=True, exist_ok=True)
    settings = {"places": places, "estimator_minutes": estimator_minutes, "seed": seed, "begin": str(begin)}
    check_same_run(folder / "settings.json", settings)
    scenes = draw_scenes(places, seed)
    print(f"drawing {len(scenes)} scenes", flush=True)
    images = draw_all(scenes, folder / f"scenes-{seed}-{places}.npy")
    depths = cached(folder / f"depths-{seed}-{places}.npy", lambda: _depths(scenes))
    estimator = train_estimator(images, depths, estimator_minutes, folder, device, seed, dtype=dtype)

    parts = load_pipeline(begin, device="cpu").components
    moments = encode_all(parts["vae"].to(device), images, folder / "moments.npy", device, dtype)
    print("estimating the depth of the scenes", flush=True)
    side = moments.shape[-1]
    true = prepare(torch.tensor(depths), side)
    estimated = prepare(estimate(estimator, images, device).cpu(), side)
    given = with_depth(parts["unet"]), parts["text_encoder"], parts["tokenizer"]
    unet = train_unet(
        scenes, moments, torch.stack([true, estimated]), given, unet_minutes, folder, device, seed, batch, dtype=dtype
    )
    return save(folder / "depth", unet, estimator, make_feature_extractor())


def _depths(scenes: Sequence[Scene]) -> np.ndarray:
    """Render the depth of every scene, (scenes, height, width); twins have the same, so only half are rendered."""
    return np.stack([depth_map(scene) for scene in scenes[::2]]).repeat(2, axis=0)


def save(
    folder: Path, unet: UNetNAS, depth_estimator: DPTForDepthEstimation, feature_extractor: DPTImageProcessor
) -> Path:
    """Save the new parts as in a diffusers folder, in float16 safetensors."""
    with quiet():
        nn.Module.to(unet, torch.float16).save_pretrained(folder / "unet")
        nn.Module.to(depth_estimator, torch.float16).save_pretrained(folder / "depth_estimator")
    feature_extractor.save_pretrained(folder / "feature_extractor")
    tidy_configs(folder)
    (folder / "model_index.json").write_text(json.dumps(INDEX, indent=2) + "\n")
    return folder


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, default=Path("runs/depth"), help="for log, checkpoints and parts")
    parser.add_argument(
        "--places", type=int, default=4_000, help="how many scenes to draw, each with a twin (default %(default)s)"
    )
    parser.add_argument(
        "--estimator-minutes", type=float, default=5, help="for the depth estimator (default %(default)s)"
    )
    parser.add_argument("--unet-minutes", type=float, default=40, help="for the U-Net (default %(default)s)")
    parser.add_argument("--batch", type=int, default=32, help="rows in a step of the U-Net (default %(default)s)")
    parser.add_argument("--begin", default="tiny", help="the model whose parts are shared (default %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    given = parser.parse_args(arguments)
    parts = train(
        given.folder,
        given.places,
        given.estimator_minutes,
        given.unet_minutes,
        given.seed,
        torch.device(given.device),
        given.begin,
        given.batch,
    )
    print(f"saved {parts}; measure it with: python -m decinb.tiny.evaluate_depth --folder {parts}")


if __name__ == "__main__":
    main()
