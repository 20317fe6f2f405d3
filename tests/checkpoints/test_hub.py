"""Models from the hub, with a real server on the loopback: what is downloaded, what is cached, and what goes wrong."""

import itertools
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

import decinb
from tests.helpers.fake_hub import DECOYS, USED, FakeHub, as_pickle, commit, digest, publish, small_model, write_json
from tests.helpers.processes import WAIT_S, Child

NUMBERS = itertools.count()


@pytest.fixture(scope="module")
def folders(tiny, tmp_path_factory) -> dict[str, Path]:
    """The repositories on the hub, by kind."""
    root = tmp_path_factory.mktemp("repos")
    saved = small_model(tiny, root / "saved")
    published = publish(saved, root / "published")

    pickled = Path(shutil.copytree(published, root / "pickled"))
    for component in ("flexible_unet", "vae", "text_encoder"):
        as_pickle(pickled, component)

    ordinary = Path(shutil.copytree(saved, root / "ordinary"))
    write_json(ordinary / "unet" / "config.json", {"_class_name": "UNet2DConditionModel", "sample_size": 64})

    decinb.load_pipeline(saved, device="cpu").save_pretrained(root / "shards", max_shard_size="500KB")
    return {path.name: path for path in root.iterdir()}


@pytest.fixture(scope="module")
def hub(folders) -> Iterator[FakeHub]:
    hub = FakeHub({f"acme/{name}": folder for name, folder in folders.items()})
    yield hub
    hub.stop()


@pytest.fixture(scope="module")
def cache(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def child(hub, cache) -> Iterator[Child]:
    child = Child(hub, cache)
    yield child
    child.close()


@pytest.fixture(scope="module")
def weights(folders) -> str:
    """The digest of every kind of repository: all have the same weights."""
    return digest(decinb.load_pipeline(folders["saved"], device="cpu"))


@pytest.fixture
def repo(hub, folders) -> str:
    """A published repository that only this test uses."""
    name = f"acme/model-{next(NUMBERS)}"
    hub.repos[name] = folders["published"]
    return name


def test_only_used_files_are_downloaded_and_only_once(hub, child, repo, weights, happened):
    assert child.load(repo) == {"value": weights, "warnings": []}
    assert hub.fetched(repo) == USED and not USED & set(DECOYS)

    hub.requests.clear()
    assert child.load(repo) == {"value": weights, "warnings": []}
    assert not hub.requests, "a request for a complete model"
    happened("F7", "a cached model loaded with 0 requests")


def test_a_dry_run_says_what_a_download_would_fetch_and_how_large_it_is(hub, child, repo, folders):
    hub.requests.clear()
    answer = child.ask(f"decinb.download({repo!r}, dry_run=True)")["value"]
    sizes = {f"{repo}/{name}": (folders["published"] / name).stat().st_size for name in USED}
    assert answer == sizes, answer
    assert all(name.endswith(".json") for name in hub.fetched(repo)), "only configurations are read for the answer"

    assert child.load(repo)["value"]
    assert child.ask(f"decinb.download({repo!r}, dry_run=True)")["value"] == {}
    assert child.ask("decinb.download('tiny', dry_run=True)")["value"] == {}
    missing = child.ask("decinb.download('acme/missing', dry_run=True)")
    assert missing["error"] == "NotFoundError" and "not found" in missing["message"]


def test_a_known_model_is_downloaded_from_its_pinned_commit(hub, child, folders):
    published = decinb.MODELS["decidiffusion-v1-0"]
    hub.repos[published.source] = folders["published"]
    hub.requests.clear()
    assert len(child.ask("decinb.download('decidiffusion-v1-0', dry_run=True)")["value"]) == len(USED)
    assert ("GET", f"/api/models/{published.source}/revision/{published.revision}") in hub.requests
    assert hub.fetched(published.source) and commit(published.source) == published.revision
    del hub.repos[published.source]


def test_a_cached_model_loads_without_a_server(hub, child, repo, weights, happened):
    child.load(repo)
    hub.stop()
    try:
        assert child.load(repo) == {"value": weights, "warnings": []}
        answer = child.load("acme/never-fetched")
        assert answer["error"] == "ModelError"
        assert f"acme/never-fetched is not in the cache, and {hub.url} cannot be reached" in answer["message"]
        happened("F7", answer["message"])
    finally:
        hub.start()


def test_offline(hub, child, repo, weights, happened):
    child.load(repo)
    hub.requests.clear()
    offline = "setattr(huggingface_hub.constants, 'HF_HUB_OFFLINE', {})"  # what the environment variable sets at import
    child.ask(offline.format(True))
    try:
        assert child.load(repo) == {"value": weights, "warnings": []}
        answer = child.load("acme/never-fetched")
    finally:
        child.ask(offline.format(False))
    assert "HF_HUB_OFFLINE" in answer["message"] and "decinb.download('acme/never-fetched')" in answer["message"]
    happened("F7", answer["message"])
    assert not hub.requests


def test_an_interrupted_download_is_not_a_model_and_resumes(hub, child, repo, weights):
    hub.misbehave[f"{repo}/text_encoder/model.safetensors"] = 404
    assert child.load(repo)["error"] == "ModelError"
    begun = hub.fetched(repo)
    assert "flexible_unet/diffusion_pytorch_model.safetensors" in begun
    hub.stop()
    try:
        assert "cannot be reached" in child.load(repo)["message"]
    finally:
        hub.start()

    hub.misbehave.clear()
    hub.requests.clear()
    assert child.load(repo)["value"] == weights
    assert hub.fetched(repo) == USED - begun


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (None, "was not found at {url}"),
        ("gated", "is gated: accept its licence at {url}/{repo}"),
        (503, "answered 503"),
        (429, "answered 429 (too many requests)"),
        ("html", "is not the hub: is there a sign-in page"),
        ("silent", "cannot be reached"),
    ],
)
def test_errors_give_the_reason(hub, child, repo, fault, message, happened):
    if fault is None:
        del hub.repos[repo]
    else:
        hub.misbehave[repo] = fault
    start = time.monotonic()
    answer = child.load(repo)
    assert answer["error"] == "ModelError"
    assert answer["message"].startswith(f"{repo} ") and "\n" not in answer["message"]
    assert message.format(url=hub.url, repo=repo) in answer["message"]
    assert time.monotonic() - start < 5 * WAIT_S
    happened("F7", answer["message"].replace(repo, "acme/model"))


def test_a_cached_model_loads_whatever_the_hub_does(hub, child, repo, weights):
    child.load(repo)
    for fault in (503, "html", "silent"):
        hub.misbehave[repo] = fault
        assert child.load(repo) == {"value": weights, "warnings": []}, fault


def test_revisions(hub, child, repo, weights):
    model = "Model({!r}, '', 128, 'day', '', revision={!r})"
    for revision, expected in ((commit(repo), {"value": weights}), ("v9", {"error": "ModelError"})):
        child.ask(f"MODELS.update(named={model.format(repo, revision)})")
        answer = child.load("named")
        assert expected.items() <= answer.items()
    assert answer["message"].startswith(f"{repo} has no revision 'v9': ")


def test_another_unet_is_rejected_before_its_weights_are_downloaded(hub, child):
    answer = child.load("acme/ordinary")
    assert answer["error"] == "ModelError" and "acme/ordinary has no flexible_unet" in answer["message"]
    assert all(name.endswith(".json") for name in hub.fetched("acme/ordinary"))


def test_shards(hub, child, weights):
    assert child.load("acme/shards") == {"value": weights, "warnings": []}
    assert "unet/diffusion_pytorch_model.safetensors.index.json" in hub.fetched("acme/shards")


def test_pickles_only_on_request_and_with_a_warning(hub, child, weights):
    answer = child.load("acme/pickled")
    assert answer["error"] == "ModelError" and "allow_pickle=True" in answer["message"]
    assert not any(name.endswith(".bin") for name in hub.fetched("acme/pickled")), "rejected before it is downloaded"

    answer = child.load("acme/pickled", allow_pickle=True)
    assert answer["value"] == weights
    (warning,) = answer["warnings"]
    assert "acme/pickled" in warning and "plain tensors only" in warning
    assert hub.fetched("acme/pickled") == {
        name.replace("/model.safetensors", "/pytorch_model.bin").replace(".safetensors", ".bin") for name in USED
    }
    assert "allow_pickle=True" in child.load("acme/pickled")["message"], "also from the cache"


def test_the_published_checkpoint_is_the_default_on_a_gpu(hub, child, folders):
    published = decinb.MODELS["decidiffusion-v1-0"].source
    hub.repos[published] = folders["published"]
    hub.misbehave[published] = "silent"
    find = "_find(None, IMAGE_TO_IMAGE, torch.device('cuda'), torch.float16, False)"
    find = f"(lambda found: [found.name, str(found.locations[0][1]), found.reason])({find})"
    name, _, reason = child.ask(find)["value"]
    assert name == "tiny" and "cannot be reached" in reason

    hub.misbehave.clear()
    hub.repos[published] = folders["pickled"]  # its entry in MODELS allows pickles
    name, folder, reason = child.ask(find)["value"]
    assert name == "decidiffusion-v1-0" and "GPU" in reason
    assert folder.endswith(commit(published))
