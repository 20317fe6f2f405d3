"""The ten faults that are promised to end well, where no other test file has a better place for them.

F1 and F10: also test_processes; F2: also test_sweep; F3: also test_batched; F6: test_loading; F7: also test_hub.
"""

import itertools
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from contextlib import contextmanager
from pathlib import Path

import nbformat
import numpy as np
import pytest
import torch
from diffusers import StableDiffusionImg2ImgPipeline
from nbclient import NotebookClient
from torch import nn

import decinb
from decinb import ModelError, SweepError, load_sweep, run_sweep
from tests.helpers.fake_hub import USED, FakeHub, commit, publish, small_model
from tests.helpers.processes import WAIT_S, Child
from tests.helpers.sweeps import as_ours

PROMPT = "a red house on snow at night"
QUICK = {"num_inference_steps": 2, "strength": 1.0, "guidance_scale": 1.0}
IMAGE = decinb.load_image("day", size=64)
NUMBERS = itertools.count()
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
    assert answer["error"] == "ModelError" and f"{repo}: {UNET} was downloaded twice" in answer["message"]
    happened("F8", answer["message"].replace(repo, "acme/model"))
    assert "value" in child.load(repo)


def test_a_hub_cannot_name_a_file_outside_of_the_cache(hub, child, repo):
    hub.misbehave[f"{repo}/{UNET}"] = "outside"
    answer = child.load(repo)
    assert answer["error"] == "ModelError" and "is not the hub" in answer["message"]
    assert UNET not in hub.fetched(repo)


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


# --- F3: out of memory ------------------------------------------------------------------------------------------------


@contextmanager
def hooked(module, hook):
    handle = module.register_forward_hook(as_ours(hook))
    try:
        yield
    finally:
        handle.remove()


def test_where_not_one_row_fits_the_cell_is_named_and_the_model_stays_usable(tiny, happened):
    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")

    cells = [{**QUICK, "seed": seed} for seed in range(2)]
    with hooked(tiny.unet, full), pytest.raises(SweepError, match="cell 0 .*CUDA out of memory") as caught:
        run_sweep(tiny, IMAGE, PROMPT, cells, progress=False)
    assert len(run_sweep(tiny, IMAGE, PROMPT, cells, progress=False)) == 2
    happened("F3", caught.value)


# --- F4: numbers that are none ----------------------------------------------------------------------------------------


def poison(_, __, output):
    (output if torch.is_tensor(output) else output[0]).fill_(float("nan"))


@pytest.mark.parametrize("output_type", ["pil", "np", "latent"])
def test_the_pipeline_gives_an_error_and_no_black_picture(tiny, output_type, happened):
    options = {"prompt": PROMPT, "image": IMAGE, "strength": 1.0, "num_inference_steps": 3, "output_type": output_type}
    calls = []

    def poison_second(module, args, output):
        calls.append(1)
        if len(calls) == 2:
            poison(module, args, output)

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with (
            hooked(tiny.unet, poison_second),
            pytest.raises(ModelError, match="the U-Net.*at step 2 of 3") as caught,
        ):
            tiny(**options)
        happened("F4", caught.value)
        if output_type != "latent":
            with (
                hooked(tiny.vae.decoder, poison),
                pytest.raises(ModelError, match="VAE's decoder returned NaN or infinity, after step 3") as caught,
            ):
                tiny(**options)
            happened("F4", caught.value)
        tiny(**options)


def test_a_callback_of_the_users_is_called_as_it_was_and_may_return_nothing(tiny):
    seen = []

    def callback(pipe, step, timestep, tensors):
        seen.append((pipe is tiny, step, sorted(tensors)))

    options = {"prompt": PROMPT, "image": IMAGE, "strength": 1.0, "num_inference_steps": 2, "output_type": "latent"}
    tiny(**options, callback_on_step_end=callback, callback_on_step_end_tensor_inputs=["prompt_embeds"])
    assert seen == [(True, 0, ["prompt_embeds"]), (True, 1, ["prompt_embeds"])]
    with pytest.raises(ModelError, match="at step 1 of 2"):
        tiny(**options, callback_on_step_end=lambda pipe, step, timestep, tensors: {"latents": tensors["latents"] / 0})


def test_a_sweep_writes_no_file_for_what_is_no_numbers(tiny, tmp_path, happened):
    with hooked(tiny.unet, poison), pytest.warns(UserWarning, match="the U-Net returned NaN.*at step 1 of 2") as caught:
        sweep = run_sweep(tiny, IMAGE, PROMPT, [QUICK], folder=tmp_path, progress=False)
    assert len(sweep) == 0 and not list(tmp_path.glob("*.png"))
    happened("F4", caught[0].message)


def test_a_vae_that_overflows_in_half_precision_decodes_in_float32(happened):
    pipe = decinb.load_pipeline("tiny", device="cpu", dtype="bfloat16")

    def overflow(module, args, output):
        if output.dtype != torch.float32:
            output.fill_(float("inf"))

    with hooked(pipe.vae.decoder, overflow):
        sweep = run_sweep(pipe, IMAGE, PROMPT, [QUICK], progress=False)
    assert np.asarray(sweep.images[0]).std() > 5
    assert pipe.vae.dtype == torch.bfloat16
    happened("F4", "a VAE that overflows in half precision: decoded once more in float32, a good picture")


class Prude(nn.Module):
    """Takes everything for unsafe, as a safety checker does: it paints it black."""

    device, dtype = torch.device("cpu"), torch.float32

    def __init__(self):
        super().__init__()
        self.register_buffer("rule", torch.ones(1))

    def forward(self, images, clip_input):
        return torch.zeros_like(images), [True] * len(images)


def test_the_black_of_a_safety_checker_is_told_from_nan(tiny, tmp_path, happened):
    pipe = StableDiffusionImg2ImgPipeline(**tiny.components, requires_safety_checker=False)
    pipe.safety_checker = Prude()

    class Features(dict):
        pixel_values = torch.zeros(1)

        def to(self, device):
            return self

    pipe.feature_extractor = lambda images, return_tensors: Features()
    with pytest.warns(UserWarning, match="black, because the safety checker judged it unsafe") as caught:
        sweep = run_sweep(pipe, IMAGE, PROMPT, [QUICK], folder=tmp_path, progress=False)
    assert sweep.records[0]["blacked_out"] and not np.asarray(sweep.images[0]).any()
    assert load_sweep(tmp_path).records[0]["blacked_out"]
    assert not run_sweep(tiny, IMAGE, PROMPT, [QUICK], progress=False).records[0]["blacked_out"]
    happened("F4", caught[0].message)


# --- F5: a disk that takes nothing ------------------------------------------------------------------------------------

SWEEP = """
import os, resource, sys, tempfile, warnings, torch, decinb
torch.set_num_threads(1)
folder, fault = sys.argv[1:]
pipe = decinb.load_pipeline("tiny", device="cpu")
image = decinb.load_image("day")
if fault == "full":  # no file may grow beyond this: the manifest fits, a picture does not
    resource.setrlimit(resource.RLIMIT_FSIZE, (8192, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
elif os.geteuid() == 0:
    with tempfile.TemporaryDirectory() as other:  # imports what other users may not read
        decinb.run_sweep(pipe, image, "a red house", [{"strength": 0.1}], folder=other, progress=False)
    os.seteuid(65534)  # what is read-only for others is not for root
cells = decinb.grid(seed=[0, 1], strength=[1.0], num_inference_steps=[2], guidance_scale=[1.0])
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    sweep = decinb.run_sweep(pipe, image, "a red house", cells, folder=folder, progress=False)
for warning in caught:
    print("warning:", warning.message)
print("images:", len(sweep), {image.size for image in sweep.images}, os.listdir(folder) if fault == "full" else "")
if fault == "full":  # there is room again: only what is missing is written, and then all is there
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
    decinb.run_sweep(pipe, image, "a red house", cells, folder=folder, progress=False)
    print("then:", len(decinb.load_sweep(folder)))
"""


@pytest.mark.skipif(os.name != "posix", reason="limits and users as POSIX has them")
@pytest.mark.parametrize("fault", ["full", "read-only"])
def test_a_folder_that_takes_nothing_stops_no_sweep(fault, happened):
    place = Path(tempfile.mkdtemp())  # pytest's own is closed to other users
    folder = place / "made"
    folder.mkdir()
    try:
        place.chmod(0o755)
        folder.chmod(0o755 if fault == "full" else 0o555)
        run = subprocess.run(
            [sys.executable, "-c", SWEEP, str(folder), fault], capture_output=True, text=True, timeout=120
        )
    finally:
        shutil.rmtree(place)
    assert run.returncode == 0, run.stderr
    lines = run.stdout.splitlines()
    (warning,) = [line for line in lines if line.startswith("warning: ")]
    reason = {"full": "File too large", "read-only": "Permission denied"}[fault]
    assert f"made' cannot be written to ({reason})" in warning and "stays in memory" in warning
    images = next(line for line in lines if line.startswith("images: "))
    assert images.startswith("images: 2 {(128, 128)}") and ".png" not in images and ".part" not in images
    if fault == "full":
        assert lines[-1] == "then: 2"
    happened("F5", f"{warning.removeprefix('warning: ')} (2 of 2 images came back)")


def test_a_folder_that_recovers_has_everything_in_the_end(tiny, tmp_path, happened):
    folder, hidden = tmp_path / "drive", tmp_path / "elsewhere"
    cells = [{**QUICK, "seed": seed} for seed in range(6)]
    decoded = []

    def lose_and_find(*_):  # the folder is gone while the first pack is saved, and back for the second
        decoded.append(1)
        if len(decoded) == 1:
            folder.rename(hidden)
            folder.write_text("")
        elif len(decoded) == 2:
            folder.unlink()
            hidden.rename(folder)

    with hooked(tiny.vae.decoder, lose_and_find), pytest.warns(UserWarning, match="cannot be written to") as caught:
        sweep = run_sweep(tiny, IMAGE, PROMPT, cells, folder=folder, progress=False)
    assert len(caught) == 1 and len(decoded) == 2
    assert len(sweep) == 6 == len(list(folder.glob("*.png"))) and all(map(Path.is_file, sweep.images.sources))
    happened("F5", "a folder that was away for a while: all images are in it at the end")


# --- F10: two at once -------------------------------------------------------------------------------------------------


def in_threads(*calls):
    """What the calls return, made at the same time."""
    results, ready = [None] * len(calls), threading.Barrier(len(calls))

    def run(i, call):
        ready.wait()
        results[i] = call()

    threads = [threading.Thread(target=run, args=numbered) for numbered in enumerate(calls)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


def test_two_threads_on_one_pipeline_take_turns(tiny, happened):
    def picture(pipe, steps):
        options = {"strength": 1.0, "num_inference_steps": steps, "guidance_scale": 1.0, "output_type": "np"}
        generator = torch.Generator().manual_seed(steps)
        return lambda: pipe(prompt=PROMPT, image=IMAGE, generator=generator, **options).images

    def sweep():
        images = run_sweep(tiny, IMAGE, PROMPT, [{**QUICK, "seed": 3}], progress=False).images
        return np.asarray(images[0])

    sibling = decinb.DeciDiffusionImg2ImgPipeline.from_pipe(tiny)  # another pipeline, the same parts
    sibling.set_progress_bar_config(disable=True)
    alone = [picture(tiny, 3)(), picture(tiny, 4)(), sweep()]
    with hooked(tiny.unet, lambda *_: time.sleep(0.005)):  # lets the other thread in
        together = in_threads(picture(tiny, 3), picture(sibling, 4), sweep)
    for one, other in zip(alone, together, strict=True):
        np.testing.assert_array_equal(one, other)
    happened("F10", "two threads on one pipeline: one waits, both pictures as if made alone")


def test_the_stock_pipeline_is_wrong_in_two_threads(tiny):
    """What the turns are for: without them the test before this one would fail."""
    stock = StableDiffusionImg2ImgPipeline(**tiny.components, requires_safety_checker=False)
    stock.set_progress_bar_config(disable=True)

    def picture(steps):
        options = {"strength": 1.0, "num_inference_steps": steps, "guidance_scale": 1.0, "output_type": "np"}
        generator = torch.Generator().manual_seed(steps)
        try:
            return stock(prompt=PROMPT, image=IMAGE, generator=generator, **options).images
        except Exception as error:
            return error

    alone = [picture(3), picture(4)]
    with hooked(tiny.unet, lambda *_: time.sleep(0.005)):
        together = in_threads(lambda: picture(3), lambda: picture(4))
    assert not all(np.array_equal(one, other) for one, other in zip(alone, together, strict=True))


TWO = """
import sys, torch, decinb
torch.set_num_threads(1)
pipe = decinb.load_pipeline("tiny", device="cpu")
first, last = map(int, sys.argv[2:])
cells = decinb.grid(seed=list(range(first, last)), strength=[1.0], num_inference_steps=[4], guidance_scale=[1.0])
print("ready", flush=True)
sys.stdin.readline()
sweep = decinb.run_sweep(pipe, "day", "a red house", cells, folder=sys.argv[1], progress=False)
print("finished", len(sweep), flush=True)
"""


def test_two_processes_on_one_folder_take_turns_and_no_lock_outlives_a_kill(tmp_path, happened):
    def start(first, last):
        command = [sys.executable, "-c", TWO, str(tmp_path), str(first), str(last)]
        return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def go(run):
        run.stdin.write("\n")
        run.stdin.flush()

    first, second = start(0, 24), start(12, 30)
    for run in (first, second):
        assert any(line == "ready\n" for line in run.stdout)
    go(first)
    deadline = time.monotonic() + 30
    while not list(tmp_path.glob("*.png")) and time.monotonic() < deadline:
        time.sleep(0.01)
    go(second)
    said = second.stdout.readline()
    assert "in use by another process: waiting until it is done" in said
    first.kill()
    first.wait()
    assert "finished 18" in second.communicate(timeout=120)[0]
    assert len(json.loads((tmp_path / "sweep.json").read_text())["cells"]) == 30, "what both have asked for"
    assert len(load_sweep(tmp_path)) == len(list(tmp_path.glob("*.png"))) < 30
    assert {record["seed"] for record in load_sweep(tmp_path).records} >= set(range(12, 30))
    happened("F10", f"{said.strip()}; the first was killed, and the second went on at once; all images whole")


# --- F9: what is only shown -------------------------------------------------------------------------------------------

NOTEBOOK = """
import sys, warnings
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "ipywidgets":
            raise ModuleNotFoundError(f"No module named {name!r}")
sys.meta_path.insert(0, Absent())
publisher = get_ipython().display_pub
publish = publisher.publish
def broken(*args, **kwargs):
    if kwargs.get("update"):
        raise BrokenPipeError("the page is closed")
    return publish(*args, **kwargs)
publisher.publish = broken

import torch, decinb
torch.set_num_threads(1)
pipe = decinb.load_pipeline("tiny", device="cpu")
cells = decinb.grid(seed=[0, 1], strength=[1.0], num_inference_steps=[2], guidance_scale=[1.0])
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    sweep = decinb.run_sweep(pipe, "day", "a red house", cells, folder=FOLDER, progress=True, show=True)
"""


def test_neither_a_grid_that_fails_nor_absent_widgets_stop_a_sweep(tmp_path, happened):
    tell = "print(len(sweep), *[str(w.message) for w in caught if 'grid' in str(w.message)], sep='\\n')"
    code = NOTEBOOK.replace("FOLDER", repr(str(tmp_path)))
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(text) for text in (code, tell)])
    NotebookClient(notebook, timeout=120, kernel_name="python3").execute()
    number, warning = notebook.cells[1].outputs[0].text.splitlines()
    assert number == "2" and len(list(tmp_path.glob("*.png"))) == 2
    assert "the grid cannot be shown (BrokenPipeError: the page is closed); the sweep continues" in warning
    happened("F9", f"{warning}: 2 of 2 images saved, without ipywidgets")


def test_a_callback_that_raises_is_the_users_own_error_and_the_pipeline_stays_usable(tiny, happened):
    def callback(*_):
        raise RuntimeError("a mistake in the callback")

    options = {"prompt": PROMPT, "image": IMAGE, "strength": 1.0, "num_inference_steps": 2}
    before = tiny(**options, generator=torch.Generator().manual_seed(0)).images[0]
    with pytest.raises(RuntimeError, match="a mistake in the callback"):
        tiny(**options, callback_on_step_end=callback)
    after = tiny(**options, generator=torch.Generator().manual_seed(0)).images[0]
    np.testing.assert_array_equal(before, after)
    happened("F9", "a callback of one call that raises: its own error, and the next call is as fresh")
