"""A sweep in a process of its own, which a test can kill."""

import multiprocessing
import sys
from multiprocessing.connection import Connection
from multiprocessing.context import BaseContext

import torch

import decinb
from decinb.benchmark.counting import count_unet_calls

IMAGES = 12
ROWS = (5 + 7 + 10) * (1 + 2) * 2  # of U-Net calls, for all cells one by one


def processes() -> BaseContext:
    """Return how to start processes: from one that has imported everything, where the system can."""
    if sys.platform == "win32":
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__, "decinb.loading", "decinb.execution.runner"])
    return context


def sweep_into(folder: str, told: Connection) -> None:
    """Tell that the sweep begins, run it, and tell how many images it has and how many rows were computed."""
    torch.set_num_threads(1)
    pipe = decinb.load_pipeline("tiny", device="cpu")
    cells = decinb.grid(strength=[0.5, 0.75, 1.0], guidance_scale=[1, 5], num_inference_steps=[10], seed=[0, 1])
    told.send("ready")
    with count_unet_calls(pipe) as count:
        sweep = decinb.run_sweep(pipe, "day", "a red house at night", cells, folder=folder, max_rows=4, progress=False)
    told.send((len(sweep), count.rows))


if __name__ == "__main__":  # each process that `accelerate launch` starts
    ours, theirs = multiprocessing.Pipe()
    sweep_into(sys.argv[1], theirs)
    ours.recv()
    images, rows = ours.recv()
    sys.stdout.write(f"finished {images} rows {rows}\n")  # in one write, because two processes print at once
