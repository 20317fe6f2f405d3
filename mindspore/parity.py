"""Compare MindSpore with torch on the bundled model: ``python parity.py``, from inside this folder.

Writes ``results/mindspore/parity.json`` and the figure ``docs/mindspore.png``. Noise is read from the reference,
because the two frameworks draw different noise from the same seed.
"""

import json
import platform
import sys
from importlib.metadata import version

import matplotlib.pyplot as plt
import mindspore as ms
import numpy as np
from mindone.diffusers import StableDiffusionImg2ImgPipeline
from mindspore import Tensor
from PIL import Image
from safetensors.numpy import load_file

import cases
import loading

SHAPE = (1, 4, 16, 16)
Differences = dict[str, dict[str, float]]


class RecordedNoise:
    """What a pipeline takes for a ``numpy.random.Generator``: it gives the noise that torch drew, in the same order."""

    def __init__(self, reference: dict[str, np.ndarray]):
        self.draws = [reference["noise 0"], reference["noise 1"]]

    def standard_normal(self, size: tuple[int, ...]) -> np.ndarray:
        noise = self.draws.pop(0)
        assert noise.shape == tuple(size)
        return noise


def read_reference() -> tuple[dict[str, np.ndarray], dict[str, Image.Image]]:
    """Return torch's tensors by name, and the input image and torch's images by name."""
    strip = Image.open(cases.REFERENCE / "images.png")
    side = strip.height
    names = ["input", *cases.IMAGES]
    images = {name: strip.crop((i * side, 0, (i + 1) * side, side)) for i, name in enumerate(names)}
    return load_file(cases.REFERENCE / "tensors.safetensors"), images


def difference(found: Tensor | np.ndarray, expected: np.ndarray) -> dict[str, float]:
    """Return the largest absolute difference, and the largest absolute value that it is to be compared with."""
    found = found.asnumpy() if isinstance(found, Tensor) else np.asarray(found)
    assert found.shape == expected.shape, (found.shape, expected.shape)
    return {
        "difference": float(np.abs(found.astype(np.float64) - expected).max()),
        "largest": float(np.abs(expected).max()),
    }


def compare_parts(pipe: StableDiffusionImg2ImgPipeline) -> Differences:
    """Give each part of the pipeline the inputs that torch was given."""
    expected, images = read_reference()
    tokenizer = pipe.tokenizer
    tokens = tokenizer(
        cases.TOKENIZED, padding="max_length", max_length=tokenizer.model_max_length, truncation=True
    ).input_ids
    latent = Tensor(cases.wave(SHAPE))
    encoded = pipe.vae.encoder(pipe.image_processor.preprocess(images["input"]))
    decoded = pipe.vae.decode(latent)[0][..., :: cases.PIXEL_STRIDE, :: cases.PIXEL_STRIDE]
    found = {
        "tokens": np.array(tokens),
        "text": pipe.encode_prompt(cases.PROMPT, 1, False)[0],
        "encoded": pipe.vae.quant_conv(encoded),
        "decoded": decoded,
        **denoise(pipe, latent),
    }
    text = Tensor(cases.wave((1, 40, pipe.unet.config.configurations["cross_attention_dim"]), 0.5))
    for height, width in cases.LATENT_SIZES:
        for timestep in cases.TIMESTEPS:
            sample = Tensor(cases.wave((1, 4, height, width), 0.1))
            found[f"unet {height} x {width} at {timestep}"] = pipe.unet(sample, timestep, text)[0]
    return {name: difference(value, expected[name]) for name, value in found.items()}


def denoise(pipe: StableDiffusionImg2ImgPipeline, latent: Tensor) -> dict[str, Tensor]:
    """Run the scheduler alone, with a formula in place of the U-Net."""
    scheduler = pipe.scheduler
    scheduler.set_timesteps(cases.STEPS)
    timesteps, sample = scheduler.timesteps, Tensor(cases.wave(SHAPE, 0.5))
    noisy = scheduler.add_noise(latent, sample, timesteps[cases.STEPS // 2 :][:1])
    for step, timestep in enumerate(timesteps):
        sample = scheduler.step(Tensor(cases.model_output(step, SHAPE)), timestep, sample)[0]
    return {"timesteps": timesteps, "noisy": noisy, "denoised": sample}


def compare_calls(pipe: StableDiffusionImg2ImgPipeline) -> tuple[Differences, dict[str, Image.Image]]:
    """Run whole calls with torch's noise. Of images, count the bytes that differ and by how many levels of 255."""
    reference, images = read_reference()
    text_to_image = loading.text_to_image(pipe)
    found, made = {}, {}
    for name, settings in cases.CALLS.items():
        call, start = (pipe, {"image": images["input"]}) if "strength" in settings else (text_to_image, {})
        given = {"num_inference_steps": cases.STEPS, "guidance_scale": cases.GUIDANCE, **start, **settings}
        latent = call(cases.PROMPT, **given, generator=RecordedNoise(reference), output_type="latent")[0]
        found[name] = difference(latent, reference[name])
        if name in images:
            pixels = pipe.vae.decode(latent / pipe.vae.config.scaling_factor)[0]
            made[name] = pipe.image_processor.postprocess(pixels, output_type="pil")[0]
            levels = np.abs(np.asarray(made[name], int) - np.asarray(images[name], int))
            found[name] |= {"levels": int(levels.max()), "bytes": int((levels > 0).sum()), "of": levels.size}
    return found, made


def draw(made: dict[str, Image.Image]) -> plt.Figure:
    """Return a figure of torch's images, MindSpore's, and where they differ at all."""
    images = read_reference()[1]
    figure, axes = plt.subplots(3, len(made), figsize=(1.7 * len(made), 5.4), layout="constrained")
    for column, name in zip(axes.T, made, strict=True):
        levels = np.abs(np.asarray(made[name], int) - np.asarray(images[name], int)).max(axis=2)
        column[0].imshow(images[name])
        column[1].imshow(made[name])
        column[2].imshow(levels, cmap="gray", vmin=0, vmax=1)
        column[0].set_title(name, fontsize=9)
        column[2].set_xlabel(f"{(levels > 0).sum()} of {levels.size:,} pixels,\nby {levels.max()} of 255", fontsize=8)
    for ax in axes.flat:
        ax.set(xticks=[], yticks=[])
    for ax, label in zip(axes[:, 0], ["torch", "MindSpore", "where they differ"], strict=True):
        ax.set_ylabel(label, fontsize=9)
    return figure


def main() -> None:
    pipe = loading.load_pipeline()
    parts = compare_parts(pipe)
    loading.compile_unet(pipe)
    calls, made = compare_calls(pipe)
    environment = {
        "python": platform.python_version(),
        **{name: version(name) for name in ("mindspore", "mindone", "transformers", "numpy")},
        "device": ms.get_context("device_target"),
        "threads": 1,
    }
    file = cases.ROOT / "results" / "mindspore" / "parity.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps({"environment": environment, "parts": parts, "calls": calls}, indent=2) + "\n")
    plt.switch_backend("agg")
    draw(made).savefig(cases.ROOT / "docs" / "mindspore.png", dpi=90)
    json.dump({"parts": parts, "calls": calls}, sys.stdout, indent=2)


if __name__ == "__main__":
    main()
