"""Train the bundled model from scratch: ``python -m decinb.tiny.train``.

Scenes are drawn and a tokenizer is trained on their captions. A VAE learns to reconstruct them from a latent of
4 x 16 x 16. Then a text encoder and a U-Net-NAS learn together to turn noise into such latents. Each stage has a budget
of minutes, which also sets its learning rate. It saves a checkpoint twice a minute, and the same command resumes it.

Random numbers depend only on the seed and the step, so a resumed run continues as if it had not been interrupted.
"""

import argparse
import json
import random
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DDIMScheduler
from PIL import Image
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import CLIPTextModel, CLIPTokenizer

from decinb.errors import InputError
from decinb.loading import load_pipeline
from decinb.pipeline import DeciDiffusionImg2ImgPipeline
from decinb.scenes.scenes import Scene
from decinb.tiny.data import Example, cached, draw_all, draw_scenes, house_weights, noised, to_input, to_tokens
from decinb.tiny.networks import make_scheduler, make_text_encoder, make_tokenizer, make_unet, make_vae
from decinb.tiny.stage import Stage
from decinb.unet_nas import UNetNAS
from decinb.utils.device import choose_workload
from decinb.utils.environment import environment
from decinb.utils.quiet import quiet

# --- losses -----------------------------------------------------------------------------------------------------------


def vae_loss(vae: AutoencoderKL, images: Tensor, generator: torch.Generator, kl_weight: float = 5e-4) -> Tensor:
    """Return the reconstruction error of images in [-1, 1], plus a small KL term that keeps the latent near normal."""
    posterior = vae.encode(images).latent_dist
    reconstructed = vae.decode(posterior.sample(generator)).sample
    kl = 0.5 * (posterior.mean.float().square() + posterior.var.float() - 1 - posterior.logvar.float()).mean()
    return image_loss(reconstructed, images) + kl_weight * kl


def image_loss(predicted: Tensor, images: Tensor) -> Tensor:
    """Return the mean absolute error of images, plus half that of their horizontal and vertical differences."""
    predicted, images = predicted.float(), images.float()
    edges = sum(F.l1_loss(predicted.diff(dim=dim), images.diff(dim=dim)) for dim in (-1, -2))
    return F.l1_loss(predicted, images) + 0.5 * edges


def unet_loss(
    unet: UNetNAS,
    text_encoder: CLIPTextModel,
    scheduler: DDIMScheduler,
    latents: Tensor,
    noise: Tensor,
    tokens: Tensor,
    timesteps: Tensor,
    weights: Tensor | float = 1.0,
    depth: Tensor | None = None,
) -> Tensor:
    """Return the mean square error of the predicted velocity; nearly clean rows have less weight.

    Args:
        unet, text_encoder: in any dtype.
        scheduler: defines noise levels and velocity.
        latents, noise: (rows, 4, height, width), float32, since lower precision would lose small amounts of noise.
        tokens: (rows, TOKENS).
        timesteps: one for each row, on the CPU.
        weights: of every latent pixel.
        depth: (rows, 1, height, width), for a U-Net with depth as a fifth input channel.

    Source: Salimans & Ho (2022), arXiv:2202.00512 (velocity); Hang et al. (2023), arXiv:2303.09556 (the weight).
    """
    noisy = scheduler.add_noise(latents, noise, timesteps)
    velocity = scheduler.get_velocity(latents, noise, timesteps)
    given = noisy if depth is None else torch.cat([noisy, depth], dim=1)
    text = text_encoder(tokens)[0]
    # On a CPU, the backward pass of fused attention takes a fifth of a training step; that of plain attention, little.
    with sdpa_kernel(SDPBackend.MATH) if latents.device.type == "cpu" else nullcontext():
        predicted = unet(given.to(unet.dtype), timesteps.to(latents.device), text).sample
    error = (weights * (predicted.float() - velocity).square()).mean(dim=(1, 2, 3))
    clean = scheduler.alphas_cumprod[timesteps]
    weight = (6 * (1 - clean)).clamp(max=1).to(error)  # min(snr + 1, 6) / (snr + 1)
    return (weight * error).mean()


@torch.no_grad()
def normalise_latent(vae: AutoencoderKL, latents: Tensor) -> None:
    """Bring the latent to mean 0 and standard deviation 1 in every channel, by changing the convolutions around it.

    Args:
        vae: changed in place; its reconstructions stay the same.
        latents: of many images, (images, channels, height, width), as the VAE encodes them now.
    """
    mean, deviation = latents.mean(dim=(0, 2, 3)), latents.std(dim=(0, 2, 3))
    before, after, channels = vae.quant_conv, vae.post_quant_conv, len(mean)
    after.bias += after.weight[:, :, 0, 0] @ mean
    after.weight *= deviation[None, :, None, None]
    before.weight[:channels] /= deviation[:, None, None, None]
    before.bias[:channels] = (before.bias[:channels] - mean) / deviation
    before.bias[channels:] -= 2 * deviation.log()


# --- stages -----------------------------------------------------------------------------------------------------------


def train_vae(
    images: np.ndarray,
    minutes: float,
    folder: Path,
    device: torch.device,
    seed: int = 0,
    batch: int = 8,
    begin: AutoencoderKL | None = None,
    dtype: torch.dtype = torch.bfloat16,
) -> AutoencoderKL:
    """Train a VAE, and bring its latent to a standard deviation of 1.

    Args:
        images: bytes, (images, 3, height, width).
        minutes: the budget.
        folder: for the checkpoint and the log.
        device: to train on.
        seed: of weights and batches.
        batch: images in a step.
        begin: a VAE to train; None makes a new one for ``tiny``.
        dtype: of the computation; the weights are kept in float32.
    """
    torch.manual_seed(seed)
    vae = begin or make_vae()
    stage = Stage("vae", {"vae": vae}, minutes, 1.5e-3, folder, device, dtype)

    def loss_of(step: int) -> Tensor:
        rng = np.random.default_rng((seed, step))
        chosen = images[rng.integers(len(images), size=batch)]
        mirrored = chosen[..., ::-1] if step % 2 else chosen
        generator = torch.Generator(device).manual_seed(seed * 1_000_003 + step)
        return vae_loss(vae, to_input(mirrored, device, stage.dtype), generator)

    stage.run(loss_of)
    sample = encode(vae, images[:1024], device)
    normalise_latent(vae, sample[:, :4])
    return vae


def finetune_decoder(
    vae: AutoencoderKL,
    images: np.ndarray,
    minutes: float,
    folder: Path,
    device: torch.device,
    seed: int = 0,
    batch: int = 8,
    dtype: torch.dtype = torch.bfloat16,
) -> AutoencoderKL:
    """Train only the decoder of a VAE further, so that a U-Net trained on its latents still fits.

    Args:
        vae: changed in place.
        images, minutes, folder, device, seed, batch, dtype: as of ``train_vae``.
    """
    modules = {"post_quant_conv": vae.post_quant_conv, "decoder": vae.decoder}
    stage = Stage("decoder", modules, minutes, 4e-4, folder, device, dtype)
    frozen = [part.to(device, stage.dtype) for part in (vae.encoder, vae.quant_conv)]

    def loss_of(step: int) -> Tensor:
        rng = np.random.default_rng((seed, step))
        chosen = to_input(images[rng.integers(len(images), size=batch)], device, stage.dtype)
        generator = torch.Generator(device).manual_seed(seed * 1_000_003 + step)
        with torch.no_grad():
            latents = vae.encode(chosen).latent_dist.sample(generator)
        return image_loss(vae.decode(latents).sample, chosen)

    stage.run(loss_of)
    for part in frozen:
        part.float().eval()
    return vae


@torch.no_grad()
def encode(vae: AutoencoderKL, images: np.ndarray, device: torch.device, batch: int = 32) -> Tensor:
    """Encode images (bytes) to means and log variances of latents, (images, 8, height / 8, width / 8), float32."""
    moments = []
    for start in range(0, len(images), batch):
        posterior = vae.encode(to_input(images[start : start + batch], device, vae.dtype)).latent_dist
        moments.append(torch.cat([posterior.mean, posterior.logvar], dim=1).float())
    return torch.cat(moments)


def encode_all(
    vae: AutoencoderKL, images: np.ndarray, file: Path, device: torch.device, dtype: torch.dtype = torch.bfloat16
) -> Tensor:
    """Encode images as ``encode`` does, computing in ``dtype``, and keep the result in a file for a resumed run."""

    def make() -> np.ndarray:
        print("encoding the scenes", flush=True)
        moments = encode(vae.to(device, dtype), images, device)
        vae.float()
        return moments.cpu().numpy()

    return torch.from_numpy(cached(file, make)).to(device)


def train_unet(
    scenes: Sequence[Scene],
    moments: Tensor,
    tokenizer: CLIPTokenizer,
    minutes: float,
    folder: Path,
    device: torch.device,
    seed: int = 0,
    batch: int = 64,
    begin: tuple[UNetNAS, CLIPTextModel] | None = None,
    watch: Callable[[UNetNAS, CLIPTextModel, float], None] | None = None,
    learning_rate: float | None = None,
    dtype: torch.dtype = torch.bfloat16,
) -> tuple[UNetNAS, CLIPTextModel]:
    """Train U-Net-NAS and text encoder together, on the latents of scenes and on captions that vary from step to step.

    An image-to-image call starts from a noisy input, which the prompt may contradict. What is left of the input then
    acts as additional noise, (input - target) / sigma at the start of the edit, which the U-Net has to remove. The
    examples show this with twins as input and target, so the U-Net learns to change what the prompt asks for and to
    keep the rest in place.

    Args:
        scenes: every second one is the twin of the one before it.
        moments: of their latents, as ``encode`` gives them.
        tokenizer: of the text encoder.
        minutes: the budget.
        folder: for the checkpoint and the log.
        device: to train on.
        seed: of weights and batches.
        batch: rows in a step.
        begin: a U-Net and a text encoder to train; None makes new ones for ``tiny``.
        watch: called four times a minute with U-Net, text encoder, and the progress from 0 to 1.
        learning_rate: the maximum; by default 1e-3, or half of that with ``begin``.
        dtype: of the computation; the weights are kept in float32.
    """
    torch.manual_seed(seed)
    unet, text_encoder = begin or (make_unet(), make_text_encoder(tokenizer))
    scheduler = make_scheduler()
    learning_rate = learning_rate or (5e-4 if begin else 1e-3)
    modules = {"unet": unet, "text_encoder": text_encoder}
    stage = Stage("unet", modules, minutes, learning_rate, folder, device, dtype)
    weights = house_weights(scenes, moments.shape[-1]).to(moments.device)

    def loss_of(step: int) -> Tensor:
        rng = random.Random(f"{seed} {step}")
        generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
        examples = [Example.draw(scenes, rng, len(scheduler.alphas_cumprod)) for _ in range(batch)]
        latents, noise = noised(examples, moments, scheduler, generator)
        tokens = to_tokens(tokenizer, [example.prompt for example in examples])
        timesteps = torch.tensor([example.timestep for example in examples])
        targets = [example.target for example in examples]
        return unet_loss(
            unet,
            text_encoder,
            scheduler,
            latents.to(device),
            noise.to(device),
            tokens.to(device),
            timesteps,
            weights[targets],
        )

    stage.run(loss_of, (lambda progress: watch(unet, text_encoder, progress)) if watch else None)
    return unet, text_encoder


def train(
    folder: Path,
    places: int,
    vae_minutes: float,
    unet_minutes: float,
    seed: int,
    device: torch.device,
    begin: str | Path | None = None,
    batch: int = 64,
    dtype: torch.dtype | None = None,
) -> Path:
    """Run all stages in ``folder`` and save the model, a diffusers folder, in ``folder/model``.

    Args:
        folder: for the log, the checkpoints and the model.
        places: how many scenes to draw, each with a twin.
        vae_minutes: for the VAE; with ``begin`` for its decoder only, and 0 skips it.
        unet_minutes: for U-Net and text encoder; with ``begin``, 0 skips them.
        seed: of scenes, weights and batches.
        device: to train on.
        begin: a model to continue from, whose latent and tokenizer are kept; None trains from scratch.
        batch: rows in a step of the U-Net.
        dtype: of the computation; None chooses with ``training_dtype``.

    Raises:
        InputError: a stage that is needed has no minutes, or ``folder`` holds a run with other settings.
    """
    if not begin and not (vae_minutes > 0 and unet_minutes > 0):
        raise InputError(
            f"vae_minutes and unet_minutes must be above 0 without a model to begin with, got {vae_minutes:g} and "
            f"{unet_minutes:g}"
        )
    dtype = dtype or training_dtype(device)
    folder.mkdir(parents=True, exist_ok=True)
    check_same_run(
        folder / "settings.json",
        {"places": places, "vae_minutes": vae_minutes, "seed": seed, "begin": begin and str(begin)},
    )
    scenes = draw_scenes(places, seed)
    print(f"drawing {len(scenes)} scenes", flush=True)
    images = draw_all(scenes, folder / f"scenes-{seed}-{places}.npy")
    if begin:
        parts = load_pipeline(begin, device="cpu").components
        vae, tokenizer, first = parts["vae"], parts["tokenizer"], (parts["unet"], parts["text_encoder"])
        if vae_minutes:
            finetune_decoder(vae, images, vae_minutes, folder, device, seed, dtype=dtype)
    else:
        tokenizer, first = make_tokenizer(folder / "tokenizer"), None
        vae = train_vae(images, vae_minutes, folder, device, seed, dtype=dtype)
    if unet_minutes or not first:
        moments = encode_all(vae, images, folder / "moments.npy", device, dtype)
        first = train_unet(
            scenes, moments, tokenizer, unet_minutes, folder, device, seed, batch, begin=first, dtype=dtype
        )
    unet, text_encoder = first
    model = save(folder / "model", vae, text_encoder, tokenizer, unet)
    write_card(model, places, seed, device, begin)
    return model


def training_dtype(device: torch.device) -> torch.dtype:
    """Choose bfloat16, or float32 on a CPU without units for bfloat16, where it is up to twenty times as fast."""
    slow = device.type == "cpu" and choose_workload(device)[1] == torch.float32
    return torch.float32 if slow else torch.bfloat16


def write_card(model: Path, places: int, seed: int, device: torch.device, begin: str | Path | None = None) -> None:
    """Write the model's ``README.md``: how it was trained, and a place for the table of ``decinb.tiny.evaluate``."""
    log = model.parent / "log.jsonl"  # missing if all stages were skipped
    lines = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
    last = {line["stage"]: line for line in lines}
    stages = ", ".join(f"{name} {line['minutes']:.0f} minutes ({line['step']} steps)" for name, line in last.items())
    machine = environment(device)
    start = f"from {Path(begin).name}" if begin else "from scratch"
    (model / "README.md").write_text(
        f"""---
library_name: diffusers
pipeline_tag: image-to-image
---

# A U-Net-NAS for drawn landscapes

Trained {start} by `python -m decinb.tiny.train` on {2 * places:,} scenes of `decinb/scenes/scenes.py`, seed {seed}.

- Wall time: {stages or "none"}.
- Machine: {machine["device"]}, {machine["threads"]} threads, torch {machine["torch"]}.

It knows only these landscapes and these words. Results of `python -m decinb.tiny.evaluate --model FOLDER`:

<!-- evaluate -->
not measured yet
<!-- /evaluate -->
""",
        encoding="utf-8",
    )


def check_same_run(file: Path, settings: dict[str, float]) -> None:
    """Save the settings on which checkpoints depend, or refuse others than those of the run in the same folder.

    Raises:
        InputError: the settings differ from those in ``file``.
    """
    if not file.exists():
        file.write_text(json.dumps(settings))
    elif (before := json.loads(file.read_text())) != settings:
        raise InputError(
            f"folder {str(file.parent)!r} holds a run with {before}, got {settings}: use the same or another folder"
        )


def sample(
    vae: AutoencoderKL,
    text_encoder: CLIPTextModel,
    tokenizer: CLIPTokenizer,
    unet: UNetNAS,
    prompts: Sequence[str],
    steps: int = 12,
) -> list[Image.Image]:
    """Make an image from each prompt alone, always from the same noise; all parts must have one dtype."""
    pipe = DeciDiffusionImg2ImgPipeline(vae, text_encoder, tokenizer, unet, make_scheduler())
    pipe.set_progress_bar_config(disable=True)
    blank = Image.new("RGB", (pipe.image_size, pipe.image_size))  # has no effect at strength 1
    return pipe(
        prompt=list(prompts),
        image=[blank] * len(prompts),
        strength=1.0,
        num_inference_steps=steps,
        generator=[torch.Generator().manual_seed(row) for row in range(len(prompts))],
    ).images


def save(
    folder: Path, vae: AutoencoderKL, text_encoder: CLIPTextModel, tokenizer: CLIPTokenizer, unet: UNetNAS
) -> Path:
    """Save the parts as an ordinary diffusers folder, in float16 safetensors."""
    pipe = DeciDiffusionImg2ImgPipeline(vae, text_encoder, tokenizer, unet, make_scheduler())
    with quiet():
        pipe.to(torch.float16).save_pretrained(folder)
    tidy_configs(folder)
    return folder


def tidy_configs(folder: Path) -> None:
    """Remove local paths from the configs of saved parts, and make them load in float32."""
    for file in folder.glob("*/config.json"):
        config = json.loads(file.read_text())
        config.pop("_name_or_path", None)  # the path that a part was loaded from
        if "transformers_version" in config:
            # diffusers loads its parts in float32 whatever is stored; transformers needs this entry.
            config["dtype"] = "float32"
        file.write_text(json.dumps(config, indent=2) + "\n")


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, default=Path("runs/tiny"), help="for log, checkpoints and model")
    parser.add_argument(
        "--places", type=int, default=20_000, help="how many scenes to draw, each with a twin (default %(default)s)"
    )
    parser.add_argument(
        "--vae-minutes", type=float, default=35, help="for the VAE, or with --begin its decoder (default %(default)s)"
    )
    parser.add_argument(
        "--unet-minutes", type=float, default=65, help="for U-Net and text encoder (default %(default)s)"
    )
    parser.add_argument("--batch", type=int, default=64, help="rows in a step of the U-Net (default %(default)s)")
    parser.add_argument(
        "--begin", help='a model to continue from, "tiny" or a folder; its latent and tokenizer are kept'
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    given = parser.parse_args(arguments)
    model = train(
        given.folder,
        given.places,
        given.vae_minutes,
        given.unet_minutes,
        given.seed,
        torch.device(given.device),
        given.begin,
        given.batch,
    )
    print(f"saved {model}; its README.md says how it was trained")


if __name__ == "__main__":
    main()
