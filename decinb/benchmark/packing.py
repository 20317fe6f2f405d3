"""What packing is worth: the guide's loop over the pipeline beside the packed denoiser, on the same designs.

Both ways make the same pictures from the same seeds, in one process and in turns. Calls and rows are counted as they
run, and the pictures of the two ways are compared before they are rounded to 8 bits.
"""

import os
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionImg2ImgPipeline
from PIL import Image
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTokenizer

from decinb.benchmark import counting, latency
from decinb.benchmark.counting import sd15_text_encoder, sd15_vae
from decinb.benchmark.latency import Measurement
from decinb.designs import Cell, grid
from decinb.errors import InputError
from decinb.images import load_image
from decinb.models import MODELS, example
from decinb.pipeline import DeciDiffusionImg2ImgPipeline
from decinb.sampling.adapters import adapter_of
from decinb.sampling.jobs import Job
from decinb.unet_nas import UNetNAS
from decinb.utils.environment import environment

DESIGNS: dict[str, list[Cell]] = {
    "guidance": grid(guidance_scale=[i * 1.5 for i in range(3, 10)]),
    "strength": grid(strength=[0.75 + 0.05 * i for i in range(6)]),
    "steps": grid(strength=[0.75], num_inference_steps=range(30, 101, 10)),
    "mixed": grid(strength=[0.3, 0.5, 0.75, 0.9], guidance_scale=[1, 5, 7.5, 10], num_inference_steps=[20, 30, 50]),
}
"""The guide's three sweeps, and 48 cells that differ in everything."""

DEFAULTS: Cell = {"strength": 0.8, "guidance_scale": 7.5, "num_inference_steps": 30, "seed": 0}

ONE_BY_ONE, PACKED = "one by one", "packed"

MATRIX = 8192  # side of the matrices whose product tells what a GPU can do
SMALL_MATRIX = 1024  # and any other device
PRODUCTS = 10  # between two looks at the clock

Way = Callable[[], Iterator[list[int]]]
"""Makes the pictures of a design. Whenever the decoder is done, it yields which they are."""


def compare(
    pipe: StableDiffusionImg2ImgPipeline,
    designs: Mapping[str, Sequence[Cell]] = DESIGNS,
    rounds: int = 4,
    pack: int | None = None,
    model: str = "unnamed",
) -> Measurement:
    """Time both ways on each design, in turns, after one run of each that warms up, counts and compares.

    Args:
        pipe: what makes the pictures; ``decinb.example`` has the image and the prompt for it.
        designs: lists of cells, by name.
        rounds: how often each way is timed; even is fairer.
        pack: the most rows in a U-Net call; None suits it to the device.
        model: what the record calls the pipeline.

    Returns:
        ``timings[design][way]``; what was counted and compared is in ``settings["designs"][design]``.

    Raises:
        InputError: rounds or pack is below 1.
    """
    for name, number in {"rounds": rounds, "pack": pack}.items():
        if number is not None and number < 1:
            raise InputError(f"{name} must be at least 1, got {number}")
    where = environment(pipe.device, pipe.dtype)  # before this process is itself a load
    pipe.set_progress_bar_config(disable=True)
    sample, prompt = example(pipe)
    image = load_image(sample)
    latent, tokens = image.width // pipe.vae_scale_factor, pipe.tokenizer.model_max_length
    settings: dict[str, Any] = {
        "model": model,
        "size": image.width,
        "rounds": rounds,
        "flops_of_a_row": counting.count(pipe.unet, latent, tokens).flops,
        "flops_a_second_of_a_matrix_product": matrix_rate(pipe.device, pipe.dtype),
        "allocator": {name: value for name, value in os.environ.items() if name.startswith("MALLOC_")},
        "designs": {},
    }
    timings = {}
    for name, cells in designs.items():
        jobs = [Job(image, prompt, None, **{**DEFAULTS, **cell}) for cell in cells]
        most = pack or adapter_of(pipe).default_max_rows(jobs)
        ways = ways_of(pipe, jobs, most)
        pictures, counts = {}, {}
        for way, make in ways.items():
            pictures[way], counts[way] = watch(pipe, make)
        one, other = pictures.values()
        difference = max(float((one[i] - other[i]).abs().max()) for i in range(len(jobs)))
        settings["designs"][name] = {"cells": len(jobs), "pack": most, "difference": difference, **counts}
        whole = {way: lambda make=make: deque(make(), maxlen=0) for way, make in ways.items()}
        timings[name] = latency.measure(whole, rounds, warmup=0)
    return Measurement(timings, settings, where)


def ways_of(pipe: StableDiffusionImg2ImgPipeline, jobs: Sequence[Job], pack: int) -> dict[str, Way]:
    """The guide's way and ours, by name."""

    def one_by_one() -> Iterator[list[int]]:
        for i, job in enumerate(jobs):
            pipe(
                prompt=job.prompt,
                image=job.image,
                strength=job.strength,
                guidance_scale=job.guidance_scale,
                num_inference_steps=job.num_inference_steps,
                generator=torch.Generator().manual_seed(job.seed),
            )
            yield [i]

    def packed() -> Iterator[list[int]]:
        for step in adapter_of(pipe).run(jobs, pack):
            yield [result.index for result in step.results]

    return {ONE_BY_ONE: one_by_one, PACKED: packed}


def watch(pipe: StableDiffusionImg2ImgPipeline, way: Way) -> tuple[dict[int, Tensor], dict[str, Any]]:
    """Go a way once: its pictures from 0 to 1, not rounded, and its U-Net calls, rows, and on CUDA most bytes held."""
    decoded: list[Tensor] = []
    pictures: dict[int, Tensor] = {}
    on_cuda = pipe.device.type == "cuda"
    if on_cuda:
        torch.cuda.reset_peak_memory_stats(pipe.device)
    hook = pipe.vae.decoder.register_forward_hook(lambda module, args, output: decoded.append(output))
    try:
        with counting.count_unet_calls(pipe) as counted:
            for indices in way():
                if indices:
                    pictures.update(zip(indices, (decoded.pop().float() / 2 + 0.5).clamp(0, 1).cpu(), strict=True))
    finally:
        hook.remove()
    peak = torch.cuda.max_memory_allocated(pipe.device) if on_cuda else None
    return pictures, {"calls": counted.calls, "rows": counted.rows, "peak_bytes": peak}


def matrix_rate(device: torch.device, dtype: torch.dtype) -> float:
    """The FLOPs a second that a device reaches in products of large square matrices: as good as it gets."""
    side = MATRIX if device.type == "cuda" else SMALL_MATRIX
    one, other = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    product = torch.empty_like(one)

    def multiply() -> None:
        for _ in range(PRODUCTS):
            torch.mm(one, other, out=product)

    return PRODUCTS * 2 * side**3 / latency.measure({"multiply": multiply})["multiply"].median


def random_pipeline(
    device: torch.device | str,
    dtype: torch.dtype,
    unet: Callable[[], nn.Module] = UNetNAS,
    vae: Callable[[], AutoencoderKL] = sd15_vae,
    text_encoder: Callable[[], CLIPTextModel] = sd15_text_encoder,
) -> DeciDiffusionImg2ImgPipeline:
    """A pipeline of full size with random weights, which take as long as trained ones. Its pictures are noise.

    Tokenizer and scheduler are those of the bundled model, but for a text that is as long as the encoder takes.
    """
    folder = MODELS["tiny"].source
    encoder = text_encoder().to(device, dtype).eval().requires_grad_(False)
    tokenizer = CLIPTokenizer.from_pretrained(folder / "tokenizer", local_files_only=True)
    tokenizer.model_max_length = encoder.config.max_position_embeddings
    return DeciDiffusionImg2ImgPipeline(
        counting.random_model(vae, device, dtype),
        encoder,
        tokenizer,
        counting.random_model(unet, device, dtype),
        DDIMScheduler.from_pretrained(folder / "scheduler", local_files_only=True),
    )


def table(record: Measurement) -> str:
    """Say a record in plain text: where it was taken, then for every design a line a way, and how they compare."""
    where, settings = record.environment, record.settings
    best = settings["flops_a_second_of_a_matrix_product"]
    side = settings["size"]
    lines = [
        f"{where['device']}, {where['dtype']}, threads {where['threads']}, load {where['load']}; "
        f"{settings['model']} at {side} x {side}, {settings['rounds']} rounds; "
        f"a matrix product reaches {best / 1e12:.3g} TFLOP/s",
        f"{'design':10}{'way':12}{'calls':>7}{'rows':>7}{'seconds':>9}{'rows/s':>8}{'TFLOP/s':>9}{'share':>7}{'GB':>6}",
    ]
    for name, timings in record.timings.items():
        found = settings["designs"][name]
        for way, timing in timings.items():
            counted = found[way]
            rate = counted["rows"] / timing.median
            flops = rate * settings["flops_of_a_row"]
            peak = "" if counted["peak_bytes"] is None else f"{counted['peak_bytes'] / 1e9:.1f}"
            lines.append(
                f"{name:10}{way:12}{counted['calls']:7}{counted['rows']:7}{timing.median:9.2f}{rate:8.1f}"
                f"{flops / 1e12:9.3g}{flops / best:7.0%}{peak:>6}"
            )
        least, middle, most = latency.ratio(timings[ONE_BY_ONE], timings[PACKED])
        lines.append(
            f"{'':10}{middle:.2f} times faster ({least:.2f} to {most:.2f}); {found['cells']} cells, "
            f"pack {found['pack']}; largest difference {found['difference']:.1g}"
        )
    return "\n".join(lines)


def options_table(record: Measurement) -> str:
    """Say what ``decinb.benchmark.options.compare_options`` measured in plain text: a line an option."""
    where, settings = record.environment, record.settings
    lines = [
        f"{where['device']}, {where['dtype']}, threads {where['threads']}, load {where['load']}; {settings['model']}",
        f"{'option':20}{'as loaded s':>12}{'with s':>9}{'faster':>8}{'PSNR dB':>9}{'first s':>9}",
    ]
    for name, timings in record.timings.items():
        found, (before, after) = settings["options"][name], timings.values()
        lines.append(
            f"{name:20}{before.median:12.3f}{after.median:9.3f}{latency.ratio(before, after)[1]:8.2f}"
            f"{found['psnr']:9.1f}{found['first']:9.1f}"
        )
    return "\n".join(lines)


def picture_call(pipe: StableDiffusionImg2ImgPipeline, steps: int) -> Callable[[], Image.Image]:
    """One guided image-to-image call of all ``steps``, from the pipeline's own example, ready to be timed."""
    pipe.set_progress_bar_config(disable=True)
    sample, prompt = example(pipe)
    image = load_image(sample)

    def call() -> Image.Image:
        return pipe(prompt, image, 1.0, steps, generator=torch.Generator().manual_seed(0)).images[0]

    return call
