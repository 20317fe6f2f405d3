"""Measure the seconds and the memory that networks take, in turns, and store them with what they depend on.

``compare`` measures networks of full size with random weights: they take as long as trained ones, and need no download.
"""

import argparse
import json
import os
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
"""Seconds per image by (U-Net, runtime, steps), as Deci published them for DeciDiffusion 1.0: text to image, 512 x 512
pixels, float16, one image at a time, on an NVIDIA A10. Infery is Deci's own compiled runtime."""

RESULTS = Path(__file__).parents[2] / "results"  # of the repository, with measurements from other machines

BUSY = 0.5
"""The load of each core above which a machine counts as busy."""

PUBLISHED_SOURCE = "https://huggingface.co/Deci/DeciDiffusion-v1-0"


# --- measuring --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Timing:
    """Times of the same work in seconds, in the order they were taken, and on CUDA the peak memory in bytes."""

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

    def per(self, count: int) -> "Timing":
        """Return the times divided by ``count``, such as the seconds per row of a call with several rows."""
        return Timing(tuple(second / count for second in self.seconds), self.peak_bytes)


def measure(
    functions: Mapping[str, Callable[[], object]],
    repeats: int = 6,
    warmup: int = 1,
    synchronize: Callable[[], None] | None = None,
    prepare: Callable[[str], object] | None = None,
) -> dict[str, Timing]:
    """Time functions in turns, as A B B A A B B A, so that a slow phase of the machine affects all of them alike.

    Args:
        functions: the functions to time, by name.
        repeats: how often each function is timed, 1 or more. With an even number, each goes first equally often.
        warmup: untimed calls of each function before that, 0 or more.
        synchronize: waits until the device has finished; by default it waits for the GPU, if torch has one.
        prepare: called with a name before each call of its function; not timed.

    Returns:
        The times of every function; time i of one function was taken next to time i of the others.

    Raises:
        InputError: ``functions`` is empty, or a number is out of range.
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
            synchronize()  # a GPU works asynchronously: without this, the clock would stop before the work does
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
    """Add up the seconds that each network of a pipeline takes while the ``with`` block runs.

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
    """Return how many times longer one took than the other, turn by turn: the least, the median and the most."""
    ratios = [a / b for a, b in zip(slow.seconds, fast.seconds, strict=True)]
    return min(ratios), statistics.median(ratios), max(ratios)


def extrapolate(timings: Mapping[str, Mapping[str, Timing]], steps: int) -> dict[str, Timing]:
    """Estimate the seconds of whole calls from shorter ones, by a line through each round of measurements.

    Args:
        timings: times by work, then by network, of at least two works named ``image, <number> step(s)``.
        steps: of the calls that are estimated.

    Returns:
        By network, one estimate for each round, to be compared with ``ratio`` like measured times.
    """
    works = {int(work.split()[1]): by_name for work, by_name in timings.items() if work.startswith("image")}
    estimates: dict[str, list[float]] = {}
    for name in next(iter(works.values())):
        for seconds in zip(*(by_name[name].seconds for by_name in works.values()), strict=True):
            slope, intercept = statistics.linear_regression(list(works), seconds)
            estimates.setdefault(name, []).append(intercept + slope * steps)
    return {name: Timing(tuple(found)) for name, found in estimates.items()}


def describe_load(where: Mapping[str, Any]) -> str:
    """Return one line that says whether a machine was quiet before a measurement.

    Args:
        where: what ``environment`` returned; its ``load`` is how many processes wanted a core in the last minute.
    """
    load, cores = where["load"], os.cpu_count() or 1
    if load is None:
        return "load: unknown on this system; close what you do not need before you measure"
    if load > BUSY * cores:
        return f"load: {load:.1f} on {cores} cores; the machine is busy, so measure again when it is quiet"
    return f"load: {load:.1f} on {cores} cores; the machine is quiet"


def unet_call(unet: nn.Module, rows: int = 1, size: int = 64, tokens: int = 77) -> Callable[[], Tensor]:
    """Return a function that calls a U-Net once, on ``rows`` random latents of ``size`` x ``size``, to be timed."""
    latents, timesteps, text = unet_inputs(unet, rows, size, tokens, next(unet.parameters()).device)

    @torch.inference_mode()
    def call() -> Tensor:
        timesteps.sub_(1)  # as within a run; at other calls, a U-Net in OpenVINO compares all of its weights
        return unet(latents, timesteps, text)[0]

    return call


def image_call(unet: nn.Module, vae: AutoencoderKL, steps: int, size: int = 64, tokens: int = 77) -> Callable[[], Any]:
    """Return a function that makes one PIL image from another, to be timed: encode, ``steps`` DDIM steps, decode.

    The steps are guided. The prompt embeddings are random, without a text encoder, which would cost about 4 % of one
    U-Net row.
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


# --- the comparison, and its storage ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Measurement:
    """Times as ``timings[work][network]``, the settings they depend on, and the machine and versions used."""

    timings: dict[str, dict[str, Timing]]
    settings: dict[str, Any]
    environment: dict[str, Any]


def build_networks(
    device: torch.device | str | None = None,
    dtype: torch.dtype | str | None = None,
    networks: Mapping[str, Callable[[], nn.Module]] = NETWORKS,
) -> dict[str, nn.Module]:
    """Return networks with random weights, to measure them more than once with ``compare``.

    Args:
        device, dtype: where and with which precision to run; None chooses what suits the machine.
        networks: functions that build them, by name.
    """
    device, dtype, _ = choose_workload(device, dtype)
    if device.type == "cpu":
        keep_freed_memory()
    return {name: random_model(factory, device, dtype) for name, factory in networks.items()}


def compare(
    device: torch.device | str | None = None,
    dtype: torch.dtype | str | None = None,
    size: int | None = None,
    repeats: int = 6,
    warmup: int = 1,
    rows: Sequence[int] = (1, 2),
    steps: Sequence[int] | None = None,
    networks: Mapping[str, Callable[[], nn.Module] | nn.Module] = NETWORKS,
    vae: Callable[[], AutoencoderKL] = sd15_vae,
) -> Measurement:
    """Measure U-Nets of full size with random weights: single calls, and on a GPU whole images.

    Args:
        device, dtype: where and with which precision to run; None chooses what suits the machine.
        size: height and width of the latent, a multiple of 8; None takes 64, or 32 on a slow CPU.
        repeats, warmup: as for ``measure``.
        rows: the numbers of rows of the U-Net calls to measure. A row is one latent; a guided step has two.
        steps: the numbers of steps of the image-to-image calls to measure; None takes 30 and 50 on a GPU, and none on a
            CPU, where one call takes minutes.
        networks: the U-Nets to compare, by name: functions that build them, or U-Nets that are on the device already.
        vae: a function that builds the VAE of the image-to-image calls.

    Raises:
        InputError: an argument is out of range, or not possible on this machine.
    """
    device, dtype, size = choose_workload(device, dtype, size)
    steps = ((30, 50) if device.type == "cuda" else ()) if steps is None else steps
    _check_turns(repeats, warmup)
    for name, numbers in {"rows": rows, "steps": steps}.items():
        if any(number < 1 for number in numbers):
            raise InputError(f"{name} must be integers of at least 1, got {tuple(numbers)}")
    where = environment(device, dtype)
    factories = {name: given for name, given in networks.items() if not isinstance(given, nn.Module)}
    unets: dict[str, Any] = {**networks, **build_networks(device, dtype, factories)}
    timings = {}
    for number in rows:
        calls = {name: unet_call(unet, number, size) for name, unet in unets.items()}
        timings["1 row" if number == 1 else f"{number} rows"] = measure(calls, repeats, warmup)
    coder = random_model(vae, device, dtype) if steps else None
    for number in steps:
        calls = {name: image_call(unet, coder, number, size) for name, unet in unets.items()}
        timings["image, 1 step" if number == 1 else f"image, {number} steps"] = measure(calls, repeats, warmup)
    return Measurement(timings, {"size": size, "tokens": 77, "repeats": repeats, "warmup": warmup}, where)


def save(measurement: Measurement, folder: str | Path = "results", name: str = "latency") -> Path:
    """Write a measurement as JSON to ``folder/<machine>/<name>-<date>.json``, and return the path."""
    where = measurement.environment
    device = re.sub(r"\((r|tm)\)", "", where["device"].lower())
    # The number of threads matters on a CPU, not on a GPU.
    machine = device if where["driver"] else f"{device} {where['threads']} threads"
    machine = re.sub(r"[^a-z0-9]+", "-", machine).strip("-")
    moment = re.sub(r"\D", "", where["date"][:19])
    path = Path(folder) / machine / f"{name}-{moment}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(asdict(measurement), indent=2) + "\n")
    return path


def load(path: str | Path) -> Measurement:
    """Read a measurement that ``save`` wrote.

    Raises:
        InputError: there is no such file, or it is not a measurement.
    """
    try:
        found = json.loads(Path(path).read_text())
        timings = {
            work: {name: Timing(tuple(timing["seconds"]), timing.get("peak_bytes")) for name, timing in by_name.items()}
            for work, by_name in found["timings"].items()
        }
        return Measurement(timings, found["settings"], found["environment"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"path: {str(path)!r} is not a measurement: {error}") from error


def stored(name: str = "latency") -> dict[str, Measurement]:
    """Return the newest measurement of a name for every device and dtype in the repository's ``results``.

    Args:
        name: ``"latency"``, ``"benchmark"``, ``"options"`` or ``"loading"``.

    Returns:
        Measurements by ``"<device>, <dtype>"``; empty if decinb was installed without its repository.
    """
    oldest_first = [load(path) for path in sorted(RESULTS.glob(f"*/{name}-*.json"))]
    return {f"{one.environment['device']}, {one.environment['dtype']}": one for one in oldest_first}


def table(measurement: Measurement) -> str:
    """Return a measurement as text: the machine, then a line for every network and its work."""
    where = measurement.environment
    lines = [
        f"{where['device']}, {where['dtype']}, latent {measurement.settings['size']}, threads {where['threads']}, "
        f"load {where['load']}",
        f"{'work':16}{'U-Net':12}{'median s':>10}{'fastest':>10}{'slowest':>10}",
    ]
    for work, timings in measurement.timings.items():
        for name, t in timings.items():
            lines.append(f"{work:16}{name:12}{t.median:10.3f}{t.fastest:10.3f}{t.slowest:10.3f}")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure as the command line asks, print a table, and write the measurement as JSON."""
    parser = argparse.ArgumentParser(
        prog="python -m decinb.benchmark.latency", description=compare.__doc__.splitlines()[0]
    )
    parser.add_argument("--device", help="cuda, mps or cpu; by default the best available")
    parser.add_argument("--dtype", help="float32, float16 or bfloat16; by default what suits the device")
    parser.add_argument("--size", type=int, help="height and width of the latent; by default 64, or 32 on a slow CPU")
    parser.add_argument("--repeats", type=int, default=6, help="how often each call is timed")
    parser.add_argument("--folder", default="results", help="where to write the JSON")
    given = parser.parse_args(arguments)
    measurement = compare(given.device, given.dtype, given.size, given.repeats)
    print(table(measurement))
    print("written to", save(measurement, given.folder))


if __name__ == "__main__":
    main()
