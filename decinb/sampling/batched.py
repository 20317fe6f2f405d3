"""Packed denoising: images with other settings share U-Net calls, and each comes out as if it had been made alone.

A U-Net takes one timestep a row, so the rows of one call need not agree on anything. Each live cell has a scheduler,
latents and timesteps of its own. A tick gathers the rows of all live cells, calls the U-Net once, and lets every cell's
scheduler take its step; cells that are done leave, waiting ones join. No sampler is written again here: any scheduler
of diffusers runs, and draws its random numbers in the order of the stock pipeline.
"""

import math
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from time import perf_counter
from typing import Any, TypeVar

import torch
from diffusers import DiffusionPipeline, SchedulerMixin
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import rescale_noise_cfg
from PIL import Image
from torch import Tensor

from decinb.errors import InputError
from decinb.sampling.adapters import Job, Words, kind_of
from decinb.unet_nas import UNetNAS

DECODED = 4  # latents a call of the VAE's decoder, which gains little from more and needs much memory for each
REMEMBERED = 64  # prompts whose encodings are kept
OUTGROWN = 1e4  # latents are a few units large; these are none that a U-Net could read

# Rows a call: a small picture leaves even a CPU half idle, a large one does not.
PIXELS = {"cpu": 64 * 16 * 16, "mps": 16 * 64 * 64, "cuda": 64 * 64 * 64}
MAX_ROWS = 64

Given, Made = TypeVar("Given"), TypeVar("Made")


@dataclass(frozen=True)
class Done:
    """A job that has ended: its number in the list, its picture or what went wrong, and its share of the time.

    A picture that a safety checker took for unsafe is black, and ``blacked_out``; a fault never gives a picture.
    """

    index: int
    image: Image.Image | None
    fault: str | None
    seconds: float
    blacked_out: bool = False


@dataclass(frozen=True)
class Tick:
    """What one packed call has done: the U-Net's rows, or 0 and what the VAE decoded; and all live latents by index."""

    rows: int
    done: list[Done]
    live: dict[int, Tensor]


def denoise(
    pipe: DiffusionPipeline,
    jobs: Sequence[Job],
    pack: int | None = None,
    guidance_rescale: float = 0.0,
) -> Iterator[Tick]:
    """Make an image for every job, many in each U-Net call.

    The longest jobs begin first, so that the calls stay full until the end. At any time only a pack of latents is held.
    Where a call runs out of memory, the pack is halved and the call made again.

    Args:
        pipe: one of the pipelines in ``decinb.sampling.adapters``.
        jobs: what to make.
        pack: the most rows in a U-Net call (a guided job has two); None suits it to the device and the pictures' size.
        guidance_rescale: 0 to 1, how much of the contrast that guidance adds is taken back (Lin et al. (2023),
            arXiv:2305.08891, section 3.4). The stock image to image has no such thing, which is 0.

    Yields:
        A ``Tick`` when jobs begin, after each step of all that live, and after each call of the VAE's decoder. A job
        whose numbers are none any more ends at that step, with a fault that names the part it came from. On an
        error, or a ``KeyboardInterrupt``, what had been denoised is still decoded and brought before it is raised.

    Raises:
        InputError: the pipeline is of another kind, or its U-Net was distilled to take the guidance scale as an input.
        torch.OutOfMemoryError: or what the device raises where not even a single row fits.
    """
    if kind_of(pipe) is None:
        raise InputError(f"pipe: a {type(pipe).__name__} is not of Stable Diffusion's kind, and cannot be packed")
    if getattr(pipe.unet.config, "time_cond_proj_dim", None):
        raise InputError(
            "pipe: a U-Net that takes the guidance scale as an input (time_cond_proj_dim) cannot be packed"
        )
    return _Packer(pipe, jobs, pack, guidance_rescale).run()


def fitting_pack(pipe: DiffusionPipeline, jobs: Sequence[Job]) -> int:
    """How many rows of the largest picture make a U-Net call that uses the device well."""
    kind = kind_of(pipe)(pipe)
    area = max((math.prod(kind.size(job)) for job in jobs), default=1)
    return max(2, min(MAX_ROWS, PIXELS.get(pipe._execution_device.type, PIXELS["cpu"]) // area))


@torch.no_grad()
def seconds_per_row(pipe: DiffusionPipeline, jobs: Sequence[Job]) -> float:
    """The time that a row of a full U-Net call takes on these jobs, from one call after another to warm up."""
    packer = _Packer(pipe, jobs, None, 0.0)
    packer._join()
    rows = [(cell.sample(), cell.timestep, words) for cell in packer.live for words in cell.words]
    for _ in range(2):
        started = perf_counter()
        packer._predict(*map(list, zip(*rows, strict=True)))
        packer._synchronize()
    return (perf_counter() - started) / len(rows)


@dataclass(eq=False)
class _Live:
    """A job under way."""

    index: int
    job: Job
    scheduler: SchedulerMixin
    timesteps: Tensor
    latents: Tensor
    beside: Tensor | None  # channels that the U-Net sees too
    words: list[Words]  # a row each: the prompt, and what stands against it
    step_arguments: dict[str, Any]
    position: int = 0
    seconds: float = 0.0
    fault: str | None = None

    @property
    def timestep(self) -> Tensor:
        return self.timesteps[self.position]

    @property
    def ended(self) -> bool:
        return self.position == len(self.timesteps)

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of the latent."""
        return tuple(self.latents.shape[-2:])

    def sample(self) -> Tensor:
        """What the U-Net sees: the latent as the scheduler hands it over, and what stands beside it."""
        scaled = self.scheduler.scale_model_input(self.latents, self.timestep)
        return scaled if self.beside is None else torch.cat([scaled, self.beside], dim=1)

    def row(self, words: Words) -> tuple:
        """What decides a row of the U-Net's input: at first the beginning of the job, which others may share."""
        return self.latents.shape, self.index if self.position else self.job.beginning, words

    def step(self, predictions: list[Tensor], guidance_rescale: float) -> None:
        with_prompt = predictions[0]
        guided = with_prompt
        if self.job.guided:
            without = predictions[1]
            guided = without + self.job.guidance_scale * (with_prompt - without)
            if guidance_rescale:
                guided = rescale_noise_cfg(guided, with_prompt, guidance_rescale)
        self.latents = self.scheduler.step(
            guided, self.timestep, self.latents, **self.step_arguments, return_dict=False
        )[0]
        self.position += 1


@dataclass
class _Packer:
    """The state of ``denoise``: what waits, what lives, and what is denoised but not yet decoded."""

    pipe: DiffusionPipeline
    jobs: Sequence[Job]
    pack: int | None
    guidance_rescale: float
    together: int = DECODED
    live: list[_Live] = field(default_factory=list)
    ended: list[_Live] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.kind = kind_of(self.pipe)(self.pipe)
        self.device = self.kind.device
        alike: dict[tuple[int, ...], int] = {}  # those that begin alike are to begin together
        for job in self.jobs:
            alike.setdefault(job.beginning, len(alike))

        def longest_first(numbered: tuple[int, Job]) -> tuple[int, int]:
            job = numbered[1]
            return job.skipped - job.num_inference_steps, alike[job.beginning]

        self.waiting = deque(sorted(enumerate(self.jobs), key=longest_first))
        self.pack = self.pack or fitting_pack(self.pipe, self.jobs)
        self.tell = lru_cache(max(REMEMBERED, self.pack))(self.kind.tell)
        self.seen: dict[int, Any] = {}  # of each picture, by its identity: Pillow would compare pixels
        self.uses = Counter(id(job.image) for job in self.jobs)

    def run(self) -> Iterator[Tick]:
        try:
            while self.waiting or self.live:
                if self._join():
                    yield Tick(0, [], self._latents())
                started = perf_counter()
                with torch.no_grad():
                    self._tick()
                    self._synchronize()
                rows = sum(len(cell.words) for cell in self.live)
                share = (perf_counter() - started) / rows
                for cell in self.live:
                    cell.seconds += share * len(cell.words)
                lost = [Done(cell.index, None, cell.fault, cell.seconds) for cell in self.live if cell.fault]
                self.ended += [cell for cell in self.live if cell.ended and not cell.fault]
                self.live = [cell for cell in self.live if not (cell.ended or cell.fault)]
                yield Tick(rows, lost, self._latents())
                while len(self.ended) >= self.together or (self.ended and not self.live and not self.waiting):
                    yield Tick(0, self._decode(), self._latents())
        except (KeyboardInterrupt, Exception):
            while self.ended:
                yield Tick(0, self._decode(), self._latents())
            raise
        finally:
            self.pipe.maybe_free_model_hooks()

    def _latents(self) -> dict[int, Tensor]:
        return {cell.index: cell.latents for cell in self.live}

    def _synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    # --- one cell ---

    @torch.no_grad()
    def _join(self) -> bool:
        """Let waiting jobs in as far as there is room; whether any came."""
        rows, before = sum(len(cell.words) for cell in self.live), len(self.live)
        while self.waiting:
            index, job = self.waiting[0]
            rows += 2 if job.guided else 1
            if rows > self.pack and self.live:
                break
            self.waiting.popleft()
            self.live.append(self._begin(index, job))
        return len(self.live) > before

    def _begin(self, index: int, job: Job) -> _Live:
        """As the stock pipeline begins a call, with random numbers from one generator of the job's own."""
        generator = torch.Generator().manual_seed(job.seed)
        scheduler, timesteps = job.schedule(self.pipe.scheduler, self.device)
        seen = self._see(job.image)
        latents = self.kind.begin(job, seen, scheduler, timesteps[:1], generator)
        step_arguments = self.pipe.prepare_extra_step_kwargs(generator, 0.0)
        words, beside = self.kind.words(job), self.kind.beside(seen)
        return _Live(index, job, scheduler, timesteps, latents, beside, words, step_arguments)

    def _see(self, image: Image.Image | None) -> Any:
        """What is made of a picture: for the first job that has it, and forgotten with the last."""
        key = id(image)
        if key not in self.seen:
            self.seen[key] = self.kind.see(image)
        self.uses[key] -= 1
        return self.seen[key] if self.uses[key] else self.seen.pop(key)

    # --- all together ---

    def _tick(self) -> None:
        """One step of every live cell."""
        keys: dict[tuple, int] = {}
        latents, timesteps, words = [], [], []
        for cell in self.live:
            sample = cell.sample()
            for said in cell.words:
                if keys.setdefault(cell.row(said), len(keys)) == len(latents):
                    latents.append(sample)
                    timesteps.append(cell.timestep)
                    words.append(said)
        predictions = self._predict(latents, timesteps, words)
        answers = {cell.index: [predictions[keys[cell.row(said)]] for said in cell.words] for cell in self.live}
        before = self._latents()
        for cell in self.live:
            cell.step(answers[cell.index], self.guidance_rescale)
        are_finite = torch.stack(
            [cell.latents.isfinite().all() for cell in self.live]
        ).tolist()  # the device waits once
        for cell, is_finite in zip(self.live, are_finite, strict=True):
            if not is_finite:
                cell.fault = self._blame(cell, before[cell.index], answers[cell.index])

    def _blame(self, cell: _Live, before: Tensor, predictions: list[Tensor]) -> str:
        """In whose hands a cell's numbers were lost, in the step that it has just made."""
        at = f"at step {cell.position} of {len(cell.timesteps)}"
        if not before.isfinite().all():
            return "the VAE's encoder made NaN or infinity of the input picture"
        told = (tensor for said in cell.words for tensor in self.tell(said, cell.size).values())
        if not all(tensor.isfinite().all() for tensor in told):
            return "the text encoder made NaN or infinity of the prompt"
        if not all(prediction.isfinite().all() for prediction in predictions):
            largest = before.abs().max()
            grown = f", of latents that guidance {cell.job.guidance_scale:g} had grown to {largest:.0e}"
            return f"the U-Net gave NaN or infinity {at}{grown if cell.job.guided and largest > OUTGROWN else ''}"
        if cell.job.guided:
            return f"guidance {cell.job.guidance_scale:g} made NaN or infinity of the U-Net's answer {at}"
        return f"{type(cell.scheduler).__name__} made NaN or infinity of the U-Net's answer {at}"

    def _predict(self, latents: list[Tensor], timesteps: list[Tensor], words: list[Words]) -> list[Tensor]:
        """The U-Net's answer for every row, in calls of at most a pack of rows of one shape."""
        shares = isinstance(self.pipe.unet, UNetNAS)  # which begins without the text: once for both rows of a cell

        def ask(rows: list[int]) -> Tensor:
            told = self.kind.arguments([self.tell(words[row], tuple(latents[row].shape[-2:])) for row in rows])
            once = list({id(latents[row]): row for row in rows}.values()) if shares else rows
            more = {}
            if len(once) < len(rows):
                place = {id(latents[row]): i for i, row in enumerate(once)}
                more["latent_of"] = torch.tensor([place[id(latents[row])] for row in rows], device=self.device)
            sample = torch.cat([latents[row] for row in once])
            timestep = torch.stack([timesteps[row] for row in once])
            return self.pipe.unet(sample, timestep, **told, **more, return_dict=False)[0]

        predicted: list[Tensor | None] = [None] * len(latents)
        by_shape: dict[torch.Size, list[int]] = {}
        for row, latent in enumerate(latents):
            by_shape.setdefault(latent.shape, []).append(row)
        for left in by_shape.values():
            while left:
                answer, self.pack = _as_many_as_fit(ask, left, self.pack)
                rows, left = left[: self.pack], left[self.pack :]
                for row, prediction in zip(rows, answer.split(1), strict=True):
                    predicted[row] = prediction
        return predicted

    def _decode(self) -> list[Done]:
        """The pictures of cells that have ended, as many as are decoded at once. None leaves before it has its own."""
        alike = [cell for cell in self.ended if cell.latents.shape == self.ended[0].latents.shape]
        started = perf_counter()
        pictures, self.together = _as_many_as_fit(self._pictures, alike, self.together)
        share = (perf_counter() - started) / len(pictures)
        done = []
        for cell, (picture, blacked_out) in zip(alike, pictures, strict=False):
            steps = len(cell.timesteps)
            fault = None if picture else f"the VAE's decoder gave NaN or infinity, after step {steps} of {steps}"
            done.append(Done(cell.index, picture, fault, cell.seconds + share, blacked_out))
        self.ended = [cell for cell in self.ended if cell not in alike[: len(pictures)]]
        return done

    @torch.no_grad()
    def _pictures(self, cells: list[_Live]) -> list[tuple[Image.Image | None, bool]]:
        """Decode latents: each its picture, or None where it is no numbers, and whether a safety checker blacked it."""
        return self.kind.pictures(torch.cat([cell.latents for cell in cells]))


def _as_many_as_fit(call: Callable[[list[Given]], Made], given: list[Given], most: int) -> tuple[Made, int]:
    """Call with the first of what is given: the most allowed, or half if memory runs out. The answer, and the most."""
    while True:
        try:
            return call(given[:most]), most
        except Exception as error:
            if min(most, len(given)) == 1 or not is_out_of_memory(error):
                raise
        # Only here, since inside `except` the error still holds what the call had filled.
        most = min(most, len(given)) // 2
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def is_out_of_memory(error: Exception) -> bool:
    """Whether a device had no room: CUDA has a class for it, the others only words."""
    words = ("out of memory", "can't allocate memory", "not enough memory", "ALLOC_FAILED")
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or (
        isinstance(error, RuntimeError) and any(said in str(error) for said in words)
    )
