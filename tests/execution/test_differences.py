"""Nothing differs in silence: inputs of one name, leftovers of a launcher, a folder that moves, prompts in labels."""

import itertools
import os

import pytest

import decinb
from decinb import InputError, grid, run_sweep
from decinb.benchmark.counting import count_unet_calls
from decinb.figures.layout import lay_out
from tests.helpers.small import small_pipe

IMAGE = decinb.load_image("day", 64)
CELL = {"num_inference_steps": 2, "strength": 1.0, "guidance_scale": 1.0}


@pytest.fixture(scope="module")
def pipe(tiny):
    return small_pipe(tiny)


def test_two_inputs_of_one_name_are_two_rows(pipe, tmp_path):
    paths = []
    for name in ("day", "night"):
        paths.append(tmp_path / name / "photo.png")
        paths[-1].parent.mkdir()
        decinb.load_image(name, 64).save(paths[-1])
    cells = grid(image=list(map(str, paths)), seed=[0, 1], **{name: [value] for name, value in CELL.items()})
    sweep = run_sweep(pipe, IMAGE, "a house", cells, folder=tmp_path / "made", progress=False)
    names = [record["image"] for record in sweep.records]
    assert len(set(names)) == 2 and all(name.startswith("photo.png (") for name in names)
    loaded = decinb.load_sweep(tmp_path / "made")
    for one in (sweep, loaded):
        assert len(lay_out(one.records).places) == 4, "none hides another"
    with count_unet_calls(pipe) as count:
        again = run_sweep(pipe, IMAGE, "a house", cells[:2], folder=tmp_path / "made", progress=False)
    assert count.calls == 0 and len(again) == 2


def test_inputs_of_one_name_from_two_sweeps_are_two_rows(pipe, tmp_path):
    for name in ("day", "night"):
        decinb.load_image(name, 64).save(tmp_path / "photo.png")
        run_sweep(pipe, tmp_path / "photo.png", "a house", [CELL], folder=tmp_path / "made", progress=False)
    assert len({record["image"] for record in decinb.load_sweep(tmp_path / "made").records}) == 2


def test_leftovers_of_a_launcher_are_told(pipe, tmp_path, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    for leftover in (None, ""):
        if leftover is not None:
            monkeypatch.setenv("WORLD_SIZE", leftover)
        with pytest.warns(UserWarning, match="RANK is set in the environment, but not WORLD_SIZE"):
            run_sweep(pipe, IMAGE, "a house", [CELL], folder=tmp_path, progress=False)
        assert (tmp_path / "sweep.json").is_file() and (tmp_path / ".lock").exists()
    monkeypatch.setenv("WORLD_SIZE", "two")
    with pytest.raises(InputError, match="WORLD_SIZE in the environment must be a number, got 'two'"):
        run_sweep(pipe, IMAGE, "a house", [CELL], progress=False)


def during(pipe, action, **arguments):
    """Run a sweep of six cells, with an action when the first four are finished."""
    cells = [{**CELL, "seed": seed} for seed in range(6)]
    running = decinb.steps(pipe, IMAGE, "a house", cells, max_rows=4, **arguments)
    finished = 0
    for state in running:
        finished += state.image is not None
        if finished == 4:
            action()
            finished += 1
    return running.sweep


def test_a_folder_that_is_renamed_while_it_is_used_is_told(pipe, tmp_path, happened):
    folder = tmp_path / "made"
    with pytest.warns(UserWarning) as caught:
        sweep = during(pipe, lambda: folder.rename(tmp_path / "renamed"), folder=folder)
    told = [str(warning.message) for warning in caught]
    assert "made' cannot be written to (it was renamed or deleted while it was in use)" in told[0]
    assert "4 images that were saved in" in told[1] and "was the folder renamed" in told[1]
    assert len(sweep) == 2 and len(decinb.load_sweep(tmp_path / "renamed")) == 4
    assert all(image.size == IMAGE.size for image in sweep.images)
    happened("K8", told[0])


def test_a_change_of_directory_changes_nothing(pipe, tmp_path, monkeypatch):
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)
    sweep = during(pipe, lambda: os.chdir(tmp_path / "elsewhere"), folder="made")
    assert len(sweep) == 6 == len(decinb.load_sweep(tmp_path / "made")) and not list((tmp_path / "elsewhere").iterdir())
    assert sweep.images[0].size == IMAGE.size


def test_a_folder_may_start_at_home(pipe, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    sweep = run_sweep(pipe, IMAGE, "a house", [CELL], folder="~/made", progress=False)
    assert sweep.folder == tmp_path / "made" and len(decinb.load_sweep("~/made")) == 1


def test_labels_name_the_negative_prompts_that_differ(pipe):
    cells = [{**CELL, "guidance_scale": 2.0, "negative_prompt": text} for text in ("trees", "snow")]
    labels = [decinb.plan(pipe, IMAGE, "a house", cells, timed=False).label(i) for i in range(2)]
    assert labels == [f"strength 1, guidance 2, steps 2, seed 0, negative prompt: {text}" for text in ("trees", "snow")]
    with pytest.warns(UserWarning, match="give the same image .*negative prompt: trees; .*negative prompt: snow"):
        decinb.plan(pipe, IMAGE, "a house", [{**cell, "guidance_scale": 1.0} for cell in cells], timed=False)


@pytest.mark.parametrize("make", [grid, decinb.zipped, lambda **axes: decinb.random_design(3, **axes)])
def test_a_generator_that_never_ends_is_refused(make):
    with pytest.raises(InputError, match="seed has more than 100,000 values, or never ends"):
        make(**({"seeds": itertools.count()} if make not in (grid, decinb.zipped) else {"seed": itertools.count()}))
    assert len(grid(seed=(seed for seed in range(3)))) == 3


def test_an_input_that_cannot_be_read_is_named_with_its_cell(pipe):
    with pytest.raises(InputError, match="^cell 1: image '/nowhere.png' is neither a file"):
        run_sweep(pipe, IMAGE, "a house", [CELL, {**CELL, "image": "/nowhere.png"}], progress=False)
    with pytest.raises(InputError, match="^image '/nowhere.png' is neither a file"):
        run_sweep(pipe, "/nowhere.png", "a house", [CELL], progress=False)
