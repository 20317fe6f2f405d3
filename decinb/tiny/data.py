"""The training data of the bundled models: scenes, their images, and examples of denoising."""

import itertools
import random
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from diffusers import DDIMScheduler
from torch import Tensor
from transformers import CLIPTokenizer

from decinb.scenes.scenes import IMAGE_SIZE, Scene, caption, differing, house_mask, random_scene, render, twin
from decinb.tiny.networks import TOKENS
from decinb.utils.files import replacing

EDIT_THRESHOLD = (350, 500)
"""Timesteps: an edit that starts below the first keeps its source; one above the second follows its prompt."""

HOUSE_WEIGHT = 4
"""Weight of a house in the loss: it covers a twentieth of an image, and most prompts are about it."""


def draw_scenes(places: int, seed: int) -> list[Scene]:
    """Choose random scenes, each followed by its twin: the same place with one or two attributes changed."""
    rng = random.Random(seed)
    scenes = []
    for _ in range(places):
        scenes.append(random_scene(rng))
        scenes.append(twin(scenes[-1], rng))
    return scenes


def draw(scene: Scene, size: int = IMAGE_SIZE) -> np.ndarray:
    """Render a scene as bytes, (3, size, size)."""
    return np.asarray(render(scene, size)).transpose(2, 0, 1)


def draw_all(scenes: list[Scene], file: Path, size: int = IMAGE_SIZE) -> np.ndarray:
    """Render many scenes on all cores into a memory-mapped file, unless it exists.

    Returns:
        Bytes, (scenes, 3, size, size).
    """
    if not file.exists():
        with replacing(file) as part, ProcessPoolExecutor() as pool:
            images = np.lib.format.open_memmap(part, "w+", np.uint8, (len(scenes), 3, size, size))
            for i, image in enumerate(pool.map(draw, scenes, itertools.repeat(size), chunksize=64)):
                images[i] = image
            images.flush()
            del images  # Windows cannot rename an open file
    return np.load(file, mmap_mode="r")


def cached(file: Path, make: Callable[[], np.ndarray]) -> np.ndarray:
    """Load an array from a file; make and save it first if there is none."""
    if not file.exists():
        array = make()
        with replacing(file) as part, open(part, "xb") as out:
            np.save(out, array)
    return np.load(file)


def to_input(images: np.ndarray | Tensor, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Convert bytes to what a VAE takes, in [-1, 1]."""
    return torch.tensor(np.ascontiguousarray(images)).to(device, dtype) / 127.5 - 1


def to_tokens(tokenizer: CLIPTokenizer, prompts: Sequence[str]) -> Tensor:
    """Tokenize prompts as a pipeline does, (prompts, TOKENS)."""
    return tokenizer(
        list(prompts), padding="max_length", max_length=TOKENS, truncation=True, return_tensors="pt"
    ).input_ids


def house_weights(scenes: Sequence[Scene], side: int) -> Tensor:
    """Return the weight of every latent pixel in the loss, (scenes, 1, side, side)."""
    houses = torch.from_numpy(np.stack([house_mask(scene, side) for scene in scenes]))[:, None]
    return torch.where(houses, HOUSE_WEIGHT, 1.0)


@dataclass(frozen=True)
class Example:
    """One row of a training step: predict ``target`` from noise that was added to ``source``.

    ``target`` and ``source`` are indices of scenes. They are equal for plain diffusion; for an edit they are twins.
    Noise was added at timestep ``start`` and has been removed down to ``timestep``.
    """

    target: int
    source: int
    start: int
    timestep: int
    prompt: str

    @classmethod
    def draw(
        cls, scenes: Sequence[Scene], rng: random.Random, steps: int, describe: Callable[..., str] = caption
    ) -> "Example":
        """Choose an example at random.

        Half of the examples are plain diffusion. In the others the prompt describes the twin of the source. If the edit
        starts above ``EDIT_THRESHOLD``, the target is the twin as well; below it, the target is the source, whatever
        the prompt says. One prompt in ten is empty, for classifier-free guidance.

        Args:
            scenes: every second one is the twin of the one before it.
            rng: chooses.
            steps: the number of training timesteps.
            describe: makes captions, called as ``caption``.
        """
        source, timestep = rng.randrange(len(scenes)), rng.randrange(steps)
        scene, other = scenes[source], scenes[source ^ 1]
        changed = differing(scene, other)
        if rng.random() < 0.5 or not all(getattr(other, name) for name in changed):  # captions cannot say "no house"
            target, start, prompt = source, timestep, describe(scene, rng)
        else:
            start = rng.randrange(timestep, steps)
            target = source ^ 1 if start > rng.uniform(*EDIT_THRESHOLD) else source
            prompt = describe(other, rng, always=changed)
        return cls(target, source, start, timestep, "" if rng.random() < 0.1 else prompt)


def noised(
    examples: Sequence[Example], moments: Tensor, scheduler: DDIMScheduler, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Return the latents of the targets, and noise that includes what is left of the sources.

    Args:
        examples: what to train on.
        moments: of the latents of all scenes, as ``encode`` gives them.
        scheduler: adds the noise.
        generator: on the CPU, so that every device gets the same noise.

    Returns:
        Two tensors (examples, 4, height, width), float32.
    """
    means, log_variances = moments[[example.target for example in examples]].chunk(2, dim=1)
    sources = moments[[example.source for example in examples], :4]
    latents = means + (0.5 * log_variances).exp() * torch.randn(means.shape, generator=generator).to(means)
    noise = torch.randn(means.shape, generator=generator).to(means)
    sigmas = (1 / scheduler.alphas_cumprod - 1).sqrt()[[example.start for example in examples]]
    noise += (sources - means) / sigmas[:, None, None, None].to(means)
    return latents, noise
