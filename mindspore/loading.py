"""Load a folder of the bundled model's kind into MindONE's pipelines."""

from pathlib import Path

import mindspore as ms
import numpy as np
from mindone.diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionPipeline,
)
from mindone.transformers import CLIPTextModel
from mindspore import nn
from safetensors.numpy import load_file
from transformers import CLIPTextConfig, CLIPTokenizerFast

import cpu
from unet_nas import UNetNAS

TORCH_NAMES = {"gamma": "weight", "beta": "bias", "embedding_table": "weight"}
"""What the parameters of ``mindspore.nn`` are called in torch. Those of ``mindspore.mint.nn`` have torch's names."""

TINY = Path(__file__).parents[1] / "decinb" / "tiny" / "model"


def load_pipeline(folder: str | Path = TINY, device: str = "CPU") -> StableDiffusionImg2ImgPipeline:
    """Load an image-to-image pipeline with a U-Net-NAS.

    ``from_pretrained`` of MindONE's pipelines accepts its own U-Net classes only, so the pipeline is built from parts.

    Args:
        folder: a diffusers folder with safetensors weights, such as ``decinb/tiny/model``.
        device: ``"CPU"``, ``"GPU"`` or ``"Ascend"``.

    Raises:
        ValueError: a tensor is missing, extra or of another shape.
        RuntimeError: the device is a CPU and the installed versions are not the tested ones.
    """
    cpu.prepare(device)
    folder = Path(folder)
    unet = UNetNAS.from_config(UNetNAS.load_config(folder / "unet"))
    vae = AutoencoderKL.from_config(AutoencoderKL.load_config(folder / "vae"))
    text_encoder = CLIPTextModel(CLIPTextConfig.from_pretrained(folder / "text_encoder"))
    load_weights(unet, folder / "unet" / "diffusion_pytorch_model.safetensors")
    load_weights(vae, folder / "vae" / "diffusion_pytorch_model.safetensors")
    load_weights(text_encoder, folder / "text_encoder" / "model.safetensors")
    pipe = StableDiffusionImg2ImgPipeline(
        vae=vae,
        text_encoder=text_encoder,
        # CLIPTokenizer asks for vocab.json and merges.txt; the fast one reads tokenizer.json and gives the same tokens.
        tokenizer=CLIPTokenizerFast.from_pretrained(folder / "tokenizer"),
        unet=unet,
        scheduler=DDIMScheduler.from_config(DDIMScheduler.load_config(folder / "scheduler")),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def text_to_image(pipe: StableDiffusionImg2ImgPipeline) -> StableDiffusionPipeline:
    """Return a text-to-image pipeline that shares all parts with ``pipe``."""
    other = StableDiffusionPipeline(**pipe.components, requires_safety_checker=False)
    other.set_progress_bar_config(disable=True)
    return other


def compile_unet(pipe: StableDiffusionImg2ImgPipeline) -> None:
    """Compile the U-Net with ``ms.jit``: twice as fast, after some seconds at the first call of each batch size."""
    pipe.unet.construct = ms.jit(pipe.unet.construct)


def load_weights(cell: nn.Cell, file: Path) -> None:
    """Fill a model from a safetensors file, in float32, and check that file and model have the same tensors.

    MindONE itself leaves what a file lacks at random values, with a warning only.

    Raises:
        ValueError: a tensor is missing, extra or of another shape.
    """
    weights = load_file(file)
    parameters = {torch_name(name): parameter for name, parameter in cell.parameters_and_names()}
    if isinstance(cell, CLIPTextModel) and not any(name.startswith("text_model.") for name in weights):
        # Transformers 5 saves these names without the prefix that transformers 4 expects.
        weights = {f"text_model.{name}": value for name, value in weights.items()}
    if wrong := sorted(weights.keys() ^ parameters.keys()):
        raise ValueError(f"{file}: missing or extra tensors: {', '.join(wrong[:3])} ({len(wrong)} in all)")
    for name, value in weights.items():
        if value.shape != parameters[name].shape:
            raise ValueError(f"{file}: {name} has shape {value.shape}, the model needs {parameters[name].shape}")
        parameters[name].set_data(ms.Tensor(value.astype(np.float32)))
    cell.set_train(False)


def torch_name(name: str) -> str:
    """Return what torch calls a parameter of a MindSpore model."""
    *path, last = name.split(".")
    return ".".join([*path, TORCH_NAMES.get(last, last)])
