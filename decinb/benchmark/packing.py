"""Compare a packed sweep with a loop over the pipeline, as in the guide, on the same cells.

Both ways make the same images from the same seeds, in one process and in turns. U-Net calls and rows are counted while
they run, and the images are compared before they are rounded to 8 bits.
"""

import os
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionImg2ImgPipeline
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
"""The guide's three sweeps, and 48 cells that differ in every parameter."""

DEFAULTS: Cell = {"strength": 0.8, "guidance_scale": 7.5, "num_inference_steps": 30, "seed": 0}

ONE_BY_ONE, PACKED = "one by one", "packed"

CUDA_MATRIX_SIDE = 8192  # of the matrices whose product shows what a device can reach
MATRIX_SIDE = 1024  # on other devices
PRODUCTS = 10  # in one timed call

Way = Callable[[], Iterator[list[int]]]
"""Makes the images of a design. After every call of the decoder, it yields the indices of the images decoded."""


def compare(
    pipe: StableDiffusionImg2ImgPipeline,
    designs: Mapping[str, Sequence[Cell]] = DESIGNS,
    rounds: int = 4,
    max_rows: int | None = None,
    model: str = "unnamed",
) -> Measurement:
    """Time both ways on each design, in turns, after one run of each to warm up, count and compare.

    Args:
        pipe: the pipeline; the image and the prompt are those of ``decinb.example(pipe)``.
        designs: lists of cells, by name.
        rounds: how often each way is timed, 1 or more; an even number is fairer.
        max_rows: the most rows in a U-Net call; None chooses what suits the device.
        model: the name of the model, for the settings.

    Returns:
        Times as ``timings[design][way]``; the counts and the largest difference between the images, in a range of
        0 to 1, as ``settings["designs"][design]``.

    Raises:
        InputError: ``rounds`` or ``max_rows`` is below 1.
    """
    for name, number in {"rounds": rounds, "max_rows": max_rows}.items():
        if number is not None and number < 1:
            raise InputError(f"{name} must be at least 1, got {number}")
    where = environment(pipe.device, pipe.dtype)  # first, since it holds the load of the machine
    pipe.set_progress_bar_config(disable=True)
    sample, prompt = example(pipe)
    image = load_image(sample)
    latent_side, tokens = image.width // pipe.vae_scale_factor, pipe.tokenizer.model_max_length
    settings: dict[str, Any] = {
        "model": model,
        "size": image.width,
        "rounds": rounds,
        "flops_of_a_row": counting.count(pipe.unet, latent_side, tokens).flops,
        "flops_a_second_of_a_matrix_product": matrix_rate(pipe.device, pipe.dtype),
        "allocator": {name: value for name, value in os.environ.items() if name.startswith("MALLOC_")},
        "designs": {},
    }
    timings = {}
    for name, cells in designs.items():
        jobs = [Job(image, prompt, None, **{**DEFAULTS, **cell}) for cell in cells]
        most = max_rows or adapter_of(pipe).default_max_rows(jobs)
        ways = ways_to_make(pipe, jobs, most)
        images, counts = {}, {}
        for way, run in ways.items():
            images[way], counts[way] = _run_and_count(pipe, run)
        first, second = images.values()
        difference = max(float((first[i] - second[i]).abs().max()) for i in range(len(jobs)))
        settings["designs"][name] = {"cells": len(jobs), "pack": most, "difference": difference, **counts}
        functions = {way: lambda run=run: deque(run(), maxlen=0) for way, run in ways.items()}
        timings[name] = latency.measure(functions, rounds, warmup=0)
    return Measurement(timings, settings, where)


def ways_to_make(pipe: StableDiffusionImg2ImgPipeline, jobs: Sequence[Job], max_rows: int) -> dict[str, Way]:
    """Return the two ways to make the images, by name: the loop of the guide, and the packed sweep."""

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
        for step in adapter_of(pipe).run(jobs, max_rows):
            yield [result.index for result in step.results]

    return {ONE_BY_ONE: one_by_one, PACKED: packed}


def _run_and_count(pipe: StableDiffusionImg2ImgPipeline, run: Way) -> tuple[dict[int, Tensor], dict[str, Any]]:
    """Run a way once; return its images as floats from 0 to 1, and its U-Net calls, rows and, on CUDA, peak memory."""
    on_cuda = pipe.device.type == "cuda"
    if on_cuda:
        torch.cuda.reset_peak_memory_stats(pipe.device)
    with counting.count_unet_calls(pipe) as counted:
        images = images_of(pipe, run)
    peak = torch.cuda.max_memory_allocated(pipe.device) if on_cuda else None
    return images, {"calls": counted.calls, "rows": counted.rows, "peak_bytes": peak}


def images_of(pipe: StableDiffusionImg2ImgPipeline, run: Way) -> dict[int, Tensor]:
    """Run a way once, and return its images by index as floats from 0 to 1, before they are rounded to 8 bits."""
    decoded: list[Tensor] = []
    images: dict[int, Tensor] = {}
    hook = pipe.vae.decoder.register_forward_hook(lambda module, args, output: decoded.append(output))
    try:
        for indices in run():
            if indices:
                images.update(zip(indices, (decoded.pop().float() / 2 + 0.5).clamp(0, 1).cpu(), strict=True))
    finally:
        hook.remove()
    return images


def matrix_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Return the FLOPs per second that a device reaches in products of large square matrices, as an upper bound."""
    side = CUDA_MATRIX_SIDE if device.type == "cuda" else MATRIX_SIDE
    left, right = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    product = torch.empty_like(left)

    def multiply() -> None:
        for _ in range(PRODUCTS):
            torch.mm(left, right, out=product)

    return PRODUCTS * 2 * side**3 / latency.measure({"multiply": multiply})["multiply"].median


def random_pipeline(
    device: torch.device | str,
    dtype: torch.dtype,
    unet: Callable[[], nn.Module] = UNetNAS,
    vae: Callable[[], AutoencoderKL] = sd15_vae,
    text_encoder: Callable[[], CLIPTextModel] = sd15_text_encoder,
) -> DeciDiffusionImg2ImgPipeline:
    """Return a full-size pipeline with random weights, which take as long as trained ones. Its images are noise.

    The tokenizer and the scheduler are those of the bundled model; prompts are as long as the text encoder takes.
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


def table(measurement: Measurement) -> str:
    """Return what ``compare`` measured as text: the machine, then two lines and their ratio for each design."""
    where, settings = measurement.environment, measurement.settings
    best = settings["flops_a_second_of_a_matrix_product"]
    side = settings["size"]
    lines = [
        f"{where['device']}, {where['dtype']}, threads {where['threads']}, load {where['load']}; "
        f"{settings['model']} at {side} x {side}, {settings['rounds']} rounds; "
        f"best, by a matrix product: {best / 1e12:.3g} TFLOP/s",
        f"{'design':10}{'way':12}{'calls':>7}{'rows':>7}{'seconds':>9}{'rows/s':>8}{'TFLOP/s':>9}{'of best':>8}"
        f"{'GB':>6}",
    ]
    for name, timings in measurement.timings.items():
        found = settings["designs"][name]
        for way, timing in timings.items():
            counted = found[way]
            rate = counted["rows"] / timing.median
            flops = rate * settings["flops_of_a_row"]
            peak = "" if counted["peak_bytes"] is None else f"{counted['peak_bytes'] / 1e9:.1f}"
            lines.append(
                f"{name:10}{way:12}{counted['calls']:7}{counted['rows']:7}{timing.median:9.2f}{rate:8.1f}"
                f"{flops / 1e12:9.3g}{flops / best:8.0%}{peak:>6}"
            )
        least, middle, most = latency.ratio(timings[ONE_BY_ONE], timings[PACKED])
        lines.append(
            f"{'':10}{middle:.2f} times faster ({least:.2f} to {most:.2f}); {found['cells']} cells, "
            f"at most {found['pack']} rows a call; largest difference {found['difference']:.1g}"
        )
    return "\n".join(lines)
