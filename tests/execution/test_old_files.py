"""Folders that the first version of decinb saved: they load, and their images can be made again.

Their files prove nothing: they have no seal, and their keys do not cover all that decides an image. So a sweep in such
a folder makes its images again, and says so. ``tests/fixtures/sweep_v0`` was written by that version with the calls
below. Records contain a hash of the bundled model's weights, so after training that model again, these tests fail until
``tests.fixtures.make_sweep_v0`` has saved new files.
"""

import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import decinb
from decinb import Link, load_sweep, replay, run_chain, run_sweep
from decinb.benchmark.counting import count_unet_calls
from decinb.images import read_input, read_record
from tests.helpers.old_sweep import CELLS, OLD, PROMPT, TEXT_CELLS

ONE_LEVEL = 1  # of 255: another processor rounds differently


@pytest.fixture
def folder(tmp_path):
    """Return a copy of the old files, since a sweep writes into its folder."""
    return Path(shutil.copytree(OLD, tmp_path / "old"))


@pytest.fixture(scope="module")
def text(tiny):
    pipe = decinb.load_pipeline(tiny, task="text-to-image")
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_old_sweeps_load(folder):
    with pytest.warns(UserWarning, match="3 of 3 images were saved by an earlier version .* cannot prove"):
        sweep = load_sweep(folder / "image")
    assert sweep.cells == CELLS and sweep.prompt == PROMPT and sweep.image.size == (64, 64)
    assert [record["steps_run"] for record in sweep.records] == [2, 2, 2]
    assert {image.size for image in sweep.images} == {(64, 64)}
    with pytest.warns(UserWarning, match="earlier version"):
        text_sweep = load_sweep(folder / "text")
    assert text_sweep.cells == TEXT_CELLS and text_sweep.image is None


@pytest.mark.filterwarnings("ignore:.* were saved by an earlier version")
def test_old_sweeps_are_made_again_and_their_files_kept(tiny, text, folder, capsys):
    image = read_input(next((folder / "image").glob("*.png")))
    for pipe, source, cells, given, name in (
        (tiny, image, CELLS, {"seed": 5, "guidance_rescale": 0.3}, "image"),
        (text, None, TEXT_CELLS, {}, "text"),
    ):
        before = {file: file.read_bytes() for file in (folder / name).glob("*.png")}
        old = load_sweep(folder / name)
        with count_unet_calls(pipe) as count:
            again = run_sweep(pipe, source, PROMPT, cells, folder=folder / name, progress=False, **given)
        assert count.calls > 0 and f"{len(cells)} images were saved by an earlier version" in capsys.readouterr().out
        assert {file: file.read_bytes() for file in before} == before
        loaded = load_sweep(folder / name)  # what was made again stands in for what it was made from
        assert loaded.records == again.records
        for mine, theirs in zip(again.images, old.images, strict=True):
            assert np.abs(np.asarray(mine, int) - np.asarray(theirs, int)).max() <= ONE_LEVEL


def test_old_chains_are_made_again_and_their_files_kept(tiny, folder):
    before = {file: file.read_bytes() for file in (folder / "chain").iterdir()}
    first = Link(tiny, PROMPT, negative_prompt="trees", num_inference_steps=2, strength=1.0)
    second = Link(tiny, "a sketch of mountains", num_inference_steps=4, strength=0.5, guidance_scale=2.0)
    run_chain([first, second], read_input(next(iter(before))), seed=3, folder=folder / "chain")
    assert {file: file.read_bytes() for file in before} == before
    assert len(list((folder / "chain").iterdir())) == len(before) + 2


@pytest.mark.parametrize("path", sorted(OLD.rglob("*.png")), ids=lambda path: f"{path.parent.name}/{path.name}")
def test_old_images_can_be_made_again(tiny, text, path):
    made = replay(path, text if read_record(path)["image"] is None else tiny)
    with Image.open(path) as saved:
        assert np.abs(np.asarray(made, int) - np.asarray(saved.convert("RGB"), int)).max() <= ONE_LEVEL
