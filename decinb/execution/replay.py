"""Make an image again from nothing but its PNG."""

from collections.abc import Sequence
from pathlib import Path

from diffusers import DiffusionPipeline
from PIL import Image

from decinb.errors import InputError
from decinb.execution.chains import Link, read_links, run_calls
from decinb.execution.plan import make_job
from decinb.execution.provenance import (
    CHAIN,
    IMAGE_FIELDS,
    LINK_ARGUMENTS,
    LINK_FIELDS,
    ImageRecord,
    check_weights,
    known_model,
    restore_scheduler,
)
from decinb.images import read_input, read_record
from decinb.loading import load_pipeline
from decinb.models import IMAGE_TO_IMAGE, TASKS, TEXT_TO_IMAGE
from decinb.sampling.adapters import adapter_of
from decinb.utils import validation
from decinb.utils.locks import pipeline_lock


def replay(path: str | Path, pipe: DiffusionPipeline | Sequence[DiffusionPipeline] | None = None) -> Image.Image:
    """Make an image again from nothing but its PNG.

    Args:
        path: a file that ``run_sweep`` or ``run_chain`` has written.
        pipe: the pipeline that made it; may be left out if it is a known one (a name in ``MODELS``). For a chain, a
            list with the pipeline of every link, or one whose components all links use.

    Raises:
        InputError: the file is not such a PNG, or the pipeline has other weights than the one that made it.
    """
    record = read_record(path)
    return _replay_chain(path, record, pipe) if CHAIN in record else _replay_cell(path, record, pipe)


def _replay_cell(path: str | Path, record: ImageRecord, pipe: DiffusionPipeline | None) -> Image.Image:
    name = str(path)
    where = f"{name!r}: "
    validation.known(IMAGE_FIELDS, record, where)
    from_text = record["image"] is None
    if pipe is None:
        pipe = load_pipeline(known_model(record, name), task=TEXT_TO_IMAGE if from_text else IMAGE_TO_IMAGE)
    adapter = adapter_of(pipe)
    check_weights(pipe, record, name)
    image = None if from_text else read_input(path)
    job = make_job(record, image, where)
    adapter.check_image(image)
    rescale = validation.fraction(record["guidance_rescale"], "guidance_rescale")
    with pipeline_lock(pipe):
        before, pipe.scheduler = pipe.scheduler, restore_scheduler(adapter, record, name)
        try:
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
        validation.known(LINK_FIELDS, link, where)
    validation.known(["seed"], record, where)
    adapters = [adapter_of(one) for one in _pipelines(links, pipe, name)]
    for i, (adapter, link) in enumerate(zip(adapters, links, strict=True)):
        check_weights(adapter.pipe, link, f"link {i} of {name}")
    image = read_input(path) if adapters[0].task == IMAGE_TO_IMAGE else None
    schedulers = [restore_scheduler(adapter, link, name) for adapter, link in zip(adapters, links, strict=True)]
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


def _pipelines(
    links: Sequence[ImageRecord], pipe: DiffusionPipeline | Sequence[DiffusionPipeline] | None, name: str
) -> list[DiffusionPipeline]:
    """Return a pipeline for every link of a record: those given, or known models loaded by name."""
    tasks = [validation.choice(link["task"], f"{name!r}: task", TASKS) for link in links]
    if pipe is None:
        models = [known_model(link, name) for link in links]
        task_of = dict(zip(models, tasks, strict=True))
        loaded = {model: load_pipeline(model, task=task) for model, task in task_of.items()}
        pipes = [loaded[model] for model in models]
    elif isinstance(pipe, Sequence):
        pipes = list(pipe)
        if len(pipes) != len(links):
            raise InputError(
                f"pipe must be one, or one for each of the {len(links)} links of {name!r}, got {len(pipes)}"
            )
    else:
        pipes = [pipe] * len(links)
    return [
        one if adapter_of(one).task == task else load_pipeline(one, task=task)
        for one, task in zip(pipes, tasks, strict=True)
    ]
