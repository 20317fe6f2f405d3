"""The pictures of pictures: right files, every image in its place, labels that fit."""

import matplotlib.pyplot as plt
import numpy as np
import pytest
from PIL import Image

from decinb import InputError, Sweep, plot_grid, plot_images

COLOURS = [(200, 30, 30), (30, 200, 30), (30, 30, 200), (200, 200, 30)]


def flat(colour):
    return Image.new("RGB", (64, 64), colour)


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    assert not plt.get_fignums(), "a figure was left open"


def places(file):
    """The middle of every colour in a saved figure, as fractions (x, y) of it."""
    pixels = np.asarray(Image.open(file).convert("RGB")).astype(int)
    found = []
    for colour in COLOURS:
        y, x = np.nonzero((abs(pixels - colour) < 8).all(axis=-1))
        found.append((x.mean() / pixels.shape[1], y.mean() / pixels.shape[0]) if len(x) > 50 else None)
    return found


def same(first, second):
    """Equal but for the width of a label."""
    return first == pytest.approx(second, abs=0.01)


def test_plot_images_saves_the_guides_row(in_a_folder_of_its_own):
    plot_images([flat(colour) for colour in COLOURS], [0.75, 0.8, 0.8500000000000001, 0.9], "Strength")
    saved = Image.open("Strength_experiments.png")
    assert saved.size == (1500, 500)  # 15 x 5 inches at 100 dots, as in the guide
    x = [place[0] for place in places("Strength_experiments.png")]
    assert x == sorted(x)


def test_plot_images_takes_one_image_and_the_guides_title_with_a_colon(in_a_folder_of_its_own):
    plot_images([flat(COLOURS[0])], [30], "Steps:")
    assert [file.name for file in in_a_folder_of_its_own.iterdir()] == ["Steps_experiments.png"]


def test_nine_images_stand_three_by_three(in_a_folder_of_its_own):
    images = [flat((9, 9, 9))] * 9
    images[0], images[2], images[6], images[8] = map(flat, COLOURS)
    plot_grid(images, [f"image {i}" for i in range(9)], columns=3, file="grid.png")
    (x0, y0), (x2, y2), (x6, y6), (x8, y8) = places("grid.png")
    assert same(x0, x6) and same(x2, x8) and x0 < x2
    assert same(y0, y2) and same(y6, y8) and y0 < y6


def two_axes():
    cells = [{"strength": s, "guidance_scale": g} for s in (0.5, 1.0) for g in (1, 9)]
    return Sweep(flat((9, 9, 9)), "a prompt", cells, [flat(colour) for colour in COLOURS])


def test_a_sweep_lays_itself_out_by_two_arguments(in_a_folder_of_its_own):
    two_axes().plot(rows="guidance_scale", cols="strength", file="sweep.png")
    low_low, low_high, high_low, high_high = places("sweep.png")
    assert same(low_low[0], low_high[0]) and same(high_low[0], high_high[0]) and low_low[0] < high_low[0]
    assert same(low_low[1], high_low[1]) and low_low[1] < low_high[1]


def test_a_sweep_finds_its_arguments_alone(in_a_folder_of_its_own):
    two_axes().plot(file="sweep.png")
    assert all(places("sweep.png"))


def test_images_without_titles_and_titles_without_images_are_refused():
    with pytest.raises(InputError, match="images is empty"):
        plot_images([], [], "Strength")
    with pytest.raises(InputError, match="as many as images: got 1 for 2"):
        plot_grid([flat(COLOURS[0])] * 2, ["one"])


def test_cells_on_one_place_are_refused():
    with pytest.raises(InputError, match="two cells fall on"):
        two_axes().plot(cols="strength")
    with pytest.raises(InputError, match="'seed' is not an argument of every cell"):
        two_axes().plot(rows="seed", cols="strength")
