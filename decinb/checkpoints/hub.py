"""A model from the hub: only the files that are used, all of one commit, whole, and from the cache once they are there.

No request waits for a silent server longer than a bound, and a download that broke is gone on with.
"""

import hashlib
import os
import re
from collections.abc import Callable
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
from huggingface_hub.utils import are_progress_bars_disabled as bar_is_off
from huggingface_hub.utils import build_hf_headers, hf_raise_for_status, validate_repo_id
from tqdm.auto import tqdm

from decinb.errors import InputError, ModelError
from decinb.utils.locks import file_lock

Choose = Callable[[list[str], Callable[[str], Path]], list[str]]
"""From a model's file names, and a way to get one, to the names wanted; or an error of ours that refuses the model."""

ANCHOR = "scheduler/scheduler_config.json"  # in every diffusers pipeline
CHUNK = 1 << 20  # bytes at once
MAX_TIMEOUT = 20.0  # seconds of silence that no setting can lengthen: a silent hub is given up within a minute


class NotFoundError(ModelError):
    """There is no such model on the hub, or not for everyone."""


def is_model_id(name: str) -> bool:
    """Whether a name can be that of a model on the hub, ``owner/name``."""
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return "/" in name


def fetch(
    repo_id: str, revision: str | None, choose: Choose, timeout: float | None = None, fresh: bool = False
) -> Path:
    """Bring the wanted files of a model into the hub's cache.

    A model that is there whole is taken as it is, and nothing is asked of the hub.

    Args:
        repo_id: ``owner/name``.
        revision: a branch, tag or commit; None is the main branch.
        choose: picks the files; it may read small ones first, and refuse the model before large ones are fetched.
        timeout: seconds of silence after which the hub counts as out of reach; None takes ``HF_HUB_ETAG_TIMEOUT``,
            at most ``MAX_TIMEOUT``.
        fresh: ask the hub for the newest version though there is one here, and compare all files with its hashes.

    Returns:
        The folder with the files.

    Raises:
        ModelError: with the true cause: no such model (a ``NotFoundError``), gated, offline, out of reach, not the hub
            that answered.
    """
    if not fresh and (folder := cached(repo_id, revision, choose)):
        return folder
    timeout = min(timeout or constants.HF_HUB_ETAG_TIMEOUT, MAX_TIMEOUT)
    try:
        listing = HfApi().model_info(repo_id, revision=revision, timeout=timeout)

        def read(name: str) -> Path:
            return _file(repo_id, name, listing.sha, timeout, check=fresh)

        for name in choose([file.rfilename for file in listing.siblings], read):
            read(name)
        if revision != listing.sha:
            # Which commit the branch is at, noted last, so that it never points at half a model.
            note = _storage(repo_id) / "refs" / (revision or constants.DEFAULT_REVISION)
            note.parent.mkdir(parents=True, exist_ok=True)
            note.write_text(listing.sha)
        return read(ANCHOR).parents[1]
    except (ModelError, InputError):  # of choose
        raise
    except Exception as error:  # the network library's errors are not the hub's own, and differ between its versions
        here = fresh and cached(repo_id, revision, choose)
        lead = "is here, but was not compared with the hub's" if here else "is not in the cache"
        gone = isinstance(error, (RepositoryNotFoundError, DisabledRepoError)) and not isinstance(error, GatedRepoError)
        kind = NotFoundError if gone else ModelError
        raise kind(f"{repo_id} {_cause(error, repo_id, revision, lead)}") from error


def _file(repo_id: str, name: str, commit: str, timeout: float, check: bool) -> Path:
    """A file in the cache, fetched if it is not there, and known to be what the hub says it is.

    It is done here, since the hub's library begins a broken download again from nothing, compares nothing but the size,
    and waits for minutes for a silent server. The cache is laid out as it documents: blobs by hash, and links to them.
    """
    here = try_to_load_from_cache(repo_id, name, revision=commit)
    if isinstance(here, str):
        blob = Path(here).resolve()  # which bears its hash as its name, unless the system has no links
        if not check or is_sound(blob, blob.name):
            return Path(here)
        Path(here).unlink()
        blob.unlink(missing_ok=True)
    url = hf_hub_url(repo_id, name, revision=commit)
    announced = get_hf_file_metadata(url, timeout=timeout)
    plain = all(re.fullmatch(r"\w[\w.-]*", part) for part in (announced.etag or "", commit, *name.split("/")))
    if announced.size is None or not plain:  # they become parts of a path here
        raise FileMetadataError("no size, or an ETag, commit or file name that is none")
    storage = _storage(repo_id)
    blob = storage / "blobs" / announced.etag
    lock = storage.parent / ".locks" / storage.name / f"{announced.etag}.lock"  # the library's own for this file
    pointer = storage / "snapshots" / commit / name
    for path in (blob, lock, pointer):
        path.parent.mkdir(parents=True, exist_ok=True)
    with file_lock(lock):
        if not blob.exists():
            _download(url, blob, announced.size, timeout, f"{repo_id}: {name}")
        if not pointer.exists():
            pointer.unlink(missing_ok=True)
            try:
                pointer.symlink_to(os.path.relpath(blob, pointer.parent))
            except OSError:  # a system without links
                os.replace(blob, pointer)
    return pointer


def _storage(repo_id: str) -> Path:
    return Path(constants.HF_HUB_CACHE) / repo_folder_name(repo_id=repo_id, repo_type="model")


def _download(url: str, blob: Path, size: int, timeout: float, what: str) -> None:
    """Bring a file under the name that is its hash. What a broken attempt has left is gone on with."""
    part = blob.with_name(f"{blob.name}.part")
    for _ in range(2):
        with tqdm(total=size, desc=what, unit="B", unit_scale=True, disable=bar_is_off(), leave=False) as bar:
            while True:
                before = _size(part)
                try:
                    _stream(url, part, timeout, bar)
                except Exception as error:
                    if _size(part) == before or isinstance(error, (HfHubHTTPError, OSError)):
                        raise  # nothing more came, or it is not the network: to try again is up to the user
                if _size(part) >= size or _size(part) == before:
                    break
        if _size(part) == size and is_sound(part, blob.name):
            os.replace(part, blob)
            return
        part.unlink(missing_ok=True)
    raise ModelError(
        f"{what} arrived twice with other bytes than {constants.ENDPOINT} announces, and was deleted: something on the "
        "way changes or cuts it; try another network"
    )


def _stream(url: str, part: Path, timeout: float, bar: tqdm) -> None:
    begun = _size(part)
    headers = {**build_hf_headers(), "Accept-Encoding": "identity"}
    if begun:
        headers["Range"] = f"bytes={begun}-"
    with get_session().stream("GET", url, headers=headers, timeout=timeout) as response:
        if response.status_code == 416:  # what is here is as long or longer: not a beginning
            part.unlink()
            return
        hf_raise_for_status(response)
        goes_on = response.status_code == 206
        bar.update((begun if goes_on else 0) - bar.n)
        with part.open("ab" if goes_on else "wb") as file:
            for chunk in response.iter_bytes():  # as it comes: of a fixed size, the last before a break is lost
                file.write(chunk)
                bar.update(len(chunk))


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def is_sound(file: Path, etag: str) -> bool:
    """Whether a file has the hash that the hub names it by: SHA-256 for large ones, that of git for small ones.

    True as well where the name is neither, as with some mirrors: then there is nothing to compare with.
    """
    if not re.fullmatch("[0-9a-f]{40}|[0-9a-f]{64}", etag):
        return True
    if not file.exists():
        return False
    digest = hashlib.sha256() if len(etag) == 64 else hashlib.sha1(f"blob {file.stat().st_size}\0".encode())
    with file.open("rb") as opened:
        while chunk := opened.read(CHUNK):
            digest.update(chunk)
    return digest.hexdigest() == etag


def cached(repo_id: str, revision: str | None, choose: Choose) -> Path | None:
    """The folder of a model that is in the cache whole, without a request; None if it is not."""
    path = try_to_load_from_cache(repo_id, ANCHOR, revision=revision)
    if not isinstance(path, str):
        return None
    folder = Path(path).parents[1]
    try:
        choose(names_in(folder), folder.joinpath)
    except ModelError:  # begun, not finished
        return None
    return folder


def names_in(folder: Path) -> list[str]:
    """The files of a model folder as the hub would list them, ``unet/config.json``."""
    files = (*folder.glob("*"), *folder.glob("*/*"))
    return [path.relative_to(folder).as_posix() for path in files if path.is_file()]


def _cause(error: Exception, repo_id: str, revision: str | None, lead: str) -> str:
    hub = constants.ENDPOINT
    if isinstance(error, OfflineModeIsEnabled):
        return f"{lead}, and HF_HUB_OFFLINE forbids to ask: unset that and run decinb.download({repo_id!r}) once"
    if isinstance(error, GatedRepoError):
        return f"is gated: accept its licence at {hub}/{repo_id}, then run `hf auth login`"
    if isinstance(error, RepositoryNotFoundError):
        return f"was not found at {hub}, or it is private: check the name, or run `hf auth login`"
    if isinstance(error, DisabledRepoError):
        return f"was disabled by {hub}: take another copy of it"
    if isinstance(error, RevisionNotFoundError):
        return f"has no revision {revision!r}: {hub}/{repo_id}/commits shows them"
    if isinstance(error, HfHubHTTPError):
        wait = error.response.headers.get("retry-after", "")
        when = f"in {wait} seconds" if wait.isdigit() else "later"
        why = {429: " (too many requests)"}.get(error.response.status_code, "")
        return f"{lead}, and {hub} answered {error.response.status_code}{why}: try again {when}"
    if isinstance(error, (ValueError, TypeError, KeyError, FileMetadataError)):
        return f"{lead}, and what answers at {hub} is not the hub: a sign-in page, or a proxy?"
    reason = " ".join(f"{type(error).__name__}: {error}".split())
    if isinstance(error, OSError) and not isinstance(error, (ConnectionError, TimeoutError)):
        return f"could not be stored: {reason}"
    return f"{lead}, and {hub} cannot be reached ({reason})"
