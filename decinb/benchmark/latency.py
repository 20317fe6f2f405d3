"""What a network costs, measured: seconds and memory, models in turns, with all that a number depends on beside it.

What is measured has its full size and random weights where no checkpoint is at hand: a matrix product takes as long for
random numbers as for trained ones.
"""

import argparse
import json
import re
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionImg2ImgPipeline
from torch import Tensor, nn

from decinb.benchmark.counting import NETWORKS, random_model, sd15_vae, text_width, unet_inputs
from decinb.errors import InputError
from decinb.utils.acceleration import keep_freed_memory
from decinb.utils.device import choose_workload
from decinb.utils.environment import environment

PUBLISHED: dict[tuple[str, str, int], float] = {
    ("U-Net-NAS", "PyTorch", 50): 2.11,
    ("SD v1.5", "PyTorch", 50): 2.95,
    ("U-Net-NAS", "Infery", 50): 1.55,
    ("SD v1.5", "Infery", 50): 2.08,
    ("U-Net-NAS", "PyTorch", 35): 1.52,
    ("U-Net-NAS", "Infery", 35): 1.07,
    ("U-Net-NAS", "PyTorch", 30): 1.29,
    ("U-Net-NAS", "Infery", 30): 0.98,
}
"""Seconds an image by (U-Net, runtime, steps), as Deci published them for DeciDiffusion 1.0: text to image of 512 x 512
pixels, float16, one image at a time, on an NVIDIA A10. Infery is Deci's own compiled runtime."""

RESULTS = Path(__file__).parents[2] / "results"  # of the repository, with what was measured on other machines

PUBLISHED_SOURCE = "https://huggingface.co/Deci/DeciDiffusion-v1-0"


# --- measuring --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Timing:
    """Times of the same work in seconds, in the order they were taken, and on CUDA the most bytes held meanwhile."""

    seconds: tuple[float, ...]
    peak_bytes: int | None = None

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    @property
    def fastest(self) -> float:
        return min(self.seconds)

    @property
    def slowest(self) -> float:
        return max(self.seconds)


def measure(
    functions: Mapping[str, Callable[[], object]],
    repeats: int = 6,
    warmup: int = 1,
    synchronize: Callable[[], None] | None = None,
    prepare: Callable[[str], object] | None = None,
) -> dict[str, Timing]:
    """Time functions against each other, in turns: A B B A A B B A, so that a slow spell of the machine hits all alike.

    Args:
        functions: what to time, by name.
        repeats: times each function is timed, 1 or more. Even is fairer: then each goes first equally often.
        warmup: untimed calls of each function beforehand, 0 or more.
        synchronize: waits until the device has done what it was given; by default for the GPU, if torch has one.
        prepare: is called with a name before each call of its function, and not timed.

    Returns:
        The times of every function; time i of one stands next to time i of the others.

    Raises:
        InputError: there is nothing to time, or a number is out of range.
    """
    if not functions:
        raise InputError("functions is empty: there is nothing to measure")
    _check_turns(repeats, warmup)
    synchronize = synchronize or _synchronize
    prepare = prepare or (lambda name: None)
    for _ in range(warmup):
        for name, function in functions.items():
            prepare(name)
            function()
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    peaks: dict[str, list[int]] = {name: [] for name in functions}
    for turn in range(repeats):
        for name in functions if turn % 2 == 0 else reversed(functions):
            prepare(name)
            synchronize()  # a GPU is only told what to do: without this, the clock would stop before the work does
            if torch.cuda.is_available():
                torch.cuda.reset_peak_memory_stats()
            start = time.perf_counter()
            functions[name]()
            synchronize()
            seconds[name].append(time.perf_counter() - start)
            if torch.cuda.is_available():
                peaks[name].append(torch.cuda.max_memory_allocated())
    return {name: Timing(tuple(taken), max(peaks[name], default=None)) for name, taken in seconds.items()}


def _check_turns(repeats: int, warmup: int) -> None:
    if repeats < 1 or warmup < 0:
        raise InputError(f"repeats must be at least 1 and warmup at least 0, got {repeats} and {warmup}")


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    elif torch.backends.mps.is_available():
        torch.mps.synchronize()


@contextmanager
def time_parts(pipe: Any) -> Iterator[dict[str, float]]:
    """Add up the seconds that the parts of a pipeline take while the ``with`` block runs, each waited for.

    Yields:
        Seconds of ``text`` (the text encoder), ``encode`` and ``decode`` (the VAE) and ``denoise`` (the U-Net).
    """
    modules = {"text": pipe.text_encoder, "encode": pipe.vae.encoder, "denoise": pipe.unet, "decode": pipe.vae.decoder}
    seconds = {part: 0.0 for part, module in modules.items() if module is not None}
    started: dict[str, float] = {}

    def start(part: str) -> None:
        _synchronize()
        started[part] = time.perf_counter()

    def stop(part: str) -> None:
        _synchronize()
        seconds[part] += time.perf_counter() - started[part]

    hooks = []
    for part in seconds:
        hooks.append(modules[part].register_forward_pre_hook(lambda *_, part=part: start(part)))
        hooks.append(modules[part].register_forward_hook(lambda *_, part=part: stop(part)))
    try:
        yield seconds
    finally:
        for hook in hooks:
            hook.remove()


def ratio(slow: Timing, fast: Timing) -> tuple[float, float, float]:
    """How many times longer one took than the other, turn by turn: the least, the median and the most."""
    ratios = [a / b for a, b in zip(slow.seconds, fast.seconds, strict=True)]
    return min(ratios), statistics.median(ratios), max(ratios)


def unet_call(unet: nn.Module, rows: int = 1, size: int = 64, tokens: int = 77) -> Callable[[], Tensor]:
    """One U-Net call on random inputs, ready to be timed: ``rows`` latents of ``size`` x ``size``."""
    inputs = unet_inputs(unet, rows, size, tokens, next(unet.parameters()).device)

    @torch.inference_mode()
    def call() -> Tensor:
        return unet(*inputs)[0]

    return call


def image_call(unet: nn.Module, vae: AutoencoderKL, steps: int, size: int = 64, tokens: int = 77) -> Callable[[], Any]:
    """One whole image-to-image call, ready to be timed: encode, ``steps`` guided DDIM steps, decode, one PIL image.

    The prompt's embedding is given, at random: the text encoder is left out, some 4 % of one U-Net row.
    """
    scheduler = DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )
    pipe = StableDiffusionImg2ImgPipeline(vae, None, None, unet, scheduler, None, None, requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    kind = {"device": next(unet.parameters()).device, "dtype": next(unet.parameters()).dtype}
    text = torch.randn(2, 1, tokens, text_width(unet), **kind)
    image = torch.rand(1, 3, 8 * size, 8 * size)

    def call() -> Any:
        return pipe(
            image=image,
            prompt_embeds=text[0],
            negative_prompt_embeds=text[1],
            strength=1.0,
            num_inference_steps=steps,
            guidance_scale=7.5,
            generator=torch.Generator().manual_seed(0),
        ).images

    return call


# --- the comparison, and its record -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Measurement:
    """Times with all that is needed to read them: ``timings[work][network]``, settings, and where they were taken."""

    timings: dict[str, dict[str, Timing]]
    settings: dict[str, Any]
    environment: dict[str, Any]


def compare(
    device: torch.device | str | None = None,
    dtype: torch.dtype | str | None = None,
    size: int | None = None,
    repeats: int = 6,
    warmup: int = 1,
    rows: Sequence[int] = (1, 2),
    steps: Sequence[int] | None = None,
    networks: Mapping[str, Callable[[], nn.Module]] = NETWORKS,
    vae: Callable[[], AutoencoderKL] = sd15_vae,
) -> Measurement:
    """Measure U-Nets of full size with random weights: calls of a number of rows, and on a GPU whole images.

    Args:
        device, dtype, size: where, in what numbers, and the side of the latent; see ``choose``.
        repeats, warmup: see ``measure``.
        rows: calls of these numbers of rows are measured: one latent each, and a guided step has two.
        steps: whole image-to-image calls of these numbers of steps are measured too; by default 30 and 50 on a GPU,
            and none on a CPU, where one takes minutes.
        networks, vae: what is compared, by name, and the VAE of whole images: what builds them.

    Raises:
        InputError: an argument cannot be used on this machine.
    """
    device, dtype, size = choose_workload(device, dtype, size)
    steps = ((30, 50) if device.type == "cuda" else ()) if steps is None else steps
    _check_turns(repeats, warmup)
    for name, numbers in {"rows": rows, "steps": steps}.items():
        if any(number < 1 for number in numbers):
            raise InputError(f"{name} must be numbers of at least 1, got {tuple(numbers)}")
    where = environment(device, dtype)
    if device.type == "cpu":
        keep_freed_memory()
    unets = {name: random_model(factory, device, dtype) for name, factory in networks.items()}
    timings = {}
    for number in rows:
        calls = {name: unet_call(unet, number, size) for name, unet in unets.items()}
        timings["1 row" if number == 1 else f"{number} rows"] = measure(calls, repeats, warmup)
    coder = random_model(vae, device, dtype) if steps else None
    for number in steps:
        calls = {name: image_call(unet, coder, number, size) for name, unet in unets.items()}
        timings["image, 1 step" if number == 1 else f"image, {number} steps"] = measure(calls, repeats, warmup)
    return Measurement(timings, {"size": size, "tokens": 77, "repeats": repeats, "warmup": warmup}, where)


def save(record: Measurement, folder: str | Path = "results", name: str = "latency") -> Path:
    """Write a record as JSON under ``folder``, in a folder of its machine, and return the file's path."""
    where = record.environment
    device = re.sub(r"\((r|tm)\)", "", where["device"].lower())
    # A GPU is the same machine however many threads feed it, a CPU is not.
    machine = device if where["driver"] else f"{device} {where['threads']} threads"
    machine = re.sub(r"[^a-z0-9]+", "-", machine).strip("-")
    moment = re.sub(r"\D", "", where["date"][:19])
    path = Path(folder) / machine / f"{name}-{moment}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(asdict(record), indent=2) + "\n")
    return path


def load(path: str | Path) -> Measurement:
    """Read a record that ``save`` wrote.

    Raises:
        InputError: there is no such file, or it is no such record.
    """
    try:
        found = json.loads(Path(path).read_text())
        timings = {
            work: {name: Timing(tuple(timing["seconds"]), timing.get("peak_bytes")) for name, timing in by_name.items()}
            for work, by_name in found["timings"].items()
        }
        return Measurement(timings, found["settings"], found["environment"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"path: {str(path)!r} is not a latency record: {error}") from error


def stored(name: str = "latency") -> dict[str, Measurement]:
    """The newest record of that name of every machine, by device and dtype, that lies in the repository's ``results``.

    Empty where decinb was installed without its repository.
    """
    records = [load(path) for path in sorted(RESULTS.glob(f"*/{name}-*.json"))]
    return {f"{one.environment['device']}, {one.environment['dtype']}": one for one in records}


def table(record: Measurement) -> str:
    """Say a record in plain text: where it was taken, then a line for every time."""
    where = record.environment
    told = {"latent": record.settings["size"], "threads": where["threads"], "load": where["load"]}
    lines = [
        ", ".join([where["device"], where["dtype"], *(f"{name} {value}" for name, value in told.items())]),
        f"{'work':16}{'U-Net':12}{'median s':>10}{'fastest':>10}{'slowest':>10}",
    ]
    for work, timings in record.timings.items():
        for name, t in timings.items():
            lines.append(f"{work:16}{name:12}{t.median:10.3f}{t.fastest:10.3f}{t.slowest:10.3f}")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m decinb.benchmark.latency", description=compare.__doc__.splitlines()[0]
    )
    parser.add_argument("--device", help="cpu, cuda or mps; by default the best there is")
    parser.add_argument("--dtype", help="float32, float16 or bfloat16; by default what suits the device")
    parser.add_argument("--size", type=int, help="height and width of the latent; by default 64, or 32 on a slow CPU")
    parser.add_argument("--repeats", type=int, default=6, help="how often each call is timed")
    parser.add_argument("--folder", default="results", help="where to write the JSON")
    given = parser.parse_args()
    record = compare(given.device, given.dtype, given.size, given.repeats)
    print(table(record))
    print("written to", save(record, given.folder))


if __name__ == "__main__":
    main()
