"""Make an image again from nothing but its PNG."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from diffusers import DiffusionPipeline, SchedulerMixin
from PIL import Image

from decinb.errors import InputError, ModelError, reason
from decinb.execution.chains import Link, read_links, run_calls
from decinb.execution.plan import make_job
from decinb.execution.provenance import (
    CHAIN,
    IMAGE_FIELDS,
    LINK_ARGUMENTS,
    LINK_FIELDS,
    ImageRecord,
    check_fields,
    check_weights,
    known_model,
    restore_scheduler,
)
from decinb.images import read_input, read_record
from decinb.loading import is_here, load_pipeline
from decinb.models import IMAGE_TO_IMAGE, MODELS, TASKS, TEXT_TO_IMAGE
from decinb.sampling.adapters import adapter_of
from decinb.sampling.base import Adapter
from decinb.utils import validation
from decinb.utils.locks import pipeline_lock

MAX_LINKS = 100  # of a chain in a file, which may be a stranger's: each can take minutes


def replay(path: str | Path, pipe: DiffusionPipeline | Sequence[DiffusionPipeline] | None = None) -> Image.Image:
    """Make an image again from nothing but its PNG.

    Args:
        path: a file that ``run_sweep`` or ``run_chain`` has written.
        pipe: the pipeline that made it; may be left out if it is a known one (a name in ``MODELS``) that is on this
            machine: nothing is downloaded. For a chain, a list with the pipeline of every link, or one whose components
            all links use.

    Raises:
        InputError: the file is not such a PNG, or the pipeline has other weights than the one that made it.
    """
    record = read_record(path)
    with _as_input_error(str(path)):
        return _replay_chain(path, record, pipe) if CHAIN in record else _replay_cell(path, record, pipe)


@contextmanager
def _as_input_error(name: str) -> Iterator[None]:
    """Raise any error of the ``with`` block as an InputError: what fails is what the file says."""
    try:
        yield
    except (InputError, ModelError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        raise InputError(f"{name!r} cannot be made again: {reason(error)}") from error


def _replay_cell(path: str | Path, record: ImageRecord, pipe: DiffusionPipeline | None) -> Image.Image:
    name = str(path)
    where = f"{name!r}: "
    check_fields(record, IMAGE_FIELDS, where)
    from_text = record["image"] is None
    if pipe is None:
        pipe = load_pipeline(_local_model(record, name), task=TEXT_TO_IMAGE if from_text else IMAGE_TO_IMAGE)
    adapter = adapter_of(pipe)
    check_weights(pipe, record, name)
    image = None if from_text else read_input(path)
    job = make_job(record, image, where)
    adapter.check_image(image)
    rescale = validation.fraction(record["guidance_rescale"], "guidance_rescale")
    with pipeline_lock(pipe):
        before, pipe.scheduler = pipe.scheduler, _scheduler(adapter, record, name)
        try:
            adapter.count_calls([job])  # refuses a scheduler that cannot run it
            (result,) = [result for step in adapter.run([job], None, rescale) for result in step.results]
        finally:
            pipe.scheduler = before
    if result.image is None:
        raise InputError(f"{where}{result.error}")
    return result.image


def _replay_chain(
    path: str | Path, record: ImageRecord, pipe: DiffusionPipeline | Sequence[DiffusionPipeline] | None
) -> Image.Image:
    name = str(path)
    where = f"{name!r}: "
    links = record[CHAIN]
    if not isinstance(links, list) or not links or not all(isinstance(link, dict) for link in links):
        raise InputError(f"{where}the record's chain must be a list of at least one dict")
    for link in links:
        check_fields(link, LINK_FIELDS, where)
    check_fields(record, ["seed"], where)
    if len(links) > MAX_LINKS:
        raise InputError(f"{where}the record has {len(links)} links, and at most {MAX_LINKS} are replayed")
    adapters = [adapter_of(one) for one in _pipelines(links, pipe, name)]
    for i, (adapter, link) in enumerate(zip(adapters, links, strict=True)):
        check_weights(adapter.pipe, link, f"link {i} of {name}")
    image = read_input(path) if adapters[0].task == IMAGE_TO_IMAGE else None
    schedulers = [_scheduler(adapter, link, name) for adapter, link in zip(adapters, links, strict=True)]
    again = [
        Link(adapter.pipe, **{argument: link[argument] for argument in LINK_ARGUMENTS})
        for adapter, link in zip(adapters, links, strict=True)
    ]
    try:
        calls = read_links(again, image is not None, schedulers)
        seed = validation.seed(record["seed"])
    except InputError as error:
        raise InputError(f"{where}{error}") from error
    *_, (output, _) = run_calls(calls, image, seed)
    return output.image


def _local_model(record: ImageRecord, name: str) -> str:
    """Return the known model that a record names; a file must not make decinb download anything.

    Raises:
        InputError: it is not a known model, or not on this machine.
    """
    model = known_model(record, name)
    if not is_here(MODELS[model]):
        raise InputError(
            f"{name!r} was made by {model}, which is not on this machine: load it with "
            f"decinb.load_pipeline({model!r}) and give it as pipe"
        )
    return model


def _scheduler(adapter: Adapter, record: ImageRecord, name: str) -> SchedulerMixin:
    """Return the scheduler that a record names, within bounds of time and memory.

    Raises:
        InputError: the pipeline cannot use it.
    """
    try:
        validation.scheduler_config(record["scheduler_config"])
    except InputError as error:
        raise InputError(f"{name!r}: {error}") from error
    return restore_scheduler(adapter, record, name)


def _pipelines(
    links: Sequence[ImageRecord], pipe: DiffusionPipeline | Sequence[DiffusionPipeline] | None, name: str
) -> list[DiffusionPipeline]:
    """Return a pipeline for every link of a record: those given, or known models loaded by name."""
    tasks = [validation.choice(link["task"], f"{name!r}: task", TASKS) for link in links]
    if pipe is None:
        models = [_local_model(link, name) for link in links]
        task_of = dict(zip(models, tasks, strict=True))
        loaded = {model: load_pipeline(model, task=task) for model, task in task_of.items()}
        pipes = [loaded[model] for model in models]
    elif isinstance(pipe, Sequence):
        pipes = list(pipe)
        if len(pipes) != len(links):
            raise InputError(
                f"pipe must be a pipeline, or one for each of the {len(links)} links of {name!r}, got {len(pipes)}"
            )
    else:
        pipes = [pipe] * len(links)
    return [
        one if adapter_of(one).task == task else load_pipeline(one, task=task)
        for one, task in zip(pipes, tasks, strict=True)
    ]
