"""Sweeps with every adapter: batched as if each image were made alone, or one after the other by the own call."""

import logging

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionInstructPix2PixPipeline
from PIL import Image

import decinb
from decinb import InputError
from decinb.benchmark.counting import count_unet_calls
from decinb.checkpoints.dummies import DUMMIES, dummy
from decinb.execution.replay import replay
from decinb.loading import load_pipeline
from decinb.models import KnownName
from decinb.sampling.adapters import adapter_of
from decinb.sampling.batched import BatchedAdapter
from decinb.sampling.calls import defaults
from decinb.sampling.sequential import SequentialAdapter
from decinb.sweep import load_sweep, run_sweep

LEVELS = 1  # of 255: rounding to 8 bits; in float64, since untrained networks amplify rounding errors
IMAGES = "image-to-image"
TEXT = "text-to-image"
PROMPT = "a red house on snow"
CELLS = [
    {"guidance_scale": 5.0, "num_inference_steps": 4, "seed": 1},
    {"guidance_scale": 5.0, "num_inference_steps": 4, "seed": 1, "negative_prompt": "trees"},
    {
        "guidance_scale": 5.0,
        "num_inference_steps": 4,
        "seed": 1,
        "negative_prompt": PROMPT,
    },  # guidance between equal prompts
    {"guidance_scale": 1.0, "num_inference_steps": 3, "seed": 2},
    {"guidance_scale": 2.0, "num_inference_steps": 5, "seed": 3, "prompt": "a sketch of a house by night"},
]
STRENGTHS = (0.5, 0.5, 1.0, 0.8, 0.6)


def make(name: str, task: str):
    if name == "tiny":
        pipe = load_pipeline("tiny", device="cpu", task=task)
    else:
        pipe = dummy(name)
        pipe = (pipe if task == IMAGES else load_pipeline(pipe, task=task)).to(torch.float64)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def cells_for(task: str) -> list[dict]:
    if task == TEXT:
        return CELLS
    return [{**cell, "strength": strength} for cell, strength in zip(CELLS, STRENGTHS, strict=True)]


def stock(pipe, cell: dict, image: Image.Image | None) -> Image.Image:
    """Return what the pipeline's own call makes of a cell."""
    given = {"prompt": PROMPT, **cell}
    generator = torch.Generator().manual_seed(given.pop("seed"))
    if image is not None:
        given["image"] = image
    if "Kandinsky" in type(pipe).__name__:
        given |= {"height": image.height, "width": image.width}
    return pipe(**given, generator=generator).images[0]


def farthest(one: Image.Image, other: Image.Image) -> int:
    """Return the largest difference of two images, in levels of 255."""
    return int(np.abs(np.asarray(one, int) - np.asarray(other, int)).max())


PACKED = [
    ("tiny", TEXT),
    ("sd-v1-5", IMAGES),
    ("sd-v1-5", TEXT),
    ("sd-2-depth", IMAGES),
    ("sdxl-base", IMAGES),
    ("sdxl-base", TEXT),
    ("sdxl-refiner", IMAGES),
]


@pytest.mark.filterwarnings("ignore:In CPU autocast")
@pytest.mark.parametrize(("name", "task"), PACKED)
def test_batched_cells_equal_their_own_calls(name, task):
    pipe = make(name, task)
    assert isinstance(adapter_of(pipe), BatchedAdapter)
    image = decinb.load_image("day", size=64) if task == IMAGES else None
    cells = cells_for(task)
    with count_unet_calls(pipe) as count:
        sweep = run_sweep(pipe, image, PROMPT, cells, progress=False)
    assert count.calls < sum(record["steps_run"] for record in sweep.records), "the cells share calls"
    for cell, made, record in zip(cells, sweep.images, sweep.records, strict=True):
        assert record["blacked_out"] is False
        assert farthest(made, stock(pipe, cell, image)) <= LEVELS, cell
    assert farthest(sweep.images[0], sweep.images[1]) > LEVELS, "the negative prompt matters"


def test_other_pipelines_are_called_one_by_one_with_a_note(capsys, tmp_path):
    pipe, image = make("kandinsky-2-2", IMAGES), decinb.load_image("day", size=64)
    assert isinstance(adapter_of(pipe), SequentialAdapter)
    cells = cells_for(IMAGES)[:2] + cells_for(IMAGES)[:1]
    assert "not packed" in str(decinb.plan(pipe, image, PROMPT, cells))
    sweep = run_sweep(pipe, image, PROMPT, cells, progress=False, folder=tmp_path)
    assert capsys.readouterr().out.count("KandinskyV22Img2ImgCombinedPipeline is not packed") == 1
    for cell, made in zip(cells, sweep.images, strict=True):
        assert farthest(made, stock(pipe, cell, image)) == 0
    assert len(list(tmp_path.glob("*.png"))) == 2, "equal cells are computed once"
    assert farthest(replay(sweep.images.sources[1], pipe), sweep.images[1]) == 0

    run_sweep(pipe, image, PROMPT, cells, progress=False, folder=tmp_path)
    assert capsys.readouterr().out == "", "nothing is left to compute"


def test_a_sweep_of_text_to_image_is_planned_saved_and_replayed(tmp_path, tiny):
    pipe = load_pipeline(tiny, task=TEXT)
    cells = decinb.grid(guidance_scale=[2, 5], seed=[0, 1])
    cells = [{**cell, "num_inference_steps": 2} for cell in cells]
    planned = decinb.plan(pipe, None, PROMPT, cells, folder=tmp_path)
    assert planned.image is None and planned.calls == 8 and planned.rows == 16
    sweep = run_sweep(pipe, None, PROMPT, cells, progress=False, folder=tmp_path)
    assert sweep.image is None
    assert {record["guidance_rescale"] for record in sweep.records} == {0.7}, "the publisher's"
    again = load_sweep(tmp_path)
    assert again.image is None and again.cells == cells
    path = again.images.sources[2]
    assert farthest(replay(path, pipe), again.images[2]) <= 1
    assert farthest(replay(path), again.images[2]) <= 1, "by its name alone"
    with pytest.raises(InputError, match="image must be"):
        replay(path, tiny)
    sweep.plot()
    planned.plot()
    assert decinb.plan(pipe, None, PROMPT, cells, folder=tmp_path).finished == 4


def test_guidance_rescale_can_be_given(tiny):
    pipe = load_pipeline(tiny, task=TEXT)
    cells = [{"num_inference_steps": 2, "guidance_scale": 9.0}]
    plain, rescaled = (
        run_sweep(pipe, None, PROMPT, cells, progress=False, guidance_rescale=share).images[0] for share in (0.0, 0.7)
    )
    assert farthest(plain, pipe(PROMPT, **cells[0], guidance_rescale=0.0, **seeded()).images[0]) <= LEVELS
    assert farthest(rescaled, pipe(PROMPT, **cells[0], **seeded()).images[0]) <= LEVELS
    assert farthest(plain, rescaled) > LEVELS


def seeded() -> dict:
    return {"generator": torch.Generator().manual_seed(0)}


@pytest.mark.parametrize(
    ("name", "task", "image", "cell", "message"),
    [
        ("tiny", TEXT, "day", {}, "image must be None: DeciDiffusionPipeline makes images from text alone"),
        (
            "tiny",
            TEXT,
            None,
            {"strength": 0.5},
            "cell 0: strength must be left out: DeciDiffusionPipeline does not take it",
        ),
        (
            "tiny",
            TEXT,
            None,
            {"image": "day"},
            "cell 0: image must be left out: DeciDiffusionPipeline does not take it",
        ),
        ("tiny", IMAGES, None, {}, "image must be a sample's name.*got None"),
        ("kandinsky-2-2", IMAGES, "day", {"strength": 0.001}, "leaves 0 steps"),
    ],
)
def test_arguments_that_a_pipeline_does_not_take_are_refused(name, task, image, cell, message):
    with pytest.raises(InputError, match=message):
        run_sweep(make(name, task), image, PROMPT, [cell])


def test_a_guidance_rescale_that_a_call_does_not_take_is_refused():
    with pytest.raises(
        InputError, match="guidance_rescale must be 0: KandinskyV22Img2ImgCombinedPipeline does not take it"
    ):
        run_sweep(make("kandinsky-2-2", IMAGES), "day", PROMPT, [{}], guidance_rescale=0.5)


def test_defaults_are_those_of_the_pipeline():
    found = {name: defaults(make(name, IMAGES)) for name in ("tiny", *DUMMIES)}
    steps = {name: values["num_inference_steps"] for name, values in found.items()}
    assert steps == {
        "tiny": 30,
        "sd-v1-5": 50,
        "sd-2-depth": 50,
        "sdxl-base": 50,
        "sdxl-refiner": 50,
        "kandinsky-2-2": 100,
    }
    assert found["sdxl-refiner"]["strength"] == found["kandinsky-2-2"]["strength"] == 0.3
    assert found["tiny"] == {
        "strength": 0.8,
        "guidance_scale": 7.5,
        "num_inference_steps": 30,
        "guidance_rescale": 0.0,
    }
    assert defaults(make("tiny", TEXT))["guidance_rescale"] == 0.7


def test_images_from_text_and_from_images_share_a_folder(tmp_path, tiny):
    text = load_pipeline(tiny, task=TEXT)
    cells = [{"num_inference_steps": 2, "seed": seed} for seed in (0, 1)]
    run_sweep(tiny, "day", PROMPT, [{**cell, "strength": 1.0} for cell in cells], progress=False, folder=tmp_path)
    run_sweep(text, None, PROMPT, cells, progress=False, folder=tmp_path)
    both = load_sweep(tmp_path)
    assert [record["image"] for record in both.records] == ["day", "day", None, None]
    header, *rows = both.to_csv(tmp_path / "both.csv").read_text().splitlines()
    assert len(rows) == 4 and "original_size" in header.split(",")
    both.plot()
    both.plot(rows="image", cols="seed")
    assert len(both.select(image=None)) == 2


def test_the_key_of_an_image_from_text_depends_on_its_size(tmp_path, tiny):
    text = load_pipeline(tiny, task=TEXT)
    keys = set()
    for name in ("tiny", "sd-v1-5"):  # as the entry of a model may be changed
        text.register_to_config(_name_or_path=KnownName(name))
        keys.add(decinb.plan(text, None, PROMPT, [{"num_inference_steps": 2}], timed=False).records[0]["key"])
    assert len(keys) == 2


def test_a_cell_argument_missing_from_the_call_is_refused():
    parts = {name: part for name, part in dummy("sd-v1-5").components.items() if part is not None}
    pipe = StableDiffusionInstructPix2PixPipeline(
        **parts, safety_checker=None, feature_extractor=None, requires_safety_checker=False
    )
    assert decinb.plan(pipe, "day", PROMPT, [{"guidance_scale": 5}]).calls == 100
    with pytest.raises(InputError, match="cell 0: strength must be left out: StableDiffusionInstructPix2PixPipeline"):
        run_sweep(pipe, "day", PROMPT, [{"strength": 0.5}])


@pytest.mark.parametrize("pipe", [None, "tiny", 5])
def test_anything_but_a_pipeline_is_refused(pipe):
    for call in (decinb.run_sweep, decinb.plan):
        with pytest.raises(InputError, match="pipe must be a pipeline, as load_pipeline returns it, got"):
            call(pipe, "day", PROMPT, [{}])


@pytest.mark.parametrize("name", DUMMIES)
def test_a_sweep_hides_the_logs_of_its_libraries(name, recwarn, monkeypatch):
    logged = []  # capsys misses these: the libraries' handlers keep the stderr of their import
    monkeypatch.setattr(logging.StreamHandler, "emit", lambda _, record: logged.append(record.getMessage()))
    pipe, words = dummy(name), " ".join(["a red house"] * 30)
    cells = [{"num_inference_steps": 2, "strength": 1.0, "prompt": prompt} for prompt in (PROMPT, words)]
    run_sweep(pipe, decinb.load_image("day", size=64), PROMPT, cells, progress=False)
    assert logged == []
    shown = [str(warning.message) for warning in recwarn if warning.category is not DeprecationWarning]
    assert len(shown) == 1 and shown[0].startswith("prompt is too long"), shown
