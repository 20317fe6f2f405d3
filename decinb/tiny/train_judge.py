"""TODO tiny.train_judge."""

import argparse
import io
import os
import random
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from decinb.scenes.judge import VALUES, WEIGHTS, Judge, _to_image, _to_tensor, accuracy, through_vae
from decinb.scenes.scenes import Scene, random_scene, render

UNSAID = -100  # the label of what cannot be seen, which cross entropy leaves out


def labels(scene: Scene) -> list[int]:
    """The index of the value of every attribute, ``UNSAID`` where it cannot be seen."""
    visible = scene.visible()
    return [values.index(visible[name]) if name in visible else UNSAID for name, values in VALUES.items()]


def damage(pictures: Tensor) -> Tensor:
    """Change pictures, (pictures, 3, height, width) in [0, 1], at random as a VAE or a sampler might.

    They are mirrored, bent, made coarse, shifted in colour and brightness, given slow and fine noise, and JPEG blocks.
    """
    batch, _, height, width = pictures.shape

    def each(low: float, high: float, channels: int = 1) -> Tensor:
        return torch.empty(batch, channels, 1, 1).uniform_(low, high)

    def slow(channels: int, side: int) -> Tensor:
        return F.interpolate(torch.randn(batch, channels, side, side), size=(height, width), mode="bilinear")

    mirrored = torch.where(torch.rand(batch) < 0.5, -1.0, 1.0)
    places = F.affine_grid(torch.eye(2, 3).repeat(batch, 1, 1), [batch, 1, height, width], align_corners=False)
    places = places * torch.stack([mirrored, torch.ones(batch)], dim=1)[:, None, None] * each(0.94, 1.06)
    places = places + (slow(2, 6) * each(0, 0.03)).permute(0, 2, 3, 1)
    pictures = F.grid_sample(pictures, places, padding_mode="border", align_corners=False)

    for part in torch.randperm(batch).chunk(4):
        side = random.randint(height * 3 // 8, height)
        coarse = F.interpolate(pictures[part], size=(side, side), mode="bilinear", antialias=True)
        pictures[part] = F.interpolate(coarse, size=(height, width), mode="bilinear")

    pictures = pictures * each(0.88, 1.12) * each(0.95, 1.05, channels=3) + each(-0.04, 0.04, channels=3)
    pictures = pictures + slow(3, 8) * each(0, 0.06) + torch.randn_like(pictures) * each(0, 0.06)
    pictures = pictures.clamp(0, 1)
    for row in range(0, batch, 4):
        pictures[row] = _through_jpeg(pictures[row], quality=random.randint(15, 80))
    return pictures


def _through_jpeg(picture: Tensor, quality: int) -> Tensor:
    file = io.BytesIO()
    _to_image(picture).save(file, "JPEG", quality=quality)
    return _to_tensor(Image.open(file))


def train(scenes: int = 12_000, epochs: int = 5, batch: int = 64, seed: int = 0) -> Judge:
    """Train a judge on random scenes.

    Args:
        scenes: how many are drawn.
        epochs: how often each is shown, damaged anew every time.
        batch: scenes a step.
        seed: of the scenes, the damage, the order and the first weights.
    """
    rng = random.Random(f"judge {seed}")
    random.seed(seed)
    torch.manual_seed(seed)
    drawn = [random_scene(rng) for _ in range(scenes)]
    with ProcessPoolExecutor() as pool:
        pictures = torch.stack([_to_tensor(image).mul_(255).byte() for image in pool.map(render, drawn, chunksize=64)])
    right = torch.tensor([labels(scene) for scene in drawn])

    judge = Judge().to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(judge.parameters(), weight_decay=0.01)
    steps = epochs * (scenes // batch)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=4e-3, total_steps=steps)
    for step, rows in enumerate(_batches(scenes, batch, steps)):
        seen = judge(damage(pictures[rows] / 255).contiguous(memory_format=torch.channels_last))
        losses = [F.cross_entropy(seen[name], right[rows, i], ignore_index=UNSAID) for i, name in enumerate(VALUES)]
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


def _batches(rows: int, batch: int, steps: int) -> Iterator[Tensor]:
    while True:
        for chosen in torch.randperm(rows).split(batch):
            if len(chosen) < batch:
                break
            if steps == 0:
                return
            steps -= 1
            yield chosen


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--test", action="store_true", help="do not train, only say how good the bundled judge is")
    parser.add_argument("--model", help='also test on pictures through the VAE of a diffusers folder, or of "tiny"')
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--threads", type=int, default=os.cpu_count(), help="of torch (default: all cores, %(default)s)"
    )
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    if not given.test:
        started = time.monotonic()
        train(seed=given.seed).save()
        minutes = (time.monotonic() - started) / 60
        print(f"wrote {WEIGHTS.name}, {WEIGHTS.stat().st_size:,} bytes, after {minutes:.1f} minutes")

    judge = Judge.load()
    rng = random.Random("judge test")
    unseen = [random_scene(rng) for _ in range(2000)]
    images = [render(scene) for scene in unseen]
    tested = {"renders": images, "damaged": _damaged(images)}
    if given.model:
        from decinb.loading import load_pipeline  # costs seconds, and only this needs it

        tested["through the VAE"] = through_vae(images, load_pipeline(given.model).vae)
    for name, pictures in tested.items():
        print(f"{name}:", ", ".join(f"{key} {share:.1%}" for key, share in accuracy(judge, unseen, pictures).items()))


def _damaged(images: Sequence[Image.Image]) -> list[Image.Image]:
    torch.manual_seed(1)
    random.seed(1)
    return [_to_image(picture) for picture in damage(torch.stack([_to_tensor(image) for image in images]))]


if __name__ == "__main__":
    main()
