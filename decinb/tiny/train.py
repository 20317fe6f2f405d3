"""Train the bundled model from nothing: ``python -m decinb.tiny.train``.

Scenes are drawn, a tokenizer learns their captions, a VAE learns to draw them again from a latent of 4 x 16 x 16, and a
text encoder and a U-Net-NAS learn together to turn noise into such latents. Each stage has a budget of minutes that its
learning rate follows, writes a checkpoint twice a minute, and goes on from it when the same command is given again.

Random numbers depend on the seed and the step alone, so a run that was killed goes on as if it had not been.
"""

import argparse
import itertools
import json
import os
import random
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass
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
from decinb.scenes.scenes import IMAGE_SIZE, Scene, caption, differing, house_mask, random_scene, render, twin
from decinb.tiny.networks import TOKENS, make_scheduler, make_text_encoder, make_tokenizer, make_unet, make_vae
from decinb.tiny.stage import Stage
from decinb.unet_nas import UNetNAS
from decinb.utils.environment import environment
from decinb.utils.quiet import quiet

EDIT_THRESHOLD = (350, 500)
"""Where the picture gives way to the words, as timesteps: an edit begun below keeps what it sees, above it obeys."""


# A house fills a twentieth of a picture, and what it looks like is what prompts ask for most.
HOUSE_WEIGHT = 4


# --- what is trained --------------------------------------------------------------------------------------------------


# --- what they learn from ---------------------------------------------------------------------------------------------


def draw_scenes(places: int, seed: int) -> list[Scene]:
    """Random scenes, each followed by its twin."""
    rng = random.Random(seed)
    scenes = []
    for _ in range(places):
        scenes.append(random_scene(rng))
        scenes.append(twin(scenes[-1], rng))
    return scenes


def draw(scene: Scene, size: int = IMAGE_SIZE) -> np.ndarray:
    """Render a scene to (3, height, width) bytes."""
    return np.asarray(render(scene, size)).transpose(2, 0, 1)


def draw_all(scenes: list[Scene], file: Path, size: int = IMAGE_SIZE) -> np.ndarray:
    """Render many scenes on all cores into a memory-mapped array (scenes, 3, height, width); done only once."""
    if not file.exists():
        part = file.with_suffix(".part")
        pictures = np.lib.format.open_memmap(part, "w+", np.uint8, (len(scenes), 3, size, size))
        with ProcessPoolExecutor() as pool:
            for i, picture in enumerate(pool.map(draw, scenes, itertools.repeat(size), chunksize=64)):
                pictures[i] = picture
        pictures.flush()
        del pictures  # Windows renames no file that is open
        os.replace(part, file)
    return np.load(file, mmap_mode="r")


def to_input(pictures: np.ndarray | Tensor, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Bytes to the [-1, 1] that a VAE takes."""
    return torch.tensor(np.ascontiguousarray(pictures)).to(device, dtype) / 127.5 - 1


@dataclass(frozen=True)
class Lesson:
    """One row of a training step: ``target`` is to be found in noise over ``seen``, added at timestep ``start``.

    ``target`` and ``seen`` are indices of scenes: one and the same for plain diffusion, two twins for an edit, which
    has come from ``start`` down to ``timestep``.
    """

    target: int
    seen: int
    start: int
    timestep: int
    words: str

    @classmethod
    def draw(
        cls, scenes: Sequence[Scene], rng: random.Random, steps: int, say: Callable[..., str] = caption
    ) -> "Lesson":
        """Draw a lesson from scenes of which each second one is the twin of the one before it.

        Half of them are plain. In the others the words are the twin's: from ``EDIT_THRESHOLD`` on so is the picture,
        before it
        the words are wrong and the picture stays. No words every tenth time, for guidance. ``say`` is called as
        ``caption`` is.
        """
        row, timestep = rng.randrange(len(scenes)), rng.randrange(steps)
        scene, other = scenes[row], scenes[row ^ 1]
        changed = differing(scene, other)
        if rng.random() < 0.5 or not all(getattr(other, name) for name in changed):  # no words ask for "no house"
            target, start, words = row, timestep, say(scene, rng)
        else:
            start = rng.randrange(timestep, steps)
            target = row ^ 1 if start > rng.uniform(*EDIT_THRESHOLD) else row
            words = say(other, rng, always=changed)
        return cls(target, row, start, timestep, "" if rng.random() < 0.1 else words)


def noised(
    lessons: Sequence[Lesson], moments: Tensor, scheduler: DDIMScheduler, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """The latents that lessons aim at, and their noise with what is left in it of the pictures that they see.

    Args:
        moments: of the latents of all scenes, as ``encode`` gives them.
        generator: of the CPU, so that every device gets the same noise.

    Returns:
        Two tensors (lessons, 4, height, width), float32.
    """
    means, log_variances = moments[[lesson.target for lesson in lessons]].chunk(2, dim=1)
    seen = moments[[lesson.seen for lesson in lessons], :4]
    latents = means + (0.5 * log_variances).exp() * torch.randn(means.shape, generator=generator).to(means)
    noise = torch.randn(means.shape, generator=generator).to(means)
    sigmas = (1 / scheduler.alphas_cumprod - 1).sqrt()[[lesson.start for lesson in lessons]]
    noise += (seen - means) / sigmas[:, None, None, None].to(means)
    return latents, noise


def to_tokens(tokenizer: CLIPTokenizer, words: Sequence[str]) -> Tensor:
    """The tokens of texts, (texts, TOKENS), as a pipeline makes them."""
    return tokenizer(
        list(words), padding="max_length", max_length=TOKENS, truncation=True, return_tensors="pt"
    ).input_ids


def house_weights(scenes: Sequence[Scene], side: int) -> Tensor:
    """How much each place of a latent counts, (scenes, 1, side, side)."""
    houses = torch.from_numpy(np.stack([house_mask(scene, side) for scene in scenes]))[:, None]
    return torch.where(houses, HOUSE_WEIGHT, 1.0)


# --- the two losses ---------------------------------------------------------------------------------------------------


def vae_loss(vae: AutoencoderKL, pictures: Tensor, generator: torch.Generator, kl_weight: float = 5e-4) -> Tensor:
    """How far a picture comes back changed: its values, its edges, and a little for a latent that is not round."""
    posterior = vae.encode(pictures).latent_dist
    back = vae.decode(posterior.sample(generator)).sample
    kl = 0.5 * (posterior.mean.float().square() + posterior.var.float() - 1 - posterior.logvar.float()).mean()
    return picture_loss(back, pictures) + kl_weight * kl


def picture_loss(back: Tensor, pictures: Tensor) -> Tensor:
    """The mean difference of two pictures, and half that of their edges."""
    back, pictures = back.float(), pictures.float()
    edges = F.l1_loss(back.diff(dim=-1), pictures.diff(dim=-1)) + F.l1_loss(back.diff(dim=-2), pictures.diff(dim=-2))
    return F.l1_loss(back, pictures) + 0.5 * edges


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
    """The error of the predicted velocity, at one timestep a row; nearly clean rows count less.

    ``latents`` and ``noise`` are float32: in fewer digits a little noise would be none. ``weights`` say how much each
    place counts. ``depth``, (rows, 1, height, width), is for a U-Net that sees it beside the latent.

    Source: Salimans & Ho (2022), arXiv:2202.00512 (velocity); Hang et al. (2023), arXiv:2303.09556 (the weight).
    """
    noisy = scheduler.add_noise(latents, noise, timesteps)
    velocity = scheduler.get_velocity(latents, noise, timesteps)
    given = noisy if depth is None else torch.cat([noisy, depth], dim=1)
    words = text_encoder(tokens)[0]
    # On a CPU, the way back through fused attention takes a fifth of a training step; through the plain one, little.
    with sdpa_kernel(SDPBackend.MATH) if latents.device.type == "cpu" else nullcontext():
        predicted = unet(given.to(unet.dtype), timesteps.to(latents.device), words).sample
    error = (weights * (predicted.float() - velocity).square()).mean(dim=(1, 2, 3))
    clean = scheduler.alphas_cumprod[timesteps]
    weight = (6 * (1 - clean)).clamp(max=1).to(error)  # min(snr + 1, 6) / (snr + 1)
    return (weight * error).mean()


@torch.no_grad()
def normalise_latent(vae: AutoencoderKL, latents: Tensor) -> None:
    """Bring every channel of the latent to mean 0 and deviation 1, by changing the 1 x 1 convolutions around it.

    Args:
        latents: latents of many pictures, (pictures, channels, height, width), as the VAE gives them now.
    """
    mean, deviation = latents.mean(dim=(0, 2, 3)), latents.std(dim=(0, 2, 3))
    into, out_of, channels = vae.quant_conv, vae.post_quant_conv, len(mean)
    out_of.bias += out_of.weight[:, :, 0, 0] @ mean
    out_of.weight *= deviation[None, :, None, None]
    into.weight[:channels] /= deviation[:, None, None, None]
    into.bias[:channels] = (into.bias[:channels] - mean) / deviation
    into.bias[channels:] -= 2 * deviation.log()


# --- the stages, one after another ------------------------------------------------------------------------------------


def train_vae(
    pictures: np.ndarray,
    minutes: float,
    folder: Path,
    device: torch.device,
    seed: int = 0,
    batch: int = 8,
    begin: AutoencoderKL | None = None,
    dtype: torch.dtype = torch.bfloat16,
) -> AutoencoderKL:
    """Train the VAE on pictures (bytes), and bring its latent to unit deviation.

    Args:
        begin: a VAE to train; without it that of ``tiny``, from nothing.
        dtype: what is computed in; the weights themselves are kept in float32.
    """
    torch.manual_seed(seed)
    vae = begin or make_vae()
    stage = Stage("vae", {"vae": vae}, minutes, 1.5e-3, folder, device, dtype)

    def loss_of(step: int) -> Tensor:
        rng = np.random.default_rng((seed, step))
        chosen = pictures[rng.integers(len(pictures), size=batch)]
        mirrored = chosen[..., ::-1] if step % 2 else chosen
        generator = torch.Generator(device).manual_seed(seed * 1_000_003 + step)
        return vae_loss(vae, to_input(mirrored, device, stage.dtype), generator)

    stage.run(loss_of)
    sample = encode(vae, pictures[:1024], device)
    normalise_latent(vae, sample[:, :4])
    return vae


def finetune_decoder(
    vae: AutoencoderKL,
    pictures: np.ndarray,
    minutes: float,
    folder: Path,
    device: torch.device,
    seed: int = 0,
    batch: int = 8,
) -> AutoencoderKL:
    """Train the decoder of a VAE further, and nothing else: the latent that a U-Net has learnt must stay as it is."""
    stage = Stage("decoder", {"out_of": vae.post_quant_conv, "decoder": vae.decoder}, minutes, 4e-4, folder, device)
    into = [part.to(device, stage.dtype) for part in (vae.encoder, vae.quant_conv)]

    def loss_of(step: int) -> Tensor:
        rng = np.random.default_rng((seed, step))
        chosen = to_input(pictures[rng.integers(len(pictures), size=batch)], device, stage.dtype)
        generator = torch.Generator(device).manual_seed(seed * 1_000_003 + step)
        with torch.no_grad():
            latents = vae.encode(chosen).latent_dist.sample(generator)
        return picture_loss(vae.decode(latents).sample, chosen)

    stage.run(loss_of)
    for part in into:
        part.float().eval()
    return vae


@torch.no_grad()
def encode(vae: AutoencoderKL, pictures: np.ndarray, device: torch.device, batch: int = 32) -> Tensor:
    """The latent of every picture as its mean and log variance, (pictures, 8, height / 8, width / 8), fp32."""
    moments = []
    for start in range(0, len(pictures), batch):
        posterior = vae.encode(to_input(pictures[start : start + batch], device, vae.dtype)).latent_dist
        moments.append(torch.cat([posterior.mean, posterior.logvar], dim=1).float())
    return torch.cat(moments)


def encode_all(vae: AutoencoderKL, pictures: np.ndarray, file: Path, device: torch.device) -> Tensor:
    """``encode`` in bfloat16, kept in a file so that a run that goes on need not do it again."""
    if not file.exists():
        print("encoding the scenes", flush=True)
        moments = encode(vae.to(device, torch.bfloat16), pictures, device)
        vae.float()
        part = file.with_suffix(".part.npy")
        np.save(part, moments.cpu().numpy())
        os.replace(part, file)
    return torch.from_numpy(np.load(file)).to(device)


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
    """Train U-Net-NAS and text encoder together on the latents of scenes and on captions said anew each time.

    An image-to-image call begins with noise over its input, which the words may contradict; what is left of the input
    then acts as a part of the noise, (input - target) / sigma at the start of the edit, that the same U-Net has to
    remove. So that is what it is taught, with twins as input and target: the change, and the place that stays.

    Args:
        scenes: each second one the twin of the one before it.
        moments: of their latents, as ``encode`` gives them.
        begin: a U-Net and a text encoder to go on from; without them those of ``tiny``, from nothing.
        watch: called four times a minute with both, as they are, and the progress from 0 to 1.
        learning_rate: by default 1e-3, and half of it with a model to go on from.
        dtype: what is computed in; the weights themselves are kept in float32.
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
        lessons = [Lesson.draw(scenes, rng, len(scheduler.alphas_cumprod)) for _ in range(batch)]
        latents, noise = noised(lessons, moments, scheduler, generator)
        tokens = to_tokens(tokenizer, [lesson.words for lesson in lessons])
        timesteps = torch.tensor([lesson.timestep for lesson in lessons])
        targets = [lesson.target for lesson in lessons]
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
) -> Path:
    """Run all stages in ``folder`` and leave the finished diffusers folder in ``folder/model``.

    Args:
        places: how many scenes to draw, each with a twin.
        vae_minutes: for the VAE; with ``begin`` for its decoder, and 0 leaves it alone.
        unet_minutes: for U-Net and text encoder; with ``begin`` 0 leaves them alone.
        begin: a model to go on from, whose latent and tokenizer are kept; without it everything begins from nothing.
    """
    folder.mkdir(parents=True, exist_ok=True)
    check_same_run(
        folder / "settings.json",
        {"places": places, "vae_minutes": vae_minutes, "seed": seed, "begin": begin and str(begin)},
    )
    scenes = draw_scenes(places, seed)
    print(f"drawing {len(scenes)} scenes", flush=True)
    pictures = draw_all(scenes, folder / f"scenes-{seed}-{places}.npy")
    if begin:
        parts = load_pipeline(begin, device="cpu").components
        vae, tokenizer, first = parts["vae"], parts["tokenizer"], (parts["unet"], parts["text_encoder"])
        if vae_minutes:
            finetune_decoder(vae, pictures, vae_minutes, folder, device, seed)
    else:
        tokenizer, first = make_tokenizer(folder / "tokenizer"), None
        vae = train_vae(pictures, vae_minutes, folder, device, seed)
    if unet_minutes or not first:
        moments = encode_all(vae, pictures, folder / "moments.npy", device)
        first = train_unet(scenes, moments, tokenizer, unet_minutes, folder, device, seed, begin=first)
    unet, text_encoder = first
    model = save(folder / "model", vae, text_encoder, tokenizer, unet)
    write_card(model, places, seed, device, begin)
    return model


def write_card(model: Path, places: int, seed: int, device: torch.device, begin: str | Path | None = None) -> None:
    """Say in the model's ``README.md`` where it comes from; ``decinb.tiny.evaluate`` puts its figures there."""
    lines = [json.loads(line) for line in (model.parent / "log.jsonl").read_text().splitlines()]
    last = {line["stage"]: line for line in lines}
    stages = ", ".join(f"{name} {line['minutes']:.0f} minutes ({line['step']} steps)" for name, line in last.items())
    machine = environment(device, torch.bfloat16)
    origin = f"from {Path(begin).name}" if begin else "from nothing"
    (model / "README.md").write_text(
        f"""---
library_name: diffusers
pipeline_tag: image-to-image
---

# A U-Net-NAS for drawn landscapes

Trained {origin} by `python -m decinb.tiny.train` on {2 * places:,} scenes of `decinb/scenes/scenes.py`, seed {seed}.

- Wall time: {stages}.
- Machine: {machine["device"]}, {machine["threads"]} threads, torch {machine["torch"]}.

It knows only these landscapes and these words. Figures of `python -m decinb.tiny.evaluate --model FOLDER`:

<!-- evaluate -->
not measured yet
<!-- /evaluate -->
""",
        encoding="utf-8",
    )


def check_same_run(file: Path, settings: dict[str, float]) -> None:
    """What the checkpoints in a folder depend on must not change between two runs there."""
    if not file.exists():
        file.write_text(json.dumps(settings))
    elif (before := json.loads(file.read_text())) != settings:
        raise InputError(f"{file.parent} holds a run with {before}, not {settings}: go on with those, or name another")


def sample(
    vae: AutoencoderKL,
    text_encoder: CLIPTextModel,
    tokenizer: CLIPTokenizer,
    unet: UNetNAS,
    prompts: Sequence[str],
    steps: int = 12,
) -> list[Image.Image]:
    """Make a picture from each prompt alone, always from the same noise; all parts must be of one dtype."""
    pipe = DeciDiffusionImg2ImgPipeline(vae, text_encoder, tokenizer, unet, make_scheduler())
    pipe.set_progress_bar_config(disable=True)
    forgotten = Image.new("RGB", (pipe.image_size, pipe.image_size))  # by strength 1
    return pipe(
        prompt=list(prompts),
        image=[forgotten] * len(prompts),
        strength=1.0,
        num_inference_steps=steps,
        generator=[torch.Generator().manual_seed(row) for row in range(len(prompts))],
    ).images


def save(
    folder: Path, vae: AutoencoderKL, text_encoder: CLIPTextModel, tokenizer: CLIPTokenizer, unet: UNetNAS
) -> Path:
    """Write the parts as an ordinary diffusers folder, fp16 safetensors."""
    pipe = DeciDiffusionImg2ImgPipeline(vae, text_encoder, tokenizer, unet, make_scheduler())
    with quiet():
        pipe.to(torch.float16).save_pretrained(folder)
    tidy_configs(folder)
    return folder


def tidy_configs(folder: Path) -> None:
    """Leave nothing in the configs of saved parts that is of this machine, or that changes how they load."""
    for file in folder.glob("*/config.json"):
        config = json.loads(file.read_text())
        config.pop("_name_or_path", None)  # where a part was loaded from on this machine
        if "transformers_version" in config:
            # diffusers' parts come up in float32 whatever is stored; transformers' do so only if they are told.
            config["dtype"] = "float32"
        file.write_text(json.dumps(config, indent=2) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--folder", type=Path, default=Path("runs/tiny"), help="log, checkpoints and the finished model"
    )
    parser.add_argument(
        "--places", type=int, default=20_000, help="how many scenes to draw, each with a twin (default %(default)s)"
    )
    parser.add_argument("--vae-minutes", type=float, default=35, help="with --begin: of its decoder (default 35)")
    parser.add_argument("--unet-minutes", type=float, default=65, help="of U-Net and text encoder (default 65)")
    parser.add_argument("--begin", help='a model to go on from ("tiny" or a folder); its latent and tokenizer are kept')
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    given = parser.parse_args()
    device = torch.device(given.device)
    model = train(given.folder, given.places, given.vae_minutes, given.unet_minutes, given.seed, device, given.begin)
    print(f"wrote {model}; how and where it was trained stands in its README.md")


if __name__ == "__main__":
    main()
