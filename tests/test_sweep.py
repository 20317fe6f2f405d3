"""Designs, the door of run_sweep, and what is kept when something goes wrong."""

import json
import random
import re
import shutil

import pytest
import torch
from PIL import Image

import decinb
from decinb import InputError, grid, run_sweep
from decinb.images import read_record
from decinb.latency import count_unet_calls
from decinb.sweep import SweepError, label, plain

QUICK = {"num_inference_steps": 2, "strength": 1.0}
PROMPT = "a red house on snow at night"


@pytest.fixture(scope="module")
def image():
    return decinb.load_image("day")


def test_grid_gives_every_combination_the_last_argument_fastest():
    assert grid(strength=[0.5, 1.0], seed=(1, 2)) == [
        {"strength": 0.5, "seed": 1},
        {"strength": 0.5, "seed": 2},
        {"strength": 1.0, "seed": 1},
        {"strength": 1.0, "seed": 2},
    ]


def test_the_guides_random_draw_is_repeatable():
    cells = grid(
        strength=[0.75 + 0.05 * i for i in range(4)],
        guidance_scale=[i * 1.5 for i in range(3, 8)],
        num_inference_steps=range(30, 101, 10),
    )
    assert len(cells) == 160
    assert random.Random(0).sample(cells, 9) == random.Random(0).sample(cells, 9)


@pytest.mark.parametrize(
    ("axes", "message"),
    [
        ({"strength": 0.5}, "strength must be a list of values, got 0.5"),
        ({"prompt": "night"}, "prompt must be a list"),
        ({"strength": []}, "strength is an empty list"),
    ],
)
def test_grid_refuses_what_is_no_list(axes, message):
    with pytest.raises(InputError, match=message):
        grid(**axes)


def test_a_cell_equals_the_stock_call_alone(tiny, image):
    cells = [
        {"strength": 0.5, "num_inference_steps": 4, "guidance_scale": 3.0, "seed": 7},
        {**QUICK, "negative_prompt": "trees"},
    ]
    sweep = run_sweep(tiny, image, PROMPT, cells, seed=5, progress=False)
    for cell, made in zip(cells, sweep.images, strict=True):
        arguments = {"guidance_scale": 7.5, "prompt": PROMPT, "seed": 5, **cell}
        generator = torch.Generator().manual_seed(arguments.pop("seed"))
        alone = tiny(image=image, generator=generator, **arguments).images[0]
        assert decinb.change(made, alone) == 0.0
    assert [record["steps_run"] for record in sweep.records] == [2, 2]


def test_defaults_are_the_guides(tiny, image):
    sweep = run_sweep(tiny, image, PROMPT, [{"strength": 0.1}], progress=False)
    assert sweep.records[0]["num_inference_steps"] == 30 and sweep.records[0]["steps_run"] == 3


@pytest.mark.parametrize(
    ("cell", "message"),
    [
        ({"strength": 0}, "^cell 1: strength must be above 0 and at most 1, got 0"),
        ({"strength": -0.1}, "strength must be above 0 and at most 1, got -0.1"),
        ({"strength": 1.2}, "strength must be above 0 and at most 1, got 1.2"),
        ({"strength": float("nan")}, "strength must be a number"),
        ({"strength": "0.5"}, "strength must be a number above 0 and at most 1, got '0.5'"),
        ({"strength": True}, "strength must be a number"),
        ({"strength": 0.02}, "leaves 0 steps to run; the smallest strength at 30 steps is 0.0333"),
        ({"guidance_scale": float("inf")}, "guidance_scale must be a number of 0 or more"),
        ({"guidance_scale": -1}, "guidance_scale must be 0 or more, got -1"),
        ({"num_inference_steps": 0}, "num_inference_steps must be a whole number from 1 to 999, got 0"),
        ({"num_inference_steps": 2.5}, "num_inference_steps must be a whole number"),
        ({"num_inference_steps": 1000}, "from 1 to 999, got 1000"),
        ({"num_inference_steps": float("inf")}, "num_inference_steps must be a whole number"),
        ({"seed": 2**64}, "seed must be a whole number"),
        ({"prompt": None}, "prompt must be a string, got None"),
        ({"guidence_scale": 3}, "unknown argument 'guidence_scale'; did you mean 'guidance_scale'"),
        (0.75, "cell 1: a cell must be a dict"),
    ],
)
def test_a_bad_cell_is_named_before_any_work(tiny, image, cell, message, tmp_path):
    with count_unet_calls(tiny) as count, pytest.raises(InputError, match=message) as caught:
        run_sweep(tiny, image, PROMPT, [QUICK, cell], folder=tmp_path / "made", progress=False)
    assert "\n" not in str(caught.value)
    assert count.calls == 0 and not (tmp_path / "made").exists()


def test_the_smallest_strength_it_names_runs(tiny, image):
    for steps in (3, 7, 30):
        with pytest.raises(InputError) as caught:
            run_sweep(tiny, image, PROMPT, [{"strength": 0.01, "num_inference_steps": steps}], progress=False)
        smallest = float(str(caught.value).split()[-1])
        sweep = run_sweep(tiny, image, PROMPT, [{"strength": smallest, "num_inference_steps": steps}], progress=False)
        assert sweep.records[0]["steps_run"] == 1


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"cells": []}, "cells must be a list of at least one dict"),
        ({"cells": {"strength": 1}}, "cells must be a list"),
        ({"image": None}, "image must be a sample's name"),
        ({"prompt": []}, "prompt must be a string"),
    ],
)
def test_a_bad_sweep_is_refused(tiny, image, given, message):
    with pytest.raises(InputError, match=message):
        run_sweep(tiny, **{"image": image, "prompt": PROMPT, "cells": [QUICK], **given})


def test_sums_of_floats_are_read_as_meant(tiny, image):
    strength = 0.0
    for _ in range(20):
        strength += 0.05
    assert strength > 1
    sweep = run_sweep(tiny, image, PROMPT, [{"strength": strength, "num_inference_steps": 2}], progress=False)
    assert sweep.records[0]["strength"] == 1.0


def test_every_image_is_on_disk_with_its_record(tiny, image, tmp_path):
    cells = [{**QUICK, "seed": seed} for seed in (1, 2)]
    sweep = run_sweep(tiny, image, PROMPT, cells, folder=tmp_path, progress=False)
    files = sorted(tmp_path.iterdir())
    names = [re.sub("[0-9a-f]{8}.png", "KEY.png", file.name) for file in files]
    assert names == ["000_strength-1_steps-2_seed-1_KEY.png", "001_strength-1_steps-2_seed-2_KEY.png"]
    for file, made, record in zip(files, sweep.images, sweep.records, strict=True):
        assert decinb.change(Image.open(file), made) == 0.0
        assert read_record(file) == record == json.loads(json.dumps(record))


def test_another_prompt_or_image_is_another_file(tiny, image, tmp_path):
    for prompt, picture in ((PROMPT, image), (PROMPT, "night"), ("mountains", image), (PROMPT, image)):
        run_sweep(tiny, picture, prompt, [QUICK], folder=tmp_path, progress=False)
    assert len(list(tmp_path.iterdir())) == 3


def test_an_image_that_cannot_be_saved_is_not_lost(tiny, image, tmp_path):
    folder = tmp_path / "made"

    def vanish(*_):
        shutil.rmtree(folder)

    hook = tiny.vae.decoder.register_forward_pre_hook(vanish)
    try:
        with pytest.raises(SweepError, match="cell 0") as caught:
            run_sweep(tiny, image, PROMPT, [QUICK], folder=folder, progress=False)
    finally:
        hook.remove()
    assert len(caught.value.sweep) == 1


def test_a_picture_with_four_channels_is_no_latent(tiny, image):
    clear = image.convert("RGBA")
    sweeps = [run_sweep(tiny, picture, PROMPT, [QUICK], progress=False) for picture in (image, clear)]
    direct = tiny(PROMPT, clear, 1.0, 2, generator=torch.Generator().manual_seed(0)).images[0]
    assert decinb.change(sweeps[0].images[0], sweeps[1].images[0]) == 0.0
    assert direct.size == image.size and decinb.change(direct, sweeps[0].images[0]) == 0.0


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"strength": 0.01}, "leaves 0 steps to run"),
        ({"strength": 1.2}, "strength must be above 0 and at most 1, got 1.2"),
        ({"prompt": []}, "prompt is an empty list"),
        ({"guidence_scale": 3}, "unknown argument 'guidence_scale'; did you mean 'guidance_scale'"),
        ({"num_inference_steps": 0}, "num_inference_steps must be a whole number from 1 to 999, got 0"),
    ],
)
def test_the_pipeline_itself_refuses_what_cannot_run(tiny, image, given, message):
    with count_unet_calls(tiny) as count, pytest.raises(InputError, match=message):
        tiny(**{"prompt": PROMPT, "image": image, **given})
    assert count.calls == 0


class Stop:
    """Breaks the U-Net after some calls, as a person or a fault would."""

    def __init__(self, pipe, calls, error):
        self.left, self.error = calls, error
        self.hook = pipe.unet.register_forward_pre_hook(self)

    def __call__(self, *_):
        self.left -= 1
        if self.left < 0:
            raise self.error

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.hook.remove()


def test_stopping_keeps_and_returns_what_is_done(tiny, image, capsys):
    cells = [{**QUICK, "seed": seed} for seed in range(3)]
    with Stop(tiny, 5, KeyboardInterrupt()):
        sweep = run_sweep(tiny, image, PROMPT, cells, progress=False)
    assert len(sweep) == 2 and sweep.cells == cells[:2]
    assert "2 of 3" in capsys.readouterr().out
    again = run_sweep(tiny, image, PROMPT, cells, progress=False)
    assert decinb.change(again.images[1], sweep.images[1]) == 0.0


def test_a_fault_names_its_cell_and_loses_nothing(tiny, image, tmp_path):
    cells = [{**QUICK, "seed": seed} for seed in range(3)]
    with (
        Stop(tiny, 3, MemoryError("out of memory")),
        pytest.raises(SweepError, match="cell 1 .*seed 1.*out of memory") as caught,
    ):
        run_sweep(tiny, image, PROMPT, cells, folder=tmp_path, progress=False)
    assert len(caught.value.sweep) == 1 == len(list(tmp_path.glob("*.png")))


def test_the_pipelines_own_progress_bar_comes_back(tiny, image):
    before = dict(tiny._progress_bar_config)
    run_sweep(tiny, image, PROMPT, [QUICK], progress=False)
    assert tiny._progress_bar_config == before


def test_labels_are_short_and_round():
    assert plain(0.8500000000000001) == "0.85"
    assert label({"strength": 0.75, "num_inference_steps": 30}) == "strength 0.75, steps 30"
