"""Time a packed sweep beside the guide's loop, or the options of a pipeline: ``python -m decinb.benchmark``."""

import argparse
import os
import tempfile

from decinb.benchmark import latency, options
from decinb.benchmark.packing import DESIGNS, compare, options_table, picture_call, random_pipeline, table
from decinb.loading import load_pipeline
from decinb.utils import acceleration
from decinb.utils.device import choose_workload


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m decinb.benchmark", description=__doc__.splitlines()[0])
    parser.add_argument("what", nargs="?", default="sweep", choices=("sweep", "options"), help="what is compared")
    parser.add_argument("--model", default="tiny", help="what load_pipeline takes; or random: full size")
    parser.add_argument("--device", help="cuda, mps or cpu; by default the best there is")
    parser.add_argument("--dtype", help="float32, float16 or bfloat16; by default what suits the device")
    parser.add_argument("--designs", nargs="+", choices=DESIGNS, help="by default all; mixed for random")
    parser.add_argument("--options", nargs="+", help="of decinb.benchmark.options.options; by default all")
    parser.add_argument("--steps", type=int, default=10, help="of the picture that options are timed on")
    parser.add_argument("--rounds", type=int, default=4, help="how often each way is timed (default %(default)s)")
    parser.add_argument("--pack", type=int, help="the most rows in a U-Net call; by default what suits the device")
    parser.add_argument("--folder", default="results", help="where to write the JSON (default %(default)s)")
    given = parser.parse_args()
    if given.model == "random":
        device, dtype, _ = choose_workload(given.device, given.dtype)
        pipe = random_pipeline(device, dtype)
        acceleration.keep_freed_memory()
    else:
        pipe = load_pipeline(given.model, given.device, given.dtype)
    if given.what == "options":
        names = given.options or list(options.options(pipe))
        call = picture_call(pipe, given.steps)
        with tempfile.TemporaryDirectory() as fresh:
            os.environ["TORCHINDUCTOR_CACHE_DIR"] = fresh  # a compilation is to cost here what it costs the first time
            record = options.compare_options(pipe, call, names, given.rounds, given.model)
        print(options_table(record))
    else:
        names = given.designs or (["mixed"] if given.model == "random" else list(DESIGNS))
        record = compare(pipe, {name: DESIGNS[name] for name in names}, given.rounds, given.pack, given.model)
        print(table(record))
    print("written to", latency.save(record, given.folder, "benchmark" if given.what == "sweep" else "options"))


if __name__ == "__main__":
    main()
