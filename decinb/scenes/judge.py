"""The judge: a classifier that tells which attributes of a scene an image shows. ``decinb.tiny.train_judge`` trains it.

It is a convolutional network of 200,000 parameters, trained on 12,000 scenes that were distorted as a VAE or a sampler
distorts images. It answers for any image, but the answer means something only for scenes.
"""

import functools
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from decinb.scenes.scenes import ATTRIBUTES, IMAGE_SIZE, Scene

VALUES: dict[str, tuple] = {**ATTRIBUTES, "house": (None, "plain", *ATTRIBUTES["house"][1:])}
"""What the judge can answer: the values of every attribute of a scene; the house of a sketch is "plain"."""

WEIGHTS = Path(__file__).with_name("judge.safetensors")

BATCH = 64


class Judge(nn.Module):
    """The classifier: from images (batch, 3, 128, 128) in [0, 1] to scores for every value of every attribute."""

    def __init__(self):
        super().__init__()
        widths = [(3, 16, 2), (16, 32, 2), (32, 64, 2), (64, 64, 1), (64, 96, 2), (96, 96, 1)]  # (in, out, stride)
        self.layers = nn.Sequential(
            *(
                nn.Sequential(
                    nn.Conv2d(width_in, width_out, 3, stride, padding=1, bias=False),
                    nn.BatchNorm2d(width_out),
                    nn.SiLU(inplace=True),
                )
                for width_in, width_out, stride in widths
            )
        )
        # The mean responds to sky and ground, the maximum to a house anywhere in the image.
        self.scores = nn.Linear(2 * widths[-1][1], sum(len(values) for values in VALUES.values()))

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Score images, (batch, 3, 128, 128) in [0, 1]; return (batch, values) for every attribute."""
        features = self.layers(images * 2 - 1)
        pooled = torch.cat([features.mean(dim=(2, 3)), features.amax(dim=(2, 3))], dim=1)
        scores = self.scores(pooled).split([len(values) for values in VALUES.values()], dim=1)
        return dict(zip(VALUES, scores, strict=True))

    @classmethod
    @functools.cache
    def load(cls, file: Path = WEIGHTS) -> "Judge":
        """Load the trained judge; its weights are read only once."""
        judge = cls()
        judge.load_state_dict({name: tensor.float() for name, tensor in load_file(file).items()}, strict=False)
        return judge.eval().requires_grad_(False)

    def save(self, file: Path = WEIGHTS) -> None:
        """Save the weights as float16 safetensors."""
        state = {
            name: tensor.half().contiguous() for name, tensor in self.state_dict().items() if tensor.is_floating_point()
        }
        save_file(state, file)

    @torch.inference_mode()
    def classify(self, images: Sequence[Image.Image]) -> list[dict[str, str | bool | None]]:
        """Tell what images show.

        Args:
            images: of any size and mode; they are converted to RGB and resized to 128 x 128 pixels.

        Returns:
            For each image a dict from attribute to value, as ``Scene.visible()``: time and ground only for paintings; a
            house has a colour in a painting and is "plain" in a sketch.
        """
        plain = torch.tensor([house == "plain" for house in VALUES["house"]])
        coloured = torch.tensor([house not in (None, "plain") for house in VALUES["house"]])
        found = []
        for start in range(0, len(images), BATCH):
            scores = self(torch.stack([to_tensor(image) for image in images[start : start + BATCH]]))
            sketch = scores["style"].argmax(dim=1) == VALUES["style"].index("sketch")
            scores["house"][sketch[:, None] & coloured | ~sketch[:, None] & plain] = -torch.inf
            best = {name: score.argmax(dim=1).tolist() for name, score in scores.items()}
            for row, is_sketch in enumerate(sketch):
                hidden = ("time", "ground") if is_sketch else ()
                found.append({name: VALUES[name][best[name][row]] for name in VALUES if name not in hidden})
        return found


def accuracy(judge: Judge, scenes: Sequence[Scene], images: Sequence[Image.Image]) -> dict[str, float]:
    """Measure the fraction of correct answers, 0 to 1, for every attribute where it is visible.

    Houses are also reported by time of day, and white houses on snow, where they are hard to see.
    """
    correct: dict[str, list[bool]] = {}
    for scene, found in zip(scenes, judge.classify(images), strict=True):
        for name, value in scene.visible().items():
            correct.setdefault(name, []).append(found.get(name) == value)
            if name == "house" and value and scene.style == "painting":
                when = "house by day" if scene.time == "day" else f"house at {scene.time}"
                correct.setdefault(when, []).append(found["house"] == value)
                if scene.ground == "snow" and value == "white":
                    correct.setdefault("white house on snow", []).append(found["house"] == value)
    return {name: sum(answers) / len(answers) for name, answers in correct.items()}


def to_tensor(image: Image.Image) -> Tensor:
    """Convert an image to what the judge takes: (3, 128, 128) in [0, 1]."""
    image = image.convert("RGB").resize((IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.BICUBIC)
    return torch.from_numpy(np.array(image)).permute(2, 0, 1) / 255


def to_image(tensor: Tensor) -> Image.Image:
    """Convert a tensor (3, height, width) in [0, 1] to an image."""
    return Image.fromarray((tensor * 255).round().clamp(0, 255).byte().permute(1, 2, 0).numpy())
