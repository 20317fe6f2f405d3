"""Run every notebook on the bundled model and say how it goes: ``make demo``.

Each notebook runs in a fresh kernel, two at a time with half of the cores each. Those that compare times run alone, at
the end, with all cores. Where a notebook measures on many images, the demo takes ``COUNT`` of them, and says so. The
executed notebooks, and the grids that they save, are written to ``runs/demo/``. An error stops the demo, with the
notebook, the error and where to look.
"""

import os
import shutil
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path

import papermill
from papermill.exceptions import PapermillExecutionError

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "runs" / "demo"
COUNT = 3  # images for each number that the notebooks measure; 32 where they are read
# ipykernel warns of TCP at every start, and may log the interrupt that ends it as an error. Errors of cells still show.
QUIET_KERNEL = ["--IPKernelApp.log_level=50"]
ALONE = ("06_latency_vs_sd15", "12_runtime_options")  # a neighbour would change what they measure
CORES = os.cpu_count() or 1
AT_ONCE = min(2, CORES)


def main() -> int:
    os.environ.setdefault("DECINB_MODEL", "tiny")
    os.environ.setdefault("DECINB_COUNT", str(COUNT))
    os.environ.setdefault("DECINB_MAX_ROWS", "2")  # of the U-Net calls that notebook 06 times
    os.environ.setdefault("DECINB_SIZE", "16")  # of the latents in these calls
    os.environ.setdefault("DECINB_STEPS", "4")  # of the images that notebook 12 times
    FOLDER.mkdir(parents=True, exist_ok=True)
    shutil.copytree(ROOT / "docs" / "maps", ROOT / "runs" / "docs" / "maps", dirs_exist_ok=True)  # notebooks show them
    shutil.copytree(ROOT / "notebooks" / "solutions", FOLDER / "solutions", dirs_exist_ok=True)  # and link to these
    notebooks = sorted((ROOT / "notebooks").glob("*.ipynb"))
    print(f"measuring on {os.environ['DECINB_COUNT']} images for each number instead of 32")
    began = time.monotonic()
    for number, (notebook, seconds, error) in enumerate(run_all(notebooks), 1):
        result = (FOLDER / notebook.name).relative_to(ROOT)
        print(f"notebook {number:2} of {len(notebooks)}  {notebook.stem:30}", end="")
        if error:
            print(f"failed\n{error}\nsee {result}")
            return 1
        print(f"{seconds:4.0f} s  {result}", flush=True)
    minutes = (time.monotonic() - began) / 60
    print(f"done in {minutes:.1f} minutes: open runs/demo/*.ipynb (`make lab` does); the grids are runs/demo/*.png")
    return 0


def run_all(notebooks: list[Path]) -> Iterator[tuple[Path, float, str]]:
    """Run notebooks, and yield each as it ends with its seconds and its error, which is empty if there was none."""
    together = [notebook for notebook in reversed(notebooks) if notebook.stem not in ALONE]  # first 14, the longest
    alone = [notebook for notebook in notebooks if notebook.stem in ALONE]
    with ProcessPoolExecutor(AT_ONCE, initializer=_share_cores) as pool:
        try:
            for running in as_completed([pool.submit(run, notebook) for notebook in together]):
                yield running.result()
        finally:
            pool.shutdown(cancel_futures=True)
    for notebook in alone:
        yield run(notebook)


def _share_cores() -> None:
    """Let the kernels that this process starts use its share of the cores."""
    os.environ.setdefault("OMP_NUM_THREADS", str(CORES // AT_ONCE))


def run(notebook: Path) -> tuple[Path, float, str]:
    """Run a notebook, and return it with its seconds and its error."""
    start = time.monotonic()
    try:
        papermill.execute_notebook(
            notebook,
            FOLDER / notebook.name,
            cwd=FOLDER,
            progress_bar=False,
            kernel_name="python3",
            extra_arguments=QUIET_KERNEL,
        )
    except PapermillExecutionError as error:
        return notebook, time.monotonic() - start, f"{error.ename}: {error.evalue}"
    return notebook, time.monotonic() - start, ""


if __name__ == "__main__":
    sys.exit(main())
