"""Train the judge of the drawn scenes: ``python -m decinb.tiny.train_judge``.

It learns from random scenes that are distorted anew each time they are shown, much as a VAE or a sampler does.
"""

import argparse
import io
import os
import random
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from decinb.loading import load_pipeline
from decinb.scenes import Scene, random_scene, render
from decinb.scenes.judge import VALUES, WEIGHTS, Judge, accuracy, through_vae, to_image, to_tensor

HIDDEN = -100
"""The label of an attribute that cannot be seen, which cross entropy ignores."""


def labels(scene: Scene) -> list[int]:
    """Return the index of the value of every attribute, ``HIDDEN`` where it cannot be seen."""
    visible = scene.visible()
    return [values.index(visible[name]) if name in visible else HIDDEN for name, values in VALUES.items()]


def distort(pixels: Tensor) -> Tensor:
    """Change images at random as a VAE or a sampler might.

    They are mirrored, bent, made coarse, shifted in colour and brightness, and given smooth noise, fine noise and JPEG
    blocks.

    Args:
        pixels: (images, 3, height, width) in [0, 1].
    """
    batch, _, height, width = pixels.shape

    def each(low: float, high: float, channels: int = 1) -> Tensor:
        return torch.empty(batch, channels, 1, 1).uniform_(low, high)

    def smooth(channels: int, side: int) -> Tensor:
        return F.interpolate(torch.randn(batch, channels, side, side), size=(height, width), mode="bilinear")

    mirrored = torch.where(torch.rand(batch) < 0.5, -1.0, 1.0)
    places = F.affine_grid(torch.eye(2, 3).repeat(batch, 1, 1), [batch, 1, height, width], align_corners=False)
    places = places * torch.stack([mirrored, torch.ones(batch)], dim=1)[:, None, None] * each(0.96, 1.04)
    places = places + (smooth(2, 6) * each(0, 0.02)).permute(0, 2, 3, 1)
    pixels = F.grid_sample(pixels, places, padding_mode="border", align_corners=False)

    for part in torch.randperm(batch).chunk(4):
        side = random.randint(height // 2, height)
        coarse = F.interpolate(pixels[part], size=(side, side), mode="bilinear", antialias=True)
        pixels[part] = F.interpolate(coarse, size=(height, width), mode="bilinear")

    pixels = pixels * each(0.9, 1.1) * each(0.95, 1.05, channels=3) + each(-0.04, 0.04, channels=3)
    pixels = pixels + smooth(3, 8) * each(0, 0.05) + torch.randn_like(pixels) * each(0, 0.05)
    pixels = pixels.clamp(0, 1)
    for row in range(0, batch, 4):
        pixels[row] = _through_jpeg(pixels[row], quality=random.randint(20, 85))
    return pixels


def _through_jpeg(pixels: Tensor, quality: int) -> Tensor:
    file = io.BytesIO()
    to_image(pixels).save(file, "JPEG", quality=quality)
    return to_tensor(Image.open(file))


def train(scenes: int = 20_000, epochs: int = 6, batch: int = 64, seed: int = 0, workers: int | None = None) -> Judge:
    """Train a judge on random scenes.

    Args:
        scenes: number of scenes.
        epochs: how often each is shown, distorted anew every time.
        batch: scenes a step.
        seed: of the scenes, the distortions, the order and the initial weights.
        workers: processes that draw scenes; by default one for each core.
    """
    rng = random.Random(f"judge {seed}")
    random.seed(seed)
    torch.manual_seed(seed)
    drawn = [random_scene(rng) for _ in range(scenes)]
    with ProcessPoolExecutor(workers) as pool:
        images = torch.stack([to_tensor(image).mul_(255).byte() for image in pool.map(render, drawn, chunksize=64)])
    right = torch.tensor([labels(scene) for scene in drawn])

    judge = Judge().to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(judge.parameters(), weight_decay=0.01)
    steps = epochs * (scenes // batch)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=4e-3, total_steps=steps)
    for step, rows in enumerate(_batches(scenes, batch, steps)):
        scores = judge(distort(images[rows] / 255).contiguous(memory_format=torch.channels_last))
        losses = [F.cross_entropy(scores[name], right[rows, i], ignore_index=HIDDEN) for i, name in enumerate(VALUES)]
        optimizer.zero_grad()
        sum(losses).backward()
        optimizer.step()
        schedule.step()
        if step % 50 == 0 or step + 1 == steps:
            named = ", ".join(f"{name} {loss:.3f}" for name, loss in zip(VALUES, losses, strict=True))
            print(f"step {step} of {steps}: {named}", flush=True)
    return judge.eval()


def _batches(rows: int, batch: int, steps: int) -> Iterator[Tensor]:
    """Yield the rows of each step, in a new order every epoch."""
    while steps > 0:
        for chosen in torch.randperm(rows).split(batch):
            if len(chosen) == batch and steps > 0:
                steps -= 1
                yield chosen


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--test", action="store_true", help="do not train, only test")
    parser.add_argument("--model", help='also test on images through the VAE of a diffusers folder, or of "tiny"')
    parser.add_argument("--scenes", type=int, default=20_000, help="how many to learn from (default %(default)s)")
    parser.add_argument("--epochs", type=int, default=6, help="how often each is shown (default %(default)s)")
    parser.add_argument("--file", type=Path, default=WEIGHTS, help="the weights (default: those of the bundled judge)")
    parser.add_argument("--test-scenes", type=int, default=1000, help="how many to test on (default %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="of torch, and processes that draw scenes")
    given = parser.parse_args(arguments)
    torch.set_num_threads(given.threads)
    if not given.test:
        started = time.monotonic()
        train(given.scenes, given.epochs, seed=given.seed, workers=given.threads).save(given.file)
        minutes = (time.monotonic() - started) / 60
        print(f"wrote {given.file.name}, {given.file.stat().st_size:,} bytes, after {minutes:.1f} minutes")

    judge = Judge.load(given.file)
    rng = random.Random("judge test")
    unseen = [random_scene(rng) for _ in range(given.test_scenes)]
    images = [render(scene) for scene in unseen]
    tested = {"renders": images, "distorted": _distorted(images)}
    if given.model:
        tested["through the VAE"] = through_vae(images, load_pipeline(given.model).vae)
    for name, shown in tested.items():
        right = accuracy(judge, unseen, shown)
        print(f"{name}:", ", ".join(f"{key} {fraction:.1%}" for key, fraction in right.items()))


def _distorted(images: Sequence[Image.Image]) -> list[Image.Image]:
    torch.manual_seed(1)
    random.seed(1)
    return [to_image(pixels) for pixels in distort(torch.stack([to_tensor(image) for image in images]))]


if __name__ == "__main__":
    main()
