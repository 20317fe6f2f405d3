"""The judge: says which attributes of a scene a picture shows. ``decinb.tiny.train_judge`` trains it.

A convolutional network of 200,000 weights that has seen 12,000 scenes, each time damaged in another way as a VAE or a
sampler damages pictures. It answers for any picture, but only for scenes is the answer worth anything.
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
"""What the judge can answer: the attributes of a scene, where the house of a sketch is "plain"."""

WEIGHTS = Path(__file__).with_name("judge.safetensors")


class Judge(nn.Module):
    """The classifier: (pictures, 3, 128, 128) in [0, 1] in, scores of every value of every attribute out."""

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
        # The mean knows the sky and the ground, the maximum finds a house wherever it stands.
        self.scores = nn.Linear(2 * plan[-1][1], sum(len(values) for values in VALUES.values()))

    def forward(self, pictures: Tensor) -> dict[str, Tensor]:
        features = self.layers(pictures * 2 - 1)
        pooled = torch.cat([features.mean(dim=(2, 3)), features.amax(dim=(2, 3))], dim=1)
        scores = self.scores(pooled).split([len(values) for values in VALUES.values()], dim=1)
        return dict(zip(VALUES, scores, strict=True))

    @classmethod
    @functools.cache
    def load(cls, file: Path = WEIGHTS) -> "Judge":
        """The trained judge, read once."""
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
    def see(self, images: Sequence[Image.Image]) -> list[dict[str, str | bool | None]]:
        """Say what pictures show.

        Args:
            images: PIL images of any size and mode; they are looked at as 128 x 128 RGB.

        Returns:
            One dict per image from attribute to value, as ``Scene.visible()``: time and ground only of paintings, and a
            house is "plain" in a sketch and has a colour in a painting.
        """
        seen = []
        for start in range(0, len(images), 64):
            pictures = torch.stack([_to_tensor(image) for image in images[start : start + 64]])
            scores = self(pictures)
            sketch = scores["style"].argmax(dim=1) == VALUES["style"].index("sketch")
            plain = torch.tensor([house == "plain" for house in VALUES["house"]])
            colour = torch.tensor([house not in (None, "plain") for house in VALUES["house"]])
            scores["house"][sketch[:, None] & colour | ~sketch[:, None] & plain] = -torch.inf
            best = {name: score.argmax(dim=1).tolist() for name, score in scores.items()}
            for row, is_sketch in enumerate(sketch):
                hidden = ("time", "ground") if is_sketch else ()
                seen.append({name: VALUES[name][best[name][row]] for name in VALUES if name not in hidden})
        return seen


def _to_tensor(image: Image.Image) -> Tensor:
    image = image.convert("RGB").resize((IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.BICUBIC)
    return torch.from_numpy(np.array(image)).permute(2, 0, 1) / 255


def _to_image(picture: Tensor) -> Image.Image:
    return Image.fromarray((picture * 255).round().clamp(0, 255).byte().permute(1, 2, 0).numpy())


# --- what it learns from ----------------------------------------------------------------------------------------------


# --- how good it is ---------------------------------------------------------------------------------------------------


def accuracy(judge: Judge, scenes: Sequence[Scene], images: Sequence[Image.Image]) -> dict[str, float]:
    """The share of pictures judged right, by attribute, among those that show it; and the house where it is hard."""
    right: dict[str, list[bool]] = {}
    for scene, seen in zip(scenes, judge.see(images), strict=True):
        for name, value in scene.visible().items():
            right.setdefault(name, []).append(seen.get(name) == value)
            if name == "house" and value and scene.style == "painting":
                hard = "house by day" if scene.time == "day" else f"house at {scene.time}"
                right.setdefault(hard, []).append(seen["house"] == value)
                if scene.ground == "snow" and value == "white":
                    right.setdefault("white house on snow", []).append(seen["house"] == value)
    return {name: sum(answers) / len(answers) for name, answers in right.items()}


@torch.inference_mode()
def through_vae(images: Sequence[Image.Image], vae: nn.Module) -> list[Image.Image]:
    """Encode and decode pictures of 128 x 128 pixels with a VAE of diffusers."""
    back = []
    for start in range(0, len(images), 32):
        pictures = torch.stack([_to_tensor(image) for image in images[start : start + 32]]) * 2 - 1
        latents = vae.encode(pictures.to(vae.device, vae.dtype)).latent_dist.mode()
        decoded = vae.decode(latents).sample.float().cpu() / 2 + 0.5
        back.extend(_to_image(picture) for picture in decoded)
    return back
