"""Packed denoising: jobs with different settings share U-Net calls, and each image comes out as if made alone.

A U-Net takes one timestep per row, so the rows of a call may differ in everything. Every active job has its own
scheduler, latents and timesteps. Each step gathers the rows of all active jobs, calls the U-Net once, and lets each
scheduler advance its own job; finished jobs leave and waiting ones join. No sampler is reimplemented: any diffusers
scheduler works, and random numbers are drawn in the order of the stock pipeline.
"""

import math
from abc import abstractmethod
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache, partial
from time import perf_counter
from typing import Any, TypeVar

import torch
from diffusers import DiffusionPipeline, SchedulerMixin
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import rescale_noise_cfg
from PIL import Image
from torch import Tensor

from decinb.errors import InputError, reason
from decinb.sampling.base import Adapter
from decinb.sampling.jobs import Conditioning, Job, Progress, Result, Step
from decinb.sampling.prediction import predict_clean
from decinb.unet_nas import UNetNAS
from decinb.utils import validation

DECODE_BATCH = 4  # latents per call of the VAE's decoder: more gain little speed and take much memory
TRIED_SCHEDULES, TRIED_STEPS = 8, 100  # of a sweep, tried without the U-Net before it starts
CACHED_PROMPTS = 64  # encoded prompts kept at least
LARGE_LATENT = 1e4  # latents are a few units large; a U-Net cannot handle values beyond this

# Latent pixels per U-Net call: one small image leaves even a CPU half idle, a large one does not.
LATENT_PIXELS = {"cpu": 64 * 16 * 16, "mps": 16 * 64 * 64, "cuda": 64 * 64 * 64}
MAX_ROWS = 64
PARTS = 4  # of a sweep, one of which runs at a time
SMALLEST_PART = 8  # of the most rows: such calls still run at more than 80% of the speed

Item, Output = TypeVar("Item"), TypeVar("Output")


class BatchedAdapter(Adapter):
    """A pipeline whose jobs can share U-Net calls. Subclasses say what each stage of its stock call does.

    Stages draw the same random numbers in the same order as the stock call.
    """

    exposes_latents = True
    extra_channels = 0

    def __init__(self, pipe: DiffusionPipeline):
        super().__init__(pipe)
        self.device = pipe._execution_device  # looked up once: diffusers goes through all components for it

    # --- the stages ---

    @abstractmethod
    def latent_size(self, job: Job) -> tuple[int, int]:
        """Return the height and width of a job's latents."""

    @abstractmethod
    def encode_image(self, image: Image.Image | None) -> Any:
        """Encode an input image, once for all jobs that share it."""

    @abstractmethod
    def prepare_latents(
        self, job: Job, encoded: Any, scheduler: SchedulerMixin, timestep: Tensor, generator: torch.Generator
    ) -> Tensor:
        """Return a job's first latents, (1, channels, height, width)."""

    @abstractmethod
    def add_noise(self, scheduler: SchedulerMixin, latents: Tensor, noise: Tensor, timestep: Tensor) -> Tensor:
        """Return the latents at the first timestep, from those of the input and noise."""

    def extra_input(self, encoded: Any) -> Tensor | None:
        """Return the channels that the U-Net sees beside the latents at every step, or None."""
        return None

    def conditionings(self, job: Job) -> list[Conditioning]:
        """Return what each row of a job is conditioned on: the prompt, and with guidance the negative prompt."""
        return [Conditioning(job.prompt), self.negative(job)] if job.guided else [Conditioning(job.prompt)]

    def negative(self, job: Job) -> Conditioning:
        """Return the conditioning that guidance moves away from."""
        return Conditioning(job.negative_prompt or "", True)

    @abstractmethod
    def encode_prompt(self, conditioning: Conditioning, size: tuple[int, int]) -> dict[str, Tensor]:
        """Return the tensors, one row each, that condition the U-Net on a text at a latent size."""

    def unet_arguments(self, encoded: Sequence[dict[str, Tensor]]) -> dict[str, Any]:
        """Combine encoded prompts into the arguments of one U-Net call."""
        return {name: torch.cat([row[name] for row in encoded]) for name in encoded[0]}

    @abstractmethod
    def decode_latents(self, latents: Tensor) -> list[tuple[Image.Image | None, bool]]:
        """Return for each latent its image, None if it is not finite, and whether a safety checker blacked it out."""

    # --- planning ---

    def key_parts(self, job: Job) -> dict[str, Any]:
        return {
            **super().key_parts(job),
            "negative_prompt": self.negative(job).text if job.guided else "",
            "guidance_scale": job.guidance_scale if job.guided else 1.0,
            "skipped": job.skipped,
        }

    def count_calls(self, jobs: Sequence[Job]) -> list[int]:
        calls: dict[tuple[int, int], int] = {}
        distinct = {(job.num_inference_steps, job.skipped): i for i, job in reversed(list(enumerate(jobs)))}
        every = max(1, len(distinct) // TRIED_SCHEDULES)
        for number, (steps, i) in enumerate(sorted(distinct.items())):
            job = jobs[i]
            try:
                scheduler, timesteps = job.schedule(self.pipe.scheduler, self.device)
                calls[steps] = len(timesteps)
                if number % every == 0 or number == len(distinct) - 1:
                    self._try(scheduler, timesteps[:TRIED_STEPS])
            except Exception as error:
                name = type(self.pipe.scheduler).__name__
                raise InputError(
                    f"cell {i}: {name} cannot run {job.num_inference_steps} steps at strength {job.strength:g}: "
                    f"{reason(error)}"
                ) from error
        return [calls[job.num_inference_steps, job.skipped] for job in jobs]

    @torch.no_grad()
    def _try(self, scheduler: SchedulerMixin, timesteps: Tensor) -> None:
        """Run a scheduler on noise alone, since some that are made for other pipelines fail only in the middle."""
        generator = torch.Generator().manual_seed(0)
        dtype = self.pipe.unet.dtype  # looked for in all modules

        def noise(channels: int) -> Tensor:
            return torch.randn(1, channels, 2, 2, generator=generator).to(self.device, dtype)

        channels, predicted = self.pipe.vae.config.latent_channels, self.pipe.unet.config.out_channels
        latents = self.add_noise(scheduler, noise(channels), noise(channels), timesteps[:1])
        step_arguments = self.pipe.prepare_extra_step_kwargs(generator, 0.0)
        for timestep in timesteps:
            scheduler.scale_model_input(latents, timestep)
            latents = scheduler.step(noise(predicted), timestep, latents, **step_arguments, return_dict=False)[0]
        if not latents.isfinite().all():
            raise ValueError("it turns noise into NaN or infinity")

    def rows(self, job: Job) -> int:
        return 2 if job.guided else 1

    def default_max_rows(self, jobs: Sequence[Job]) -> int:
        """Return how many rows of the largest image make a U-Net call that uses the device well.

        Jobs that run together end together, so a call takes no more than a part of them: a sweep that is stopped after
        a third of its time has about a third of its images. Very small calls would cost more than that is worth.
        """
        area = max((math.prod(self.latent_size(job)) for job in jobs), default=1)
        most = min(MAX_ROWS, LATENT_PIXELS.get(self.device.type, LATENT_PIXELS["cpu"]) // area)
        part = -(-sum(self.rows(job) for job in jobs) // PARTS)
        return max(2, min(most, max(part, most // SMALLEST_PART)))

    @torch.no_grad()
    def seconds_per_row(self, jobs: Sequence[Job]) -> float:
        """Measure the time one row of a full U-Net call takes on these jobs, after one call to warm up."""
        packed = _PackedRun(self, jobs, self.default_max_rows(jobs), 0.0)
        packed.start_waiting()
        rows = [
            (active.model_input(), active.timestep, text) for active in packed.active for text in active.conditionings
        ]
        for _ in range(2):
            started = perf_counter()
            packed.predict(*map(list, zip(*rows, strict=True)))
            packed.synchronize()
        return (perf_counter() - started) / len(rows)

    def schedule_note(self, jobs: Sequence[Job]) -> str | None:
        steps = sorted({job.num_inference_steps for job in jobs}, reverse=True)
        return next(filter(None, (validation.late_start(number, self.pipe.scheduler) for number in steps)), None)

    def ignores_negative(self, job: Job) -> bool:
        return bool(job.negative_prompt) and not job.guided

    # --- sampling ---

    def run(self, jobs: Sequence[Job], max_rows: int | None = None, guidance_rescale: float = 0.0) -> Iterator[Step]:
        """Make an image for every job, many in each U-Net call; see ``Adapter.run``.

        No more jobs are in memory than fit into one call. A call that runs out of memory is repeated with half the
        rows.

        Yields:
            A ``Step`` when jobs start, after each step of all active jobs, and after each call of the VAE's decoder.
            A job whose values become NaN or infinity ends at that step, with an error that names the cause. On an
            exception or a ``KeyboardInterrupt``, what is fully denoised is decoded and yielded before it is raised.

        Raises:
            InputError: the U-Net was distilled to take the guidance scale as an input.
            torch.OutOfMemoryError: or what the device raises if not even one row fits.
        """
        if getattr(self.pipe.unet.config, "time_cond_proj_dim", None):
            raise InputError(
                "pipe: a U-Net that takes the guidance scale as an input (time_cond_proj_dim) cannot be packed"
            )
        return _PackedRun(self, jobs, max_rows or self.default_max_rows(jobs), guidance_rescale).run()


@dataclass(eq=False)
class _ActiveJob:
    """A job being denoised, with its own scheduler and latents."""

    index: int
    job: Job
    scheduler: SchedulerMixin
    timesteps: Tensor
    latents: Tensor
    extra_input: Tensor | None
    conditionings: list[Conditioning]
    step_arguments: dict[str, Any]
    position: int = 0
    seconds: float = 0.0
    error: str | None = None
    predict: Callable[[], Tensor | None] | None = None

    @property
    def timestep(self) -> Tensor:
        return self.timesteps[self.position]

    @property
    def is_denoised(self) -> bool:
        return self.position == len(self.timesteps)

    @property
    def latent_size(self) -> tuple[int, int]:
        return tuple(self.latents.shape[-2:])

    @property
    def progress(self) -> Progress:
        return Progress(self.position, len(self.timesteps), self.predict)

    def model_input(self) -> Tensor:
        """Return what the U-Net sees: the latents as the scheduler scales them, and any extra channels."""
        scaled = self.scheduler.scale_model_input(self.latents, self.timestep)
        return scaled if self.extra_input is None else torch.cat([scaled, self.extra_input], dim=1)

    def row_key(self, conditioning: Conditioning) -> tuple:
        """Return what decides a row of the U-Net's input. The first rows of jobs that start alike are equal."""
        return self.latents.shape, self.index if self.position else self.job.start_key, conditioning

    def step(self, predictions: list[Tensor], guidance_rescale: float) -> None:
        """Apply guidance to the U-Net's predictions, one per row, and advance by one scheduler step."""
        guided = conditional = predictions[0]
        if self.job.guided:
            unconditional = predictions[1]
            guided = unconditional + self.job.guidance_scale * (conditional - unconditional)
            if guidance_rescale:
                guided = rescale_noise_cfg(guided, conditional, guidance_rescale)
        # The prediction is worked out only if someone wants to see it.
        seen = self.scheduler.scale_model_input(self.latents, self.timestep)
        self.predict = partial(predict_clean, self.scheduler, seen, guided, self.timestep)
        self.latents = self.scheduler.step(
            guided, self.timestep, self.latents, **self.step_arguments, return_dict=False
        )[0]
        self.position += 1


@dataclass
class _PackedRun:
    """The state of one run: jobs that wait, that are active, and that are denoised but not yet decoded."""

    adapter: BatchedAdapter
    jobs: Sequence[Job]
    max_rows: int
    guidance_rescale: float
    decode_batch: int = DECODE_BATCH
    active: list[_ActiveJob] = field(default_factory=list)
    denoised: list[_ActiveJob] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.pipe, self.device = self.adapter.pipe, self.adapter.device
        self.waiting = deque(self._ordered())
        self.encode_prompt = lru_cache(max(CACHED_PROMPTS, self.max_rows))(self.adapter.encode_prompt)
        self.encoded_images: dict[int, Any] = {}  # by id: Pillow would compare images pixel by pixel
        self.image_uses = Counter(id(job.image) for job in self.jobs)

    def _ordered(self) -> list[tuple[int, Job]]:
        """Return the jobs with their numbers, in the order in which they start.

        The jobs are split into as many groups as there are full calls, each with long and short jobs. In all groups but
        the last, the shortest jobs start first, so that images finish at an even rate; in the last, the longest do, so
        that calls stay full until the end. Jobs with the same start stay together, because they share rows.
        """
        together: dict[tuple[int, ...], list[tuple[int, Job]]] = {}
        for i, job in enumerate(self.jobs):
            together.setdefault(job.start_key, []).append((i, job))

        def length(jobs: list[tuple[int, Job]]) -> int:
            return jobs[0][1].num_inference_steps - jobs[0][1].skipped

        longest_first = sorted(together.values(), key=length, reverse=True)
        number = max(1, round(sum(map(self.adapter.rows, self.jobs)) / self.max_rows))
        groups = [longest_first[i::number] for i in range(number)]
        for group in groups[:-1]:
            group.sort(key=length)
        return [one for group in groups for jobs in group for one in jobs]

    def run(self) -> Iterator[Step]:
        try:
            while self.waiting or self.active:
                if self.start_waiting():
                    yield Step(0, [], self._progress())
                started = perf_counter()
                with torch.no_grad():
                    self._step_all()
                    self.synchronize()
                rows = sum(len(active.conditionings) for active in self.active)
                seconds_per_row = (perf_counter() - started) / rows
                for active in self.active:
                    active.seconds += seconds_per_row * len(active.conditionings)
                failed = self._remove_ended()
                yield Step(rows, failed, self._progress())
                while len(self.denoised) >= self.decode_batch or (
                    self.denoised and not self.active and not self.waiting
                ):
                    yield Step(0, self._decode(), self._progress())
        except (KeyboardInterrupt, Exception):
            while self.denoised:
                yield Step(0, self._decode(), self._progress())
            raise
        finally:
            self.pipe.maybe_free_model_hooks()

    def _remove_ended(self) -> list[Result]:
        """Move denoised jobs on to the decoder, and return the results of those that failed."""
        failed = [active for active in self.active if active.error]
        self.denoised += [active for active in self.active if active.is_denoised and not active.error]
        self.active = [active for active in self.active if not (active.is_denoised or active.error)]
        return [Result(active.index, None, active.error, active.seconds) for active in failed]

    def _progress(self) -> dict[int, Progress]:
        return {active.index: active.progress for active in [*self.active, *self.denoised]}

    def synchronize(self) -> None:
        """Wait for the device, so that times are right."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    # --- starting jobs ---

    @torch.no_grad()
    def start_waiting(self) -> bool:
        """Start waiting jobs as long as there is room; return whether any started."""
        rows, before = sum(len(active.conditionings) for active in self.active), len(self.active)
        while self.waiting:
            index, job = self.waiting[0]
            rows += self.adapter.rows(job)
            if rows > self.max_rows and self.active:
                break
            self.waiting.popleft()
            self.active.append(self._start(index, job))
        return len(self.active) > before

    def _start(self, index: int, job: Job) -> _ActiveJob:
        """Prepare a job as the stock call does, with its own generator."""
        generator = torch.Generator().manual_seed(job.seed)
        scheduler, timesteps = job.schedule(self.pipe.scheduler, self.device)
        encoded = self._encode_image(job.image)
        latents = self.adapter.prepare_latents(job, encoded, scheduler, timesteps[:1], generator)
        step_arguments = self.pipe.prepare_extra_step_kwargs(generator, 0.0)
        extra_input, conditionings = self.adapter.extra_input(encoded), self.adapter.conditionings(job)
        return _ActiveJob(index, job, scheduler, timesteps, latents, extra_input, conditionings, step_arguments)

    def _encode_image(self, image: Image.Image | None) -> Any:
        """Encode an image for the first job that uses it, and forget it with the last."""
        key = id(image)
        if key not in self.encoded_images:
            self.encoded_images[key] = self.adapter.encode_image(image)
        self.image_uses[key] -= 1
        return self.encoded_images[key] if self.image_uses[key] else self.encoded_images.pop(key)

    # --- denoising ---

    def _step_all(self) -> None:
        """Advance every active job by one step."""
        row_of: dict[tuple, int] = {}
        latents, timesteps, conditionings = [], [], []
        for active in self.active:
            model_input = active.model_input()
            for conditioning in active.conditionings:
                if row_of.setdefault(active.row_key(conditioning), len(row_of)) == len(latents):
                    latents.append(model_input)
                    timesteps.append(active.timestep)
                    conditionings.append(conditioning)
        predicted = self.predict(latents, timesteps, conditionings)
        predictions = {
            active.index: [predicted[row_of[active.row_key(conditioning)]] for conditioning in active.conditionings]
            for active in self.active
        }
        before = {active.index: active.latents for active in self.active}
        for active in self.active:
            active.step(predictions[active.index], self.guidance_rescale)
        # In one tensor, so that there is only one wait for the device.
        are_finite = torch.stack([active.latents.isfinite().all() for active in self.active]).tolist()
        for active, is_finite in zip(self.active, are_finite, strict=True):
            if not is_finite:
                active.error = self._find_cause(active, before[active.index], predictions[active.index])

    def _find_cause(self, active: _ActiveJob, before: Tensor, predictions: list[Tensor]) -> str:
        """Return which part produced NaN or infinity in the step that a job has just made."""
        at = f"at step {active.position} of {len(active.timesteps)}"
        if not before.isfinite().all():
            return "the VAE's encoder returned NaN or infinity for the input image"
        encoded = (
            tensor for text in active.conditionings for tensor in self.encode_prompt(text, active.latent_size).values()
        )
        if not all(tensor.isfinite().all() for tensor in encoded):
            return "the text encoder returned NaN or infinity for the prompt"
        scale = f"guidance_scale {active.job.guidance_scale:g}"
        if not all(prediction.isfinite().all() for prediction in predictions):
            largest = before.abs().max()
            grown = active.job.guided and largest > LARGE_LATENT
            because = f", after {scale} had driven the latents to {largest:.0e}" if grown else ""
            return f"the U-Net returned NaN or infinity {at}{because}"
        culprit = scale if active.job.guided else type(active.scheduler).__name__
        return f"{culprit} turned the U-Net's prediction into NaN or infinity {at}"

    def predict(
        self, latents: list[Tensor], timesteps: list[Tensor], conditionings: list[Conditioning]
    ) -> list[Tensor]:
        """Return the U-Net's prediction for every row, in calls of at most ``max_rows`` rows of one shape."""
        # U-Net-NAS starts without the text, so that part is computed once for both rows of a job.
        shares_latents = isinstance(getattr(self.pipe.unet, "_orig_mod", self.pipe.unet), UNetNAS)  # or compiled

        def call_unet(rows: list[int]) -> Tensor:
            encoded = [self.encode_prompt(conditionings[row], tuple(latents[row].shape[-2:])) for row in rows]
            arguments = self.adapter.unet_arguments(encoded)
            distinct = list({id(latents[row]): row for row in rows}.values()) if shares_latents else rows
            if len(distinct) < len(rows):
                place = {id(latents[row]): i for i, row in enumerate(distinct)}
                arguments["latent_of"] = torch.tensor([place[id(latents[row])] for row in rows], device=self.device)
            sample = torch.cat([latents[row] for row in distinct])
            timestep = torch.stack([timesteps[row] for row in distinct])
            return self.pipe.unet(sample, timestep, **arguments, return_dict=False)[0]

        predicted: list[Tensor | None] = [None] * len(latents)
        by_shape: dict[torch.Size, list[int]] = {}
        for row, latent in enumerate(latents):
            by_shape.setdefault(latent.shape, []).append(row)
        for left in by_shape.values():
            while left:
                output, self.max_rows = _call_with_fitting_batch(call_unet, left, self.max_rows)
                rows, left = left[: self.max_rows], left[self.max_rows :]
                for row, prediction in zip(rows, output.split(1), strict=True):
                    predicted[row] = prediction
        return predicted

    # --- decoding ---

    def _decode(self) -> list[Result]:
        """Decode a batch of denoised jobs. Each stays in ``denoised`` until its image exists."""
        same_size = [active for active in self.denoised if active.latents.shape == self.denoised[0].latents.shape]
        started = perf_counter()
        images, self.decode_batch = _call_with_fitting_batch(self._decode_latents, same_size, self.decode_batch)
        seconds = (perf_counter() - started) / len(images)
        decoded = same_size[: len(images)]
        results = []
        for active, (image, blacked_out) in zip(decoded, images, strict=True):
            steps = len(active.timesteps)
            error = None if image else f"the VAE's decoder returned NaN or infinity, after step {steps} of {steps}"
            results.append(Result(active.index, image, error, active.seconds + seconds, blacked_out))
        self.denoised = [active for active in self.denoised if active not in decoded]
        return results

    @torch.no_grad()
    def _decode_latents(self, batch: list[_ActiveJob]) -> list[tuple[Image.Image | None, bool]]:
        return self.adapter.decode_latents(torch.cat([active.latents for active in batch]))


def _call_with_fitting_batch(call: Callable[[list[Item]], Output], items: list[Item], most: int) -> tuple[Output, int]:
    """Call with the first ``most`` items, or half as many if memory runs out; return the output and the number."""
    while True:
        try:
            return call(items[:most]), most
        except Exception as error:
            if min(most, len(items)) == 1 or not is_out_of_memory(error):
                raise
        # Outside of `except`, where the exception would keep the memory of the failed call alive.
        most = min(most, len(items)) // 2
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def is_out_of_memory(error: Exception) -> bool:
    """Return whether a device ran out of memory. CUDA has an exception class for it, others only a message."""
    messages = ("out of memory", "can't allocate memory", "not enough memory", "ALLOC_FAILED")
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or (
        isinstance(error, RuntimeError) and any(message in str(error) for message in messages)
    )
