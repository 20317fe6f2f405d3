"""Run every notebook on the bundled model and say how it goes: ``make demo``.

Each notebook runs in a fresh kernel, one after another, because two at once would change the times that some of them
measure. Where a notebook measures on many images, the demo takes ``COUNT`` of them, and says so. The executed
notebooks, and the grids that they save, are written to ``runs/demo/``. An error stops the demo, with the notebook, the
error and where to look.
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
COUNT = 8  # images for each number that the notebooks measure; 32 where they are read
QUIET_KERNEL = ["--IPKernelApp.log_level=40"]  # ipykernel warns of TCP at every start; errors still show


def main() -> int:
    os.environ.setdefault("DECINB_MODEL", "tiny")
    os.environ.setdefault("DECINB_COUNT", str(COUNT))
    os.environ.setdefault("DECINB_MAX_ROWS", "4")  # of the U-Net calls that notebook 06 times
    FOLDER.mkdir(parents=True, exist_ok=True)
    shutil.copytree(ROOT / "docs" / "maps", ROOT / "runs" / "docs" / "maps", dirs_exist_ok=True)  # notebooks show them
    shutil.copytree(ROOT / "notebooks" / "solutions", FOLDER / "solutions", dirs_exist_ok=True)  # and link to these
    notebooks = sorted((ROOT / "notebooks").glob("*.ipynb"))
    print(f"measuring on {os.environ['DECINB_COUNT']} images for each number instead of 32")
    began = time.monotonic()
    for number, notebook in enumerate(notebooks, 1):
        print(f"notebook {number:2} of {len(notebooks)}  {notebook.stem:30}", end="", flush=True)
        start, result = time.monotonic(), FOLDER / notebook.name
        try:
            papermill.execute_notebook(
                notebook,
                result,
                cwd=FOLDER,
                progress_bar=False,
                kernel_name="python3",
                extra_arguments=QUIET_KERNEL,
            )
        except PapermillExecutionError as error:
            print(f"failed\n{error.ename}: {error.evalue}\nsee {result.relative_to(ROOT)}")
            return 1
        print(f"{time.monotonic() - start:4.0f} s  {result.relative_to(ROOT)}", flush=True)
    minutes = (time.monotonic() - began) / 60
    print(f"done in {minutes:.1f} minutes: open runs/demo/*.ipynb (`make lab` does); the grids are runs/demo/*.png")
    return 0


if __name__ == "__main__":
    sys.exit(main())
