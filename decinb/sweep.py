"""A sweep: an image and a prompt, run once for every cell of a design, planned first and denoised together.

``run_sweep`` makes the images, ``load_sweep`` brings back what a folder holds, and ``replay`` makes one image again
from its file.
"""

import csv
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffusers import DiffusionPipeline
from PIL import Image

from decinb.designs import Cell
from decinb.errors import InputError
from decinb.execution.plan import plan
from decinb.execution.provenance import Record
from decinb.execution.runner import _is_shared, _Run
from decinb.execution.store import Images, Store
from decinb.images import Source
from decinb.sampling.adapters import check_pipe
from decinb.utils import validation
from decinb.utils.labels import ARGUMENTS, label
from decinb.utils.locks import pipeline_lock

if TYPE_CHECKING:
    import pandas


@dataclass
class Sweep:
    """What came out: cells as they were given, records of everything (arguments, steps, seconds), images; in one order.

    ``images`` is a sequence; where the sweep has a folder, each is read from there when it is asked for.
    """

    image: Image.Image | None
    prompt: str
    cells: list[Cell] = field(default_factory=list)
    images: Sequence[Image.Image] = field(default_factory=list)
    records: list[Record] = field(default_factory=list)
    folder: Path | None = None

    def __len__(self) -> int:
        return len(self.cells)

    def select(self, **where: Any) -> "Sweep":
        """The part of the sweep with these values: ``select(seed=0, strength=[0.5, 0.75])``.

        Raises:
            InputError: an argument is not known.
        """
        validation.known(where, [*ARGUMENTS, "steps_run"])
        several = (list, tuple, set, range)
        wanted = {name: value if isinstance(value, several) else [value] for name, value in where.items()}
        kept = [i for i, r in enumerate(self.records) if all(_among(r[name], some) for name, some in wanted.items())]
        sources = self.images.sources if isinstance(self.images, Images) else self.images
        return Sweep(
            self.image,
            self.prompt,
            [self.cells[i] for i in kept],
            Images([sources[i] for i in kept]),
            [self.records[i] for i in kept],
            self.folder,
        )

    def to_dataframe(self) -> "pandas.DataFrame":
        """The records as a table of pandas, a row for each image."""
        import pandas  # takes longer to import than everything else, and only this needs it

        return pandas.DataFrame([_flat(record) for record in self.records])

    def to_csv(self, file: str | Path) -> Path:
        """Write the records as a CSV file with a header, a row for each image."""
        file = Path(file)
        file.parent.mkdir(parents=True, exist_ok=True)
        rows = [_flat(record) for record in self.records]
        with open(file, "w", newline="", encoding="utf-8") as out:
            columns = dict.fromkeys(name for row in rows for name in row)  # records of several tasks differ in theirs
            writer = csv.DictWriter(out, list(columns or ARGUMENTS))
            writer.writeheader()
            writer.writerows(rows)
        return file

    def plot(self, *args: Any, **kwargs: Any) -> None:
        """Show the images as a labelled grid: see ``decinb.plotting.plot_sweep``."""
        from decinb.plotting import plot_sweep

        plot_sweep(self, *args, **kwargs)


class SweepError(RuntimeError):
    """A sweep broke while it ran. ``sweep`` holds everything that was finished before."""

    def __init__(self, message: str, sweep: Sweep):
        super().__init__(message)
        self.sweep = sweep


def run_sweep(
    pipe: DiffusionPipeline,
    image: Source | None,
    prompt: str,
    cells: Sequence[Cell],
    seed: int = 0,
    negative_prompt: str | None = None,
    folder: str | Path | None = None,
    progress: bool = True,
    guidance_rescale: float | None = None,
    pack: int | None = None,
    show: bool = False,
) -> Sweep:
    """Make one image for every cell, many in each U-Net call, each as if it had been made alone.

    Each cell starts from a fresh ``torch.Generator().manual_seed(seed)`` on the CPU, so any of them can be made again
    alone. All cells are checked before the first one runs; cells that come to the same computation run once. With a
    folder, each image is written there the moment it is finished, and what is there already is not made again: call
    it again after an interruption, or with more cells. Stopping the notebook cell returns what is done. Where the
    folder cannot be written to, a warning says so, and the images stay in memory.

    Under ``accelerate launch`` the processes share the cells, and ``folder`` is where they meet. Otherwise a second
    thread with the same pipeline, and a second process in the same folder, wait until the first is done.

    Args:
        pipe: from ``load_pipeline``, or any other that makes images from text, or from text and an image. Those of
            Stable Diffusion's kind (1, 2, XL, with depth) are packed; any other makes its images one after the other,
            by its own call, and the sweep says so.
        image: from ``load_image``, or what it takes; None where the pipeline makes images from text alone.
        prompt: what the picture should become; a cell's own ``prompt`` goes before it.
        cells: dicts with any of ``strength`` (above 0, at most 1), ``guidance_scale`` (0 or more; 1 or less switches
            guidance off), ``num_inference_steps`` (1 to 999), ``prompt``, ``negative_prompt``, ``image``, and ``seed``
            (0 to 2**63 - 1). Text to image has no strength and no image.
        seed: of every cell that names none.
        negative_prompt: of every cell that names none.
        folder: where every finished image is written at once, as a PNG with its record and its input inside.
        progress: show a bar.
        guidance_rescale: 0 to 1; None is the pipeline's own: 0.7 for text to image with DeciDiffusion, nothing else.
        pack: the most rows in a U-Net call; None suits it to the device and the images' size.
        show: in a notebook, show a grid that fills while the sweep runs, with previews where there is an input.

    Raises:
        InputError: a cell cannot run; the message names it.
        SweepError: the sweep broke while running; what was finished before is in its ``sweep``.
    """
    if folder is None and _is_shared():
        raise InputError("folder must be given where several processes share a sweep: it is where they meet")
    if pack is not None:
        pack = validation.count(pack, "pack")
    store = None if folder is None else Store(validation.folder(folder))
    check_pipe(pipe)
    with pipeline_lock(pipe):  # planning too: it reads the scheduler
        planned = plan(pipe, image, prompt, cells, seed, negative_prompt, folder, guidance_rescale, timed=False)
        return _run(_Run(pipe, planned, store, pack, progress, show))


def _run(run: "_Run") -> Sweep:
    planned = run.plan
    try:
        run.go()
    except KeyboardInterrupt:
        print(f"stopped: {len(run.made)} of {len(planned.cells)} cells are done")
    except Exception as error:
        if isinstance(error, InputError) and not run.made:  # found at the last door: the folder, or the U-Net
            raise
        sweep = run.result()
        under_way = "; ".join(f"cell {i} ({label(planned.records[i])})" for i in run.under_way[:3])
        more = f" and {len(run.under_way) - 3} more" if len(run.under_way) > 3 else ""
        done = f"{len(sweep)} of {len(planned.cells)} cells were done and are in this error's `sweep`"
        raise SweepError(f"{under_way or 'the sweep'}{more} failed: {error}; {done}", sweep) from error
    finally:
        if run.grid:
            with run._only_shown():
                run.grid.close()
    return run.result()


def load_sweep(folder: str | Path) -> Sweep:
    """Bring back what a folder of ``run_sweep`` holds: every finished image, in the order it was asked for.

    Raises:
        InputError: the folder holds no sweep, or none of its images is finished.
    """
    store = Store(folder)
    paths, records, image = store.read()
    return Sweep(image, records[0]["prompt"], [r["cell"] for r in records], Images(paths), records, store.folder)


def _is_plain(value: Any) -> bool:
    return value is None or isinstance(value, (bool, int, float, str))


def _flat(record: Record) -> dict[str, Any]:
    """The part of a record that fits into a table."""
    kept = {name: value for name, value in record.items() if _is_plain(value)}
    return {**kept, **{f"{name}_version": version for name, version in record.get("versions", {}).items()}}


def _among(value: Any, wanted: Iterable[Any]) -> bool:
    numeric = isinstance(value, float)
    return any(abs(value - one) < 1e-6 if numeric and isinstance(one, (int, float)) else value == one for one in wanted)


# --- the run ----------------------------------------------------------------------------------------------------------
