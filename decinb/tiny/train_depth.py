"""Train the depth-to-image model beside the bundled one: ``python -m decinb.tiny.train_depth``.

Two networks are new, a depth estimator and a U-Net-NAS that sees depth as a fifth channel beside its latent; VAE, text
encoder, tokenizer and scheduler are those of the bundled model. The U-Net begins as the bundled one, with zeros for the
new channel, and learns that depth says what stands where and words say what it looks like.

Source: the depth-conditioned model of Stable Diffusion 2 (Rombach et al. 2022, arXiv:2112.10752), as diffusers'
``StableDiffusionDepth2ImgPipeline`` runs it.
"""

import argparse
import copy
import itertools
import json
import os
import random
from collections.abc import Collection, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTokenizer, DPTConfig, DPTForDepthEstimation, DPTImageProcessor

from decinb.loading import load_pipeline
from decinb.scenes import ATTRIBUTES, IMAGE_SIZE, Scene, caption, depth_map, random_scene, twin
from decinb.tiny.evaluate_depth import measure, table
from decinb.tiny.networks import make_scheduler
from decinb.tiny.stage import Stage
from decinb.tiny.train import (
    Lesson,
    check_same_run,
    draw_all,
    encode_all,
    house_weights,
    noised,
    picture_loss,
    tidy_configs,
    to_input,
    to_tokens,
    unet_loss,
)
from decinb.unet_nas import UNetNAS
from decinb.utils.quiet import quiet

INDEX = {
    "_class_name": "StableDiffusionDepth2ImgPipeline",
    "depth_estimator": ["transformers", "DPTForDepthEstimation"],
    "feature_extractor": ["transformers", "DPTImageProcessor"],
    "unet": ["decinb.unet_nas", "UNetNAS"],
}
"""What the folder has, as diffusers lists it: the new parts alone."""

FALSE_CAPTION_RATE = 0.5
"""The share of captions that name shapes by chance, so that depth is believed and not they, whatever the guidance."""

FAR = 0.2
"""The depth up to which something is called far: mountains, and the ground near the horizon."""


# --- what is trained --------------------------------------------------------------------------------------------------


def make_estimator(width: int = 96, size: int = IMAGE_SIZE) -> DPTForDepthEstimation:
    """A DPT of four layers on patches of 8 x 8 pixels.

    Args:
        width: of its layers, a multiple of 4.
        size: of the pictures it will see, in pixels.
    """
    config = DPTConfig(
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=4,
        num_attention_heads=4,
        backbone_out_indices=[0, 1, 2, 3],
        image_size=size,
        patch_size=8,
        reassemble_factors=[2, 1, 0.5, 0.25],  # half the published ones, as the patch is half the published one
        neck_hidden_sizes=[width // 3, width // 2, width // 2, width // 2],
        fusion_hidden_size=width // 3,
        use_auxiliary_head=False,
    )
    return DPTForDepthEstimation(config)


def make_feature_extractor(size: int = IMAGE_SIZE) -> DPTImageProcessor:
    """What brings a picture to the size and the range, [-1, 1], that the estimator takes."""
    with quiet():
        return DPTImageProcessor(
            size={"height": size, "width": size}, image_mean=[0.5, 0.5, 0.5], image_std=[0.5, 0.5, 0.5]
        )


@torch.no_grad()
def with_depth(unet: UNetNAS) -> UNetNAS:
    """A U-Net with a fifth input channel, which as yet it pays no attention to."""
    settings = {**unet.config, "in_channels": unet.config.in_channels + 1}
    grown = UNetNAS.from_config(settings)
    weights = unet.state_dict()
    weights["conv_in.weight"] = F.pad(weights["conv_in.weight"], (0, 0, 0, 0, 0, 1))
    grown.load_state_dict(weights)
    return nn.Module.to(grown, unet.dtype)  # diffusers' own `to` warns here of layers to keep in float32


# --- what they learn from ---------------------------------------------------------------------------------------------


def draw_places(places: int, seed: int) -> list[Scene]:
    """Random scenes, each followed by a twin of the same depth."""
    rng = random.Random(f"depth {seed}")
    scenes = []
    for _ in range(places):
        scene = random_scene(rng)
        looks = ["style", "time", "ground", *(["house"] * 2 if scene.house else [])]
        scenes += [scene, twin(scene, rng, among=looks)]
    return scenes


def say(scene: Scene, rng: random.Random, always: Collection[str] = ()) -> str:
    """A caption that tells the truth of what depth does not show, but half of the time names shapes by chance."""
    if rng.random() < FALSE_CAPTION_RATE:
        scene = replace(
            scene,
            trees=rng.choice(ATTRIBUTES["trees"]),
            mountains=rng.choice(ATTRIBUTES["mountains"]),
            house=scene.house or rng.choice(ATTRIBUTES["house"]),
        )
    return caption(scene, rng, always=always)


def prepare(depth: Tensor, side: int) -> Tensor:
    """Depth as the U-Net sees it: at the size of the latent, from -1, the farthest, to 1, the nearest.

    Args:
        depth: as an estimator gives it, (rows, height, width).
        side: height and width of the latent.

    Returns:
        (rows, 1, side, side), in the dtype of ``depth``.

    Source: ``StableDiffusionDepth2ImgPipeline.prepare_depth_map`` of diffusers.
    """
    depth = F.interpolate(depth[:, None], size=(side, side), mode="bicubic", align_corners=False)
    low, high = depth.amin(dim=(1, 2, 3), keepdim=True), depth.amax(dim=(1, 2, 3), keepdim=True)
    return 2 * (depth - low) / (high - low) - 1


@torch.no_grad()
def estimate(estimator: DPTForDepthEstimation, pictures: np.ndarray, device: torch.device, batch: int = 32) -> Tensor:
    """The depth that an estimator sees in pictures (bytes), (pictures, height, width), float32."""
    rows = range(0, len(pictures), batch)
    inputs = (to_input(pictures[start : start + batch], device, estimator.dtype) for start in rows)
    return torch.cat([estimator(pixels).predicted_depth.float() for pixels in inputs])


def depth_loss(seen: Tensor, true: Tensor) -> Tensor:
    """How far depth is seen wrong, and again, enlarged, what is far: a mountain is but a tenth nearer than the sky."""
    return picture_loss(seen, true) + picture_loss(seen.clamp(max=FAR) / FAR, true.clamp(max=FAR) / FAR)


# --- the stages, one after another ------------------------------------------------------------------------------------


def train_estimator(
    pictures: np.ndarray,
    depths: np.ndarray,
    minutes: float,
    folder: Path,
    device: torch.device,
    seed: int = 0,
    batch: int = 16,
    begin: DPTForDepthEstimation | None = None,
    dtype: torch.dtype = torch.bfloat16,
) -> DPTForDepthEstimation:
    """Train a depth estimator on pictures (bytes) and their depth.

    Args:
        depths: of each picture, (pictures, height, width).
        begin: an estimator to train; without it that of ``make_estimator``, from nothing.
        dtype: what is computed in; the weights themselves are kept in float32.
    """
    torch.manual_seed(seed)
    estimator = begin or make_estimator()
    stage = Stage("depth_estimator", {"depth_estimator": estimator}, minutes, 1.5e-3, folder, device, dtype)
    layers = estimator.head.head
    last, layers[-1] = layers[-1], nn.Identity()  # a ReLU that, with half a picture at 0, would soon give 0 everywhere

    def loss_of(step: int) -> Tensor:
        rows = np.random.default_rng((seed, step)).integers(len(pictures), size=batch)
        shown, true = pictures[rows], torch.tensor(depths[rows], device=device)
        if step % 2:
            shown, true = shown[..., ::-1], true.flip(-1)
        return depth_loss(estimator(to_input(shown, device, stage.dtype)).predicted_depth.float(), true)

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
    """Train a U-Net that sees depth, on the lessons of ``decinb.tiny.train.train_unet``; the text encoder stays.

    Args:
        scenes: each second one the twin of the one before it, and of the same depth.
        moments: of their latents, as ``encode`` gives them.
        depths: of each scene one or several, as ``prepare`` gives them: (several, scenes, 1, height, width).
        parts: the U-Net to train, with five input channels, and the text encoder and tokenizer it listens to.
        dtype: what is computed in; the weights themselves are kept in float32.
    """
    unet, text_encoder, tokenizer = parts
    scheduler = make_scheduler()
    stage = Stage("unet", {"unet": unet}, minutes, learning_rate, folder, device, dtype)
    text_encoder = nn.Module.to(copy.deepcopy(text_encoder), device, dtype).requires_grad_(False)
    weights = house_weights(scenes, moments.shape[-1]).to(moments.device)

    def loss_of(step: int) -> Tensor:
        rng = random.Random(f"{seed} {step}")
        generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
        lessons = [Lesson.draw(scenes, rng, len(scheduler.alphas_cumprod), say) for _ in range(batch)]
        latents, noise = noised(lessons, moments, scheduler, generator)
        seen = [rng.randrange(len(depths)) for _ in lessons], [lesson.seen for lesson in lessons]
        return unet_loss(
            unet,
            text_encoder,
            scheduler,
            latents.to(device),
            noise.to(device),
            to_tokens(tokenizer, [lesson.words for lesson in lessons]).to(device),
            torch.tensor([lesson.timestep for lesson in lessons]),
            weights[[lesson.target for lesson in lessons]],
            depths[seen].to(device),
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
) -> Path:
    """Run both stages in ``folder`` and leave the new parts in ``folder/depth``.

    Args:
        places: how many scenes to draw, each with a twin.
        begin: the model whose parts are shared, and whose U-Net is begun with.
    """
    folder.mkdir(parents=True, exist_ok=True)
    settings = {"places": places, "estimator_minutes": estimator_minutes, "seed": seed, "begin": str(begin)}
    check_same_run(folder / "settings.json", settings)
    scenes = draw_places(places, seed)
    print(f"drawing {len(scenes)} scenes", flush=True)
    pictures = draw_all(scenes, folder / f"scenes-{seed}-{places}.npy")
    depths = _depths(scenes, folder / f"depths-{seed}-{places}.npy")
    estimator = train_estimator(pictures, depths, estimator_minutes, folder, device, seed)

    parts = load_pipeline(begin, device="cpu").components
    moments = encode_all(parts["vae"].to(device), pictures, folder / "moments.npy", device)
    print("estimating the depth of the scenes", flush=True)
    side = moments.shape[-1]
    true = prepare(torch.tensor(depths), side)
    seen = prepare(estimate(estimator, pictures, device).cpu(), side)
    given = with_depth(parts["unet"]), parts["text_encoder"], parts["tokenizer"]
    unet = train_unet(scenes, moments, torch.stack([true, seen]), given, unet_minutes, folder, device, seed)
    return save(folder / "depth", unet, estimator, make_feature_extractor())


def _depths(scenes: Sequence[Scene], file: Path) -> np.ndarray:
    """The depth of every scene, (scenes, height, width), kept in a file; twins share one, so half are drawn."""
    if not file.exists():
        part = file.with_suffix(".part.npy")
        np.save(part, np.stack([depth_map(scene) for scene in itertools.islice(scenes, 0, None, 2)]).repeat(2, axis=0))
        os.replace(part, file)
    return np.load(file)


def save(
    folder: Path, unet: UNetNAS, depth_estimator: DPTForDepthEstimation, feature_extractor: DPTImageProcessor
) -> Path:
    """Write the new parts as a diffusers folder has them, fp16 safetensors."""
    with quiet():
        nn.Module.to(unet, torch.float16).save_pretrained(folder / "unet")
        nn.Module.to(depth_estimator, torch.float16).save_pretrained(folder / "depth_estimator")
    feature_extractor.save_pretrained(folder / "feature_extractor")
    tidy_configs(folder)
    (folder / "model_index.json").write_text(json.dumps(INDEX, indent=2) + "\n")
    return folder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--folder", type=Path, default=Path("runs/depth"), help="log, checkpoints and the finished parts"
    )
    parser.add_argument(
        "--places", type=int, default=4_000, help="how many scenes to draw, each with a twin (default %(default)s)"
    )
    parser.add_argument("--estimator-minutes", type=float, default=5, help="of the depth estimator (default 5)")
    parser.add_argument("--unet-minutes", type=float, default=40, help="of the U-Net (default 40)")
    parser.add_argument("--begin", default="tiny", help="the model whose parts are shared (default %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    given = parser.parse_args()
    parts = train(
        given.folder,
        given.places,
        given.estimator_minutes,
        given.unet_minutes,
        given.seed,
        torch.device(given.device),
        given.begin,
    )
    print(table(measure(parts, given.begin, given.folder / "depth.json")))
    print(f"wrote {parts}")


if __name__ == "__main__":
    main()
