"""Train the bundled model from nothing: ``python -m decinb.tiny.train``.

Scenes are drawn once. A tokenizer learns their captions, a VAE learns to encode them as latents of 4 x 16 x 16, and a
text encoder and a U-Net-NAS learn together to denoise such latents, as in any latent diffusion model. The captions
are incomplete and sometimes wrong, like captions on the web (``decinb.scenes.captions``).

Each stage runs for a given number of minutes, over which its learning rate falls to zero. It saves a checkpoint every
minute, and the same command resumes it.
"""

import argparse
import copy
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from random import Random

import numpy as np
import torch
from diffusers import AutoencoderKL
from PIL import Image
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTokenizer

from decinb.errors import InputError
from decinb.loading import load_pipeline
from decinb.pipeline import DeciDiffusionImg2ImgPipeline
from decinb.scenes.captions import LEFT_OUT, WRONG
from decinb.tiny.data import (
    cached,
    draw_all,
    draw_captions,
    draw_numbers,
    draw_rows,
    draw_scenes,
    to_input,
    to_tokens,
)
from decinb.tiny.losses import diffusion_loss, image_loss, vae_loss
from decinb.tiny.networks import make_scheduler, make_text_encoder, make_tokenizer, make_unet, make_vae
from decinb.tiny.stage import Stage, check_torch
from decinb.unet_nas import UNetNAS
from decinb.utils.device import choose_workload
from decinb.utils.environment import environment
from decinb.utils.quiet import quiet

NO_CAPTION = 0.1
"""The share of rows that are trained without a caption, for classifier-free guidance."""

EQUIVARIANT = 0.25
"""The share of the VAE's steps in which latents are turned and shrunk with their images."""

SHOWN = (
    "a painting of a red house and pine trees on snow at night",
    "a painting of a blue windmill and a lake on grass under a cloudy sky by day",
    "a painting of a yellow barn and mountains in autumn at sunset",
    "a painting of mountains and a lake at night",
    "a sketch of a windmill, round trees and mountains",
    "a watercolour of a white house, poplar trees and a path on sand by day",
    "pixel art of a red barn and round trees on grass at sunset",
    "a painting of a blue house, pine trees and a fence on snow in a snowfall by day",
)
"""Prompts of the samples that are drawn while the model is trained."""


# --- stages -----------------------------------------------------------------------------------------------------------


def train_vae(
    images: np.ndarray,
    minutes: float,
    folder: Path,
    device: torch.device,
    seed: int = 0,
    batch: int = 8,
    begin: AutoencoderKL | None = None,
    dtype: torch.dtype = torch.float32,
    equivariant: float = EQUIVARIANT,
    learning_rate: float = 4e-3,
    compiled: bool = False,
) -> AutoencoderKL:
    """Train a VAE on images (bytes), and give its latent mean 0 and deviation 1.

    Args:
        begin: a VAE to train; by default that of ``tiny``, untrained.
        dtype: of the computation; the weights are kept in float32.
        equivariant: the share of steps in which latents are turned and shrunk with their images, 0 to 1.
        compiled: compile encoder and decoder with ``torch.compile``.
    """
    torch.manual_seed(seed)
    vae = begin or make_vae()
    if compiled:  # not by `compile_network`, which copies of a network, such as those that draw samples, would share
        vae.encoder.compile(dynamic=False)
        vae.decoder.compile(dynamic=False)
    stage = Stage("vae", {"vae": vae}, minutes, learning_rate, folder, device, dtype)
    shown = images if device.type == "cpu" else torch.from_numpy(np.array(images)).to(device)

    def loss_of(step: int) -> Tensor:
        rng = np.random.default_rng((seed, step))
        chosen = to_input(shown[np.sort(rng.integers(len(images), size=batch))], device, dtype)
        mirrored = chosen.flip(-1) if step % 2 else chosen
        generator = torch.Generator(device).manual_seed(seed * 1_000_003 + step)
        turned = Random(f"{seed} {step}") if rng.random() < equivariant else None
        with torch.compiler.set_stance("force_eager" if turned else "default"):  # not compiled for each size
            return vae_loss(vae, mirrored, generator, turned)

    stage.run(loss_of)
    normalise_latent(vae, encode(vae, images[:1024], device)[:, :4])
    return vae


@torch.no_grad()
def normalise_latent(vae: AutoencoderKL, latents: Tensor) -> None:
    """Give every channel of a VAE's latent mean 0 and deviation 1, by changing the 1 x 1 convolutions around it.

    Args:
        latents: latents of many images, (images, channels, height, width), as the VAE gives them now.
    """
    mean, deviation = latents.mean(dim=(0, 2, 3)), latents.std(dim=(0, 2, 3))
    before, after, channels = vae.quant_conv, vae.post_quant_conv, len(mean)
    after.bias += after.weight[:, :, 0, 0] @ mean
    after.weight *= deviation[None, :, None, None]
    before.weight[:channels] /= deviation[:, None, None, None]
    before.bias[:channels] = (before.bias[:channels] - mean) / deviation
    before.bias[channels:] -= 2 * deviation.log()


def finetune_decoder(
    vae: AutoencoderKL,
    images: np.ndarray,
    minutes: float,
    folder: Path,
    device: torch.device,
    seed: int = 0,
    batch: int = 8,
    dtype: torch.dtype = torch.float32,
) -> AutoencoderKL:
    """Train only the decoder of a VAE, so that the latent stays as the U-Net has learned it."""
    modules = {"post_quant_conv": vae.post_quant_conv, "decoder": vae.decoder}
    stage = Stage("decoder", modules, minutes, 4e-4, folder, device, dtype)
    frozen = [part.to(device, dtype) for part in (vae.encoder, vae.quant_conv)]

    def loss_of(step: int) -> Tensor:
        rng = np.random.default_rng((seed, step))
        chosen = to_input(images[np.sort(rng.integers(len(images), size=batch))], device, dtype)
        generator = torch.Generator(device).manual_seed(seed * 1_000_003 + step)
        with torch.no_grad():
            latents = vae.encode(chosen).latent_dist.sample(generator)
        return image_loss(vae.decode(latents).sample, chosen)

    stage.run(loss_of)
    for part in frozen:
        part.float().eval()
    return vae


@torch.no_grad()
def encode(vae: AutoencoderKL, images: np.ndarray, device: torch.device, batch: int | None = None) -> Tensor:
    """Return the latents of images as mean and log variance, (images, 8, height / 8, width / 8), float32."""
    moments, batch = [], batch or (32 if device.type == "cpu" else 512)
    with torch.compiler.set_stance("force_eager"):  # not compiled again for these sizes
        for start in range(0, len(images), batch):
            posterior = vae.encode(to_input(images[start : start + batch], device, vae.dtype)).latent_dist
            moments.append(torch.cat([posterior.mean, posterior.logvar], dim=1).float())
    return torch.cat(moments)


def encode_all(
    vae: AutoencoderKL, images: np.ndarray, file: Path, device: torch.device, dtype: torch.dtype = torch.float32
) -> Tensor:
    """Encode images as ``encode`` does and keep the result in a file. A finished file is reused."""

    def make() -> np.ndarray:
        print("encoding the scenes", flush=True)
        moments = encode(nn.Module.to(vae, device, dtype), images, device)
        vae.float()
        return moments.cpu().numpy()

    return torch.from_numpy(cached(file, make)).to(device)


def train_unet(
    moments: Tensor,
    captions: Tensor,
    parts: tuple[UNetNAS, CLIPTextModel],
    empty: Tensor,
    minutes: float,
    folder: Path,
    device: torch.device,
    seed: int = 0,
    batch: int = 64,
    depths: Tensor | None = None,
    watch: Callable[[UNetNAS, CLIPTextModel, float], None] | None = None,
    learning_rate: float = 4e-3,
    dtype: torch.dtype = torch.float32,
    compiled: bool = False,
) -> tuple[UNetNAS, CLIPTextModel]:
    """Train a U-Net-NAS to denoise latents; the text encoder is trained with it where its weights ask for gradients.

    A row is one scene, one of its captions (or none, in ``NO_CAPTION`` of all rows), one timestep and one noise, each
    drawn evenly.

    Args:
        moments: of the latents of all scenes, as ``encode`` returns them.
        captions: tokens of the captions, (scenes, several, TOKENS), as ``draw_captions`` returns them.
        parts: the U-Net and the text encoder to train.
        empty: tokens of the empty caption, (TOKENS,).
        depths: for a U-Net that takes depth as a fifth channel, (several, scenes, 1, height, width).
        watch: called four times a minute with both networks and the progress from 0 to 1.
        dtype: of the computation; the weights are kept in float32.
        compiled: compile the U-Net with ``torch.compile``.
    """
    unet, text_encoder = parts
    if compiled:
        unet.compile(dynamic=False)
    trained = {"unet": unet}
    if any(weight.requires_grad for weight in text_encoder.parameters()):
        trained["text_encoder"] = text_encoder
    else:
        nn.Module.to(text_encoder, device, dtype)
    scheduler = make_scheduler()
    stage = Stage("unet", trained, minutes, learning_rate, folder, device, dtype)
    moments, captions, empty = moments.to(device), captions.to(device), empty.to(device, captions.dtype)
    depths = None if depths is None else depths.to(device)

    def loss_of(step: int) -> Tensor:
        generator = torch.Generator(device).manual_seed(seed * 1_000_003 + step)
        drawn, latents, noise, tokens = draw_rows(moments, captions, batch, generator)
        unsaid = torch.rand(batch, generator=generator, device=device) < NO_CAPTION
        tokens = torch.where(unsaid[:, None], empty, tokens)
        timesteps = draw_numbers(len(scheduler.alphas_cumprod), batch, generator)
        depth = None if depths is None else depths[draw_numbers(len(depths), batch, generator), drawn]
        return diffusion_loss(unet, text_encoder, scheduler, latents, noise, tokens.long(), timesteps, depth)

    stage.run(loss_of, (lambda progress: watch(unet, text_encoder, progress)) if watch else None)
    return unet, text_encoder


# --- the whole run ----------------------------------------------------------------------------------------------------


def train(
    folder: Path,
    scenes: int,
    vae_minutes: float,
    unet_minutes: float,
    seed: int,
    device: torch.device,
    begin: str | Path | None = None,
    captions: int = 8,
    vae_batch: int | None = None,
    batch: int | None = None,
    dtype: torch.dtype | None = None,
    workers: int | None = None,
    learning_rate: float = 4e-3,
    compiled: bool = False,
) -> Path:
    """Run all stages in ``folder`` and save the finished diffusers folder as ``folder/model``.

    Args:
        scenes: number of scenes to draw.
        vae_minutes: for the VAE; with ``begin`` for its decoder, where 0 leaves it as it is.
        unet_minutes: for U-Net and text encoder.
        begin: a model to go on from, whose latent and tokenizer are kept; by default everything is trained anew.
        captions: captions a scene.
        vae_batch, batch: images a step of the VAE and rows a step of the U-Net; by default 4 and 64 on a CPU, 128 and
            1024 on a GPU.
        dtype: of the computation; by default bfloat16 where the device is fast at it, else float32.
        workers: processes that draw scenes; by default one for each core.
        compiled: compile VAE and U-Net with ``torch.compile``, whose time counts as training.

    Raises:
        InputError: a stage has no minutes, torch is older than 2.9, or ``folder`` holds a run with other settings.
    """
    if not (unet_minutes > 0 and (vae_minutes > 0 or begin)):
        raise InputError(
            f"vae_minutes and unet_minutes must be above 0, got {vae_minutes:g} and {unet_minutes:g}; "
            "vae_minutes may be 0 with a model to begin with"
        )
    check_torch()
    on_cpu = device.type == "cpu"
    vae_batch, batch = vae_batch or (4 if on_cpu else 128), batch or (64 if on_cpu else 1024)
    dtype = dtype or fast_dtype(device)
    folder.mkdir(parents=True, exist_ok=True)
    check_same_run(folder / "settings.json", {"scenes": scenes, "seed": seed, "begin": begin and str(begin)})
    drawn = draw_scenes(scenes, seed)
    print(f"drawing {scenes} scenes", flush=True)
    images = draw_all(drawn, folder / f"scenes-{seed}-{scenes}.npy", workers=workers)
    if begin:
        loaded = load_pipeline(begin, device="cpu").components
        vae, tokenizer, parts = loaded["vae"], loaded["tokenizer"], (loaded["unet"], loaded["text_encoder"])
    else:
        tokenizer = make_tokenizer(folder / "tokenizer")
        torch.manual_seed(seed)
        parts = make_unet(), make_text_encoder(tokenizer)
    print("writing captions", flush=True)
    tokens, empty = draw_captions(drawn, tokenizer, captions, seed, workers=workers), to_tokens(tokenizer, [""])[0]
    if not begin:
        vae = train_vae(images, vae_minutes, folder, device, seed, vae_batch, dtype=dtype, compiled=compiled)
    elif vae_minutes:
        finetune_decoder(vae, images, vae_minutes, folder, device, seed, vae_batch, dtype)
    moments = encode_all(vae, images, folder / "moments.npy", device, dtype)
    parts = train_unet(
        moments,
        tokens,
        parts,
        empty,
        unet_minutes,
        folder,
        device,
        seed,
        batch,
        watch=SampleSheets(folder, vae, tokenizer, device),
        learning_rate=learning_rate / 2 if begin else learning_rate,
        dtype=dtype,
        compiled=compiled,
    )
    model = save(folder / "model", vae, parts[1], tokenizer, parts[0])
    write_card(model, scenes, captions, seed, device, dtype, begin)
    return model


def fast_dtype(device: torch.device) -> torch.dtype:
    """Return bfloat16 on a CUDA device and on a CPU with units for it, else float32."""
    return torch.bfloat16 if device.type == "cuda" else choose_workload(device)[1]


class SampleSheets:
    """Saves samples of the prompts in ``SHOWN`` as a PNG twenty times during the training of a U-Net."""

    def __init__(self, folder: Path, vae: AutoencoderKL, tokenizer: CLIPTokenizer, device: torch.device):
        self.folder, self.vae, self.tokenizer, self.device = folder / "samples", vae, tokenizer, device
        self.folder.mkdir(exist_ok=True)

    def __call__(self, unet: UNetNAS, text_encoder: CLIPTextModel, progress: float) -> None:
        file = self.folder / f"{int(20 * progress) * 5:03d}.png"
        if file.exists():
            return
        copies = [nn.Module.to(copy.deepcopy(part), self.device).float() for part in (self.vae, text_encoder, unet)]
        images = sample(copies[0], copies[1], self.tokenizer, copies[2], SHOWN)
        rows = [np.hstack([np.asarray(image) for image in images[start : start + 4]]) for start in (0, 4)]
        Image.fromarray(np.vstack(rows)).save(file)


def check_same_run(file: Path, settings: dict[str, int | str | None]) -> None:
    """Refuse to resume a folder with other settings than those its checkpoints depend on."""
    if not file.exists():
        file.write_text(json.dumps(settings))
    elif (before := json.loads(file.read_text())) != settings:
        raise InputError(f"{file.parent} holds a run with {before}, not {settings}: use those, or another folder")


def sample(
    vae: AutoencoderKL,
    text_encoder: CLIPTextModel,
    tokenizer: CLIPTokenizer,
    unet: UNetNAS,
    prompts: Sequence[str],
    steps: int = 12,
) -> list[Image.Image]:
    """Make one image from each prompt, always from the same noise; all parts must be of one dtype and device."""
    pipe = DeciDiffusionImg2ImgPipeline(vae, text_encoder, tokenizer, unet, make_scheduler())
    pipe.set_progress_bar_config(disable=True)
    blank = Image.new("RGB", (pipe.image_size, pipe.image_size))  # strength 1 keeps nothing of it
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
    """Save the parts as an ordinary diffusers folder of fp16 safetensors."""
    pipe = DeciDiffusionImg2ImgPipeline(vae, text_encoder, tokenizer, unet, make_scheduler())
    with quiet():
        pipe.to("cpu", torch.float16).save_pretrained(folder)
    tidy_configs(folder)
    return folder


def tidy_configs(folder: Path) -> None:
    """Remove from saved configs what describes this machine, and what changes how the parts load."""
    for file in folder.glob("*/config.json"):
        config = json.loads(file.read_text())
        config.pop("_name_or_path", None)  # where a part was loaded from
        if "transformers_version" in config:
            config["dtype"] = "float32"  # transformers loads the stored dtype, diffusers always float32
        file.write_text(json.dumps(config, indent=2) + "\n")


def write_card(
    model: Path,
    scenes: int,
    captions: int,
    seed: int,
    device: torch.device,
    dtype: torch.dtype,
    begin: str | Path | None = None,
) -> None:
    """Write the model's ``README.md``: how and where it was trained. ``decinb.tiny.evaluate`` adds its figures."""
    lines = [json.loads(line) for line in (model.parent / "log.jsonl").read_text().splitlines()]
    last = {line["stage"]: line for line in lines}
    stages = ", ".join(f"{name} {line['minutes']:.0f} minutes ({line['step']} steps)" for name, line in last.items())
    machine = environment(device, dtype)
    origin = f"from {Path(begin).name}" if begin else "from nothing"
    (model / "README.md").write_text(
        f"""---
library_name: diffusers
pipeline_tag: image-to-image
---

# A U-Net-NAS for drawn landscapes

Trained {origin} by `python -m decinb.tiny.train` on {scenes:,} scenes of `decinb.scenes`, seed {seed}.

- Objective: velocity prediction at evenly drawn timesteps, min-SNR weights, nothing else.
- Captions: {captions} a scene. Each leaves an attribute out with probability {LEFT_OUT:g}, and {WRONG:.0%} of them name
  something that is not there. {NO_CAPTION:.0%} of the rows have none.
- Noise: Stable Diffusion's levels (scaled linear, 0.00085 to 0.012, 1,000 levels), rescaled to end in pure noise.
- Time: {stages}.
- Machine: {machine["device"]}, {machine["threads"]} threads, {machine["dtype"]}, torch {machine["torch"]}.

It knows only these landscapes and these words. Results of `python -m decinb.tiny.evaluate --model FOLDER`:

<!-- evaluate -->
not measured yet
<!-- /evaluate -->
""",
        encoding="utf-8",
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--folder", type=Path, default=Path("runs/tiny"), help="log, checkpoints and the finished model"
    )
    parser.add_argument("--scenes", type=int, default=40_000, help="how many to draw (default %(default)s)")
    parser.add_argument("--captions", type=int, default=8, help="captions a scene (default %(default)s)")
    parser.add_argument("--vae-minutes", type=float, default=60, help="with --begin: of its decoder (default 60)")
    parser.add_argument("--unet-minutes", type=float, default=120, help="of U-Net and text encoder (default 120)")
    parser.add_argument("--vae-batch", type=int, help="images a step of the VAE (default 4 on a CPU, 128 on a GPU)")
    parser.add_argument("--batch", type=int, help="rows a step of the U-Net (default 64 on a CPU, 1024 on a GPU)")
    parser.add_argument("--learning-rate", type=float, default=4e-3, help="of the U-Net (default %(default)s)")
    parser.add_argument("--begin", help='a model to go on from ("tiny" or a folder); its latent and tokenizer are kept')
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--compile", action="store_true", dest="compiled", help="compile VAE and U-Net")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="default: what the device is fast at")
    parser.add_argument("--workers", type=int, help="processes that draw scenes (default: one for each core)")
    given = vars(parser.parse_args(arguments))
    device, dtype = torch.device(given.pop("device")), given.pop("dtype")
    model = train(device=device, dtype=dtype and getattr(torch, dtype), **given)
    print(f"wrote {model}")


if __name__ == "__main__":
    main()
