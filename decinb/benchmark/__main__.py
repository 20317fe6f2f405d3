"""Time packed sweeps against a loop over the pipeline, or a pipeline's options: ``python -m decinb.benchmark``."""

import argparse
import os
import tempfile
from collections.abc import Sequence

from decinb.benchmark import latency, options, packing
from decinb.loading import load_pipeline
from decinb.utils import acceleration
from decinb.utils.device import choose_workload


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the benchmark that the command line asks for, print a table, and write the measurement as JSON."""
    parser = argparse.ArgumentParser(prog="python -m decinb.benchmark", description=__doc__)
    parser.add_argument("what", nargs="?", default="sweep", choices=("sweep", "options"), help="what to compare")
    parser.add_argument("--model", default="tiny", help="a model for load_pipeline, or random: full size")
    parser.add_argument("--device", help="cuda, mps or cpu; by default the best available")
    parser.add_argument("--dtype", help="float32, float16 or bfloat16; by default what suits the device")
    parser.add_argument("--designs", nargs="+", choices=packing.DESIGNS, help="by default all; for random only mixed")
    parser.add_argument("--options", nargs="+", help="names of options; by default all")
    parser.add_argument("--steps", type=int, default=10, help="steps of the image that options are timed on")
    parser.add_argument("--rounds", type=int, default=4, help="how often each way is timed (default %(default)s)")
    parser.add_argument("--max-rows", type=int, help="the most rows in a U-Net call; by default what suits the device")
    parser.add_argument("--folder", default="results", help="where to write the JSON (default %(default)s)")
    given = parser.parse_args(arguments)

    if given.model == "random":
        device, dtype, _ = choose_workload(given.device, given.dtype)
        pipe = packing.random_pipeline(device, dtype)
        acceleration.keep_freed_memory()
    else:
        pipe = load_pipeline(given.model, given.device, given.dtype)

    if given.what == "options":
        with tempfile.TemporaryDirectory() as cache:
            os.environ["TORCHINDUCTOR_CACHE_DIR"] = cache  # empty, so that the first call pays for its compilation
            names = given.options or list(options.options(pipe))
            call = options.example_call(pipe, given.steps)
            measurement = options.compare_options(pipe, call, names, given.rounds, given.model)
        print(options.table(measurement))
        print("written to", latency.save(measurement, given.folder, "options"))
    else:
        names = given.designs or (["mixed"] if given.model == "random" else list(packing.DESIGNS))
        designs = {name: packing.DESIGNS[name] for name in names}
        measurement = packing.compare(pipe, designs, given.rounds, given.max_rows, given.model)
        print(packing.table(measurement))
        print("written to", latency.save(measurement, given.folder, "benchmark"))


if __name__ == "__main__":
    main()
