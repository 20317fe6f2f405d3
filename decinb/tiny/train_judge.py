"""Train and test the judge of scenes: ``python -m decinb.tiny.train_judge``."""

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
from decinb.scenes.judge import VALUES, WEIGHTS, Judge, accuracy, to_image, to_tensor
from decinb.scenes.scenes import Scene, random_scene, render
from decinb.tiny.evaluate import reconstruct

INVISIBLE = -100  # the label of invisible attributes, which the cross entropy ignores


def labels(scene: Scene) -> list[int]:
    """Return the index of the value of every attribute; ``INVISIBLE`` for those that cannot be seen."""
    visible = scene.visible()
    return [values.index(visible[name]) if name in visible else INVISIBLE for name, values in VALUES.items()]


def distort(images: Tensor) -> Tensor:
    """Distort images, (images, 3, height, width) in [0, 1], at random, much as a VAE or a sampler does.

    They are mirrored, warped, reduced in resolution, and changed in colour and brightness; smooth noise, fine noise and
    JPEG artefacts are added.
    """
    batch, _, height, width = images.shape

    def uniform(low: float, high: float, channels: int = 1) -> Tensor:
        return torch.empty(batch, channels, 1, 1).uniform_(low, high)

    def smooth_noise(channels: int, side: int) -> Tensor:
        return F.interpolate(torch.randn(batch, channels, side, side), size=(height, width), mode="bilinear")

    mirrored = torch.where(torch.rand(batch) < 0.5, -1.0, 1.0)
    places = F.affine_grid(torch.eye(2, 3).repeat(batch, 1, 1), [batch, 1, height, width], align_corners=False)
    places = places * torch.stack([mirrored, torch.ones(batch)], dim=1)[:, None, None] * uniform(0.94, 1.06)
    places = places + (smooth_noise(2, 6) * uniform(0, 0.03)).permute(0, 2, 3, 1)
    images = F.grid_sample(images, places, padding_mode="border", align_corners=False)

    for part in torch.randperm(batch).chunk(4):
        side = random.randint(height * 3 // 8, height)
        coarse = F.interpolate(images[part], size=(side, side), mode="bilinear", antialias=True)
        images[part] = F.interpolate(coarse, size=(height, width), mode="bilinear")

    images = images * uniform(0.88, 1.12) * uniform(0.95, 1.05, channels=3) + uniform(-0.04, 0.04, channels=3)
    images = images + smooth_noise(3, 8) * uniform(0, 0.06) + torch.randn_like(images) * uniform(0, 0.06)
    images = images.clamp(0, 1)
    for row in range(0, batch, 4):
        images[row] = _compressed(images[row], quality=random.randint(15, 80))
    return images


def _compressed(image: Tensor, quality: int) -> Tensor:
    """Save an image as JPEG and load it again."""
    file = io.BytesIO()
    to_image(image).save(file, "JPEG", quality=quality)
    return to_tensor(Image.open(file))


def train(scenes: int = 12_000, epochs: int = 5, batch: int = 64, seed: int = 0) -> Judge:
    """Train a judge on random scenes.

    Args:
        scenes: how many to draw.
        epochs: how often each is used, with a new distortion every time.
        batch: scenes in a step.
        seed: of scenes, distortions, order and initial weights.
    """
    batch = min(batch, scenes)
    rng = random.Random(f"judge {seed}")
    random.seed(seed)
    torch.manual_seed(seed)
    drawn = [random_scene(rng) for _ in range(scenes)]
    with ProcessPoolExecutor() as pool:
        images = torch.stack([to_tensor(image).mul_(255).byte() for image in pool.map(render, drawn, chunksize=64)])
    correct = torch.tensor([labels(scene) for scene in drawn])

    judge = Judge().to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(judge.parameters(), weight_decay=0.01)
    steps = epochs * (scenes // batch)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=4e-3, total_steps=steps)
    for step, rows in enumerate(_batches(scenes, batch, epochs)):
        scores = judge(distort(images[rows] / 255).contiguous(memory_format=torch.channels_last))
        losses = [
            F.cross_entropy(scores[name], correct[rows, i], ignore_index=INVISIBLE) for i, name in enumerate(VALUES)
        ]
        optimizer.zero_grad()
        sum(losses).backward()
        optimizer.step()
        schedule.step()
        if step % 100 == 0 or step + 1 == steps:
            print(
                f"step {step} of {steps}: " + ", ".join(f"{n} {x:.3f}" for n, x in zip(VALUES, losses, strict=True)),
                flush=True,
            )
    return judge.eval()


def _batches(rows: int, batch: int, epochs: int) -> Iterator[Tensor]:
    """Yield full batches of rows in random order."""
    for _ in range(epochs):
        yield from (chosen for chosen in torch.randperm(rows).split(batch) if len(chosen) == batch)


def _distorted(images: Sequence[Image.Image]) -> list[Image.Image]:
    torch.manual_seed(1)
    random.seed(1)
    return [to_image(image) for image in distort(torch.stack([to_tensor(image) for image in images]))]


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--file", type=Path, default=WEIGHTS, help="the weights (default: those of the bundled judge)")
    parser.add_argument("--test", action="store_true", help="do not train, only test the weights in --file")
    parser.add_argument("--model", help='also test on images from the VAE of a diffusers folder, or of "tiny"')
    parser.add_argument("--scenes", type=int, default=12_000, help="how many to train on (default %(default)s)")
    parser.add_argument("--epochs", type=int, default=5, help="how often each is used (default %(default)s)")
    parser.add_argument("--test-scenes", type=int, default=2_000, help="how many to test on (default %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--threads", type=int, default=os.cpu_count(), help="of torch (default: all cores, %(default)s)"
    )
    given = parser.parse_args(arguments)
    torch.set_num_threads(given.threads)
    if not given.test:
        started = time.monotonic()
        train(given.scenes, given.epochs, seed=given.seed).save(given.file)
        minutes = (time.monotonic() - started) / 60
        print(f"saved {given.file.name}, {given.file.stat().st_size:,} bytes, after {minutes:.1f} minutes")

    judge = Judge.load(given.file)
    rng = random.Random("judge test")
    scenes = [random_scene(rng) for _ in range(given.test_scenes)]
    images = [render(scene) for scene in scenes]
    tested = {"renders": images, "distorted": _distorted(images)}
    if given.model:
        tested["after the VAE"] = reconstruct(images, load_pipeline(given.model).vae)
    for name, shown in tested.items():
        print(f"{name}:", ", ".join(f"{key} {value:.1%}" for key, value in accuracy(judge, scenes, shown).items()))


if __name__ == "__main__":
    main()
