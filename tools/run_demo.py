"""Run every notebook on the bundled model and say how it goes: ``make demo``.

Each notebook runs in a fresh kernel, one after another, because two at once would change the times that some of them
measure. Where a notebook repeats a measurement, the demo repeats it less often, by the parameters of ``FEWER``, and
says so. The executed notebooks, and the grids that they save, are written to ``runs/demo/``. An error stops the demo,
with the notebook, the error and where to look.
"""

import os
import shutil
import sys
import time
from pathlib import Path

import papermill
from papermill.exceptions import PapermillExecutionError

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "runs" / "demo"
FEWER = {
    "04_steps_sweep": {"SEEDS": 20},  # instead of 32 images for each point of a curve that no assert depends on
    "06_latency_vs_sd15": {"REPEATS": 2},  # instead of 4 timings of each call
}
QUIET_KERNEL = ["--IPKernelApp.log_level=40"]  # ipykernel warns of TCP at every start; errors still show


def main() -> int:
    os.environ.setdefault("DECINB_MODEL", "tiny")
    os.environ.setdefault("DECINB_MAX_ROWS", "4")  # of the U-Net calls that notebook 06 times
    FOLDER.mkdir(parents=True, exist_ok=True)
    shutil.copytree(ROOT / "docs" / "maps", ROOT / "runs" / "docs" / "maps", dirs_exist_ok=True)  # notebooks show them
    shutil.copytree(ROOT / "notebooks" / "solutions", FOLDER / "solutions", dirs_exist_ok=True)  # and link to these
    notebooks = sorted((ROOT / "notebooks").glob("*.ipynb"))
    began = time.monotonic()
    for number, notebook in enumerate(notebooks, 1):
        print(f"notebook {number:2} of {len(notebooks)}  {notebook.stem:30}", end="", flush=True)
        start, result, given = time.monotonic(), FOLDER / notebook.name, FEWER.get(notebook.stem, {})
        try:
            papermill.execute_notebook(
                notebook,
                result,
                given,
                cwd=FOLDER,
                progress_bar=False,
                kernel_name="python3",
                extra_arguments=QUIET_KERNEL,
            )
        except PapermillExecutionError as error:
            print(f"failed\n{error.ename}: {error.evalue}\nsee {result.relative_to(ROOT)}")
            return 1
        less = "".join(f", with {name}={value}" for name, value in given.items())
        print(f"{time.monotonic() - start:4.0f} s  {result.relative_to(ROOT)}{less}", flush=True)
    minutes = (time.monotonic() - began) / 60
    print(f"done in {minutes:.1f} minutes: open runs/demo/*.ipynb (`make lab` does); the grids are runs/demo/*.png")
    return 0


if __name__ == "__main__":
    sys.exit(main())
