"""What torch and MindSpore are compared on: prompts, inputs given by a formula, and the settings of whole calls.

Both sides import this file, so it needs NumPy only.
"""

from pathlib import Path

import numpy as np

ROOT = Path(__file__).parents[1]
MODEL = ROOT / "decinb" / "tiny" / "model"
REFERENCE = Path(__file__).parent / "reference"

PROMPT = "a painting of a blue house, round trees and mountains on snow at night"
NEGATIVE_PROMPT = "a pencil sketch"
TOKENIZED = [PROMPT, NEGATIVE_PROMPT, "", "A Café, snow: 30% off! " * 12]  # the last one is longer than 40 tokens

LATENT_SIZES = [(16, 16), (13, 22)]  # the second does not halve evenly
TIMESTEPS = [1, 500, 999]
STEPS = 20
GUIDANCE = 7.5
PIXEL_STRIDE = 4  # of the decoded image, every fourth row and column is kept

CALLS = {
    "strength 0.4": {"strength": 0.4},
    "strength 0.6": {"strength": 0.6},
    "strength 1.0": {"strength": 1.0},
    "guidance 0.1": {"strength": 0.6, "guidance_scale": 0.1},
    "guidance 10": {"strength": 0.6, "guidance_scale": 10.0},
    "negative prompt": {"strength": 0.6, "negative_prompt": NEGATIVE_PROMPT},
    "text to image": {"guidance_rescale": 0.0},
}
"""Whole pipeline calls, each with ``PROMPT``, ``STEPS`` and ``GUIDANCE``; all but the last start from an image."""

IMAGES = ["strength 0.4", "strength 0.6", "strength 1.0", "guidance 10", "text to image"]
"""The calls whose images are kept, after the input image; of the others the final latent only."""


def wave(shape: tuple[int, ...], phase: float = 0.0) -> np.ndarray:
    """Return float32 values of a sine over the flat index: inputs without a random generator."""
    return np.sin(0.918273 * np.arange(np.prod(shape)) + phase).astype(np.float32).reshape(shape)


def model_output(step: int, shape: tuple[int, ...]) -> np.ndarray:
    """Return what stands in for the U-Net's prediction where only the scheduler is compared."""
    return wave(shape, phase=0.37 * step)
