"""Download a model from the hub into the hub's cache, or find it there.

Only the files that are used are downloaded, all of one commit. Each is compared with the hash that the hub gives for
it, interrupted downloads resume, and no request waits longer than ``MAX_TIMEOUT`` for a silent server.

The hub's own client restarts an interrupted download from the beginning, compares only the size of a file, and can wait
for minutes; that is why files are downloaded here. The cache layout is the documented one of the client: files named by
their hash under ``blobs``, and links to them under ``snapshots/<commit>``. Other programs share it.
"""

import hashlib
import os
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub import (
    HfApi,
    constants,
    get_hf_file_metadata,
    get_session,
    hf_hub_url,
    try_to_load_from_cache,
)
from huggingface_hub.errors import (
    DisabledRepoError,
    FileMetadataError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.file_download import repo_folder_name
from huggingface_hub.utils import (
    are_progress_bars_disabled,
    build_hf_headers,
    hf_raise_for_status,
    validate_repo_id,
)
from tqdm.auto import tqdm

from decinb.errors import InputError, ModelError
from decinb.utils.locks import file_lock

ChooseFiles = Callable[[list[str], Callable[[str], Path]], list[str]]
"""Given the file names of a model and a function that returns the local path of one, return the names to download.

It may read small files first, and raise a ModelError or an InputError to reject the model.
"""

ANCHOR = "scheduler/scheduler_config.json"  # a file that every diffusers pipeline has
CHUNK_BYTES = 1 << 20
MAX_TIMEOUT = 20.0  # seconds of silence; an upper bound on HF_HUB_ETAG_TIMEOUT, so that errors come within a minute


class NotFoundError(ModelError):
    """The model does not exist on the hub, or is private or disabled."""


_here = threading.local()
_is_offline_mode = constants.is_offline_mode


def _is_offline_here() -> bool:
    return getattr(_here, "offline", False) or _is_offline_mode()


@contextmanager
def offline() -> Iterator[None]:
    """Let no request of the hub's client leave from this thread inside the ``with`` block.

    A configuration can name other models, which diffusers and transformers would look up.
    """
    constants.is_offline_mode = _is_offline_here  # the client asks it before each request
    before, _here.offline = getattr(_here, "offline", False), True
    try:
        yield
    finally:
        _here.offline = before


def is_model_id(name: str) -> bool:
    """Return whether a name has the form of a hub id, ``owner/name``."""
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return "/" in name


def list_files(folder: Path) -> list[str]:
    """Return the file names of a model folder as the hub would list them, such as ``"unet/config.json"``."""
    paths = (*folder.glob("*"), *folder.glob("*/*"))
    return [path.relative_to(folder).as_posix() for path in paths if path.is_file()]


def find_cached(repo_id: str, revision: str | None, choose: ChooseFiles) -> Path | None:
    """Return the folder of a model that is completely in the cache, else None. Makes no request."""
    path = try_to_load_from_cache(repo_id, ANCHOR, revision=revision)
    if not isinstance(path, str):
        return None
    folder = Path(path).parents[1]
    try:
        choose(list_files(folder), folder.joinpath)
    except ModelError:  # a file is missing: the download was not finished
        return None
    return folder


def fetch(
    repo_id: str, revision: str | None, choose: ChooseFiles, timeout: float | None = None, refresh: bool = False
) -> Path:
    """Return the folder of a model in the cache; download what is missing there.

    A model that is completely in the cache is used without a request.

    Args:
        repo_id: ``owner/name``.
        revision: a branch, tag or commit; None is the main branch.
        choose: selects the files to download.
        timeout: seconds of silence after which the hub counts as unreachable, at most ``MAX_TIMEOUT``; None uses
            ``HF_HUB_ETAG_TIMEOUT``.
        refresh: ask the hub for the newest version even if one is cached, and compare all files with its hashes.

    Raises:
        NotFoundError: the model does not exist, or is private or disabled.
        ModelError: it cannot be downloaded; the message says why (gated, offline, unreachable, not the hub, no space).
    """
    if not refresh and (folder := find_cached(repo_id, revision, choose)):
        return folder
    with _as_model_error(repo_id, revision, choose, refresh):
        return _fetch_from_hub(repo_id, revision, choose, _limit(timeout), refresh)


def list_missing(
    repo_id: str, revision: str | None, choose: ChooseFiles, timeout: float | None = None
) -> dict[str, int]:
    """Return the files that ``fetch`` would download, each with its size in bytes.

    The configurations that ``choose`` reads are downloaded for that, a few kilobytes. Arguments and errors as for
    ``fetch``.
    """
    timeout = _limit(timeout)
    with _as_model_error(repo_id, revision, choose, refresh=True):
        listing = HfApi().model_info(repo_id, revision=revision, timeout=timeout, files_metadata=True)
        sizes = {file.rfilename: file.size or 0 for file in listing.siblings}

        def is_missing(name: str) -> bool:
            return not isinstance(try_to_load_from_cache(repo_id, name, revision=listing.sha), str)

        missing_before = {name for name in sizes if is_missing(name)}
        chosen = choose(list(sizes), lambda name: _fetch_file(repo_id, name, listing.sha, timeout, False))
        return {name: sizes[name] for name in chosen if name in missing_before}


def _limit(timeout: float | None) -> float:
    return min(timeout or constants.HF_HUB_ETAG_TIMEOUT, MAX_TIMEOUT)


@contextmanager
def _as_model_error(repo_id: str, revision: str | None, choose: ChooseFiles, refresh: bool) -> Iterator[None]:
    """Raise what goes wrong in the ``with`` block as a ModelError of one line."""
    try:
        yield
    except (ModelError, InputError):
        raise
    except Exception as error:  # the errors of the HTTP library are not the hub client's own, and change with versions
        is_cached = refresh and find_cached(repo_id, revision, choose)
        state = "is cached, but could not be compared with the hub" if is_cached else "is not in the cache"
        is_gone = isinstance(error, (RepositoryNotFoundError, DisabledRepoError))
        kind = NotFoundError if is_gone and not isinstance(error, GatedRepoError) else ModelError
        raise kind(f"{repo_id} {_reason(error, repo_id, revision, state)}") from error


def _fetch_from_hub(
    repo_id: str, revision: str | None, choose: ChooseFiles, timeout: float, verify_cached: bool
) -> Path:
    listing = HfApi().model_info(repo_id, revision=revision, timeout=timeout)
    commit = listing.sha

    def read(name: str) -> Path:
        return _fetch_file(repo_id, name, commit, timeout, verify_cached)

    for name in choose([file.rfilename for file in listing.siblings], read):
        read(name)
    if revision != commit:
        # The branch's commit is saved last, so that it never refers to an incomplete model.
        reference = _cache_folder(repo_id) / "refs" / (revision or constants.DEFAULT_REVISION)
        reference.parent.mkdir(parents=True, exist_ok=True)
        reference.write_text(commit)
    return read(ANCHOR).parents[1]


def _fetch_file(repo_id: str, name: str, commit: str, timeout: float, verify_cached: bool) -> Path:
    """Return the path of a file in the cache; download it if it is missing, or damaged and ``verify_cached`` is set."""
    cached = try_to_load_from_cache(repo_id, name, revision=commit)
    if isinstance(cached, str):
        blob = Path(cached).resolve()  # named by its hash, except on a system without links
        if not verify_cached or matches_hash(blob, blob.name):
            return Path(cached)
        Path(cached).unlink()
        blob.unlink(missing_ok=True)

    url = hf_hub_url(repo_id, name, revision=commit)
    metadata = get_hf_file_metadata(url, timeout=timeout)
    path_parts = (metadata.etag or "", commit, *name.split("/"))  # from the server, and used in paths below
    if metadata.size is None or not all(re.fullmatch(r"\w[\w.-]*", part) for part in path_parts):
        raise FileMetadataError("the size is missing, or the ETag, the commit or the file name is not valid")

    folder = _cache_folder(repo_id)
    blob = folder / "blobs" / metadata.etag
    link = folder / "snapshots" / commit / name
    lock = folder.parent / ".locks" / folder.name / f"{metadata.etag}.lock"  # the one that the hub's client uses
    for path in (blob, link, lock):
        path.parent.mkdir(parents=True, exist_ok=True)
    with file_lock(lock):
        if not blob.exists():
            _download(url, blob, metadata.size, timeout, f"{repo_id}: {name}")
        if not link.exists():
            link.unlink(missing_ok=True)  # it may be a broken link
            try:
                link.symlink_to(os.path.relpath(blob, link.parent))
            except OSError:  # a system without links
                os.replace(blob, link)
    return link


def _cache_folder(repo_id: str) -> Path:
    return Path(constants.HF_HUB_CACHE) / repo_folder_name(repo_id=repo_id, repo_type="model")


def _download(url: str, blob: Path, size: int, timeout: float, label: str) -> None:
    """Download a file to ``blob``, which is named by its hash. If the hash differs, download it once more."""
    part = blob.with_name(f"{blob.name}.part")
    for _ in range(2):
        part.touch()
        with tqdm(
            total=size, desc=label, unit="B", unit_scale=True, disable=are_progress_bars_disabled(), leave=False
        ) as bar:
            _resume(url, part, size, timeout, bar)
        if part.stat().st_size == size and matches_hash(part, blob.name):
            os.replace(part, blob)
            return
        part.unlink()
    raise ModelError(
        f"{label} was downloaded twice, but its bytes are not those that {constants.ENDPOINT} announces, so it was "
        "deleted: something in between changes or truncates it; try another network"
    )


def _resume(url: str, part: Path, size: int, timeout: float, bar: tqdm) -> None:
    """Append to a partial file until it has ``size`` bytes, in several requests if connections break.

    Stops where a request brings nothing more.
    """
    while (before := part.stat().st_size) < size:
        try:
            _append(url, part, timeout, bar)
        except (HfHubHTTPError, OSError):  # an answer of the hub, or a full disk: trying again would not help
            raise
        except Exception:  # a broken connection, in the terms of the HTTP library
            if part.stat().st_size <= before:
                raise
        if part.stat().st_size <= before:
            return


def _append(url: str, part: Path, timeout: float, bar: tqdm) -> None:
    """Request the missing bytes of a partial file, and write each as it arrives."""
    offset = part.stat().st_size
    headers = {**build_hf_headers(), "Accept-Encoding": "identity"}
    if offset:
        headers["Range"] = f"bytes={offset}-"
    with get_session().stream("GET", url, headers=headers, timeout=timeout) as response:
        if response.status_code == 416:  # there are no such bytes: the partial file is not the start of this one
            part.write_bytes(b"")
            return
        hf_raise_for_status(response)
        is_partial = response.status_code == 206  # else the server sends the whole file
        bar.update((offset if is_partial else 0) - bar.n)
        with part.open("ab" if is_partial else "wb") as file:
            for chunk in response.iter_bytes():  # of any size: with a fixed one, the last bytes before a break are lost
                file.write(chunk)
                bar.update(len(chunk))


def matches_hash(file: Path, etag: str) -> bool:
    """Return whether a file has the hash that is its ETag: SHA-256 for large files, git's SHA-1 for small ones.

    True also if the ETag is neither, as on some mirrors: then there is nothing to compare with.
    """
    if not re.fullmatch("[0-9a-f]{40}|[0-9a-f]{64}", etag):
        return True
    if not file.exists():
        return False
    digest = hashlib.sha256() if len(etag) == 64 else hashlib.sha1(f"blob {file.stat().st_size}\0".encode())
    with file.open("rb") as opened:
        while chunk := opened.read(CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest() == etag


def _reason(error: Exception, repo_id: str, revision: str | None, state: str) -> str:
    """Return, in one line, why a model could not be downloaded and what to do about it.

    Args:
        state: what is known of the model in the cache; the start of the line where the hub said nothing about it.
    """
    hub = constants.ENDPOINT
    if isinstance(error, OfflineModeIsEnabled):
        return f"{state}, and HF_HUB_OFFLINE is set: unset it and run decinb.download({repo_id!r}) once"
    if isinstance(error, GatedRepoError):
        return f"is gated: accept its licence at {hub}/{repo_id}, then run `hf auth login`"
    if isinstance(error, RepositoryNotFoundError):
        return f"was not found at {hub}, or it is private: check the name, or run `hf auth login`"
    if isinstance(error, DisabledRepoError):
        return f"is disabled at {hub}: use another copy of it"
    if isinstance(error, RevisionNotFoundError):
        return f"has no revision {revision!r}: see {hub}/{repo_id}/commits"
    if isinstance(error, HfHubHTTPError):
        wait = error.response.headers.get("retry-after", "")
        when = f"in {wait} seconds" if wait.isdigit() else "later"
        status = error.response.status_code
        why = " (too many requests)" if status == 429 else ""
        return f"{state}, and {hub} answered {status}{why}: try again {when}"
    if isinstance(error, (ValueError, TypeError, KeyError, FileMetadataError)):
        return f"{state}, and the server at {hub} is not the hub: is there a sign-in page or a proxy in between?"
    cause = " ".join(f"{type(error).__name__}: {error}".split())
    if isinstance(error, OSError) and not isinstance(error, (ConnectionError, TimeoutError)):
        return f"could not be saved: {cause}"
    return f"{state}, and {hub} cannot be reached ({cause})"
