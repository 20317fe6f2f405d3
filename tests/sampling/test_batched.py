"""Packed denoising: every image as if it had been made alone, in fewer calls, whatever goes wrong beside it."""

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
from decinb.sampling import batched as denoising
from decinb.sampling.adapters import Job
from decinb.sampling.batched import Tick, denoise

TOLERANCE = 1e-4  # of a range of 0 to 1: a sum over more rows adds in another order, seen up to 1e-5
ROUNDED = 0.5 / 255  # what 8 bits a colour lose

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
    Job(DAY, PROMPT, None, 0.5, 1.5, 6, 0),  # begins as the first does
]


@pytest.fixture(scope="module")
def stock(tiny):
    pipe = StableDiffusionImg2ImgPipeline(**tiny.components, requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def seeds(job: Job, number: int) -> list[Job]:
    return [replace(job, seed=seed) for seed in range(number)]


def alone(pipe, job: Job) -> np.ndarray:
    """What the stock pipeline makes of a job, from 0 to 1, not rounded to 8 bits."""
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


def packed(pipe, jobs, pack=None, guidance_rescale=0.0):
    """The pictures of jobs before they are rounded, in the order of the jobs, their ``Done``, and the ticks."""
    pixels, done, ticks, decoded = {}, {}, [], []
    with hooked(pipe.vae.decoder, lambda module, args, kwargs, output: decoded.append(output)):
        for tick in denoise(pipe, jobs, pack, guidance_rescale):
            ticks.append(tick)
            for row, ended in enumerate(tick.done):
                assert ended.index not in done
                done[ended.index] = ended
                if tick.rows:  # a step: what ends here has no picture
                    pixels[ended.index] = None
                    continue
                pixels[ended.index] = (decoded[-1][row] / 2 + 0.5).clamp(0, 1).permute(1, 2, 0).numpy()
    assert sorted(done) == list(range(len(jobs)))
    return [pixels[i] for i in range(len(jobs))], [done[i] for i in range(len(jobs))], ticks


def difference(one: np.ndarray, other: np.ndarray) -> float:
    assert one.shape == other.shape
    return float(np.abs(one - other).max())


class Room:
    """A device that runs out of memory at more than so many rows; ``seen`` says what it was asked for."""

    def __init__(self, rows: int, error: Exception):
        self.rows, self.error, self.seen = rows, error, []

    def __call__(self, module, args, kwargs):
        rows = len(kwargs.get("encoder_hidden_states", args[0]))  # the decoder reads no text
        self.seen.append(rows)
        if rows > self.rows:
            raise self.error


class Break:
    """Breaks a network at one of its calls, counted from 1."""

    def __init__(self, call: int, error: BaseException):
        self.left, self.error = call, error

    def __call__(self, *_):
        self.left -= 1
        if self.left == 0:
            raise self.error


# --- the same as alone ------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("name", SCHEDULERS)
def test_every_image_equals_the_stock_call(tiny, stock, name, monkeypatch):
    changes = {} if name == "DDIMScheduler" else {"rescale_betas_zero_snr": False, "skip_prk_steps": True}
    scheduler = getattr(diffusers, name).from_config({**tiny.scheduler.config, **changes})
    for pipe in (tiny, stock):
        monkeypatch.setattr(pipe, "scheduler", scheduler)
    pixels, done, ticks = packed(tiny, MIXED, pack=3)
    for job, made, ended in zip(MIXED, pixels, done, strict=True):
        expected = alone(stock, job)
        assert difference(made, expected) < TOLERANCE, job
        assert difference(np.asarray(ended.image) / 255, expected) < ROUNDED + TOLERANCE, job
    together = [set(tick.live) for tick in ticks]
    assert any(one & other and one - other and other - one for one in together for other in together)


def test_pictures_of_two_sizes_go_together(tiny, stock):
    large = Job(decinb.load_image("winter", 192), OTHER, None, 1.0, 5.0, 3, 4)
    jobs = [QUICK, large, PLAIN, replace(large, guidance_scale=1.0, seed=5)]
    pixels, done, _ = packed(tiny, jobs)
    assert [ended.image.size for ended in done] == [(128, 128), (192, 192), (128, 128), (192, 192)]
    for job, made in zip(jobs, pixels, strict=True):
        assert difference(made, alone(stock, job)) < TOLERANCE


def test_guidance_rescale_is_that_of_the_stock_text_to_image(tiny, stock):
    """At full strength nothing is left of the input: the noise is what text to image begins from."""
    text_to_image = StableDiffusionPipeline(**tiny.components, requires_safety_checker=False)
    text_to_image.set_progress_bar_config(disable=True)
    job = replace(QUICK, num_inference_steps=4, seed=3)
    generator = torch.Generator().manual_seed(job.seed)
    _, noise = (torch.randn(1, 4, 16, 16, generator=generator) for _ in range(2))  # the first is the VAE's
    made = {}
    for rescale in (0.0, 0.7):
        (made[rescale],), _, _ = packed(tiny, [job], guidance_rescale=rescale)
        expected = text_to_image(
            job.prompt, num_inference_steps=4, latents=noise.clone(), guidance_rescale=rescale, output_type="np"
        )
        assert difference(made[rescale], expected.images[0]) < TOLERANCE
    assert difference(made[0.0], alone(stock, job)) < TOLERANCE
    assert difference(made[0.0], made[0.7]) > 100 * TOLERANCE


def test_nothing_to_do_is_done_at_once(tiny):
    assert list(denoise(tiny, [])) == []


# --- how much work it is ----------------------------------------------------------------------------------------------


def test_only_guidance_above_1_costs_a_second_row(tiny):
    jobs = [replace(QUICK, guidance_scale=scale, seed=i) for i, scale in enumerate((0.0, 0.5, 1.0, 1.01, 7.5))]
    with count_unet_calls(tiny) as counted:
        _, _, ticks = packed(tiny, jobs)
    assert (counted.calls, counted.rows) == (2, 2 * (1 + 1 + 1 + 2 + 2))
    assert [tick.rows for tick in ticks if tick.rows] == [7, 7]


def test_jobs_that_differ_in_guidance_alone_share_their_first_rows(tiny):
    jobs = [replace(QUICK, guidance_scale=scale) for scale in (1.0, 3.0, 5.0, 7.5)]
    with count_unet_calls(tiny) as counted:
        packed(tiny, jobs)
    assert (counted.calls, counted.rows) == (2, 2 + 7)


@pytest.mark.parametrize(
    "change", [{"seed": 1}, {"strength": 0.5, "num_inference_steps": 4}, {"image": NIGHT}, {"num_inference_steps": 1}]
)
def test_jobs_that_begin_otherwise_share_nothing(tiny, change):
    with count_unet_calls(tiny) as counted:
        next(tick for tick in denoise(tiny, [PLAIN, replace(PLAIN, **change)]) if tick.rows)
    assert (counted.calls, counted.rows) == (1, 2)


@pytest.mark.parametrize("pack", [1, 2, 5])
def test_a_pack_is_never_exceeded(tiny, pack):
    jobs = [*seeds(QUICK, 3), *seeds(PLAIN, 3)]
    room = Room(pack, AssertionError("too many rows"))
    with hooked(tiny.unet, room, before=True):
        ticks = list(denoise(tiny, jobs, pack))
    assert max(room.seen) == pack
    assert sum(tick.rows for tick in ticks) == 2 * (3 * 2 + 3)
    assert max(len(tick.live) for tick in ticks) <= pack


def test_a_long_list_holds_no_more_than_a_short_one(tiny):
    def most_held(number: int) -> int:
        gc.collect()
        held = [0]
        once = replace(PLAIN, num_inference_steps=1)
        jobs = [replace(once, image=DAY.copy(), seed=seed) for seed in range(number)]
        for tick in denoise(tiny, jobs, pack=4):
            if tick.rows:
                held.append(sum(type(o) is torch.Tensor and o.shape[2:] == (16, 16) for o in gc.get_objects()))
        return max(held)

    assert most_held(20) <= most_held(10) > 0


def test_prompts_and_pictures_are_encoded_once(tiny, monkeypatch):
    monkeypatch.setattr(denoising, "REMEMBERED", 2)  # a pack of more prompts keeps them all
    words, pictures = [], []
    jobs = [replace(job, num_inference_steps=job.num_inference_steps + 1) for job in MIXED] + MIXED
    with (
        hooked(tiny.text_encoder, lambda *_: words.append(1)),
        hooked(tiny.vae.encoder, lambda *_: pictures.append(1)),
    ):
        packed(tiny, jobs, pack=5)
    assert len(words) == len({PROMPT, OTHER, "trees", ""})
    assert len(pictures) == len([DAY, NIGHT])


def test_the_seconds_of_the_jobs_add_up_to_no_more_than_the_whole(tiny):
    started = perf_counter()
    _, done, _ = packed(tiny, [QUICK, replace(PLAIN, seed=1)])
    took = perf_counter() - started
    assert 0.25 * took < sum(ended.seconds for ended in done) <= took
    assert done[0].seconds > done[1].seconds


# --- out of memory ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def undisturbed(tiny):
    return packed(tiny, seeds(QUICK, 3))[0]


@pytest.mark.parametrize("error", MEMORY_ERRORS, ids=lambda error: type(error).__name__)
def test_a_pack_that_does_not_fit_is_halved_and_nothing_is_lost(tiny, undisturbed, error, happened):
    room = Room(3, error)
    with hooked(tiny.unet, room, before=True):
        pixels, _, _ = packed(tiny, seeds(QUICK, 3))
    assert room.seen == [6, 3, 3, 3, 3]  # what did not fit is not tried again
    for made, expected in zip(pixels, undisturbed, strict=True):
        assert difference(made, expected) < TOLERANCE
    happened("F3", f"{type(error).__name__} at a pack of 6 rows: two packs of 3, the same pictures, the model usable")


@pytest.mark.parametrize("error", MEMORY_ERRORS, ids=lambda error: type(error).__name__)
def test_where_not_even_one_row_fits_the_error_comes_out(tiny, error):
    room = Room(0, error)
    with hooked(tiny.unet, room, before=True), pytest.raises(type(error)) as caught:
        list(denoise(tiny, seeds(QUICK, 3)))
    assert caught.value is error
    assert room.seen == [6, 3, 1]


def test_other_errors_are_not_tried_again(tiny):
    room = Room(0, RuntimeError("shapes do not match"))
    with hooked(tiny.unet, room, before=True), pytest.raises(RuntimeError, match="shapes"):
        list(denoise(tiny, seeds(QUICK, 3)))
    assert room.seen == [6]


@pytest.mark.parametrize("error", MEMORY_ERRORS, ids=lambda error: type(error).__name__)
def test_a_decoder_without_room_takes_fewer_at_once(tiny, undisturbed, error):
    room = Room(1, error)
    with hooked(tiny.vae.decoder, room, before=True):
        pixels, _, _ = packed(tiny, seeds(QUICK, 3))
    assert room.seen == [3, 1, 1, 1]
    for made, expected in zip(pixels, undisturbed, strict=True):
        assert difference(made, expected) < TOLERANCE
    with hooked(tiny.vae.decoder, Room(0, error), before=True), pytest.raises(type(error)):
        list(denoise(tiny, [QUICK]))


# --- faults and stops -------------------------------------------------------------------------------------------------


def test_a_job_that_turns_to_nan_is_a_fault_and_harms_no_other(tiny, stock, happened):
    jobs = [replace(QUICK, seed=7), replace(QUICK, prompt=OTHER), replace(PLAIN, seed=8)]
    text = tiny.encode_prompt(OTHER, tiny.device, 1, False)[0]

    def poison(module, args, kwargs, output):
        rows = [torch.equal(row, text[0]) for row in kwargs["encoder_hidden_states"]]
        output[0][rows] = float("nan")

    with hooked(tiny.unet, poison):
        pixels, done, _ = packed(tiny, jobs)
    assert done[1].image is None and done[1].fault == "the U-Net gave NaN or infinity at step 1 of 2"
    happened("F4", done[1].fault)
    for i in (0, 2):
        assert done[i].fault is None
        assert difference(pixels[i], alone(stock, jobs[i])) < TOLERANCE


@pytest.mark.parametrize("step", [1, 3])
def test_numbers_that_are_lost_later_are_lost_there_and_no_step_is_run_after_it(tiny, step):
    calls = []

    def poison(module, args, kwargs, output):
        calls.append(len(args[0]))
        output[0].view(-1)[0] = float("inf") if len(calls) == step else 0.0

    with hooked(tiny.unet, poison):
        (tick,) = [tick for tick in denoise(tiny, [replace(PLAIN, num_inference_steps=4)]) if tick.done]
    assert tick.done[0].fault == f"the U-Net gave NaN or infinity at step {step} of 4"
    assert len(calls) == step


@pytest.mark.parametrize(
    ("part", "fault"),
    [
        ("vae.encoder", "the VAE's encoder made NaN or infinity of the input picture"),
        ("text_encoder", "the text encoder made NaN or infinity of the prompt"),
        (
            "guidance",
            "the U-Net gave NaN or infinity at step 2 of 2, of latents that guidance 1e+38 had grown to",
        ),
    ],
)
def test_the_part_that_gave_no_numbers_is_named(tiny, part, fault, happened):
    job = replace(QUICK, guidance_scale=1e38) if part == "guidance" else QUICK

    def poison(module, args, kwargs, output):
        (output if torch.is_tensor(output) else output[0]).fill_(float("nan"))

    broken = {"vae.encoder": tiny.vae.encoder, "text_encoder": tiny.text_encoder}.get(part)
    with hooked(broken, poison) if broken else nullcontext():
        (done,) = [done for tick in denoise(tiny, [job]) for done in tick.done]
    assert done.image is None and done.fault.startswith(fault)
    happened("F4", done.fault)


def test_a_picture_that_is_no_numbers_is_a_fault(tiny, stock, happened):
    def poison(module, args, kwargs, output):
        output[1, :, 5, 5] = float("inf")

    with hooked(tiny.vae.decoder, poison):
        _, done, _ = packed(tiny, seeds(QUICK, 2))
    assert done[1].image is None
    assert done[1].fault == "the VAE's decoder gave NaN or infinity, after step 2 of 2"
    happened("F4", done[1].fault)
    expected = alone(stock, QUICK)
    assert difference(np.asarray(done[0].image) / 255, expected) < ROUNDED + TOLERANCE


@pytest.mark.parametrize("error", [KeyboardInterrupt(), ValueError("broken")], ids=["interrupt", "error"])
@pytest.mark.parametrize(("part", "call"), [("unet", 3), ("vae", 1)])
def test_what_was_denoised_is_brought_before_the_stop(tiny, error, part, call):
    jobs = [replace(PLAIN, num_inference_steps=steps, seed=steps) for steps in (4, 2, 1)]
    stopped = jobs if part == "unet" else jobs[1:]  # the decoder waits for more jobs, or for the last
    network = tiny.unet if part == "unet" else tiny.vae.decoder
    ticks: list[Tick] = []
    with hooked(network, Break(call, error), before=True), pytest.raises(type(error)) as caught:
        for tick in denoise(tiny, stopped):
            ticks.append(tick)
    assert caught.value is error
    brought = {stopped[ended.index].seed: ended.image for tick in ticks for ended in tick.done}
    assert sorted(brought) == [1, 2] and all(brought.values())
    assert ticks[-1].rows == 0 and not any(tick.done for tick in ticks[:-1])
