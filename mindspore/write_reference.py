"""Write what torch computes with the bundled model, for the parity tests: ``python mindspore/write_reference.py``.

Run it in decinb's own environment, and again whenever the bundled weights change.
"""

import decinb
import numpy as np
import torch
from diffusers import DiffusionPipeline
from PIL import Image
from safetensors.numpy import save_file
from torch import Tensor

import cases


@torch.no_grad()
def main() -> None:
    torch.set_num_threads(1)
    pipe = decinb.load_pipeline("tiny", device="cpu", dtype="float32")
    pipe.set_progress_bar_config(disable=True)
    image = decinb.load_image("day")
    tensors = {
        "tokens": tokens(pipe),
        "text": pipe.encode_prompt(cases.PROMPT, "cpu", 1, False)[0],
        **autoencoder(pipe, image),
        **scheduler(pipe),
        **unet(pipe),
    }
    calls, images = whole_calls(pipe, image)
    cases.REFERENCE.mkdir(exist_ok=True)
    arrays = {name: np.ascontiguousarray(tensor.numpy()) for name, tensor in (tensors | calls).items()}
    save_file(arrays, cases.REFERENCE / "tensors.safetensors")
    Image.fromarray(np.hstack([np.asarray(one) for one in (image, *images)])).save(
        cases.REFERENCE / "images.png", optimize=True
    )
    for file in sorted(cases.REFERENCE.iterdir()):
        print(file.relative_to(cases.ROOT), f"{file.stat().st_size / 1000:.0f} kB")


def tokens(pipe: DiffusionPipeline) -> Tensor:
    length = pipe.tokenizer.model_max_length
    given = pipe.tokenizer(cases.TOKENIZED, padding="max_length", max_length=length, truncation=True)
    return torch.tensor(given.input_ids)


def autoencoder(pipe: DiffusionPipeline, image: Image.Image) -> dict[str, Tensor]:
    pixels = pipe.image_processor.preprocess(image)
    latent = torch.from_numpy(cases.wave((1, 4, 16, 16)))
    decoded = pipe.vae.decode(latent).sample
    return {
        "encoded": pipe.vae.encode(pixels).latent_dist.parameters,  # mean and log variance
        "decoded": decoded[..., :: cases.PIXEL_STRIDE, :: cases.PIXEL_STRIDE],
    }


def scheduler(pipe: DiffusionPipeline) -> dict[str, Tensor]:
    shape = (1, 4, 16, 16)
    pipe.scheduler.set_timesteps(cases.STEPS)
    timesteps = pipe.scheduler.timesteps
    latent, noise = torch.from_numpy(cases.wave(shape)), torch.from_numpy(cases.wave(shape, 0.5))
    noisy = pipe.scheduler.add_noise(latent, noise, timesteps[cases.STEPS // 2 :][:1])
    sample = noise
    for step, timestep in enumerate(timesteps):
        output = torch.from_numpy(cases.model_output(step, shape))
        sample = pipe.scheduler.step(output, timestep, sample).prev_sample
    return {"timesteps": timesteps, "noisy": noisy, "denoised": sample}


def unet(pipe: DiffusionPipeline) -> dict[str, Tensor]:
    text = torch.from_numpy(cases.wave((1, 40, pipe.unet.config.configurations["cross_attention_dim"]), 0.5))
    return {
        f"unet {height} x {width} at {timestep}": pipe.unet(
            torch.from_numpy(cases.wave((1, 4, height, width), 0.1)), timestep, text
        ).sample
        for height, width in cases.LATENT_SIZES
        for timestep in cases.TIMESTEPS
    }


def whole_calls(pipe: DiffusionPipeline, image: Image.Image) -> tuple[dict[str, Tensor], list[Image.Image]]:
    """Run the stock pipelines from seed 0, and draw the same noise again, in the order in which they draw it."""
    text_to_image = decinb.load_pipeline(pipe, task="text-to-image")
    text_to_image.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    made = {f"noise {i}": torch.randn((1, 4, 16, 16), generator=generator) for i in range(2)}
    images = []
    for name, settings in cases.CALLS.items():
        call, start = (pipe, {"image": image}) if "strength" in settings else (text_to_image, {})
        generator = torch.Generator().manual_seed(0)
        given = {"num_inference_steps": cases.STEPS, "guidance_scale": cases.GUIDANCE, **start, **settings}
        made[name] = call(cases.PROMPT, **given, generator=generator, output_type="latent").images
        if name in cases.IMAGES:
            pixels = pipe.vae.decode(made[name] / pipe.vae.config.scaling_factor).sample
            images += pipe.image_processor.postprocess(pixels)
    return made, images


if __name__ == "__main__":
    main()
