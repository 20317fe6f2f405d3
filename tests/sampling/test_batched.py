"""Packed denoising: each image equals the stock call's, in fewer U-Net calls, even if other jobs fail."""

import gc
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from time import perf_counter

import diffusers
import numpy as np
import pytest
import torch
from diffusers import StableDiffusionImg2ImgPipeline, StableDiffusionPipeline

import decinb
from decinb.benchmark.counting import count_unet_calls
from decinb.sampling import batched
from decinb.sampling.adapters import adapter_of
from decinb.sampling.jobs import Job, Step
from tests.helpers.small import small_pipe

TOLERANCE = 1e-4  # of a range of 0 to 1: sums over other batches round differently, by up to 1e-5
ROUNDED = 0.5 / 255  # the rounding error of 8 bits

ALLOCATOR = "[enforce fail at alloc_cpu.cpp:117] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to"
MEMORY_ERRORS = [torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), RuntimeError(ALLOCATOR)]

SCHEDULERS = [
    "DDIMScheduler",
    "PNDMScheduler",  # one call more than its steps
    "EulerDiscreteScheduler",  # scales the model's input
    "EulerAncestralDiscreteScheduler",  # draws noise at every step
    "DPMSolverMultistepScheduler",  # remembers the step before
    "UniPCMultistepScheduler",
    "HeunDiscreteScheduler",  # two calls a step
]

PROMPT = "a painting of a blue house, round trees and mountains on snow at night"
OTHER = "a sketch of a red house on sand"
DAY, NIGHT = decinb.load_image("day"), decinb.load_image("night")

QUICK = Job(DAY, PROMPT, None, strength=1.0, guidance_scale=7.5, num_inference_steps=2, seed=0)
PLAIN = replace(QUICK, guidance_scale=1.0)
MIXED = [
    Job(DAY, PROMPT, None, 0.5, 7.5, 6, 0),
    Job(DAY, PROMPT, "trees", 1.0, 3.0, 3, 1),
    Job(NIGHT, OTHER, None, 0.75, 1.0, 8, 2),
    Job(NIGHT, PROMPT, None, 0.9, 0.5, 5, 0),
    Job(DAY, OTHER, "", 0.3, 12.0, 7, 3),
    Job(DAY, PROMPT, None, 0.5, 1.5, 6, 0),  # starts like the first
]


@pytest.fixture(scope="module")
def stock(tiny):
    pipe = StableDiffusionImg2ImgPipeline(**tiny.components, requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def seeds(job: Job, number: int) -> list[Job]:
    return [replace(job, seed=seed) for seed in range(number)]


def alone(pipe, job: Job) -> np.ndarray:
    """Return the stock pipeline's image of a job as floats from 0 to 1."""
    return pipe(
        prompt=job.prompt,
        image=job.image,
        negative_prompt=job.negative_prompt,
        strength=job.strength,
        guidance_scale=job.guidance_scale,
        num_inference_steps=job.num_inference_steps,
        generator=torch.Generator().manual_seed(job.seed),
        output_type="np",
    ).images[0]


@contextmanager
def hooked(module, hook, before=False):
    register = module.register_forward_pre_hook if before else module.register_forward_hook
    handle = register(hook, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


def run(pipe, jobs, max_rows=None, guidance_rescale=0.0):
    """Return the images of jobs as floats from 0 to 1, in the order of the jobs, their results, and the steps."""
    pixels, results, steps, decoded = {}, {}, [], []
    with hooked(pipe.vae.decoder, lambda module, args, kwargs, output: decoded.append(output)):
        for step in adapter_of(pipe).run(jobs, max_rows, guidance_rescale):
            steps.append(step)
            for row, result in enumerate(step.results):
                assert result.index not in results
                results[result.index] = result
                if step.rows:  # not decoded: what ends here has failed
                    pixels[result.index] = None
                    continue
                pixels[result.index] = (decoded[-1][row] / 2 + 0.5).clamp(0, 1).permute(1, 2, 0).numpy()
    assert sorted(results) == list(range(len(jobs)))
    return [pixels[i] for i in range(len(jobs))], [results[i] for i in range(len(jobs))], steps


def difference(one: np.ndarray, other: np.ndarray) -> float:
    assert one.shape == other.shape
    return float(np.abs(one - other).max())


class Room:
    """A device that runs out of memory at more than so many rows; ``seen`` lists the rows of all calls."""

    def __init__(self, rows: int, error: Exception):
        self.rows, self.error, self.seen = rows, error, []

    def __call__(self, module, args, kwargs):
        rows = len(kwargs.get("encoder_hidden_states", args[0]))  # the decoder has no text
        self.seen.append(rows)
        if rows > self.rows:
            raise self.error


class Break:
    """Raises at one call of a network, counted from 1."""

    def __init__(self, call: int, error: BaseException):
        self.left, self.error = call, error

    def __call__(self, *_):
        self.left -= 1
        if self.left == 0:
            raise self.error


# --- equal to the stock call ------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("name", SCHEDULERS)
def test_every_image_equals_the_stock_call(tiny, stock, name, monkeypatch):
    changes = {} if name == "DDIMScheduler" else {"rescale_betas_zero_snr": False, "skip_prk_steps": True}
    scheduler = getattr(diffusers, name).from_config({**tiny.scheduler.config, **changes})
    for pipe in (tiny, stock):
        monkeypatch.setattr(pipe, "scheduler", scheduler)
    pixels, results, steps = run(tiny, MIXED, max_rows=3)
    for job, made, result in zip(MIXED, pixels, results, strict=True):
        expected = alone(stock, job)
        assert difference(made, expected) < TOLERANCE, job
        assert difference(np.asarray(result.image) / 255, expected) < ROUNDED + TOLERANCE, job
    together = [{i for i, one in step.active.items() if one.step < one.steps} for step in steps]
    assert any(one & other and one - other and other - one for one in together for other in together)


def test_images_of_two_sizes_run_together(tiny, stock):
    large = Job(decinb.load_image("winter", 192), OTHER, None, 1.0, 5.0, 3, 4)
    jobs = [QUICK, large, PLAIN, replace(large, guidance_scale=1.0, seed=5)]
    pixels, results, _ = run(tiny, jobs)
    assert [result.image.size for result in results] == [(128, 128), (192, 192), (128, 128), (192, 192)]
    for job, made in zip(jobs, pixels, strict=True):
        assert difference(made, alone(stock, job)) < TOLERANCE


def test_guidance_rescale_is_that_of_the_stock_text_to_image(tiny, stock):
    """At full strength nothing of the input is left, so the noise is that of text to image."""
    text_to_image = StableDiffusionPipeline(**tiny.components, requires_safety_checker=False)
    text_to_image.set_progress_bar_config(disable=True)
    job = replace(QUICK, num_inference_steps=4, seed=3)
    generator = torch.Generator().manual_seed(job.seed)
    _, noise = (torch.randn(1, 4, 16, 16, generator=generator) for _ in range(2))  # the VAE's sample is drawn first
    made = {}
    for rescale in (0.0, 0.7):
        (made[rescale],), _, _ = run(tiny, [job], guidance_rescale=rescale)
        expected = text_to_image(
            job.prompt, num_inference_steps=4, latents=noise.clone(), guidance_rescale=rescale, output_type="np"
        )
        assert difference(made[rescale], expected.images[0]) < TOLERANCE
    assert difference(made[0.0], alone(stock, job)) < TOLERANCE
    assert difference(made[0.0], made[0.7]) > 100 * TOLERANCE


def test_no_jobs_take_no_steps(tiny):
    assert list(adapter_of(tiny).run([])) == []


# --- how much is computed ---------------------------------------------------------------------------------------------


def test_only_guidance_above_1_takes_a_second_row(tiny):
    jobs = [replace(QUICK, guidance_scale=scale, seed=i) for i, scale in enumerate((0.0, 0.5, 1.0, 1.01, 7.5))]
    with count_unet_calls(tiny) as counted:
        _, _, steps = run(tiny, jobs)
    assert (counted.calls, counted.rows) == (2, 2 * (1 + 1 + 1 + 2 + 2))
    assert [step.rows for step in steps if step.rows] == [7, 7]


def test_jobs_that_differ_in_guidance_alone_share_their_first_rows(tiny):
    jobs = [replace(QUICK, guidance_scale=scale) for scale in (1.0, 3.0, 5.0, 7.5)]
    with count_unet_calls(tiny) as counted:
        run(tiny, jobs)
    assert (counted.calls, counted.rows) == (2, 2 + 7)


@pytest.mark.parametrize(
    "change", [{"seed": 1}, {"strength": 0.5, "num_inference_steps": 4}, {"image": NIGHT}, {"num_inference_steps": 1}]
)
def test_jobs_that_start_differently_share_no_rows(tiny, change):
    with count_unet_calls(tiny) as counted:
        next(step for step in adapter_of(tiny).run([PLAIN, replace(PLAIN, **change)]) if step.rows)
    assert (counted.calls, counted.rows) == (1, 2)


@pytest.mark.parametrize("max_rows", [1, 2, 5])
def test_max_rows_is_never_exceeded(tiny, max_rows):
    jobs = [*seeds(QUICK, 3), *seeds(PLAIN, 3)]
    room = Room(max_rows, AssertionError("too many rows"))
    with hooked(tiny.unet, room, before=True):
        steps = list(adapter_of(tiny).run(jobs, max_rows))
    assert max(room.seen) == max_rows
    assert sum(step.rows for step in steps) == 2 * (3 * 2 + 3)
    in_progress = [[one for one in step.active.values() if one.step < one.steps] for step in steps]
    assert max(map(len, in_progress)) <= max_rows


@pytest.mark.slow
def test_more_jobs_take_no_more_memory(tiny):
    def most_held(number: int) -> int:
        gc.collect()
        held = [0]
        once = replace(PLAIN, num_inference_steps=1)
        jobs = [replace(once, image=DAY.copy(), seed=seed) for seed in range(number)]
        for step in adapter_of(tiny).run(jobs, max_rows=4):
            if step.rows:
                held.append(sum(type(o) is torch.Tensor and o.shape[2:] == (16, 16) for o in gc.get_objects()))
        return max(held)

    assert most_held(20) <= most_held(10) > 0


def test_prompts_and_images_are_encoded_once(tiny, monkeypatch):
    monkeypatch.setattr(batched, "CACHED_PROMPTS", 2)  # but as many as there are rows in a call
    texts, images = [], []
    jobs = [replace(job, num_inference_steps=job.num_inference_steps + 1) for job in MIXED] + MIXED
    with (
        hooked(tiny.text_encoder, lambda *_: texts.append(1)),
        hooked(tiny.vae.encoder, lambda *_: images.append(1)),
    ):
        run(tiny, jobs, max_rows=5)
    assert len(texts) == len({PROMPT, OTHER, "trees", ""})
    assert len(images) == len([DAY, NIGHT])


def test_the_seconds_of_all_jobs_add_up_to_at_most_the_total(tiny):
    started = perf_counter()
    _, results, _ = run(tiny, [QUICK, replace(PLAIN, seed=1)])
    took = perf_counter() - started
    assert 0.25 * took < sum(result.seconds for result in results) <= took
    assert results[0].seconds > results[1].seconds


def test_a_stopped_sweep_has_about_as_many_images_as_of_its_time(tiny):
    pipe, image = small_pipe(tiny), DAY.resize((64, 64))
    equal = [Job(image, PROMPT, None, 1.0, 2.0, 6, seed) for seed in range(24)]
    by_strength = [Job(image, PROMPT, None, tenth / 10, 2.0, 10, seed) for tenth in range(1, 11) for seed in range(4)]
    by_guidance = [Job(image, PROMPT, None, 0.5, scale, 12, 0) for scale in range(1, 25)]
    for jobs in (equal, by_strength, by_guidance):
        total = sum((job.num_inference_steps - job.skipped) * (2 if job.guided else 1) for job in jobs)
        rows = images = 0
        steps = adapter_of(pipe).run(jobs)
        for step in steps:
            rows += step.rows
            images += len(step.results)
            if rows >= 0.3 * total:
                break
        with pytest.raises(KeyboardInterrupt):
            step = steps.throw(KeyboardInterrupt)
            while True:  # what is denoised is still decoded
                images += len(step.results)
                step = next(steps)
        assert 0.2 < images / len(jobs) < 0.4


# --- out of memory ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def undisturbed(tiny):
    return run(tiny, seeds(QUICK, 3))[0]


@pytest.mark.parametrize("error", MEMORY_ERRORS, ids=lambda error: type(error).__name__)
def test_a_batch_that_does_not_fit_is_halved_and_nothing_is_lost(tiny, undisturbed, error, happened):
    room = Room(3, error)
    with hooked(tiny.unet, room, before=True):
        pixels, _, _ = run(tiny, seeds(QUICK, 3))
    assert room.seen == [6, 3, 3, 3, 3]  # a size that did not fit is not tried again
    for made, expected in zip(pixels, undisturbed, strict=True):
        assert difference(made, expected) < TOLERANCE
    happened("F3", f"{type(error).__name__} at 6 rows: two calls of 3 rows, the same images, the model usable")


@pytest.mark.parametrize("error", MEMORY_ERRORS, ids=lambda error: type(error).__name__)
def test_the_error_is_raised_if_not_even_one_row_fits(tiny, error):
    room = Room(0, error)
    with hooked(tiny.unet, room, before=True), pytest.raises(type(error)) as caught:
        list(adapter_of(tiny).run(seeds(QUICK, 3)))
    assert caught.value is error
    assert room.seen == [6, 3, 1]


def test_other_errors_are_not_retried(tiny):
    room = Room(0, RuntimeError("shapes do not match"))
    with hooked(tiny.unet, room, before=True), pytest.raises(RuntimeError, match="shapes"):
        list(adapter_of(tiny).run(seeds(QUICK, 3)))
    assert room.seen == [6]


@pytest.mark.parametrize("error", MEMORY_ERRORS, ids=lambda error: type(error).__name__)
def test_a_decoder_that_runs_out_of_memory_takes_fewer_latents(tiny, undisturbed, error):
    room = Room(1, error)
    with hooked(tiny.vae.decoder, room, before=True):
        pixels, _, _ = run(tiny, seeds(QUICK, 3))
    assert room.seen == [3, 1, 1, 1]
    for made, expected in zip(pixels, undisturbed, strict=True):
        assert difference(made, expected) < TOLERANCE
    with hooked(tiny.vae.decoder, Room(0, error), before=True), pytest.raises(type(error)):
        list(adapter_of(tiny).run([QUICK]))


# --- errors and interruptions -----------------------------------------------------------------------------------------


def test_a_job_with_nan_is_an_error_and_does_not_affect_others(tiny, stock, happened):
    jobs = [replace(QUICK, seed=7), replace(QUICK, prompt=OTHER), replace(PLAIN, seed=8)]
    text = tiny.encode_prompt(OTHER, tiny.device, 1, False)[0]

    def poison(module, args, kwargs, output):
        rows = [torch.equal(row, text[0]) for row in kwargs["encoder_hidden_states"]]
        output[0][rows] = float("nan")

    with hooked(tiny.unet, poison):
        pixels, results, _ = run(tiny, jobs)
    assert results[1].image is None and results[1].error == "the U-Net returned NaN or infinity at step 1 of 2"
    happened("F4", results[1].error)
    for i in (0, 2):
        assert results[i].error is None
        assert difference(pixels[i], alone(stock, jobs[i])) < TOLERANCE


@pytest.mark.parametrize("step", [1, 3])
def test_a_job_ends_at_the_step_that_returns_infinity(tiny, step):
    calls = []

    def poison(module, args, kwargs, output):
        calls.append(len(args[0]))
        output[0].view(-1)[0] = float("inf") if len(calls) == step else 0.0

    with hooked(tiny.unet, poison):
        steps = list(adapter_of(tiny).run([replace(PLAIN, num_inference_steps=4)]))
    (result,) = [result for one in steps for result in one.results]
    assert result.error == f"the U-Net returned NaN or infinity at step {step} of 4"
    assert len(calls) == step


@pytest.mark.parametrize(
    ("part", "error"),
    [
        ("vae.encoder", "the VAE's encoder returned NaN or infinity for the input image"),
        ("text_encoder", "the text encoder returned NaN or infinity for the prompt"),
        (
            "guidance",
            "the U-Net returned NaN or infinity at step 2 of 2, after guidance_scale 1e+38 had driven the latents to",
        ),
    ],
)
def test_the_error_names_the_part_that_returned_nan(tiny, part, error, happened):
    job = replace(QUICK, guidance_scale=1e38) if part == "guidance" else QUICK

    def poison(module, args, kwargs, output):
        (output if torch.is_tensor(output) else output[0]).fill_(float("nan"))

    broken = {"vae.encoder": tiny.vae.encoder, "text_encoder": tiny.text_encoder}.get(part)
    with hooked(broken, poison) if broken else nullcontext():
        (result,) = [result for step in adapter_of(tiny).run([job]) for result in step.results]
    assert result.image is None and result.error.startswith(error)
    happened("F4", result.error)


def test_an_image_with_infinity_is_an_error(tiny, stock, happened):
    def poison(module, args, kwargs, output):
        output[1, :, 5, 5] = float("inf")

    with hooked(tiny.vae.decoder, poison):
        _, results, _ = run(tiny, seeds(QUICK, 2))
    assert results[1].image is None
    assert results[1].error == "the VAE's decoder returned NaN or infinity, after step 2 of 2"
    happened("F4", results[1].error)
    expected = alone(stock, QUICK)
    assert difference(np.asarray(results[0].image) / 255, expected) < ROUNDED + TOLERANCE


@pytest.mark.parametrize("error", [KeyboardInterrupt(), ValueError("broken")], ids=["interrupt", "error"])
@pytest.mark.parametrize(("part", "call"), [("unet", 3), ("vae", 1)])
def test_denoised_jobs_are_decoded_before_the_error_is_raised(tiny, error, part, call):
    jobs = [replace(PLAIN, num_inference_steps=steps, seed=steps) for steps in (4, 2, 1)]
    stopped = jobs if part == "unet" else jobs[1:]  # the decoder waits for more jobs, or for the last
    network = tiny.unet if part == "unet" else tiny.vae.decoder
    steps: list[Step] = []
    with hooked(network, Break(call, error), before=True), pytest.raises(type(error)) as caught:
        for step in adapter_of(tiny).run(stopped):
            steps.append(step)
    assert caught.value is error
    yielded = {stopped[result.index].seed: result.image for step in steps for result in step.results}
    assert sorted(yielded) == [1, 2] and all(yielded.values())
    assert steps[-1].rows == 0 and not any(step.results for step in steps[:-1])
