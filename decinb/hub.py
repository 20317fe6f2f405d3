"""A model from the hub: only the files that are used, all of one commit, and from the cache where no hub answers."""

from collections.abc import Callable
from pathlib import Path

from huggingface_hub import HfApi, constants, hf_hub_download, try_to_load_from_cache
from huggingface_hub.errors import (
    FileMetadataError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import validate_repo_id

from decinb.errors import ModelError

Choose = Callable[[list[str], Callable[[str], Path]], list[str]]
"""From a model's file names, and a way to get one, to the names wanted; or a ModelError that says what is missing."""

ANCHOR = "scheduler/scheduler_config.json"  # in every diffusers pipeline, and small


def is_model_id(name: str) -> bool:
    """Whether a name can be that of a model on the hub, ``owner/name``."""
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return "/" in name


def fetch(repo_id: str, revision: str | None, choose: Choose, timeout: float | None = None) -> Path:
    """Bring the wanted files of a model into the hub's cache.

    Args:
        repo_id: ``owner/name``.
        revision: a branch, tag or commit; None is the main branch.
        choose: picks the files; it may read small ones first, and refuse the model before large ones are fetched.
        timeout: seconds of silence after which the hub counts as out of reach; None takes ``HF_HUB_ETAG_TIMEOUT``.

    Returns:
        The folder with the files. The hub is asked first; where it fails, a complete copy in the cache will do.

    Raises:
        ModelError: with the true cause: no such model, gated, offline, out of reach, not the hub that answered.
    """
    timeout = timeout or constants.HF_HUB_ETAG_TIMEOUT
    try:
        listing = HfApi().model_info(repo_id, revision=revision, timeout=timeout)

        def read(name: str) -> Path:
            return Path(hf_hub_download(repo_id, name, revision=listing.sha, etag_timeout=timeout))

        for name in choose([file.rfilename for file in listing.siblings], read):
            read(name)
        # Files asked for by commit leave no note of which commit the branch is at, and an offline load looks there. So
        # one file is asked for by branch, and last: the note never points at half a model.
        hf_hub_download(repo_id, ANCHOR, revision=revision, etag_timeout=timeout)
        return read(ANCHOR).parents[1]
    except ModelError:
        raise
    except Exception as error:  # the network library's errors are not the hub's own, and differ between its versions
        if folder := _cached(repo_id, revision, choose):
            return folder
        raise ModelError(f"{repo_id} {_cause(error, repo_id, revision)}") from error


def _cached(repo_id: str, revision: str | None, choose: Choose) -> Path | None:
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
    return [path.relative_to(folder).as_posix() for path in folder.glob("*/*") if path.is_file()]


def _cause(error: Exception, repo_id: str, revision: str | None) -> str:
    if isinstance(error, LocalEntryNotFoundError) and isinstance(error.__cause__, Exception):
        error = error.__cause__  # "no network and not cached" is the hub library's summary; this is what happened
    hub = constants.ENDPOINT
    if isinstance(error, OfflineModeIsEnabled):
        return "is not in the cache, and HF_HUB_OFFLINE forbids to download it: unset that and load it once"
    if isinstance(error, GatedRepoError):
        return f"is gated: accept its licence at {hub}/{repo_id}, then run `hf auth login`"
    if isinstance(error, RepositoryNotFoundError):
        return f"was not found at {hub}, or it is private: check the name, or run `hf auth login`"
    if isinstance(error, RevisionNotFoundError):
        return f"has no revision {revision!r}"
    if isinstance(error, HfHubHTTPError):
        return f"is not in the cache, and {hub} answered {error.response.status_code}: try again later"
    if isinstance(error, (ValueError, TypeError, KeyError, FileMetadataError)):
        return f"is not in the cache, and what answers at {hub} is not the hub: a sign-in page, or a proxy?"
    reason = " ".join(f"{type(error).__name__}: {error}".split())
    if isinstance(error, OSError) and not isinstance(error, (ConnectionError, TimeoutError)):
        return f"could not be stored: {reason}"
    return f"is not in the cache, and {hub} cannot be reached ({reason})"
