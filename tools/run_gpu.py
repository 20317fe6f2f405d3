"""Run everything that waits for a CUDA GPU, in at most 20 minutes: ``make gpu``.

Each stage runs in a process of its own and is written as it ends, so that a run that is cut off keeps what it has. A
stage that fails or takes too long does not stop the others. At the end, a table compares what was measured with the
targets. On a machine without a GPU, the stages are only listed; ``--small`` tries all of them on small networks.
"""

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel

from decinb.benchmark import counting, latency, options, packing
from decinb.benchmark.compiled import COMPILED, EAGER, GRAPHS
from decinb.benchmark.latency import Measurement, Timing
from decinb.designs import grid
from decinb.images import load_image
from decinb.loading import load_pipeline
from decinb.metrics import psnr
from decinb.models import MODELS, example
from decinb.sampling.adapters import adapter_of
from decinb.sampling.jobs import Job
from decinb.unet_nas import V1_CONFIGURATIONS, UNetNAS
from decinb.utils.acceleration import compile_network, has_compiler, uncompile_network
from decinb.utils.environment import environment
from decinb.utils.files import write_atomically

ROOT = Path(__file__).parents[1]
MINUTES = 20.0
STEPS = 30  # of the image whose time is compared with its arithmetic
PACKED_TARGET, RATE_TARGET, FLOOR_TARGET = 6.0, 0.4, 2.0


@dataclass(frozen=True)
class Sizes:
    """What the stages run on: the networks by name, the latent size, the designs and the number of repeats."""

    device: torch.device
    dtype: torch.dtype
    networks: dict[str, Callable[[], nn.Module]]
    vae: Callable[[], AutoencoderKL]
    text_encoder: Callable[[], CLIPTextModel]
    designs: dict[str, list[dict]]
    latent: int
    steps: int
    repeats: int
    max_rows: int | None = None


def full_size() -> Sizes:
    """Return the full size, on the first CUDA GPU."""
    return Sizes(
        torch.device("cuda"),
        torch.float16,
        counting.NETWORKS,
        counting.sd15_vae,
        counting.sd15_text_encoder,
        {"mixed": packing.DESIGNS["mixed"]},
        64,
        STEPS,
        4,
    )


def small_size() -> Sizes:
    """Return networks that take milliseconds on the CPU."""
    widths = {"down_blocks_in_channels": [32, 32, 32], "down_blocks_out_channels": [32, 32, 64]}
    more = {"prev_output_channels": [64, 64, 32], "cross_attention_dim": 16, "temb_dim": 32, "num_attention_heads": 2}
    table = {**V1_CONFIGURATIONS, **widths, **more}
    blocks = {"block_out_channels": (32,) * 4}
    return Sizes(
        torch.device("cpu"),
        torch.float32,
        {
            "U-Net-NAS": lambda: UNetNAS(table, sample_size=8),
            "SD v1.5": lambda: UNet2DConditionModel(
                sample_size=8, block_out_channels=(32, 32, 64, 64), cross_attention_dim=16, attention_head_dim=2
            ),
        },
        lambda: AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4, **blocks
        ),
        lambda: CLIPTextModel(
            CLIPTextConfig(hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2)
        ),
        {"mixed": grid(guidance_scale=[1.0, 7.5], num_inference_steps=[2])},
        8,
        2,
        1,
        4,
    )


# --- stages -----------------------------------------------------------------------------------------------------------


def run_tests(sizes: Sizes, folder: Path) -> dict[str, Any]:
    """Run the tests that are marked ``cuda``."""
    marked = [str(file) for file in (ROOT / "tests").rglob("test_*.py") if "pytest.mark.cuda" in file.read_text()]
    # Without the project's own options, which need plugins that only the notebooks' tests use.
    command = [sys.executable, "-m", "pytest", "-q", "-o", "addopts=", "-m", "cuda", *marked]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    last = (ended.stdout.strip().splitlines() or [ended.stderr.strip()])[-1]
    if ended.returncode not in (0, 5):  # 5: there is none
        raise RuntimeError(f"tests failed: {last}")
    return {"pytest": last}


def run_sweep(sizes: Sizes, folder: Path) -> dict[str, Any]:
    """Time a packed sweep of 48 cells at full size against the stock loop."""
    rounds = max(1, sizes.repeats // 2)
    found = packing.compare(_pipeline(sizes), sizes.designs, rounds, sizes.max_rows, "random")
    print(packing.table(found))
    return {"file": latency.save(found, folder, "benchmark").name, **_of_sweep(found)}


def run_latency(sizes: Sizes, folder: Path) -> dict[str, Any]:
    """Time calls of both U-Nets and whole images, eager, compiled and with CUDA graphs, on both networks alike."""
    where = environment(sizes.device, sizes.dtype)
    modes = {EAGER: None}
    if sizes.device.type == "cuda":
        modes |= {COMPILED: "default", GRAPHS: "reduce-overhead"}
    elif has_compiler() and sizes.latent > small_size().latent:
        modes |= {COMPILED: "default"}
    coder = counting.random_model(sizes.vae, sizes.device, sizes.dtype)
    timings: dict[str, dict[str, Timing]] = {}
    first: dict[str, dict[str, float]] = {}
    flops = {}
    for name, build in sizes.networks.items():
        unet = counting.random_model(build, sizes.device, sizes.dtype)
        flops[name] = counting.count(unet, sizes.latent).flops
        first[name] = {}
        for mode, compiled in modes.items():
            if compiled is not None:
                compile_network(unet, compiled)
            call = latency.unet_call(unet, 2, sizes.latent)
            started = time.perf_counter()
            call()
            latency._synchronize()
            first[name][mode] = time.perf_counter() - started
            image = latency.image_call(unet, coder, sizes.steps, sizes.latent)
            timings.setdefault("2 rows", {}).update(latency.measure({f"{name}, {mode}": call}, sizes.repeats, 2))
            work = f"image, {sizes.steps} steps"
            timings.setdefault(work, {}).update(latency.measure({f"{name}, {mode}": image}, sizes.repeats, 1))
            uncompile_network(unet)
    rate = packing.matrix_rate(sizes.device, sizes.dtype)
    settings = {"size": sizes.latent, "flops_of_a_row": flops, "flops_a_second_of_a_matrix_product": rate}
    found = Measurement(timings, {**settings, "first": first, "steps": sizes.steps}, where)
    print(latency.table(found))
    best = min(timing.median for way, timing in timings[work].items() if way.startswith("U-Net-NAS"))
    floor = 2 * sizes.steps * flops["U-Net-NAS"] / rate
    return {"file": latency.save(found, folder, "latency").name, "image_over_floor": best / floor}


def run_options(sizes: Sizes, folder: Path) -> dict[str, Any]:
    """Time the options that make a pipeline faster, compiled ones too."""
    pipe = _pipeline(sizes)
    names = list(options.options(pipe)) if sizes.device.type == "cuda" else ["channels last"]
    found = options.compare_options(
        pipe, options.example_call(pipe, min(10, sizes.steps)), names, sizes.repeats, "random"
    )
    print(options.table(found))
    return {"file": latency.save(found, folder, "options").name}


def run_loading(sizes: Sizes, folder: Path) -> dict[str, Any]:
    """Time the loading of a model from safetensors to the device."""
    where = environment(sizes.device, sizes.dtype)
    source = MODELS["tiny"].source
    function = {"load_pipeline": lambda: load_pipeline(source, sizes.device, sizes.dtype)}
    found = Measurement({"load": latency.measure(function, sizes.repeats)}, {"model": "tiny"}, where)
    return {"file": latency.save(found, folder, "loading-to-device").name}


def run_out_of_memory(sizes: Sizes, folder: Path) -> dict[str, Any]:
    """Run a sweep with too little memory for its calls: they are halved, and the images stay the same."""
    pipe = _pipeline(sizes)
    image, prompt = _input(pipe)
    cells = [{"strength": 1.0, "guidance_scale": 2.0 + i, "num_inference_steps": 2, "seed": 0} for i in range(8)]
    jobs = [Job(image, prompt, None, **cell) for cell in cells]
    expected = _images(pipe, jobs, 2)
    rows: list[int] = []

    def limit(module: nn.Module, args: tuple) -> None:
        rows.append(len(args[0]))
        if sizes.device.type == "cpu" and len(args[0]) > 2:
            raise torch.OutOfMemoryError("out of memory: the limit of this stage")

    hook = pipe.unet.register_forward_pre_hook(limit)
    try:
        if sizes.device.type == "cuda":
            torch.cuda.empty_cache()
            total = torch.cuda.get_device_properties(sizes.device).total_memory
            torch.cuda.set_per_process_memory_fraction(min(1.0, 1.05 * torch.cuda.memory_allocated() / total + 0.01))
        made = _images(pipe, jobs, 64)
    finally:
        hook.remove()
        if sizes.device.type == "cuda":
            torch.cuda.set_per_process_memory_fraction(1.0)
    worst = min(psnr(one, other) for one, other in zip(made, expected, strict=True))
    if worst < 40:
        raise RuntimeError(f"the images differ: {worst:.1f} dB")
    return {"rows_of_calls": [max(rows), min(rows)], "was_halved": min(rows) < max(rows)}


def run_exactness(sizes: Sizes, folder: Path) -> dict[str, Any]:
    """Compare images of ``tiny``: packed with one by one in the dtype of the device, and this dtype with float32."""
    cells = grid(guidance_scale=[1.0, 5.0, 9.0], num_inference_steps=[sizes.steps])
    images = {}
    for dtype in (sizes.dtype, torch.float32):
        pipe = load_pipeline("tiny", sizes.device, dtype)
        image, prompt = _input(pipe)
        jobs = [Job(image, prompt, None, **{**packing.DEFAULTS, **cell}) for cell in cells]
        images[dtype] = _images(pipe, jobs, 64)
        if dtype == sizes.dtype:
            alone = [_images(pipe, [job], 2)[0] for job in jobs]
    return {
        "packed_to_alone_psnr": _worst(images[sizes.dtype], alone),
        "to_float32_psnr": _worst(images[sizes.dtype], images[torch.float32]),
    }


def _pipeline(sizes: Sizes) -> Any:
    unet = sizes.networks["U-Net-NAS"]
    return packing.random_pipeline(sizes.device, sizes.dtype, unet, sizes.vae, sizes.text_encoder)


def _input(pipe: Any) -> tuple[Any, str]:
    sample, prompt = example(pipe)
    return load_image(sample), prompt


def _images(pipe: Any, jobs: Sequence[Job], max_rows: int) -> list[Any]:
    done = {result.index: result.image for step in adapter_of(pipe).run(jobs, max_rows) for result in step.results}
    return [done[i] for i in range(len(jobs))]


def _worst(images: Sequence[Any], expected: Sequence[Any]) -> float:
    return min(min(psnr(*pair), options.MAX_PSNR) for pair in zip(images, expected, strict=True))


def _of_sweep(found: Measurement) -> dict[str, float]:
    """Return how many times faster packing is, and the fraction of the matrix rate that it reaches."""
    ((name, timings),) = found.timings.items()
    rows = found.settings["designs"][name][packing.PACKED]["rows"]
    rate = rows * found.settings["flops_of_a_row"] / timings[packing.PACKED].median
    return {
        "packed_over_loop": latency.ratio(timings[packing.ONE_BY_ONE], timings[packing.PACKED])[1],
        "of_matrix_rate": rate / found.settings["flops_a_second_of_a_matrix_product"],
    }


STAGES: dict[str, tuple[Callable[[Sizes, Path], dict[str, Any]], float]] = {
    "exactness": (run_exactness, 1),
    "tests": (run_tests, 2),
    "sweep": (run_sweep, 4),
    "latency": (run_latency, 6),
    "out of memory": (run_out_of_memory, 2),
    "loading": (run_loading, 1),
    "options": (run_options, 4),
}
"""The stages in their order, each with the minutes that it may take."""


# --- running them -----------------------------------------------------------------------------------------------------


def run_stages(names: Sequence[str], folder: Path, minutes: float, small: bool) -> dict[str, dict[str, Any]]:
    """Run stages in processes of their own, and write what is known after each of them.

    Args:
        names: of the stages.
        folder: for the results; a folder for this machine is made in it.
        minutes: for all stages together. A stage that would begin later is left out.
        small: use small networks on the CPU.

    Returns:
        For every stage its ``outcome`` (``done``, ``failed``, ``cut off`` or ``left out``), its seconds and findings.
    """
    sizes = small_size() if small else full_size()
    summary = Measurement({}, {"stages": {}}, environment(sizes.device, sizes.dtype))
    stages: dict[str, dict[str, Any]] = summary.settings["stages"]
    file = latency.save(summary, folder, "gpu")
    end = time.monotonic() + 60 * minutes
    for name in names:
        limit = min(60 * STAGES[name][1], end - time.monotonic())
        stages[name] = {"outcome": "left out"} if limit <= 0 else _run_stage(name, folder, limit, small)
        print(f"{name}: {stages[name]['outcome']}", flush=True)
        write_atomically(file, (json.dumps(asdict(summary), indent=2) + "\n").encode())
    print(target_table(stages))
    print("written to", file)
    return stages


def _run_stage(name: str, folder: Path, seconds: float, small: bool) -> dict[str, Any]:
    command = [sys.executable, "-m", "tools.run_gpu", "--stage", name, "--folder", str(folder.resolve())]
    started = time.monotonic()
    try:
        ended = subprocess.run(
            [*command, *(["--small"] if small else [])], cwd=ROOT, stdout=subprocess.PIPE, text=True, timeout=seconds
        )
    except subprocess.TimeoutExpired:
        return {"outcome": "cut off", "seconds": round(time.monotonic() - started, 1)}
    *shown, last = ended.stdout.strip().splitlines() or [""]
    if shown:
        print("\n".join(shown))
    spent = {"seconds": round(time.monotonic() - started, 1)}
    return {"outcome": "failed", **spent} if ended.returncode else {"outcome": "done", **spent, **json.loads(last)}


def target_table(stages: dict[str, dict[str, Any]]) -> str:
    """Return the targets and what was reached, as text."""

    def found(stage: str, name: str) -> float | None:
        return stages.get(stage, {}).get(name)

    rows = [
        ("packed sweep over the loop, times", found("sweep", "packed_over_loop"), PACKED_TARGET, True),
        ("packed sweep, of the matrix rate", found("sweep", "of_matrix_rate"), RATE_TARGET, True),
        (f"{STEPS}-step image over its arithmetic", found("latency", "image_over_floor"), FLOOR_TARGET, False),
    ]
    lines = [f"{'target':42}{'wanted':>10}{'measured':>10}"]
    for name, value, target, at_least in rows:
        reached = value is not None and (value >= target if at_least else value <= target)
        shown = "-" if value is None else f"{value:.2f}"
        lines.append(f"{name:42}{'>= ' if at_least else '<= '}{target:<7g}{shown:>10}  {'yes' if reached else 'no'}")
    return "\n".join(lines)


def describe(minutes: float) -> str:
    """Return what would run on a machine with a GPU."""
    lines = [f"no CUDA GPU: on a machine with one, this would run, in at most {minutes:g} minutes:"]
    lines += [f"  {name:14} up to {most:g} min  {run.__doc__.splitlines()[0]}" for name, (run, most) in STAGES.items()]
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run all stages, one stage, or say what would run."""
    parser = argparse.ArgumentParser(prog="python -m tools.run_gpu", description=__doc__.splitlines()[0])
    parser.add_argument("--small", action="store_true", help="try all stages on small networks on the CPU")
    parser.add_argument("--minutes", type=float, default=MINUTES, help="for all stages (default %(default)s)")
    parser.add_argument("--folder", type=Path, default=Path("results"), help="where to write (default %(default)s)")
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=list(STAGES), help="by default all")
    parser.add_argument("--stage", choices=STAGES, help=argparse.SUPPRESS)  # in the process of a stage
    given = parser.parse_args(arguments)
    if given.stage:
        sizes = small_size() if given.small else full_size()
        print(json.dumps(STAGES[given.stage][0](sizes, given.folder)))
    elif given.small or torch.cuda.is_available():
        stages = run_stages(given.stages, given.folder, given.minutes, given.small)
        sys.exit(any(stage["outcome"] == "failed" for stage in stages.values()))
    else:
        print(describe(given.minutes))


if __name__ == "__main__":
    main()
