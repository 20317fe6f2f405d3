"""The training data: scenes, their images as bytes and their captions as tokens, drawn once and kept in files."""

import itertools
import random
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from transformers import CLIPTokenizer

from decinb.scenes import IMAGE_SIZE, Scene, random_scene, render, web_caption
from decinb.utils.files import replacing

CAPTIONED = 1024
"""Scenes whose captions one process writes at a time. It decides the chance of each caption, the processes do not."""


def draw_scenes(count: int, seed: int) -> list[Scene]:
    """Draw random scenes."""
    rng = random.Random(seed)
    return [random_scene(rng) for _ in range(count)]


def draw(scene: Scene, size: int = IMAGE_SIZE) -> np.ndarray:
    """Render a scene to bytes, (3, height, width)."""
    return np.asarray(render(scene, size)).transpose(2, 0, 1)


def draw_all(scenes: Sequence[Scene], file: Path, size: int = IMAGE_SIZE, workers: int | None = None) -> np.ndarray:
    """Render scenes to a file of bytes, (scenes, 3, height, width), and map it into memory. A finished file is reused.

    Args:
        workers: number of processes; by default one for each core.
    """
    if not file.exists():
        with replacing(file) as part, ProcessPoolExecutor(workers) as pool:
            images = np.lib.format.open_memmap(part, "w+", np.uint8, (len(scenes), 3, size, size))
            for i, image in enumerate(pool.map(draw, scenes, itertools.repeat(size), chunksize=64)):
                images[i] = image
            images.flush()
            del images  # Windows does not rename open files
    return np.load(file, mmap_mode="r")


def cached(file: Path, make: Callable[[], np.ndarray]) -> np.ndarray:
    """Load an array from a file; make and save it first if there is none."""
    if not file.exists():
        with replacing(file) as part, open(part, "wb") as stream:
            np.save(stream, make())
    return np.load(file)


def to_input(images: np.ndarray | Tensor, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Turn bytes into the [-1, 1] that a VAE takes."""
    pixels = images if isinstance(images, Tensor) else torch.from_numpy(np.array(images))
    return pixels.to(device, dtype) / 127.5 - 1


def draw_numbers(high: int, count: int, generator: torch.Generator) -> Tensor:
    """Draw whole numbers from 0 to ``high`` - 1, on the device of the generator."""
    return torch.randint(high, (count,), generator=generator, device=generator.device)


def draw_rows(
    moments: Tensor, captions: Tensor, count: int, generator: torch.Generator
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Draw rows that a denoiser is trained on: a scene each, one of its captions, and noise.

    Args:
        moments: mean and log variance of the latents of all scenes, (scenes, 8, height, width).
        captions: tokens, (scenes, several, tokens).

    Returns:
        The numbers of the scenes; latents drawn from their distribution, and noise of the same shape; tokens.
    """
    scenes = draw_numbers(len(moments), count, generator)
    mean, log_variance = moments[scenes].chunk(2, dim=1)
    first, noise = (torch.randn(mean.shape, generator=generator, device=mean.device) for _ in range(2))
    latents = mean + (0.5 * log_variance).exp() * first
    return scenes, latents, noise, captions[scenes, draw_numbers(captions.shape[1], count, generator)]


def to_tokens(tokenizer: CLIPTokenizer, texts: Sequence[str]) -> Tensor:
    """Return the tokens of texts, (texts, longest the tokenizer allows), as a pipeline makes them."""
    return tokenizer(
        list(texts), padding="max_length", max_length=tokenizer.model_max_length, truncation=True, return_tensors="pt"
    ).input_ids


def draw_captions(
    scenes: Sequence[Scene],
    tokenizer: CLIPTokenizer,
    each: int,
    seed: int,
    say: Callable[[Scene, random.Random], str] = web_caption,
    workers: int | None = None,
) -> Tensor:
    """Write several captions for each scene and return their tokens, (scenes, each, tokens), int16.

    Args:
        each: captions a scene.
        say: writes one caption; by default ``web_caption``, which is incomplete and sometimes wrong.
        workers: number of processes for many scenes; by default one for each core.
    """
    starts = range(0, len(scenes), CAPTIONED)
    chunks = [(scenes[start : start + CAPTIONED], tokenizer, each, f"captions {seed} {start}", say) for start in starts]
    if len(chunks) == 1:
        drawn = [_draw_captions(chunks[0])]
    else:
        with ProcessPoolExecutor(workers) as pool:
            drawn = list(pool.map(_draw_captions, chunks))
    return torch.from_numpy(np.concatenate(drawn)).unflatten(0, (len(scenes), each))


def _draw_captions(chunk: tuple[Sequence[Scene], CLIPTokenizer, int, str, Callable[..., str]]) -> np.ndarray:
    scenes, tokenizer, each, seed, say = chunk
    rng = random.Random(seed)
    texts = [say(scene, rng) for scene in scenes for _ in range(each)]
    return to_tokens(tokenizer, texts).numpy().astype(np.int16)
