"""Distil a bundled model into one that needs few steps: ``python -m decinb.tiny.train_lcm``.

The student learns to jump from any noise level to the image that its teacher would reach in many guided steps. It is a
latent consistency model: guidance is built in, so that it is called with a guidance scale of 1 and one row a step.

The learning rate follows a budget of minutes, a checkpoint is saved every minute, and the same command resumes it.

Source: Song et al. (2023), arXiv:2303.01469 (consistency distillation); Luo et al. (2023), arXiv:2310.04378 (LCM:
skipped timesteps, guided teacher); Song & Dhariwal (2023), arXiv:2310.14189 (the student as its own target, and the
pseudo-Huber loss).
"""

import argparse
import copy
import json
import math
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from diffusers import DDIMScheduler, LCMScheduler
from diffusers.models.unets.unet_2d_condition import UNet2DConditionOutput
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import CLIPTextModel

from decinb.errors import InputError
from decinb.loading import load_pipeline
from decinb.tiny.data import draw_all, draw_captions, draw_numbers, draw_rows, draw_scenes, to_tokens
from decinb.tiny.networks import make_scheduler
from decinb.tiny.stage import Stage, check_torch
from decinb.tiny.train import check_same_run, encode_all, fast_dtype, tidy_configs
from decinb.unet_nas import UNetNAS
from decinb.utils.environment import environment
from decinb.utils.quiet import quiet

GUIDANCE = 4.0
"""The guidance scale of the teacher, which the student has built in."""

TEACHER_STEPS = 50
"""Steps in which the teacher goes from pure noise to an image; the student learns at their timesteps."""

SIGMA_DATA, TIMESTEP_SCALING = 0.5, 10.0  # of diffusers' LCMScheduler

INDEX = {
    "_class_name": "StableDiffusionImg2ImgPipeline",
    "scheduler": ["diffusers", "LCMScheduler"],
    "unet": ["decinb.unet_nas", "UNetNAS"],
}
"""The index of the folder: the new parts only."""

Denoiser = Callable[..., UNet2DConditionOutput]


def make_lcm_scheduler() -> LCMScheduler:
    """Make the scheduler that samples from a student, with the noise levels of its teacher."""
    config = dict(make_scheduler().config)
    return LCMScheduler.from_config(config, original_inference_steps=TEACHER_STEPS, timestep_scaling=TIMESTEP_SCALING)


def consistency_loss(
    student: Denoiser,
    teacher: Denoiser,
    text_encoder: CLIPTextModel,
    scheduler: DDIMScheduler,
    latents: Tensor,
    noise: Tensor,
    tokens: Tensor,
    empty: Tensor,
    places: Tensor,
    guidance: float = GUIDANCE,
) -> Tensor:
    """Return how far the student's images from two neighbouring timesteps of the teacher's path are apart.

    Args:
        student, teacher: U-Nets that predict the velocity, of the dtype of ``text_encoder``.
        latents, noise: (rows, 4, height, width), float32.
        tokens: (rows, TOKENS).
        empty: tokens of the empty caption, (TOKENS,).
        places: which of the ``TEACHER_STEPS`` each row starts at, (rows,), 0 for the least noise.
        guidance: the teacher's guidance scale.
    """
    skip = len(scheduler.alphas_cumprod) // TEACHER_STEPS
    now = (places + 1) * skip - 1
    before = (now - skip).clamp(min=0)
    noisy = scheduler.add_noise(latents, noise, now)
    on_cpu = latents.device.type == "cpu"
    # On a CPU the backward pass of fused attention takes a fifth of a training step; that of plain attention is fast.
    with sdpa_kernel(SDPBackend.MATH) if on_cpu else nullcontext():
        with torch.no_grad():
            told = torch.cat([tokens, empty[None]])
            # Counting what is distinct would wait for a GPU, which encodes captions faster than that.
            distinct, which = told.unique(dim=0, return_inverse=True) if on_cpu else (told, slice(None))
            encoded = text_encoder(distinct)[0][which]
            text, nothing = encoded[:-1], encoded[-1:].expand_as(encoded[:-1])
            both = teacher(noisy.to(text.dtype).repeat(2, 1, 1, 1), now.repeat(2), torch.cat([text, nothing])).sample
            conditional, unconditional = both.float().chunk(2)
            velocity = unconditional + guidance * (conditional - unconditional)
            nearer = ddim_step(scheduler, noisy, velocity, now, before)
            target = consistency(student, scheduler, nearer, before, text)
        predicted = consistency(student, scheduler, noisy, now, text)
    distance = (predicted - target).square().sum(dim=(1, 2, 3))
    soft = 0.00054 * math.sqrt(latents[0].numel())  # Song & Dhariwal (2023), section 3.3
    return ((distance + soft**2).sqrt() - soft).mean()


def consistency(unet: Denoiser, scheduler: DDIMScheduler, noisy: Tensor, timesteps: Tensor, text: Tensor) -> Tensor:
    """Return the image that a consistency model sees in noisy latents: at timestep 0 the latents themselves."""
    velocity = unet(noisy.to(text.dtype), timesteps, text).sample.float()
    signal, spread = levels(scheduler, timesteps)
    scaled = timesteps[:, None, None, None] * TIMESTEP_SCALING
    keep = SIGMA_DATA**2 / (scaled**2 + SIGMA_DATA**2)
    take = scaled / (scaled**2 + SIGMA_DATA**2) ** 0.5
    return keep * noisy + take * (signal * noisy - spread * velocity)


def ddim_step(scheduler: DDIMScheduler, noisy: Tensor, velocity: Tensor, now: Tensor, before: Tensor) -> Tensor:
    """Return latents at an earlier timestep of each row, from the velocity at ``now``."""
    signal, spread = levels(scheduler, now)
    image, noise = signal * noisy - spread * velocity, spread * noisy + signal * velocity
    signal, spread = levels(scheduler, before)
    return signal * image + spread * noise


def levels(scheduler: DDIMScheduler, timesteps: Tensor) -> tuple[Tensor, Tensor]:
    """Return how much of the image and of the noise is in latents at timesteps, each (rows, 1, 1, 1)."""
    alphas = scheduler.alphas_cumprod.to(timesteps.device)[timesteps][:, None, None, None]
    return alphas.sqrt(), (1 - alphas).sqrt()


def distil(
    moments: Tensor,
    captions: Tensor,
    teacher: UNetNAS,
    text_encoder: CLIPTextModel,
    empty: Tensor,
    minutes: float,
    folder: Path,
    device: torch.device,
    seed: int = 0,
    batch: int = 64,
    guidance: float = GUIDANCE,
    learning_rate: float = 5e-4,
    dtype: torch.dtype = torch.float32,
) -> UNetNAS:
    """Train a copy of a U-Net to reach in few steps what the U-Net reaches in many; arguments as for ``train_unet``."""
    student = copy.deepcopy(teacher)
    for frozen in (teacher, text_encoder):
        nn.Module.to(frozen, device, dtype).eval().requires_grad_(False)
    scheduler = make_scheduler()
    stage = Stage("lcm", {"unet": student.requires_grad_(True)}, minutes, learning_rate, folder, device, dtype)
    moments, captions, empty = moments.to(device), captions.to(device), empty.to(device).long()

    def loss_of(step: int) -> Tensor:
        generator = torch.Generator(device).manual_seed(seed * 1_000_003 + step)
        _, latents, noise, tokens = draw_rows(moments, captions, batch, generator)
        places = draw_numbers(TEACHER_STEPS, batch, generator)
        return consistency_loss(
            student, teacher, text_encoder, scheduler, latents, noise, tokens.long(), empty, places, guidance
        )

    stage.run(loss_of)
    return student


def train(
    folder: Path,
    teacher: str | Path,
    scenes: int,
    minutes: float,
    seed: int,
    device: torch.device,
    captions: int = 8,
    batch: int | None = None,
    guidance: float = GUIDANCE,
    learning_rate: float = 5e-4,
    dtype: torch.dtype | None = None,
    workers: int | None = None,
) -> Path:
    """Distil a model in ``folder`` and save the student's own parts in ``folder/lcm``.

    Args:
        teacher: a model for ``load_pipeline``.
        scenes: number of scenes to draw.
        minutes: of training.
        captions, batch, dtype, workers: as for ``decinb.tiny.train.train``.
        guidance: the guidance scale to build in, at least 1.

    Raises:
        InputError: ``minutes`` is not above 0, ``guidance`` is below 1, torch is older than 2.9, or ``folder`` holds a
            run with other settings.
    """
    if minutes <= 0 or guidance < 1:
        raise InputError(f"minutes must be above 0 and guidance at least 1, got {minutes:g} and {guidance:g}")
    check_torch()
    batch, dtype = batch or (64 if device.type == "cpu" else 512), dtype or fast_dtype(device)
    folder.mkdir(parents=True, exist_ok=True)
    settings = {"scenes": scenes, "seed": seed, "teacher": str(teacher), "guidance": guidance}
    check_same_run(folder / "settings.json", settings)
    drawn = draw_scenes(scenes, seed)
    images = draw_all(drawn, folder / f"scenes-{seed}-{scenes}.npy", workers=workers)
    parts = load_pipeline(teacher, device="cpu").components
    tokens = draw_captions(drawn, parts["tokenizer"], captions, seed, workers=workers)
    empty = to_tokens(parts["tokenizer"], [""])[0]
    moments = encode_all(parts["vae"], images, folder / "moments.npy", device, dtype)
    student = distil(
        moments,
        tokens,
        parts["unet"],
        parts["text_encoder"],
        empty,
        minutes,
        folder,
        device,
        seed,
        batch,
        guidance,
        learning_rate,
        dtype,
    )
    write_card(save(folder / "lcm", student), settings, device, dtype)
    return folder / "lcm"


def save(folder: Path, student: UNetNAS) -> Path:
    """Save a student and its scheduler as a diffusers folder of fp16 safetensors; the teacher has the other parts."""
    with quiet():
        nn.Module.to(student, "cpu", torch.float16).save_pretrained(folder / "unet")
    make_lcm_scheduler().save_pretrained(folder / "scheduler")
    tidy_configs(folder)
    (folder / "model_index.json").write_text(json.dumps(INDEX, indent=2) + "\n")
    return folder


def write_card(model: Path, settings: dict[str, Any], device: torch.device, dtype: torch.dtype) -> None:
    """Write the student's ``README.md``: how and where it was trained. ``decinb.tiny.evaluate_lcm`` adds figures."""
    last = [json.loads(line) for line in (model.parent / "log.jsonl").read_text().splitlines()][-1]
    machine, teacher = environment(device, dtype), Path(settings["teacher"]).name
    (model / "README.md").write_text(
        f"""---
license: apache-2.0
library_name: diffusers
pipeline_tag: image-to-image
---

# {teacher} in four steps

A latent consistency model ([arXiv:2310.04378](https://arxiv.org/abs/2310.04378)), distilled from `{teacher}` by
`python -m decinb.tiny.train_lcm`. This folder holds the U-Net and the scheduler; the other parts are those of
`{teacher}`. Load it with `decinb.load_pipeline("tiny-lcm")`.

- The student learns to jump from any of {TEACHER_STEPS} timesteps to the image at the end of its teacher's path.
- A guidance scale of {settings["guidance"]:g} is built in. Call it with a guidance scale of 1: the U-Net then runs
  once a step, on one row. A negative prompt has no effect.
- Data: {settings["scenes"]:,} scenes of `decinb.scenes`, seed {settings["seed"]}, with the captions of the teacher.
- Time: {last["minutes"]:.0f} minutes ({last["step"]} steps).
- Machine: {machine["device"]}, {machine["threads"]} threads, {machine["dtype"]}, torch {machine["torch"]}.

Its shapes are less clean than those of its teacher, and in image to image few steps leave few strengths to choose from.
Figures of `python -m decinb.tiny.evaluate_lcm`:

<!-- evaluate -->
not measured yet
<!-- /evaluate -->
""",
        encoding="utf-8",
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(prog="python -m decinb.tiny.train_lcm", description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, default=Path("runs/tiny-lcm"), help="log, checkpoints and the student")
    parser.add_argument("--teacher", default="tiny", help="a model for load_pipeline (default %(default)s)")
    parser.add_argument("--scenes", type=int, default=40_000, help="how many to draw (default %(default)s)")
    parser.add_argument("--captions", type=int, default=8, help="captions a scene (default %(default)s)")
    parser.add_argument("--minutes", type=float, default=60, help="of training (default %(default)s)")
    parser.add_argument("--batch", type=int, help="rows a step (default 64 on a CPU, 512 on a GPU)")
    parser.add_argument("--guidance", type=float, default=GUIDANCE, help="to build in (default %(default)s)")
    parser.add_argument("--learning-rate", type=float, default=5e-4, help="default %(default)s")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="default: what the device is fast at")
    parser.add_argument("--workers", type=int, help="processes that draw scenes (default: one for each core)")
    given = vars(parser.parse_args(arguments))
    device, dtype = torch.device(given.pop("device")), given.pop("dtype")
    print(f"wrote {train(device=device, dtype=dtype and getattr(torch, dtype), **given)}")


if __name__ == "__main__":
    main()
