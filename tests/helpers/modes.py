"""Ways to run the same networks: compiled, offloaded, laid out or computed in another order."""

import accelerate
import diffusers
import torch
from diffusers.hooks import apply_group_offloading

CPU = torch.device("cpu")


def compiled(pipe):
    pipe.unet = torch.compile(pipe.unet, backend="eager")


def compiled_in_place(pipe):
    pipe.unet.compile(backend="eager")


def compiled_forward(pipe):
    pipe.unet.forward = torch.compile(type(pipe.unet).forward.__get__(pipe.unet), backend="eager")  # as load_pipeline


def channels_last(pipe):
    pipe.unet.to(memory_format=torch.channels_last)


def sliced(pipe):
    pipe.enable_attention_slicing(1)
    pipe.vae.enable_slicing()


def offloaded(pipe):
    for part in (pipe.unet, pipe.vae, pipe.text_encoder):
        accelerate.cpu_offload(part, CPU, offload_buffers=True)


def offloaded_and_compiled(pipe):
    offloaded(pipe)
    pipe.unet = torch.compile(pipe.unet, backend="eager")


def offloaded_by_model(pipe):
    for part in (pipe.unet, pipe.vae, pipe.text_encoder):
        accelerate.cpu_offload_with_hook(part, CPU)


def offloaded_in_groups(pipe):
    for part in (pipe.unet, pipe.vae, pipe.text_encoder):
        apply_group_offloading(part, CPU, offload_type="leaf_level")


MODES = [
    compiled,
    compiled_in_place,
    compiled_forward,
    channels_last,
    sliced,
    offloaded,
    offloaded_and_compiled,
    offloaded_by_model,
]

# diffusers 0.39 offloads in groups only where torch has an accelerator.
IN_GROUPS = torch.accelerator.is_available() or not diffusers.__version__.startswith("0.39.")
if IN_GROUPS:
    MODES.append(offloaded_in_groups)
