"""Locate the files of a model: in a folder, in the hub's cache, or on the hub, from which they are downloaded."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

from decinb import models
from decinb.checkpoints import hub
from decinb.checkpoints.components import Contents, Files, find_components
from decinb.errors import InputError, ModelError
from decinb.models import MODELS, Model
from decinb.utils import validation

Locations = list[tuple[str, Path]]
"""The folders of a model, each with the prefix that its components' names get in the pipeline, ``""`` for the first."""

Answer = TypeVar("Answer")

Check = Callable[[Contents], None]
"""Raises an error to reject a model, after its small files are downloaded and before its weights are."""


def locate(
    name: str,
    model: Model,
    allow_pickle: bool = False,
    timeout: float | None = None,
    refresh: bool = False,
    check: Check | None = None,
) -> Locations:
    """Return the folders of a model; download what is not cached.

    A mirror replaces a source that no longer exists, or one that is not cached while the mirror is.

    Args:
        name: the name of the model, for messages.
        model: its sources, mirrors and extra sources.
        allow_pickle: accept weights that exist only as ``.bin``.
        timeout: seconds of silence after which the hub counts as unreachable.
        refresh: ask the hub for the newest version, and compare all files with its hashes.
        check: rejects the model before its weights are downloaded.

    Raises:
        InputError: a source is neither a ``Path`` nor a hub id.
        NotFoundError: a model that is not in ``MODELS`` does not exist on the hub.
        ModelError: the files cannot be downloaded; the message says why.
    """

    def fetch(one: Model) -> Path:
        if isinstance(one.source, Path):
            return one.source
        chooser = _file_chooser(one, allow_pickle, check)
        return hub.fetch(_hub_id(name, one), one.revision, chooser, timeout, refresh)

    return [
        (prefix, _from_first(name, source, mirrors, fetch, prefer_cached=not refresh))
        for prefix, source, mirrors in _sources(model)
    ]


def list_missing(name: str, model: Model, allow_pickle: bool = False) -> dict[str, int]:
    """Return the files of a model that are not in the cache, as ``owner/name/file``, each with its size in bytes.

    Arguments and errors as for ``locate``.
    """

    def ask(one: Model) -> dict[str, int]:
        if isinstance(one.source, Path):
            return {}
        repo_id = _hub_id(name, one)
        missing = hub.list_missing(repo_id, one.revision, _file_chooser(one, allow_pickle))
        return {f"{repo_id}/{file}": size for file, size in missing.items()}

    found: dict[str, int] = {}
    for _, source, mirrors in _sources(model):
        found |= _from_first(name, source, mirrors, ask, prefer_cached=False)
    return found


def _hub_id(name: str, model: Model) -> str:
    if not hub.is_model_id(str(model.source)):
        raise InputError(
            f"model: the source of {name!r}, {model.source!r}, is not a hub id 'owner/name'; give a folder as a "
            "pathlib.Path"
        )
    return str(model.source)


def _from_first(
    name: str, source: Model, mirrors: list[Model], ask: Callable[[Model], Answer], prefer_cached: bool
) -> Answer:
    """Return the answer for a source, or for the first of its mirrors that exists if the source does not."""
    if mirrors and prefer_cached and not _is_cached(source):
        cached = next(filter(_is_cached, mirrors), None)
        if cached is not None:
            return ask(cached)
    try:
        return ask(source)
    except hub.NotFoundError as error:
        if name not in MODELS:
            raise
        failures, not_found = [str(error)], error
    for mirror in mirrors:
        try:
            answer = ask(mirror)
        except ModelError as error:
            failures.append(str(error))
        else:
            validation.warn(f"{name}: {source.source} is gone from the hub; its copy {mirror.source} is used")
            return answer
    edit = f"if it has moved, edit {models.line_of(str(source.source))}"
    raise ModelError(f"{name}: {'; '.join(failures)}; {edit}") from not_found


def is_local(model: Model) -> bool:
    """Return whether every source of a model, or a mirror of it, is a folder or in the cache."""
    return all(any(map(_is_cached, [source, *mirrors])) for _, source, mirrors in _sources(model))


def _sources(model: Model) -> list[tuple[str, Model, list[Model]]]:
    """Return the prefix, the source and the mirrors of every group of components that lies in a folder of its own."""
    mirrors = [replace(model, source=mirror, revision=None) for mirror in model.mirrors]
    extra = [(prefix, replace(model, source=source, revision=None), []) for prefix, source in model.extra_sources]
    return [("", model, mirrors), *extra]


def _is_cached(model: Model) -> bool:
    if isinstance(model.source, Path):
        return True
    return hub.find_cached(model.source, model.revision, _file_chooser(model)) is not None


def _file_chooser(model: Model, allow_pickle: bool = False, check: Check | None = None) -> hub.ChooseFiles:
    """Return the function that selects the files of a model that are used."""

    def choose(names: list[str], read: Callable[[str], Path]) -> list[str]:
        files = Files(str(model.source), names, read)
        contents = find_components(files, allow_pickle or model.allow_pickle, model.variant)
        if check:
            check(contents)
        return contents.files

    return choose
