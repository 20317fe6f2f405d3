"""What only a CUDA GPU shows: half precision, memory that runs out, and CUDA graphs."""

import pytest
import torch

import decinb
from decinb.metrics import psnr
from decinb.sampling.adapters import adapter_of
from decinb.sampling.jobs import Job
from decinb.utils.acceleration import compile_network, uncompile_network

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]

SAME = 50  # dB, in float16
DEFAULTS = {"strength": 1.0, "num_inference_steps": 4, "seed": 0}


@pytest.fixture(scope="module")
def pipe():
    pipe = decinb.load_pipeline("tiny", "cuda")
    pipe.set_progress_bar_config(disable=True)
    return pipe


def jobs(number: int) -> list[Job]:
    image = decinb.load_image("day")
    return [Job(image, "a red house", None, guidance_scale=1.0 + i, **DEFAULTS) for i in range(number)]


def make(pipe, jobs, max_rows=None):
    done = {result.index: result.image for step in adapter_of(pipe).run(jobs, max_rows) for result in step.results}
    return [done[i] for i in range(len(jobs))]


def test_packed_images_in_half_precision_are_those_made_alone(pipe):
    assert pipe.dtype == torch.float16
    packed = make(pipe, jobs(4))
    alone = [make(pipe, [job])[0] for job in jobs(4)]
    assert all(psnr(*pair) > SAME for pair in zip(packed, alone, strict=True))


def test_calls_that_do_not_fit_into_memory_are_halved(pipe):
    expected = make(pipe, jobs(8), 2)
    rows = []
    hook = pipe.unet.register_forward_pre_hook(lambda module, args: rows.append(len(args[0])))
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.empty_cache()
    try:
        torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_allocated() + 40e6) / total)
        made = make(pipe, jobs(8), 64)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
        hook.remove()
    assert min(rows) < max(rows)
    assert all(psnr(*pair) > SAME for pair in zip(made, expected, strict=True))


@pytest.mark.slow
def test_cuda_graphs_give_the_same_images(pipe):
    expected = make(pipe, jobs(2))
    compile_network(pipe.unet, "reduce-overhead")
    try:
        made = make(pipe, jobs(2))
    finally:
        uncompile_network(pipe.unet)
    assert all(psnr(*pair) > SAME for pair in zip(made, expected, strict=True))
