"""The judge: a small classifier that tells which attributes of a scene an image shows.

It answers for any image, but the answer is meaningful only for scenes. ``decinb.tiny.train_judge`` trains it.
"""

import functools
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from decinb.scenes.attributes import ATTRIBUTES, IMAGE_SIZE, Scene

VALUES: dict[str, tuple] = {**ATTRIBUTES, "house": (None, "plain", *ATTRIBUTES["house"][1:])}
"""What the judge can answer: the values of a scene's attributes, and "plain" for the building of a sketch."""

WEIGHTS = Path(__file__).with_name("judge.safetensors")

BATCH = 64


class Judge(nn.Module):
    """A convolutional classifier: (images, 3, 128, 128) in [0, 1] in, scores of every value of every attribute out."""

    def __init__(self):
        super().__init__()
        plan = [(3, 16, 2), (16, 32, 2), (32, 64, 2), (64, 64, 1), (64, 96, 2), (96, 96, 1)]  # (in, out, stride)
        self.layers = nn.Sequential(
            *(
                nn.Sequential(
                    nn.Conv2d(into, out, 3, stride, padding=1, bias=False), nn.BatchNorm2d(out), nn.SiLU(inplace=True)
                )
                for into, out, stride in plan
            )
        )
        # The mean responds to sky and ground, the maximum to a house wherever it stands.
        self.scores = nn.Linear(2 * plan[-1][1], sum(len(values) for values in VALUES.values()))

    def pool(self, pixels: Tensor) -> Tensor:
        """Return the features that the scores are computed from, (images, 192)."""
        features = self.layers(pixels * 2 - 1)
        return torch.cat([features.mean(dim=(2, 3)), features.amax(dim=(2, 3))], dim=1)

    def forward(self, pixels: Tensor) -> dict[str, Tensor]:
        scores = self.scores(self.pool(pixels)).split([len(values) for values in VALUES.values()], dim=1)
        return dict(zip(VALUES, scores, strict=True))

    @classmethod
    @functools.cache
    def load(cls, file: Path = WEIGHTS) -> "Judge":
        """Return the trained judge; its weights are read once."""
        judge = cls()
        judge.load_state_dict({name: tensor.float() for name, tensor in load_file(file).items()}, strict=False)
        return judge.eval().requires_grad_(False)

    def save(self, file: Path = WEIGHTS) -> None:
        """Write the weights as fp16 safetensors."""
        state = {
            name: tensor.half().contiguous() for name, tensor in self.state_dict().items() if tensor.is_floating_point()
        }
        save_file(state, file)

    @torch.inference_mode()
    def classify(self, images: Sequence[Image.Image]) -> list[dict[str, str | bool | None]]:
        """Tell what images show.

        Args:
            images: PIL images of any size and mode; they are looked at as 128 x 128 RGB.

        Returns:
            One dict per image from attribute to value, as ``Scene.visible()``: a sketch has no time and no ground, its
            building is "plain", and without a building there is no kind of building.
        """
        seen = []
        for start in range(0, len(images), BATCH):
            scores = self(torch.stack([to_tensor(image) for image in images[start : start + BATCH]]))
            sketch = scores["style"].argmax(dim=1) == VALUES["style"].index("sketch")
            plain = torch.tensor([house == "plain" for house in VALUES["house"]])
            coloured = torch.tensor([house not in (None, "plain") for house in VALUES["house"]])
            scores["house"][sketch[:, None] & coloured | ~sketch[:, None] & plain] = -torch.inf
            without = scores["house"].argmax(dim=1) == VALUES["house"].index(None)
            no_building = torch.tensor([building is None for building in VALUES["building"]])
            scores["building"][without[:, None] ^ no_building] = -torch.inf
            best = {name: score.argmax(dim=1).tolist() for name, score in scores.items()}
            for row, is_sketch in enumerate(sketch):
                hidden = ("time", "ground") if is_sketch else ()
                seen.append({name: VALUES[name][best[name][row]] for name in VALUES if name not in hidden})
        return seen

    @torch.inference_mode()
    def features(self, images: Sequence[Image.Image]) -> Tensor:
        """Return the features of images, (images, 192), for a Fréchet distance."""
        batches = (images[start : start + BATCH] for start in range(0, len(images), BATCH))
        return torch.cat([self.pool(torch.stack([to_tensor(image) for image in batch])) for batch in batches])


def frechet_distance(first: Tensor, second: Tensor) -> float:
    """Return the Fréchet distance of two sets of features, as if each were normally distributed.

    It depends on the number of images: compare only distances of equally many.

    Args:
        first, second: (images, features), at least two images each.

    Source: Heusel et al. (2017), arXiv:1706.08500.
    """
    means, covariances, roots = [], [], []
    for features in (first.double(), second.double()):
        means.append(features.mean(dim=0))
        covariances.append(torch.cov(features.T))
    values, vectors = torch.linalg.eigh(covariances[0])
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T
    roots = torch.linalg.eigvalsh(root @ covariances[1] @ root).clamp(min=0).sqrt()
    spread = covariances[0].trace() + covariances[1].trace() - 2 * roots.sum()
    return max(0.0, float((means[0] - means[1]).square().sum() + spread))


def to_tensor(image: Image.Image) -> Tensor:
    """Return an image as (3, 128, 128) in [0, 1]."""
    image = image.convert("RGB").resize((IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.BICUBIC)
    return torch.from_numpy(np.array(image)).permute(2, 0, 1) / 255


def to_image(pixels: Tensor) -> Image.Image:
    """Return (3, height, width) in [0, 1] as an image."""
    return Image.fromarray((pixels * 255).round().clamp(0, 255).byte().permute(1, 2, 0).numpy())


def accuracy(judge: Judge, scenes: Sequence[Scene], images: Sequence[Image.Image]) -> dict[str, float]:
    """Return the fraction of images judged right, by attribute, among those that show it.

    White buildings on snow and buildings at night, the hardest cases, are also counted by themselves.
    """
    right: dict[str, list[bool]] = {}
    for scene, seen in zip(scenes, judge.classify(images), strict=True):
        for name, value in scene.visible().items():
            right.setdefault(name, []).append(seen.get(name) == value)
        if scene.house and scene.style != "sketch":
            if scene.time == "night":
                right.setdefault("house at night", []).append(seen["house"] == scene.house)
            if scene.ground == "snow" and scene.house == "white":
                right.setdefault("white house on snow", []).append(seen["house"] == scene.house)
    return {name: sum(answers) / len(answers) for name, answers in right.items()}


@torch.inference_mode()
def through_vae(images: Sequence[Image.Image], vae: nn.Module) -> list[Image.Image]:
    """Encode and decode images of 128 x 128 pixels with a VAE of diffusers."""
    back = []
    for start in range(0, len(images), 32):
        pixels = torch.stack([to_tensor(image) for image in images[start : start + 32]]) * 2 - 1
        latents = vae.encode(pixels.to(vae.device, vae.dtype)).latent_dist.mode()
        decoded = vae.decode(latents).sample.float().cpu() / 2 + 0.5
        back.extend(to_image(one) for one in decoded)
    return back
