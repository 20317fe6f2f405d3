"""A sweep: one image for every cell of a design, validated and planned first, then run together.

``run_sweep`` makes the images, ``steps`` makes them one U-Net call at a time, ``load_sweep`` reads them back from a
folder, and ``replay`` makes one again from its file.
"""

import warnings
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from diffusers import DiffusionPipeline
from PIL import Image

from decinb.designs import MAX_CELLS, Cell
from decinb.errors import InputError, Stopped, SweepError, reason
from decinb.execution.plan import make_plan
from decinb.execution.provenance import ImageRecord, distinguish_inputs
from decinb.execution.results import Results
from decinb.execution.runner import Runner, State, check_processes, is_shared
from decinb.execution.store import Images, Store
from decinb.figures import viewer
from decinb.figures.quiz import quiz
from decinb.images import Source
from decinb.sampling.adapters import adapter_of
from decinb.sampling.base import Adapter
from decinb.utils import validation
from decinb.utils.files import write_output
from decinb.utils.labels import ARGUMENTS, SELECTABLE, spreadsheet_cell
from decinb.utils.locks import pipeline_lock

if TYPE_CHECKING:
    import pandas


@dataclass
class Sweep:
    """The finished cells of a sweep.

    Attributes:
        image, prompt: of all cells that do not name their own.
        cells: as they were given.
        images: of the cells, in the same order; with a folder, each is read from there whenever it is accessed.
        records: of the images, in the same order: all arguments, the steps run, the seconds taken.
        folder: where the images are saved, or None.
    """

    image: Image.Image | None
    prompt: str
    cells: list[Cell] = field(default_factory=list)
    images: Sequence[Image.Image] = field(default_factory=list)
    records: list[ImageRecord] = field(default_factory=list)
    folder: Path | None = None

    def __len__(self) -> int:
        return len(self.cells)

    def select(self, **where: Any) -> "Sweep":
        """Return the part of the sweep with these values, as in ``select(seed=0, strength=[0.5, 0.75])``.

        Raises:
            InputError: an argument is not known, or has more than 100,000 values.
        """
        validation.known(where, SELECTABLE)
        wanted = {name: _several(value, name) for name, value in where.items()}
        kept = [
            i
            for i, record in enumerate(self.records)
            if all(_is_among(record[name], values) for name, values in wanted.items())
        ]
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
        """Return the records as a pandas DataFrame with one row per image."""
        import pandas  # slower to import than everything else, and needed only here

        rows = [_flatten(record) for record in self.records]
        return pandas.DataFrame(rows, columns=None if rows else list(ARGUMENTS))

    def to_csv(self, file: str | Path) -> Path:
        """Write the records as a UTF-8 CSV file with a header and one row per image; return its path."""
        file = validation.file(file)
        text = self.to_dataframe().map(spreadsheet_cell).rename(columns=spreadsheet_cell).to_csv(index=False)
        write_output(file, text.encode())
        return file

    def plot(self, *args: Any, **kwargs: Any) -> None:
        """Show the images as a labelled grid: see ``decinb.plotting.plot_sweep``."""
        from decinb.plotting import plot_sweep

        plot_sweep(self, *args, **kwargs)

    def explore(self, scores: Mapping[str, Sequence[float]] | None = None) -> viewer.Fragment:
        """Return a viewer for a notebook's output: a slider for each axis, a comparison of any two images, play.

        It needs no kernel, and where a notebook is not trusted, labelled images remain.

        Args:
            scores: more numbers to show of each cell, by name: one value per image, such as
                ``{"adherence": decinb.adherence(sweep.images, prompt)}``.

        Raises:
            InputError: the sweep is empty, or scores do not fit its images.
        """
        return viewer.Fragment(viewer.viewer(self.images, self.records, self.image, scores))

    def quiz(self, name: str, questions: int = 5, pairs: bool = False, seed: int = 0) -> viewer.Fragment:
        """Return questions for a notebook's output: guess which value made an image, see the answer, count the score.

        Args:
            name: the argument to guess, such as ``"strength"``.
            questions: how many, 1 to 20.
            pairs: ask instead which of two images, alike in everything else, has the larger value.
            seed: of the choice of images.

        Raises:
            InputError: the argument is not one in which the images differ.
        """
        return quiz(self.images, self.records, name, questions, pairs, seed)

    def to_html(self, file: str | Path, scores: Mapping[str, Sequence[float]] | None = None) -> Path:
        """Write the viewer as one HTML file that needs no network and holds the exact pixels; return its path.

        Args:
            file: where to write; its folder is created.
            scores: as for ``explore``.

        Raises:
            InputError: the sweep is empty, or scores do not fit its images.
        """
        file = validation.file(file)
        fragment = viewer.viewer(self.images, self.records, self.image, scores, lossless=True)
        write_output(file, viewer.page(self.prompt or file.stem, fragment).encode())
        return file


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
    max_rows: int | None = None,
    show: bool = False,
    *,
    pack: int | None = None,
) -> Sweep:
    """Make one image for every cell, many in each U-Net call, each exactly as if it had been made alone.

    Each cell starts from its own ``torch.Generator().manual_seed(seed)`` on the CPU, so every image can be made again
    alone. All cells are checked before the first one runs, and cells with the same result are computed once.

    With a folder, each image is saved as soon as it is finished, and images that are there already are not computed
    again: after an interruption, or to add cells, call this again. If the folder cannot be written to, a warning says
    so and images stay in memory.

    Under ``accelerate launch``, all processes share the cells through ``folder``. Otherwise a second thread with the
    same pipeline, or a second process in the same folder, waits until the first is done.

    Args:
        pipe: from ``load_pipeline``, or any diffusers pipeline that makes images from text, or from text and an
            image. Stable Diffusion pipelines (1, 2, XL, depth) are batched; any other makes one image after the
            other by its own call, and the sweep says so.
        image: anything that ``load_image`` takes; None for text to image.
        prompt: of all cells that do not name their own.
        cells: dicts with any of ``strength`` (above 0, at most 1), ``guidance_scale`` (0 to 10,000; 1 or less turns
            guidance off), ``num_inference_steps`` (1 to 999), ``prompt``, ``negative_prompt``, ``image`` and ``seed``
            (0 to 2**63 - 1). Text to image takes no strength and no image.
        seed: of all cells that do not name their own.
        negative_prompt: of all cells that do not name their own.
        folder: where every image is saved, as a PNG that also holds its record and its input.
        progress: show a progress bar.
        guidance_rescale: 0 to 1; None is the pipeline's default: 0.7 for text to image with DeciDiffusion, else 0.
        max_rows: the most rows in one U-Net call, 1 to 1,000; None chooses for the device and the image size.
        show: in a notebook, show a grid that fills while the sweep runs, with previews if there is an input.
        pack: the old name of ``max_rows``.

    Raises:
        InputError: an argument or a cell cannot be used; the message names it.
        SweepError: the sweep failed while it ran; its ``sweep`` holds what was finished before.
        Stopped: the sweep was interrupted. It is a ``KeyboardInterrupt``, so it ends the notebook's cell; its ``done``
            is a sweep of what was finished.
    """
    if pack is not None:
        warnings.warn(
            "run_sweep: pack is now called max_rows; the old name will be removed", DeprecationWarning, stacklevel=2
        )
        if max_rows is not None:
            raise InputError("pack is the old name of max_rows: give only max_rows")
        max_rows = validation.count(pack, "pack")
    elif max_rows is not None:
        max_rows = validation.count(max_rows, "max_rows")
    adapter = adapter_of(pipe)
    given = {"image": image, "prompt": prompt, "negative_prompt": negative_prompt, "seed": seed}
    with pipeline_lock(pipe):  # until the end, so that another thread's call waits
        running = _start(adapter, cells, given, folder, guidance_rescale, max_rows, progress, show)
        try:
            for _ in running:
                pass
        except KeyboardInterrupt as interrupt:
            raise running.stopped() from interrupt
        return running.sweep


def steps(
    pipe: DiffusionPipeline,
    image: Source | None,
    prompt: str,
    cells: Sequence[Cell],
    seed: int = 0,
    negative_prompt: str | None = None,
    folder: str | Path | None = None,
    guidance_rescale: float | None = None,
    max_rows: int | None = None,
) -> "Steps":
    """Run a sweep one U-Net call at a time: an iterator of what each cell has become.

    It does what ``run_sweep`` does, and makes the same images, while your own code decides what happens between two
    calls: show ``state.predicted``, stop, ask the user. All cells are checked at once, before the first step.

    Example::

        running = decinb.steps(pipe, image, prompt, [{"strength": 0.6}])
        for state in running:
            print(state.step, "of", state.steps, state.seconds_left)
        running.sweep.images[0]

    Args:
        pipe, image, prompt, cells, seed, negative_prompt, folder, guidance_rescale, max_rows: as for ``run_sweep``.

    Returns:
        An iterator of ``State``: ``cell``, ``step``, ``steps``, ``predicted``, ``image`` and ``seconds_left``. Cells
        that are computed together advance together. ``close()`` stops; ``sweep`` is what is finished by then.

    Raises:
        InputError: an argument or a cell cannot be used; the message names it.
        SweepError: from the iterator: the sweep failed while it ran.
    """
    max_rows = None if max_rows is None else validation.count(max_rows, "max_rows")
    given = {"image": image, "prompt": prompt, "negative_prompt": negative_prompt, "seed": seed}
    return _start(adapter_of(pipe), cells, given, folder, guidance_rescale, max_rows)


class Steps(Iterator[State]):
    """A sweep in progress, from ``steps``.

    Between two steps, the pipeline is free for other calls, and may be given another scheduler: the sweep keeps its
    own. A change of a network is noticed when an image ends, unless it is undone by then. Steps may be taken by
    different threads, one at a time.

    Attributes:
        plan: what the sweep takes, as ``plan`` returns it.
    """

    def __init__(self, runner: Runner, results: Results):
        self.plan = results.plan
        self._pipe, self._scheduler = runner.adapter.pipe, getattr(runner.adapter.pipe, "scheduler", None)
        self._results, self._steps = results, runner.steps()
        self._states: deque[State] = deque()  # of the last step, not yet taken

    def __next__(self) -> State:
        while not self._states:
            if (states := self.advance()) is None:
                raise StopIteration
            self._states.extend(states)
        return self._states.popleft()

    def advance(self) -> list[State] | None:
        """Take one step: start cells, advance all that are in progress by one U-Net call, or decode some.

        Returns:
            The states of these cells, which may be none; None when everything is finished.

        Raises:
            SweepError: the sweep failed.
        """
        with pipeline_lock(self._pipe), self._own_scheduler():
            try:
                return next(self._steps, None)
            except Exception as error:
                if isinstance(error, InputError) and not len(self._results):  # found only now, in folder or U-Net
                    raise
                raise SweepError(_describe_failure(self._results, error), self.sweep) from error

    @property
    def sweep(self) -> Sweep:
        """The finished cells."""
        folder = None if self._results.store is None else self._results.store.folder
        return Sweep(self.plan.image, self.plan.prompt, *self._results.in_order(), folder)

    def close(self) -> None:
        """Stop. What is fully denoised is still decoded and kept; the rest can be made later."""
        with pipeline_lock(self._pipe), self._own_scheduler():
            self._steps.close()

    def stopped(self) -> Stopped:
        """Stop as ``close`` does, and return the error that says how to go on."""
        self.close()
        self._results.save_again()
        return Stopped(_describe_stop(self._results), self.sweep)

    @contextmanager
    def _own_scheduler(self) -> Iterator[None]:
        """Give the pipeline the scheduler that was planned with, inside the ``with`` block."""
        before = getattr(self._pipe, "scheduler", None)
        if before is self._scheduler:
            yield
            return
        self._pipe.scheduler = self._scheduler
        try:
            yield
        finally:
            self._pipe.scheduler = before


def load_sweep(folder: str | Path) -> Sweep:
    """Read a folder of ``run_sweep``: every finished image, in the order in which the cells were given.

    Raises:
        InputError: the folder holds no sweep, or none of its images is finished.
    """
    store = Store(validation.folder(folder))
    paths, records, image = store.read()
    records = distinguish_inputs(records)
    return Sweep(image, records[0]["prompt"], [r["cell"] for r in records], Images(paths), records, store.folder)


def _start(
    adapter: Adapter,
    cells: Sequence[Cell],
    given: Cell,
    folder: str | Path | None,
    guidance_rescale: float | None,
    max_rows: int | None,
    progress: bool = False,
    show: bool = False,
) -> Steps:
    """Validate and plan a sweep; ``given`` holds the arguments of cells that do not name their own."""
    check_processes()
    if folder is None and is_shared():
        raise InputError("folder must be given when several processes share a sweep: they exchange images through it")
    store = None if folder is None else Store(validation.folder(folder))
    with pipeline_lock(adapter.pipe):  # for planning too, which reads the scheduler
        results = Results(make_plan(adapter, cells, given, guidance_rescale, store), store)
        return Steps(Runner(results, max_rows, progress, show), results)


def _describe_stop(results: Results) -> str:
    done = f"{len(results)} of {len(results.plan.cells)} cells are done"
    if results.store is None:
        return (
            f"{done}, and sys.last_value.done holds them; with folder=..., running a stopped sweep again goes on from "
            "where it was"
        )
    folder = str(results.store.folder)
    return f"{done} and saved; to go on, run this again; to see what is done, decinb.load_sweep({folder!r})"


def _describe_failure(results: Results, error: Exception) -> str:
    cells = results.in_progress
    named = "; ".join(f"cell {i} ({results.plan.label(i)})" for i in cells[:3]) or "the sweep"
    more = f" and {len(cells) - 3} more" if len(cells) > 3 else ""
    done = f"{len(results)} of {len(results.plan.cells)} cells are done and are in this error's `sweep`"
    return f"{named}{more} failed: {reason(error)}; {done}"


def _flatten(record: ImageRecord) -> dict[str, Any]:
    """Return the plain values of a record, and the versions of libraries, as one table row."""
    plain = {
        name: value for name, value in record.items() if value is None or isinstance(value, (bool, int, float, str))
    }
    return {**plain, **{f"{name}_version": version for name, version in record.get("versions", {}).items()}}


def _several(value: Any, name: str) -> Sequence[Any]:
    """Return the values that ``select`` was given: one, or those of a list, an array, a Series or a generator."""
    value = validation.plain_tensor(value, name) if torch.is_tensor(value) else value
    value = value.tolist() if hasattr(value, "tolist") else value  # of NumPy, torch and pandas
    if not isinstance(value, Iterable) or isinstance(value, (str, bytes)):
        return [value]
    return validation.bounded_list(iter(value), name, MAX_CELLS)


def _is_among(value: Any, wanted: Sequence[Any]) -> bool:
    """Return whether a value is one of those wanted; floats may differ by rounding."""
    if not isinstance(value, float):
        return any(validation.equal(value, one) for one in wanted)
    numbers = map(validation.real, wanted)
    return any(number is not None and abs(value - number) < 1e-6 for number in numbers)
