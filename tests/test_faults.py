"""The ten faults that are promised to end well, where no other test file has a better place for them.

F1 and F10: also test_processes; F2: also test_sweep; F3: also test_denoise; F6: test_pipeline; F7: also test_hub.
"""

import time
from pathlib import Path

import pytest

import decinb
from tests.fake_hub import FakeHub, commit, publish, small_model
from tests.test_hub import NUMBERS, USED, WAIT_S, Child

UNET = "flexible_unet/diffusion_pytorch_model.safetensors"


# --- F7 and F8: the hub -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def published(tiny, tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("published")
    return publish(small_model(tiny, root / "saved"), root / "model")


@pytest.fixture(scope="module")
def hub(published):
    hub = FakeHub({})
    yield hub
    hub.stop()


@pytest.fixture(scope="module")
def child(hub, tmp_path_factory):
    child = Child(hub, tmp_path_factory.mktemp("cache"))
    yield child
    child.close()


@pytest.fixture
def repo(hub, published) -> str:
    """A repository of this test alone, with files that no other one has: equal ones would share their cache."""
    name = f"acme/fault-{next(NUMBERS)}"
    hub.repos[name] = published
    hub.misbehave.clear()
    hub.requests.clear()
    hub.sent.clear()
    return name


def sent(hub: FakeHub, repo: str) -> int:
    """How many bytes of the U-Net's file the hub has sent."""
    return hub.sent[f"/{repo}/resolve/{commit(repo)}/{UNET}"]


def test_a_download_that_is_cut_goes_on_where_it_was_when_it_is_run_again(hub, child, repo, published, happened):
    size = (published / UNET).stat().st_size
    hub.misbehave[f"{repo}/{UNET}"] = ["cut", 503]
    answer = child.ask(f"str(decinb.download({repo!r}))")
    assert answer["error"] == "ModelError" and "answered 503" in answer["message"]
    before = sent(hub, repo)
    assert before == size * 9 // 10

    answer = child.ask(f"str(decinb.download({repo!r}))")
    assert (Path(answer["value"]) / UNET).read_bytes() == (published / UNET).read_bytes()
    again = sent(hub, repo) - before
    assert again == size - before, "only what was missing"
    happened("F8", f"cut at 90%, and run again: {again / size:.0%} of the bytes were fetched")
    assert hub.fetched(repo) == USED
    assert not list(Path(answer["value"]).parents[1].rglob("*.part"))
    hub.requests.clear()
    assert "value" in child.load(repo) and not hub.requests, "load_pipeline finds it without a request"


def test_a_connection_that_breaks_now_and_then_is_gone_on_with_in_one_run(hub, child, repo, published, happened):
    hub.misbehave[f"{repo}/{UNET}"] = ["cut", "stall", "cut"]
    answer = child.load(repo)
    assert "value" in answer
    assert sent(hub, repo) == (published / UNET).stat().st_size
    happened("F8", "cut three times in one run: resumed each time, and complete")


def test_wrong_bytes_of_the_right_size_are_fetched_again(hub, child, repo, published, happened):
    hub.misbehave[f"{repo}/{UNET}"] = ["wrong"]
    assert "value" in child.load(repo)
    assert sent(hub, repo) == 2 * (published / UNET).stat().st_size
    happened("F8", "wrong bytes of the right size: found by SHA-256, deleted, fetched again, loaded")


def test_wrong_bytes_twice_are_an_error_and_do_not_stay(hub, child, repo, published, happened):
    hub.misbehave[f"{repo}/{UNET}"] = ["wrong", "wrong"]
    answer = child.load(repo)
    assert answer["error"] == "ModelError" and f"{repo}: {UNET} arrived twice with other bytes" in answer["message"]
    happened("F8", answer["message"].replace(repo, "acme/model"))
    assert "value" in child.load(repo)


def test_what_rotted_on_disk_is_found_and_fetched_again_by_download(hub, child, repo, published, happened):
    folder = Path(child.ask(f"str(decinb.download({repo!r}))")["value"])
    file = (folder / UNET).resolve()
    body = bytearray(file.read_bytes())
    body[-1] ^= 1
    file.write_bytes(body)
    hub.requests.clear()
    child.ask(f"str(decinb.download({repo!r}))")
    assert hub.fetched(repo) == {UNET}
    assert (folder / UNET).read_bytes() == (published / UNET).read_bytes()
    happened("F8", "a bit flipped in the cache: download() found the file by its SHA-256 and fetched it again")


@pytest.mark.parametrize("what", ["silent", "stall"])
def test_a_server_that_falls_silent_in_a_file_is_given_up(hub, child, repo, what, happened):
    hub.misbehave[f"{repo}/{UNET}"] = "silent" if what == "silent" else ["stall", "silent"]
    start = time.monotonic()
    answer = child.load(repo)
    assert answer["error"] == "ModelError" and "cannot be reached (ReadTimeout" in answer["message"]
    assert time.monotonic() - start < 5 * WAIT_S
    happened("F7", f"silence within a file, at a bound of {WAIT_S} s: {answer['message'].replace(repo, 'acme/model')}")


def test_a_name_that_leads_nowhere(tmp_path, hub, happened):
    child = Child(hub, tmp_path, HF_ENDPOINT="http://hub.invalid")
    answer = child.load("acme/model")
    child.close()
    assert answer["error"] == "ModelError" and "http://hub.invalid cannot be reached" in answer["message"]
    happened("F7", answer["message"])


def test_download_takes_names_and_brings_nothing_for_what_is_bundled():
    assert decinb.download("tiny") == decinb.MODELS["tiny"].source
    for name in ("tinny", "/tmp", None, 3):
        with pytest.raises(decinb.InputError, match="hub id"):
            decinb.download(name)
