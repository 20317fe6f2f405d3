"""Measure this machine: ``python -m decinb.benchmark``, with one of the words below to say what.

sweep         packed sweeps and a loop over the pipeline
options       a pipeline's options that change images only by rounding
runtimes      the U-Net in PyTorch and in OpenVINO; with --model random, U-Nets of full size
neighbours    a sweep beside busy processes, with threads that adapt and with fixed numbers of threads
first-image   fresh processes to their first image, part by part
playground    from a click in the playground to its first preview, and to the image
compiled      U-Nets of full size, eager, compiled and with CUDA graphs, with what the first call costs
few-steps     packed sweeps of tiny at 20 steps and of its student, tiny-lcm, at 4
"""

import argparse
import os
import tempfile
from collections.abc import Callable, Sequence
from types import ModuleType

from diffusers import DiffusionPipeline

from decinb.benchmark import (
    compiled,
    few_steps,
    first_image,
    latency,
    neighbours,
    options,
    packing,
    playground,
    runtimes,
)
from decinb.benchmark.latency import Measurement
from decinb.loading import load_pipeline
from decinb.runtimes.graph import is_installed
from decinb.runtimes.openvino import EIGHT_BITS, RUNTIMES, TORCH
from decinb.utils import acceleration
from decinb.utils.device import choose_workload

Given = argparse.Namespace


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the benchmark that the command line asks for, print a table, and write the measurement as JSON."""
    given = _parser().parse_args(arguments)
    run, module, name = BENCHMARKS[given.what]
    measurement = run(given)
    print(module.table(measurement))
    print("written to", latency.save(measurement, given.folder, name))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m decinb.benchmark", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", nargs="?", default="sweep", choices=BENCHMARKS, help="what to measure")
    parser.add_argument("--model", default="tiny", help="a model for load_pipeline, or random: full size")
    parser.add_argument("--device", help="cuda, mps or cpu; by default the best available")
    parser.add_argument("--dtype", help="float32, float16 or bfloat16; by default what suits the device")
    parser.add_argument("--designs", nargs="+", help="by default all; for random only mixed")
    parser.add_argument("--options", nargs="+", help="names of options; by default all")
    parser.add_argument("--steps", type=int, default=10, help="steps of the image that options are timed on")
    parser.add_argument("--rounds", type=int, default=4, help="how often each way is timed (default %(default)s)")
    parser.add_argument("--max-rows", type=int, help="the most rows in a U-Net call; by default what suits the device")
    parser.add_argument("--size", type=int, default=64, help="of the latents of random U-Nets (default %(default)s)")
    parser.add_argument("--seconds", type=float, default=10.0, help="of each run beside busy processes")
    parser.add_argument("--busy", type=int, nargs="+", default=[0, 1, 2], help="numbers of busy processes")
    parser.add_argument("--folder", default="results", help="where to write the JSON (default %(default)s)")
    return parser


def _load(given: Given) -> DiffusionPipeline:
    if given.model != "random":
        return load_pipeline(given.model, given.device, given.dtype)
    device, dtype, _ = choose_workload(given.device, given.dtype)
    acceleration.keep_freed_memory()
    return packing.random_pipeline(device, dtype)


def _runtimes() -> Sequence[str]:
    return RUNTIMES if is_installed() else (TORCH,)


def _measure_sweeps(given: Given) -> Measurement:
    names = given.designs or (["mixed"] if given.model == "random" else list(packing.DESIGNS))
    designs = {name: packing.DESIGNS[name] for name in names}
    return packing.compare(_load(given), designs, given.rounds, given.max_rows, given.model)


def _measure_options(given: Given) -> Measurement:
    pipe = _load(given)
    with tempfile.TemporaryDirectory() as cache:
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = cache  # empty, so that the first call pays for its compilation
        names = given.options or list(options.options(pipe))
        return options.compare_options(pipe, options.example_call(pipe, given.steps), names, given.rounds, given.model)


def _measure_runtimes(given: Given) -> Measurement:
    if given.model == "random":
        names = [*_runtimes(), *([EIGHT_BITS] if is_installed() else [])]
        return runtimes.compare_networks(size=given.size, repeats=given.rounds, runtimes=names)
    designs = {name: runtimes.GUIDES[name] for name in given.designs or runtimes.GUIDES}
    return runtimes.compare(
        lambda runtime: load_pipeline(given.model, "cpu", runtime=runtime),
        designs,
        _runtimes(),
        given.rounds,
        given.model,
    )


def _measure_neighbours(given: Given) -> Measurement:
    ways = [*neighbours.WAYS, *([neighbours.OPENVINO] if is_installed() else [])]
    return neighbours.compare(given.busy, given.rounds, given.seconds, ways)


def _exact_runtimes() -> Sequence[str]:
    return [name for name in _runtimes() if name != "openvino-bfloat16"]


def _measure_first_image(given: Given) -> Measurement:
    return first_image.measure_first_image(_exact_runtimes(), given.rounds)


def _measure_playground(given: Given) -> Measurement:
    return playground.measure_playground(_exact_runtimes(), given.rounds)


def _measure_compiled(given: Given) -> Measurement:
    return compiled.compare(given.device, given.dtype, given.size, given.rounds)


def _measure_few_steps(given: Given) -> Measurement:
    teacher, student = (load_pipeline(name, given.device, given.dtype) for name in ("tiny", "tiny-lcm"))
    designs = {name: few_steps.SWEEPS[name] for name in given.designs or few_steps.SWEEPS}
    return few_steps.compare(teacher, student, designs, given.rounds)


BENCHMARKS: dict[str, tuple[Callable[[Given], Measurement], ModuleType, str]] = {
    "sweep": (_measure_sweeps, packing, "benchmark"),
    "options": (_measure_options, options, "options"),
    "runtimes": (_measure_runtimes, runtimes, "runtimes"),
    "neighbours": (_measure_neighbours, neighbours, "neighbours"),
    "first-image": (_measure_first_image, first_image, "first-image"),
    "playground": (_measure_playground, playground, "playground"),
    "compiled": (_measure_compiled, compiled, "compiled"),
    "few-steps": (_measure_few_steps, few_steps, "few-steps"),
}
"""What each word measures, the module with its table, and the name of its files."""


if __name__ == "__main__":
    main()
