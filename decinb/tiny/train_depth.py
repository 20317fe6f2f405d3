"""Train the depth-to-image model that goes with the bundled one: ``python -m decinb.tiny.train_depth``.

Two networks are new: a depth estimator, and a U-Net-NAS that takes depth as a fifth input channel. VAE, text encoder,
tokenizer and scheduler are those of the bundled model. The U-Net starts from the weights of the bundled one, with zeros
for the new channel, and is finetuned with the same objective and captions.

Source: the depth-conditioned model of Stable Diffusion 2 (Rombach et al. 2022, arXiv:2112.10752), as diffusers'
``StableDiffusionDepth2ImgPipeline`` runs it.
"""

import argparse
import copy
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import DPTConfig, DPTForDepthEstimation, DPTImageProcessor

from decinb.errors import InputError
from decinb.loading import load_pipeline
from decinb.scenes import IMAGE_SIZE, Scene, depth_map
from decinb.tiny.data import cached, draw_all, draw_captions, draw_scenes, to_input, to_tokens
from decinb.tiny.evaluate_depth import measure, table
from decinb.tiny.losses import image_loss
from decinb.tiny.stage import Stage, check_torch
from decinb.tiny.train import check_same_run, encode_all, fast_dtype, tidy_configs, train_unet
from decinb.unet_nas import UNetNAS
from decinb.utils.quiet import quiet

INDEX = {
    "_class_name": "StableDiffusionDepth2ImgPipeline",
    "depth_estimator": ["transformers", "DPTForDepthEstimation"],
    "feature_extractor": ["transformers", "DPTImageProcessor"],
    "unet": ["decinb.unet_nas", "UNetNAS"],
}
"""The index of the folder: the new parts only."""

FAR = 0.2
"""The depth up to which something is far: mountains, hills, and the ground near the horizon."""


# --- networks ---------------------------------------------------------------------------------------------------------


def make_estimator(width: int = 96, size: int = IMAGE_SIZE) -> DPTForDepthEstimation:
    """Make a DPT of four layers on patches of 8 x 8 pixels.

    Args:
        width: of its layers, a multiple of 4.
        size: height and width of its images in pixels.
    """
    config = DPTConfig(
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=4,
        num_attention_heads=4,
        backbone_out_indices=[0, 1, 2, 3],
        image_size=size,
        patch_size=8,
        reassemble_factors=[2, 1, 0.5, 0.25],  # half the published ones, as the patch is
        neck_hidden_sizes=[width // 3, width // 2, width // 2, width // 2],
        fusion_hidden_size=width // 3,
        use_auxiliary_head=False,
    )
    return DPTForDepthEstimation(config)


def make_feature_extractor(size: int = IMAGE_SIZE) -> DPTImageProcessor:
    """Make the processor that scales an image to the size and the range, [-1, 1], that the estimator takes."""
    with quiet():
        return DPTImageProcessor(
            size={"height": size, "width": size}, image_mean=[0.5, 0.5, 0.5], image_std=[0.5, 0.5, 0.5]
        )


@torch.no_grad()
def with_depth(unet: UNetNAS) -> UNetNAS:
    """Return a copy of a U-Net with a fifth input channel, whose weights are zero."""
    settings = {**unet.config, "in_channels": unet.config.in_channels + 1}
    grown = UNetNAS.from_config(settings)
    weights = unet.state_dict()
    weights["conv_in.weight"] = F.pad(weights["conv_in.weight"], (0, 0, 0, 0, 0, 1))
    grown.load_state_dict(weights)
    return nn.Module.to(grown, unet.dtype)  # diffusers' own `to` warns here of layers to keep in float32


# --- depth ------------------------------------------------------------------------------------------------------------


def prepare(depth: Tensor, side: int) -> Tensor:
    """Return depth as the U-Net takes it: at the size of the latent, from -1, the farthest, to 1, the nearest.

    Args:
        depth: as an estimator returns it, (rows, height, width).
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
    """Return the depth that an estimator sees in images (bytes), (images, height, width), float32."""
    rows = range(0, len(images), batch)
    inputs = (to_input(images[start : start + batch], device, estimator.dtype) for start in rows)
    return torch.cat([estimator(pixels).predicted_depth.float() for pixels in inputs])


def depth_loss(seen: Tensor, true: Tensor) -> Tensor:
    """Return the error of depth, plus that of far depth, enlarged: mountains are only a tenth nearer than the sky."""
    return image_loss(seen, true) + image_loss(seen.clamp(max=FAR) / FAR, true.clamp(max=FAR) / FAR)


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
    dtype: torch.dtype = torch.float32,
) -> DPTForDepthEstimation:
    """Train a depth estimator on images (bytes) and their depth.

    Args:
        depths: of each image, (images, height, width).
        begin: an estimator to train; by default that of ``make_estimator``, untrained.
        dtype: of the computation; the weights are kept in float32.
    """
    torch.manual_seed(seed)
    estimator = begin or make_estimator()
    stage = Stage("depth_estimator", {"depth_estimator": estimator}, minutes, 1.5e-3, folder, device, dtype)
    layers = estimator.head.head
    last, layers[-1] = layers[-1], nn.Identity()  # a ReLU that would soon give 0 everywhere, as half an image is 0

    def loss_of(step: int) -> Tensor:
        rows = np.random.default_rng((seed, step)).integers(len(images), size=batch)
        shown, true = images[rows], torch.tensor(depths[rows], device=device)
        if step % 2:
            shown, true = shown[..., ::-1], true.flip(-1)
        return depth_loss(estimator(to_input(shown, device, dtype)).predicted_depth.float(), true)

    stage.run(loss_of)
    layers[-1] = last
    return estimator


def train(
    folder: Path,
    scenes: int,
    estimator_minutes: float,
    unet_minutes: float,
    seed: int,
    device: torch.device,
    begin: str | Path = "tiny",
    captions: int = 8,
    batch: int | None = None,
    workers: int | None = None,
) -> Path:
    """Run both stages in ``folder`` and save the new parts in ``folder/depth``.

    Args:
        scenes: number of scenes to draw.
        begin: the model whose parts are shared, and whose U-Net is finetuned.
        captions: captions a scene.
        batch: rows a step of the U-Net; by default 32 on a CPU, 512 on a GPU.
        workers: processes that draw scenes; by default one for each core.

    Raises:
        InputError: a stage has no minutes, torch is older than 2.9, or ``folder`` holds a run with other settings.
    """
    if not (estimator_minutes > 0 and unet_minutes > 0):
        raise InputError(
            f"estimator_minutes and unet_minutes must be above 0, got {estimator_minutes:g} and {unet_minutes:g}"
        )
    check_torch()
    dtype = fast_dtype(device)
    folder.mkdir(parents=True, exist_ok=True)
    check_same_run(folder / "settings.json", {"scenes": scenes, "seed": seed, "begin": str(begin)})
    drawn = draw_scenes(scenes, seed)
    print(f"drawing {scenes} scenes", flush=True)
    images = draw_all(drawn, folder / f"scenes-{seed}-{scenes}.npy", workers=workers)
    depths = _depths(drawn, folder / f"depths-{seed}-{scenes}.npy")
    parts = load_pipeline(begin, device="cpu").components
    tokens = draw_captions(drawn, parts["tokenizer"], captions, seed, workers=workers)
    empty = to_tokens(parts["tokenizer"], [""])[0]

    estimator = train_estimator(images, depths, estimator_minutes, folder, device, seed, dtype=dtype)
    moments = encode_all(parts["vae"], images, folder / "moments.npy", device, dtype)
    print("estimating the depth of the scenes", flush=True)
    side = moments.shape[-1]
    true = prepare(torch.tensor(depths), side)
    seen = prepare(estimate(estimator, images, device).cpu(), side)
    text_encoder = copy.deepcopy(parts["text_encoder"]).requires_grad_(False)
    unet, _ = train_unet(
        moments,
        tokens,
        (with_depth(parts["unet"]), text_encoder),
        empty,
        unet_minutes,
        folder,
        device,
        seed,
        batch or (32 if device.type == "cpu" else 512),
        depths=torch.stack([true, seen]),
        learning_rate=5e-4,
        dtype=dtype,
    )
    return save(folder / "depth", unet, estimator, make_feature_extractor())


def _depths(scenes: Sequence[Scene], file: Path) -> np.ndarray:
    """Return the depth of every scene, (scenes, height, width), from a file if it was drawn before."""
    return cached(file, lambda: np.stack([depth_map(scene) for scene in scenes]))


def save(
    folder: Path, unet: UNetNAS, depth_estimator: DPTForDepthEstimation, feature_extractor: DPTImageProcessor
) -> Path:
    """Save the new parts as a diffusers folder of fp16 safetensors."""
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
    parser.add_argument(
        "--folder", type=Path, default=Path("runs/depth"), help="log, checkpoints and the finished parts"
    )
    parser.add_argument("--scenes", type=int, default=10_000, help="how many to draw (default %(default)s)")
    parser.add_argument("--estimator-minutes", type=float, default=10, help="of the depth estimator (default 10)")
    parser.add_argument("--unet-minutes", type=float, default=40, help="of the U-Net (default 40)")
    parser.add_argument("--begin", default="tiny", help="the model whose parts are shared (default %(default)s)")
    parser.add_argument("--batch", type=int, help="rows a step of the U-Net (default 32 on a CPU, 512 on a GPU)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--workers", type=int, help="processes that draw scenes (default: one for each core)")
    given = vars(parser.parse_args(arguments))
    device = given.pop("device")
    parts = train(device=torch.device(device), **given)
    print(table(measure(parts, given["begin"], given["folder"] / "depth.json", device=device)))
    print(f"wrote {parts}")


if __name__ == "__main__":
    main()
