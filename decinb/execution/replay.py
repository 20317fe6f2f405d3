"""Make an image again from nothing but its PNG."""

from collections.abc import Sequence
from pathlib import Path

from diffusers import DiffusionPipeline
from PIL import Image

from decinb.errors import InputError
from decinb.execution import chains
from decinb.execution.chains import CHAIN, Link, _task
from decinb.execution.plan import read_cell
from decinb.execution.provenance import NEEDED, Record, check_weights, known_model, scheduler_of
from decinb.execution.runner import _ticks
from decinb.images import read_input, read_record
from decinb.loading import load_pipeline
from decinb.models import IMAGE_TO_IMAGE, TASKS, TEXT_TO_IMAGE
from decinb.sampling.adapters import check_image
from decinb.utils import validation
from decinb.utils.labels import ARGUMENTS
from decinb.utils.locks import pipeline_lock


def replay_chain(path: str | Path, pipe: DiffusionPipeline | Sequence[DiffusionPipeline] | None = None) -> Image.Image:
    """Make a picture of a chain again from nothing but its PNG: see ``decinb.replay``.

    Raises:
        InputError: the file is not such a PNG, or a pipeline has other weights than those that its link was made with.
    """
    record, where = read_record(path), str(path)
    links = record.get(CHAIN)
    if not isinstance(links, list) or not links or not all(isinstance(link, dict) for link in links):
        raise InputError(f"{where!r} tells of no chain: its links must be a list of at least one dict")
    for link in links:
        validation.known(chains.NEEDED, link, f"{where!r}: ")
    validation.known(["seed"], record, f"{where!r}: ")
    pipes = _pipes(links, pipe, where)
    for i, (one, link) in enumerate(zip(pipes, links, strict=True)):
        check_weights(one, link, f"link {i} of {where}")
    picture = read_input(path) if _task(pipes[0]) == IMAGE_TO_IMAGE else None
    schedulers = [scheduler_of(one, link, where) for one, link in zip(pipes, links, strict=True)]
    try:
        told = [{name: link[name] for name in chains.ARGUMENTS} for link in links]
        again = [Link(one, **arguments) for one, arguments in zip(pipes, told, strict=True)]
        steps = chains._read(again, picture is not None, schedulers)
        seed = validation.seed(record["seed"])
    except InputError as error:
        raise InputError(f"{where!r}: {error}") from error
    *_, last = chains._run(steps, picture, seed)
    return last.picture


def _pipes(
    links: Sequence[Record], pipe: DiffusionPipeline | Sequence[DiffusionPipeline] | None, where: str
) -> list[DiffusionPipeline]:
    """A pipeline for every link of a record, from those given or from models that are known by name."""
    tasks = [validation.choice(link["task"], f"{where!r}: task", TASKS) for link in links]
    if pipe is None:
        names = [known_model(link, where) for link in links]
        loaded = {name: load_pipeline(name, task=task) for name, task in dict(zip(names, tasks, strict=True)).items()}
        given = [loaded[name] for name in names]
    elif isinstance(pipe, Sequence):
        given = list(pipe)
        if len(given) != len(links):
            raise InputError(
                f"pipe must be one, or one for each of the {len(links)} links of {where!r}, got {len(given)}"
            )
    else:
        given = [pipe] * len(links)
    for one in given:
        if not isinstance(one, DiffusionPipeline):
            raise InputError(f"pipe must be a pipeline, as load_pipeline gives it, got {validation.short_repr(one)}")
    return [
        one if _task(one) == task else load_pipeline(one, task=task) for one, task in zip(given, tasks, strict=True)
    ]


def replay(path: str | Path, pipe: DiffusionPipeline | Sequence[DiffusionPipeline] | None = None) -> Image.Image:
    """Make an image again from nothing but its PNG.

    Args:
        path: a file that ``run_sweep`` or ``run_chain`` has written.
        pipe: the pipeline that made it; may be left out if it was a known one (a name in ``MODELS``). A chain takes a
            list with the pipeline of every link, or one that gives its parts to all.

    Raises:
        InputError: the file is not such a PNG, or the pipeline has other weights than those it was made with.
    """
    record = read_record(path)
    if CHAIN in record:
        return replay_chain(path, pipe)
    validation.known(NEEDED, record, f"{str(path)!r}: ")
    if pipe is None:
        task = TEXT_TO_IMAGE if record["image"] is None else IMAGE_TO_IMAGE
        pipe = load_pipeline(known_model(record, str(path)), task=task)
    check_weights(pipe, record, str(path))
    cell = {name: record[name] for name in ARGUMENTS if name != "image"}
    image = None if record["image"] is None else read_input(path)
    job = read_cell(cell, {**cell, "image": image}, lambda image: image, where=f"{str(path)!r}: ")
    check_image(pipe, job.image)
    with pipeline_lock(pipe):
        before = pipe.scheduler
        pipe.scheduler = scheduler_of(pipe, record, str(path))
        try:
            rescale = validation.fraction(record["guidance_rescale"], "guidance_rescale")
            done = [done for tick in _ticks(pipe, [job], None, rescale) for done in tick.done].pop()
        finally:
            pipe.scheduler = before
    if done.image is None:
        raise InputError(f"{str(path)!r}: {done.fault}")
    return done.image
