"""Distil a bundled model into one that needs few steps: ``python -m decinb.tiny.train_lcm``.

The path from noise to an image is cut into four segments. From any point of a segment, the student learns to jump to
where the segment ends: there it lands where its teacher lands after several guided steps. It is a multistep latent
consistency model: guidance is built in, so that it is called with a guidance scale of 1 and one row a step, and four
steps with an ordinary scheduler make an image.

The learning rate follows a budget of minutes, a checkpoint is saved every minute, and the same command resumes it.

Source: Heek et al. (2024), arXiv:2403.06807 (multistep consistency); Luo et al. (2023), arXiv:2310.04378 (a latent
consistency model of a guided teacher); Salimans & Ho (2022), arXiv:2202.00512 (one step for several of the teacher's).
"""

import argparse
import copy
import json
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from diffusers import DDIMScheduler
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

GUIDANCE = 7.5
"""The guidance scale of the teacher, which the student has built in."""

SEGMENTS, STEPS_OF_SEGMENT = 4, 5
"""The segments of the path, each crossed in one step by the student and in several by the teacher.

Their product must divide 1,000: only then does each step of diffusers' DDIM end where the next one begins.
"""

INDEX = {
    "_class_name": "StableDiffusionImg2ImgPipeline",
    "scheduler": ["diffusers", "DDIMScheduler"],
    "unet": ["decinb.unet_nas", "UNetNAS"],
}
"""The index of the folder: the new parts only."""

Denoiser = Callable[..., UNet2DConditionOutput]


def teacher_timesteps(scheduler: DDIMScheduler) -> Tensor:
    """Return the timesteps of the teacher's path from pure noise, (steps + 1,); the last, -1, is the image."""
    scheduler.set_timesteps(SEGMENTS * STEPS_OF_SEGMENT)
    return torch.cat([scheduler.timesteps, torch.tensor([-1])])


def segment_loss(
    student: Denoiser,
    teacher: Denoiser,
    text_encoder: CLIPTextModel,
    scheduler: DDIMScheduler,
    latents: Tensor,
    noise: Tensor,
    tokens: Tensor,
    empty: Tensor,
    segments: Tensor,
    points: Tensor,
    guidance: float = GUIDANCE,
) -> Tensor:
    """Return how far the student's velocity is from the one that leads to the end of a segment in one step.

    It is trained at the start of each row's segment, and at one of the later points on the teacher's path.

    Args:
        student, teacher: U-Nets that predict the velocity, of the dtype of ``text_encoder``.
        latents, noise: (rows, 4, height, width), float32.
        tokens: (rows, TOKENS).
        empty: tokens of the empty caption, (TOKENS,).
        segments: of each row, (rows,), 0 for the one that starts in pure noise.
        points: which later point of the segment is trained too, (rows,), 1 to ``STEPS_OF_SEGMENT - 1``.
        guidance: the teacher's guidance scale.
    """
    timesteps, rows = teacher_timesteps(scheduler).to(latents.device), torch.arange(len(latents), device=latents.device)
    first = segments * STEPS_OF_SEGMENT
    on_cpu = latents.device.type == "cpu"
    # On a CPU the backward pass of fused attention takes a fifth of a training step; that of plain attention is fast.
    with sdpa_kernel(SDPBackend.MATH) if on_cpu else nullcontext():
        with torch.no_grad():
            text, nothing = encode_text(text_encoder, tokens, empty)
            path = [scheduler.add_noise(latents, noise, timesteps[first])]
            for step in range(STEPS_OF_SEGMENT):
                now, after = timesteps[first + step], timesteps[first + step + 1]
                velocity = guided_velocity(teacher, path[-1], now, text, nothing, guidance)
                path.append(ddim_step(scheduler, path[-1], velocity, now, after))
            noisy = torch.cat([path[0], torch.stack(path)[points, rows]])
            now = torch.cat([timesteps[first], timesteps[first + points]])
            end = timesteps[first + STEPS_OF_SEGMENT]
            target = velocity_to(scheduler, noisy, path[-1].repeat(2, 1, 1, 1), now, end.repeat(2))
        predicted = student(noisy.to(text.dtype), now, text.repeat(2, 1, 1)).sample.float()
    return (predicted - target).square().mean()


def encode_text(text_encoder: CLIPTextModel, tokens: Tensor, empty: Tensor) -> tuple[Tensor, Tensor]:
    """Return the embeddings of captions and, as often, of the empty caption, each (rows, tokens, width)."""
    captions = torch.cat([tokens, empty[None]])
    distinct, which = captions, slice(None)
    if captions.device.type == "cpu":  # a GPU encodes captions faster than it counts the distinct ones
        distinct, which = captions.unique(dim=0, return_inverse=True)
    encoded = text_encoder(distinct)[0][which]
    return encoded[:-1], encoded[-1:].expand_as(encoded[:-1])


def guided_velocity(
    unet: Denoiser, noisy: Tensor, timesteps: Tensor, text: Tensor, nothing: Tensor, guidance: float
) -> Tensor:
    """Return the velocity with classifier-free guidance."""
    both = unet(noisy.to(text.dtype).repeat(2, 1, 1, 1), timesteps.repeat(2), torch.cat([text, nothing])).sample
    conditional, unconditional = both.float().chunk(2)
    return unconditional + guidance * (conditional - unconditional)


def ddim_step(scheduler: DDIMScheduler, noisy: Tensor, velocity: Tensor, now: Tensor, after: Tensor) -> Tensor:
    """Return latents at the next timestep of each row, from the velocity at ``now``."""
    signal, spread = levels(scheduler, now)
    image, noise = signal * noisy - spread * velocity, spread * noisy + signal * velocity
    signal, spread = levels(scheduler, after)
    return signal * image + spread * noise


def velocity_to(scheduler: DDIMScheduler, noisy: Tensor, landing: Tensor, now: Tensor, after: Tensor) -> Tensor:
    """Return the velocity with which one DDIM step leads to ``landing``: the inverse of ``ddim_step``."""
    signal, spread = levels(scheduler, now)
    signal_after, spread_after = levels(scheduler, after)
    straight = signal_after * signal + spread_after * spread  # the cosine of the angle between the timesteps
    turn = spread_after * signal - signal_after * spread  # minus its sine
    return (landing - straight * noisy) / turn


def levels(scheduler: DDIMScheduler, timesteps: Tensor) -> tuple[Tensor, Tensor]:
    """Return how much of the image and of the noise is in latents at timesteps, each (rows, 1, 1, 1).

    At -1, the end of the path, they are those of the scheduler's last step.
    """
    parts = (scheduler.alphas_cumprod, scheduler.final_alpha_cumprod[None])  # diffusers moves only one to a GPU
    alphas = torch.cat([part.to(timesteps.device) for part in parts])[timesteps][:, None, None, None]
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
    batch: int = 32,
    guidance: float = GUIDANCE,
    learning_rate: float = 5e-4,
    dtype: torch.dtype = torch.float32,
) -> UNetNAS:
    """Train a copy of a U-Net to reach in few steps what the U-Net reaches in many; arguments as for ``train_unet``.

    ``batch`` counts the paths of a step, each of which gives two rows.
    """
    student = copy.deepcopy(teacher)
    for frozen in (teacher, text_encoder):
        nn.Module.to(frozen, device, dtype).eval().requires_grad_(False)
    scheduler = make_scheduler()
    stage = Stage("lcm", {"unet": student.requires_grad_(True)}, minutes, learning_rate, folder, device, dtype)
    moments, captions, empty = moments.to(device), captions.to(device), empty.to(device).long()

    def loss_of(step: int) -> Tensor:
        generator = torch.Generator(device).manual_seed(seed * 1_000_003 + step)
        _, latents, noise, tokens = draw_rows(moments, captions, batch, generator)
        segments = draw_numbers(SEGMENTS, batch, generator)
        points = draw_numbers(STEPS_OF_SEGMENT - 1, batch, generator) + 1
        return segment_loss(
            student, teacher, text_encoder, scheduler, latents, noise, tokens.long(), empty, segments, points, guidance
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
    batch, dtype = batch or (32 if device.type == "cpu" else 512), dtype or fast_dtype(device)
    folder.mkdir(parents=True, exist_ok=True)
    settings = {
        "scenes": scenes,
        "seed": seed,
        "teacher": str(teacher),
        "guidance": guidance,
        "segments": [SEGMENTS, STEPS_OF_SEGMENT],
    }
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
    make_scheduler().save_pretrained(folder / "scheduler")
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

A multistep latent consistency model ([arXiv:2403.06807](https://arxiv.org/abs/2403.06807),
[arXiv:2310.04378](https://arxiv.org/abs/2310.04378)), distilled from `{teacher}` by `python -m decinb.tiny.train_lcm`.
This folder holds the U-Net and the scheduler; the other parts are those of `{teacher}`. Load it with
`decinb.load_pipeline("tiny-lcm")`.

- The path from noise to an image has {SEGMENTS} segments. The student learns to jump from any point of a segment to its
  end, where its teacher arrives after {STEPS_OF_SEGMENT} guided steps. So it is made for {SEGMENTS} steps. With fewer,
  images are soft.
- A guidance scale of {settings["guidance"]:g} is built in. Call it with a guidance scale of 1: the U-Net then runs
  once a step, on one row. A negative prompt has no effect.
- Data: {settings["scenes"]:,} scenes of `decinb.scenes`, seed {settings["seed"]}, with the captions of the teacher.
- Time: {last["minutes"]:.0f} minutes ({last["step"]} steps).
- Machine: {machine["device"]}, {machine["threads"]} threads, {machine["dtype"]}, torch {machine["torch"]}.

In image to image, few steps leave few strengths to choose from. Measured by `python -m decinb.tiny.evaluate_lcm`; the
same numbers as JSON: `results/tiny/few_steps.json`.

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
    parser.add_argument("--batch", type=int, help="paths a step (default 32 on a CPU, 512 on a GPU)")
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
