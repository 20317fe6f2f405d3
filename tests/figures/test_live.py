"""Tests of what is shown while a sweep runs: the progress bar, the grid that fills, and the previews of latents."""

import base64
import io
import re
from itertools import pairwise

import nbformat
import numpy as np
import pytest
import torch
from nbclient import NotebookClient
from PIL import Image

from decinb import SAMPLES, grid, load_image
from decinb.checkpoints.dummies import dummy
from decinb.figures.layout import lay_out
from decinb.figures.live import SIDE, Canvas, LiveGrid, progress_bar
from decinb.figures.page import Tile, compose
from decinb.figures.preview import latent_to_rgb, preview
from decinb.sampling.adapters import adapter_of

DEFAULTS = {
    "image": "day",
    "image_size": [128, 128],
    "prompt": "a house",
    "negative_prompt": None,
    "strength": 0.8,
    "guidance_scale": 7.5,
    "num_inference_steps": 30,
    "seed": 0,
}
RED, GREEN, GREY = (200, 30, 30), (30, 200, 30), (100, 100, 100)


def with_defaults(cells, size=(128, 128)):
    return [{**DEFAULTS, "image_size": list(size), **cell} for cell in cells]


# --- the bar ---


def test_the_bar_counts_images_and_estimates_the_time_left(capsys):
    with progress_bar(5, 40) as bar:
        bar.advance(30, 2)
        bar.refresh()
        written = capsys.readouterr().err
    assert re.search(r"sweep: 2 of 5 images \|.*\|  75% \[\d+:\d+<\d+:\d+\]", written)
    assert capsys.readouterr().err.endswith("\r"), "the bar is removed at the end"


def test_a_hidden_bar_writes_nothing(capsys):
    with progress_bar(1, 40, show=False) as bar:
        bar.advance(40, 1)
    assert capsys.readouterr() == ("", "")


# --- colours of latents ---


@torch.no_grad()
def encoded(pipe, image):
    """Return an image as the VAE encodes it, and the image averaged down to the size of the latents, 0 to 255."""
    pixels = pipe.image_processor.preprocess(image).to(pipe.device)
    latents = pipe.vae.encode(pixels).latent_dist.mode() * pipe.vae.config.scaling_factor
    return latents, np.asarray(image.reduce(pipe.vae_scale_factor), dtype=float)


@pytest.mark.parametrize("fitted", ["day", "sketch"])
def test_a_preview_resembles_the_encoded_image_whichever_image_was_fitted(tiny, fitted):
    matrix = latent_to_rgb(adapter_of(tiny), load_image(fitted))
    assert matrix.shape == (5, 3)
    found = {}
    for name in SAMPLES:
        latents, small = encoded(tiny, load_image(name, 128))
        seen = np.asarray(preview(latents, matrix), dtype=float)
        assert seen.shape == (16, 16, 3)
        found[name] = np.corrcoef(seen.ravel(), small.ravel())[0, 1]
    # 0.49 to 0.88; if only the image's own colours are fitted, the worst is 0.04.
    assert min(found.values()) > 0.4 and np.mean(list(found.values())) > 0.6, found


def test_an_image_of_one_colour_can_be_fitted_and_latents_of_nan_can_be_shown(tiny):
    matrix = latent_to_rgb(adapter_of(tiny), Image.new("RGB", (64, 96), RED))
    assert matrix.isfinite().all()
    assert preview(torch.full((1, 4, 12, 8), torch.nan), matrix).size == (8, 12)


@pytest.mark.parametrize("half", [False, True])
def test_previews_do_not_depend_on_how_the_vae_scales_latents(half):
    pipe, image = dummy("sdxl-base"), load_image("day", 64)
    pipe.vae.register_to_config(latents_mean=[3.0, -2.0, 1.0, 0.5], latents_std=[9.0, 5.0, 2.0, 7.0])
    adapter = adapter_of(pipe)
    seen = adapter.scale(adapter.encode(adapter.preprocess(image)).latent_dist.mode())
    with torch.no_grad():
        expected = np.asarray(preview(seen, latent_to_rgb(adapter_of(pipe), image)), int)
        pipe.vae.register_to_config(latents_mean=None, latents_std=None)
        seen = adapter.scale(adapter.encode(adapter.preprocess(image)).latent_dist.mode())
        plain = np.asarray(preview(seen, latent_to_rgb(adapter_of(pipe), image)), int)
    assert abs(expected - plain).max() <= 1, "the mean and deviation of the latents are accounted for"
    if half:  # as the published VAE, which overflows in half precision and has to run in float32
        pipe.vae.half()
        dtypes = []
        pipe.vae.encoder.register_forward_pre_hook(lambda _, given: dtypes.append(given[0].dtype))
        assert latent_to_rgb(adapter_of(pipe), image).isfinite().all()
        assert dtypes == [torch.float32] and pipe.vae.dtype == torch.float16


# --- the canvas of all cells ---


def centre(canvas, colour):
    """The middle of the pixels of a colour, as (x, y)."""
    pixels = np.asarray(canvas.image).astype(int)
    y, x = np.nonzero((abs(pixels - colour) < 3).all(axis=-1))
    return (x.mean(), y.mean()) if len(x) else None


def test_cells_stand_where_the_printed_figure_has_them():
    cells = with_defaults(grid(strength=[0.5, 0.75, 1.0], guidance_scale=[1, 9]))
    canvas = Canvas(cells)
    assert centre(canvas, RED) is None
    colours = [(40 * index + 20, 0, 0) for index in range(6)]
    for index, colour in enumerate(colours):
        canvas.put(index, Image.new("RGB", (8, 8), colour))
    printed = compose(lay_out(cells), cells, lambda index: Tile(Image.new("RGB", (128, 128), colours[index])), {})
    width, height = printed.size
    for place, tile in printed.tiles.items():
        left, top, wide, high = printed.boxes[place]
        expected = (left + wide / 2) / width, (top + high / 2) / height
        x, y = centre(canvas, colours[tile.cell])
        assert (x / canvas.image.width, y / canvas.image.height) == pytest.approx(expected, abs=0.01)


def test_images_of_any_size_and_mode_fill_their_boxes():
    canvas = Canvas(with_defaults(grid(strength=[0.5, 0.75])))
    canvas.put(0, Image.new("RGB", (64, 64), RED))
    canvas.put(1, Image.new("L", (16, 16), 100))
    for index, colour in enumerate((RED, GREY)):
        assert (np.asarray(canvas.image.crop(canvas.boxes[index])) == colour).all()


def test_an_input_shared_by_all_cells_comes_first():
    canvas = Canvas(with_defaults(grid(strength=[0.5, 0.75])), Image.new("RGB", (128, 128), GREEN))
    assert centre(canvas, GREEN)[0] < canvas.boxes[0][0] < canvas.boxes[1][0]
    several = with_defaults(grid(strength=[0.5, 0.75], image=["day", "night"]))
    assert centre(Canvas(several, Image.new("RGB", (128, 128), GREEN)), GREEN) is None


@pytest.mark.parametrize("size", [(128, 128), (1024, 512), (512, 1024)])
@pytest.mark.parametrize("count", [1, 6, 40, 1500])
def test_the_canvas_is_never_large_and_no_cell_covers_another(count, size):
    canvas = Canvas(with_defaults([{"seed": seed} for seed in range(count)], size))
    assert max(canvas.image.size) <= SIDE and len(canvas.png()) < 500_000
    boxes = sorted(canvas.boxes.values())
    assert len(set(boxes)) == count
    for left, top, right, bottom in boxes:
        width, height = right - left, bottom - top
        assert width * height >= 16 * 16 and height / width == pytest.approx(size[1] / size[0], rel=0.1)
    for (_, _, right, bottom), (left, top, _, _) in pairwise(boxes):
        assert left >= right or top >= bottom
    assert max(box[2] for box in boxes) <= canvas.image.width
    assert max(box[3] for box in boxes) <= canvas.image.height


def test_cells_have_labels_where_these_can_be_read():
    few = Canvas(with_defaults(grid(strength=[0.5, 0.75])))
    many = Canvas(with_defaults(grid(strength=[0.5, 0.75], seed=range(60))))
    for canvas, labelled in ((few, True), (many, False)):
        dark = (np.asarray(canvas.image).max(axis=-1) < 100).any()
        assert dark == labelled


# --- inside and outside a notebook ---


def test_outside_a_notebook_nothing_is_shown_and_the_pipeline_is_not_used(capsys):
    live = LiveGrid(None, load_image("day"), with_defaults(grid(strength=[0.5, 0.75])))
    live.preview(0, lambda: torch.zeros(1, 4, 16, 16))
    live.show(0, load_image("night"))
    live.close()
    assert capsys.readouterr() == ("", "")


IN_A_NOTEBOOK = """
import time, torch
from PIL import Image
from decinb import load_pipeline, load_image, grid
from decinb.figures.live import LiveGrid
from decinb.figures.preview import Preview
from decinb.sampling.adapters import adapter_of

publisher, sent = get_ipython().display_pub, []
publish = publisher.publish
def counting(*args, **kwargs):
    sent.append((time.perf_counter(), bool(kwargs.get("update"))))
    return publish(*args, **kwargs)
publisher.publish = counting

defaults = dict(image="day", prompt="", negative_prompt=None, guidance_scale=7.5, num_inference_steps=30, seed=0)
cells = [{**defaults, "image_size": [128, 128], **cell} for cell in grid(strength=[0.5, 0.75, 1.0])]
pipe = load_pipeline("tiny", "cpu")
live = LiveGrid(Preview(adapter_of(pipe), load_image("day")), load_image("day"), cells)
started, asked, spent = time.perf_counter(), 0, 0.0
while sum(update for _, update in sent) < 3:
    before = time.perf_counter()
    live.preview(asked % 3, lambda: torch.randn(1, 4, 16, 16))
    spent += time.perf_counter() - before
    asked += 1
    time.sleep(0.005)
elapsed = time.perf_counter() - started
for index, colour in enumerate([(200, 30, 30), (30, 200, 30), (30, 30, 200)]):
    live.show(index, Image.new("RGB", (128, 128), colour))
"""

MEASURED = """
times = [at for at, update in sent if update]
pauses = [later - earlier for earlier, later in zip(times, times[1:3])]  # the last update does not wait
print(asked, len(times), len(sent) - len(times), spent / elapsed, min(pauses))
"""


@pytest.mark.slow
def test_in_a_notebook_one_image_is_replaced_a_few_times_and_ends_complete():
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(text) for text in (IN_A_NOTEBOOK, MEASURED)])
    NotebookClient(notebook, timeout=240, kernel_name="python3").execute()
    shown = "".join(output.get("data", {}).get("text/html", "") for output in notebook.cells[0].outputs)
    assert shown.count("<img") == 1
    assert 'alt="A sweep, 3 of 3 images finished."' in shown
    asked, updates, displays, fraction, shortest = map(float, notebook.cells[1].outputs[0].text.split())
    # Three previews, at most two a second, and one more update when the grid is complete.
    assert asked > 20 and updates <= 5 and displays == 1
    assert shortest >= 0.5
    assert fraction < 0.5  # on a busy machine; 0.05 on an idle one
    png = base64.b64decode(shown.partition("base64,")[2].partition('"')[0])
    pixels = np.asarray(Image.open(io.BytesIO(png))).astype(int)
    for colour in (RED, GREEN, (30, 30, 200)):
        assert ((abs(pixels - colour) < 3).all(axis=-1)).sum() > 100 * 100
