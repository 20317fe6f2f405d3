"""Packed denoising: images with other settings share U-Net calls, and each comes out as if it had been made alone.

A U-Net takes one timestep a row, so the rows of one call need not agree on anything. Each live cell has a scheduler,
latents and timesteps of its own. A tick gathers the rows of all live cells, calls the U-Net once, and lets every cell's
scheduler take its step; cells that are done leave, waiting ones join. No sampler is written again here: any scheduler
of diffusers runs, and draws its random numbers in the order of the stock pipeline.
"""

from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from time import perf_counter
from typing import Any, TypeVar

import torch
from PIL import Image
from torch import Tensor

from decinb.errors import InputError
from decinb.quiet import quiet
from decinb.unet_nas import UNetNAS

with quiet():  # importing these tells of optional libraries that are not needed here
    from diffusers import AutoencoderKL, SchedulerMixin, StableDiffusionImg2ImgPipeline
    from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import rescale_noise_cfg
    from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion_img2img import retrieve_latents
    from diffusers.utils.torch_utils import randn_tensor

DECODED = 4  # latents a call of the VAE's decoder, which gains little from more and needs much memory for each
REMEMBERED = 64  # prompts whose encodings are kept
OUTGROWN = 1e4  # latents are a few units large; these are none that a U-Net could read

# Rows a call: a small picture leaves even a CPU half idle, a large one does not.
PIXELS = {"cpu": 64 * 16 * 16, "mps": 16 * 64 * 64, "cuda": 64 * 64 * 64}
MAX_ROWS = 64

Given, Made = TypeVar("Given"), TypeVar("Made")


@dataclass(frozen=True)
class Job:
    """One image to make: the arguments of a call of the stock pipeline, as plain values that are known to be good."""

    image: Image.Image
    prompt: str
    negative_prompt: str | None
    strength: float
    guidance_scale: float
    num_inference_steps: int
    seed: int

    @property
    def guided(self) -> bool:
        """Whether there is a second row a step, without the prompt. At a scale of 1 or less there is none."""
        return self.guidance_scale > 1

    @property
    def skipped(self) -> int:
        """How many of the steps are not run, since the input is no noise. ``int`` cuts off, as diffusers does."""
        return max(self.num_inference_steps - int(self.num_inference_steps * self.strength), 0)

    @property
    def beginning(self) -> tuple[int, ...]:
        """What decides the first latents: jobs that agree in it, as in a sweep of guidance, share their first rows."""
        return id(self.image), self.seed, self.num_inference_steps, self.skipped

    def schedule(self, kind: SchedulerMixin, device: torch.device) -> tuple[SchedulerMixin, Tensor]:
        """A scheduler of the same kind set to begin where this job does, and its timesteps: one a U-Net call."""
        scheduler = type(kind).from_config(kind.config)
        scheduler.set_timesteps(self.num_inference_steps, device=device)
        begin = self.skipped * scheduler.order
        if hasattr(scheduler, "set_begin_index"):
            scheduler.set_begin_index(begin)
        return scheduler, scheduler.timesteps[begin:]


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
    pipe: StableDiffusionImg2ImgPipeline,
    jobs: Sequence[Job],
    pack: int | None = None,
    guidance_rescale: float = 0.0,
) -> Iterator[Tick]:
    """Make an image for every job, many in each U-Net call.

    The longest jobs begin first, so that the calls stay full until the end. At any time only a pack of latents is held.
    Where a call runs out of memory, the pack is halved and the call made again.

    Args:
        pipe: any pipeline with the parts of Stable Diffusion's image to image.
        jobs: what to make.
        pack: the most rows in a U-Net call (a guided job has two); None suits it to the device and the pictures' size.
        guidance_rescale: 0 to 1, how much of the contrast that guidance adds is taken back (Lin et al. (2023),
            arXiv:2305.08891, section 3.4). The stock image to image has no such thing, which is 0.

    Yields:
        A ``Tick`` when jobs begin, after each step of all that live, and after each call of the VAE's decoder. A job
        whose numbers are none any more ends at that step, with a fault that names the part it came from. On an
        error, or a ``KeyboardInterrupt``, what had been denoised is still decoded and brought before it is raised.

    Raises:
        InputError: the U-Net was distilled to take the guidance scale as an input, which is not done here.
        torch.OutOfMemoryError: or what the device raises where not even a single row fits.
    """
    if getattr(pipe.unet.config, "time_cond_proj_dim", None):
        raise InputError(
            "pipe: a U-Net that takes the guidance scale as an input (time_cond_proj_dim) cannot be packed"
        )
    return _Packer(pipe, jobs, pack, guidance_rescale).run()


def fitting_pack(pipe: StableDiffusionImg2ImgPipeline, jobs: Sequence[Job]) -> int:
    """How many rows of the largest picture make a U-Net call that uses the device well."""
    scale = pipe.vae_scale_factor
    area = max(((job.image.width // scale) * (job.image.height // scale) for job in jobs), default=1)
    return max(2, min(MAX_ROWS, PIXELS.get(pipe._execution_device.type, PIXELS["cpu"]) // area))


@torch.no_grad()
def seconds_per_row(pipe: StableDiffusionImg2ImgPipeline, jobs: Sequence[Job]) -> float:
    """The time that a row of a full U-Net call takes on these jobs, from one call after another to warm up."""
    packer = _Packer(pipe, jobs, None, 0.0)
    packer._join()
    rows = [(cell.latents, cell.timestep, words) for cell in packer.live for words in cell.words]
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
    words: list[str]  # a row each: the prompt, and what stands against it
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

    def row(self, words: str) -> tuple:
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

    pipe: StableDiffusionImg2ImgPipeline
    jobs: Sequence[Job]
    pack: int | None
    guidance_rescale: float
    together: int = DECODED
    live: list[_Live] = field(default_factory=list)
    ended: list[_Live] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.device = self.pipe._execution_device  # diffusers looks through every part for it, which takes a while
        alike: dict[tuple[int, ...], int] = {}  # those that begin alike are to begin together
        for job in self.jobs:
            alike.setdefault(job.beginning, len(alike))

        def longest_first(numbered: tuple[int, Job]) -> tuple[int, int]:
            job = numbered[1]
            return job.skipped - job.num_inference_steps, alike[job.beginning]

        self.waiting = deque(sorted(enumerate(self.jobs), key=longest_first))
        self.pack = self.pack or fitting_pack(self.pipe, self.jobs)
        self.encode_prompt = lru_cache(max(REMEMBERED, self.pack))(self._encode_prompt)
        self.encoded: dict[int, Any] = {}  # each picture, by its identity: Pillow would compare pixels
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
        """As the stock pipeline begins a call: the VAE's sample is drawn first, then the noise, from one generator."""
        pipe, generator = self.pipe, torch.Generator().manual_seed(job.seed)
        scheduler, timesteps = job.schedule(pipe.scheduler, self.device)
        encoded = self._encode_image(job.image, self.encode_prompt(job.prompt).dtype)
        latents = pipe.vae.config.scaling_factor * retrieve_latents(encoded, generator)
        noise = randn_tensor(latents.shape, generator=generator, device=latents.device, dtype=latents.dtype)
        latents = scheduler.add_noise(latents, noise, timesteps[:1])
        words = [job.prompt, job.negative_prompt or ""] if job.guided else [job.prompt]
        return _Live(index, job, scheduler, timesteps, latents, words, pipe.prepare_extra_step_kwargs(generator, 0.0))

    def _encode_prompt(self, words: str) -> Tensor:
        return self.pipe.encode_prompt(words, self.device, 1, False)[0]

    def _encode_image(self, image: Image.Image, dtype: torch.dtype) -> Any:
        """What the VAE makes of a picture: encoded for the first job that has it, forgotten with the last."""
        key = id(image)
        if key not in self.encoded:
            pixels = self.pipe.image_processor.preprocess(image).to(self.device, dtype)
            self.encoded[key] = self.pipe.vae.encode(pixels)
        self.uses[key] -= 1
        return self.encoded[key] if self.uses[key] else self.encoded.pop(key)

    # --- all together ---

    def _tick(self) -> None:
        """One step of every live cell."""
        keys: dict[tuple, int] = {}
        latents, timesteps, words = [], [], []
        for cell in self.live:
            scaled = cell.scheduler.scale_model_input(cell.latents, cell.timestep)
            for said in cell.words:
                if keys.setdefault(cell.row(said), len(keys)) == len(latents):
                    latents.append(scaled)
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
        if not all(self.encode_prompt(said).isfinite().all() for said in cell.words):
            return "the text encoder made NaN or infinity of the prompt"
        if not all(prediction.isfinite().all() for prediction in predictions):
            largest = before.abs().max()
            grown = f", of latents that guidance {cell.job.guidance_scale:g} had grown to {largest:.0e}"
            return f"the U-Net gave NaN or infinity {at}{grown if cell.job.guided and largest > OUTGROWN else ''}"
        if cell.job.guided:
            return f"guidance {cell.job.guidance_scale:g} made NaN or infinity of the U-Net's answer {at}"
        return f"{type(cell.scheduler).__name__} made NaN or infinity of the U-Net's answer {at}"

    def _predict(self, latents: list[Tensor], timesteps: list[Tensor], words: list[str]) -> list[Tensor]:
        """The U-Net's answer for every row, in calls of at most a pack of rows of one shape."""
        shares = isinstance(self.pipe.unet, UNetNAS)  # which begins without the text: once for both rows of a cell

        def ask(rows: list[int]) -> Tensor:
            text = torch.cat([self.encode_prompt(words[row]) for row in rows])
            once = list({id(latents[row]): row for row in rows}.values()) if shares else rows
            more = {}
            if len(once) < len(rows):
                place = {id(latents[row]): i for i, row in enumerate(once)}
                more["latent_of"] = torch.tensor([place[id(latents[row])] for row in rows], device=self.device)
            sample = torch.cat([latents[row] for row in once])
            timestep = torch.stack([timesteps[row] for row in once])
            return self.pipe.unet(sample, timestep, encoder_hidden_states=text, return_dict=False, **more)[0]

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
        pipe, latents = self.pipe, torch.cat([cell.latents for cell in cells])
        pixels = decode(pipe.vae, latents / pipe.vae.config.scaling_factor)
        good = pixels.isfinite().flatten(1).all(dim=1)
        pixels = torch.where(good[:, None, None, None], pixels, 0)
        pixels, unsafe = pipe.run_safety_checker(pixels, pixels.device, pixels.dtype)
        unsafe = [False] * len(pixels) if unsafe is None else list(map(bool, unsafe))
        shown = [not flag for flag in unsafe]
        pictures = pipe.image_processor.postprocess(pixels, output_type="pil", do_denormalize=shown)
        rows = zip(pictures, good.tolist(), unsafe, strict=True)
        return [(picture, flag) if fine else (None, False) for picture, fine, flag in rows]


def decode(vae: AutoencoderKL, latents: Tensor) -> Tensor:
    """Pixels, from a VAE in half precision that overflows once more in float32, as some of that time's do."""
    pixels = vae.decode(latents)[0]
    half = vae.dtype
    if half == torch.float32 or pixels.isfinite().all():
        return pixels
    vae.to(torch.float32)
    try:
        return vae.decode(latents.float())[0].to(half)
    finally:
        vae.to(half)


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
