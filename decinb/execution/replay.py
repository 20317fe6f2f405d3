"""Make an image again from nothing but its PNG."""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from PIL import Image

from decinb.errors import InputError, ModelError, reason
from decinb.execution.chains import ALIKE, MAX_LINKS, Link, read_links, run_calls
from decinb.execution.plan import examine, make_job
from decinb.execution.provenance import (
    CHAIN,
    IMAGE_FIELDS,
    LINK_ARGUMENTS,
    LINK_FIELDS,
    ImageRecord,
    active_adapters,
    check_fields,
    check_pipeline,
    lora_layers,
    mismatch,
    pipeline_record,
    recorded_model,
    restore_scheduler,
)
from decinb.images import Saved, read_saved
from decinb.loading import load_pipeline
from decinb.models import IMAGE_TO_IMAGE, TASKS, TEXT_TO_IMAGE
from decinb.runtimes.openvino import AUTOCAST, RUNTIMES
from decinb.sampling.adapters import adapter_of
from decinb.sampling.base import Adapter
from decinb.utils import validation
from decinb.utils.locks import pipeline_lock


def replay(path: str | Path, pipe: DiffusionPipeline | Sequence[DiffusionPipeline] | None = None) -> Image.Image:
    """Make an image again from nothing but its PNG: with the same weights, dtype, adapters, scheduler and arguments.

    Args:
        path: a file that ``run_sweep`` or ``run_chain`` has written.
        pipe: the pipeline that made it; may be left out if it is a known one (a name in ``MODELS``) that is on this
            machine: nothing is downloaded. For a chain, a list with the pipeline of every link, or one whose components
            all links use. Its adapters get the scales that the file names.

    Raises:
        InputError: the file is not such a PNG, or was changed; the pipeline is not the one that made it.
    """
    saved = read_saved(path)
    if wrong := mismatch(saved):
        raise InputError(f"{str(path)!r} was changed after decinb saved it: {wrong}")
    with _as_input_error(str(path)):
        return _replay_chain(path, saved, pipe) if CHAIN in saved.record else _replay_cell(path, saved, pipe)


@contextmanager
def _as_input_error(name: str) -> Iterator[None]:
    """Raise any error of the ``with`` block as an InputError: what fails is what the file says."""
    try:
        yield
    except (InputError, ModelError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        raise InputError(f"{name!r} cannot be made again: {reason(error)}") from error


def _input_image(saved: Saved, path: str | Path) -> Image.Image:
    if saved.input_image is None:
        raise InputError(f"{str(path)!r} does not contain the image that it was made from")
    return saved.input_image


def _replay_cell(path: str | Path, saved: Saved, pipe: DiffusionPipeline | None) -> Image.Image:
    name, record = str(path), saved.record
    where = f"{name!r}: "
    check_fields(record, IMAGE_FIELDS, where)
    image = None if record["image"] is None else _input_image(saved, path)
    if pipe is None:
        task = TEXT_TO_IMAGE if image is None else IMAGE_TO_IMAGE
        pipe = _load(recorded_model(record, name), record.get("dtype"), task)
    adapter = adapter_of(pipe)
    job = make_job(record, image, where)
    adapter.check_image(image)
    _check_class(adapter, record, name)
    # A sweep of a pipeline with code of the user is not packed, and more arguments decide its keys.
    either = [one.key_parts(job) for one in (adapter, adapter_of(pipe, why="the record"))]
    if record.get("decides", either[0]) not in either:
        raise InputError(f"{name!r} was changed after decinb saved it: its arguments do not match its key")
    rescale = validation.fraction(record["guidance_rescale"], "guidance_rescale")
    with pipeline_lock(pipe), _with_adapters(pipe, record):
        adapter, made_by = examine(adapter)
        check_pipeline(pipe, made_by, record, name)
        before, pipe.scheduler = pipe.scheduler, restore_scheduler(adapter, record, name)
        try:
            adapter.count_calls([job])  # refuses a scheduler that cannot run it
            (result,) = [result for step in adapter.run([job], None, rescale) for result in step.results]
        finally:
            pipe.scheduler = before
    if result.image is None:
        raise InputError(f"{where}{result.error}")
    return result.image


@contextmanager
def _with_adapters(pipe: DiffusionPipeline, record: ImageRecord) -> Iterator[None]:
    """Give a pipeline's adapters the scales that a record names, inside the ``with`` block."""
    wanted = record.get("adapters")
    if not wanted or not _have_scales(wanted) or _are_close(wanted, active_adapters(pipe)):
        yield  # nothing to change, or nothing that can be set: the weights are compared anyway
        return
    loaded = getattr(pipe, "get_list_adapters", dict)()
    known = {name for names in loaded.values() for name in names}
    if lacking := [name for name, _ in wanted if name not in known]:
        raise InputError(f"pipe lacks the adapter {validation.short_repr(lacking[0])}: load it first")
    layers = [
        (layer, dict(layer.scaling), layer._active_adapter, layer.disable_adapters) for layer in lora_layers(pipe)
    ]
    trained = [(weight, weight.requires_grad) for layer, *_ in layers for weight in layer.parameters()]
    try:
        pipe.enable_lora()
        pipe.set_adapters([name for name, _ in wanted], [scale for _, scale in wanted])
        yield
    finally:
        for layer, scaling, active, disabled in layers:
            layer.scaling.update(scaling)
            layer._active_adapter, layer._disable_adapters = active, disabled
        for weight, requires_grad in trained:
            weight.requires_grad_(requires_grad)


def _are_close(wanted: list, active: list) -> bool:
    """Return whether adapters have the same names and scales; earlier versions recorded six decimals of a scale."""
    return (
        _have_scales(active)
        and [name for name, _ in wanted] == [name for name, _ in active]
        and all(
            math.isclose(one, other, rel_tol=0, abs_tol=1e-6)
            for (_, one), (_, other) in zip(wanted, active, strict=True)
        )
    )


def _have_scales(adapters: Any) -> bool:
    """Return whether a record's adapters are a list of names with their scales."""
    pairs = isinstance(adapters, list) and all(isinstance(one, list) and len(one) == 2 for one in adapters)
    return pairs and all(isinstance(name, str) and isinstance(scale, (int, float)) for name, scale in adapters)


def _check_class(adapter: Adapter, record: ImageRecord, name: str) -> None:
    """Refuse a pipeline of another class than a record names: its call may do something else with the same parts."""
    decides = record.get("decides")
    said = decides.get("pipeline") if isinstance(decides, dict) else None
    said = record.get("pipeline") if said is None else said  # of a link
    if said in (None, adapter.name) or (said in ALIKE and adapter.name in ALIKE):
        return
    raise InputError(
        f"{name!r} was made by a {validation.short_repr(said)}, but pipe is a {adapter.name}, whose call may differ: "
        "give a pipeline of that class as pipe"
    )


def _replay_chain(
    path: str | Path, saved: Saved, pipe: DiffusionPipeline | Sequence[DiffusionPipeline] | None
) -> Image.Image:
    name, record = str(path), saved.record
    where = f"{name!r}: "
    links = record[CHAIN]
    if not isinstance(links, list) or not links or not all(isinstance(link, dict) for link in links):
        raise InputError(f"{where}the record's chain must be a list of at least one dict")
    if len(links) > MAX_LINKS:
        raise InputError(f"{where}the record's chain must have at most {MAX_LINKS} links, got {len(links)}")
    for link in links:
        check_fields(link, LINK_FIELDS, where)
    check_fields(record, ["seed"], where)
    adapters = [adapter_of(one) for one in _pipelines(links, pipe, name)]
    for i, (adapter, link) in enumerate(zip(adapters, links, strict=True)):
        _check_class(adapter, link, f"link {i} of {name}")
        check_pipeline(adapter.pipe, pipeline_record(adapter.pipe), link, f"link {i} of {name}")
    image = _input_image(saved, path) if adapters[0].task == IMAGE_TO_IMAGE else None
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


def _load(model: str, made_in: str | None, task: str) -> DiffusionPipeline:
    """Load a model as an image was made: in the dtype, or in the runtime, that its record names."""
    made_in = (
        made_in.partition(AUTOCAST)[0] if isinstance(made_in, str) else made_in
    )  # check_pipeline compares the rest
    if made_in in RUNTIMES:
        return load_pipeline(model, device="cpu", runtime=made_in, task=task)
    return load_pipeline(model, dtype=made_in, task=task)


def _pipelines(
    links: Sequence[ImageRecord], pipe: DiffusionPipeline | Sequence[DiffusionPipeline] | None, name: str
) -> list[DiffusionPipeline]:
    """Return a pipeline for every link of a record: those given, or known models loaded by name."""
    tasks = [validation.choice(link["task"], f"{name!r}: task", TASKS) for link in links]
    if pipe is None:
        models = [recorded_model(link, name) for link in links]
        wanted = [(model, link.get("dtype")) for model, link in zip(models, links, strict=True)]
        task_of = dict(zip(wanted, tasks, strict=True))
        loaded = {one: _load(*one, task) for one, task in task_of.items()}
        pipes = [loaded[one] for one in wanted]
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
