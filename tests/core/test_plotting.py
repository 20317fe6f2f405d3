"""Tests of the plotting functions: files have the right names, images the right places, and labels fit."""

import itertools
import re
from dataclasses import dataclass
from itertools import combinations, pairwise
from pathlib import Path

import matplotlib.pyplot as plt
import nbformat
import numpy as np
import pytest
import torch
from matplotlib.transforms import Bbox
from nbclient import NotebookClient
from PIL import Image

import decinb
from decinb import InputError, Sweep, grid, plot_grid, plot_images, plotting
from decinb.execution.chains import Chain
from decinb.execution.store import Images

COLOURS = [(200, 30, 30), (30, 200, 30), (30, 30, 200), (200, 200, 30)]
INPUT = (9, 9, 9)
DEFAULTS = {
    "image": "day",
    "prompt": "a house",
    "negative_prompt": None,
    "strength": 0.8,
    "guidance_scale": 7.5,
    "num_inference_steps": 30,
    "seed": 0,
}
LONG = "a highly detailed oil painting in the manner of the old masters, of a blue house with a $5 roof, "
ENDLESS = "x" * 5000
TOUCH = 0.5  # pixels: boxes that only touch do not overlap


def flat(colour, size=(64, 64)):
    return Image.new("RGB", size, colour)


@pytest.fixture(autouse=True)
def own_folder(tmp_path, monkeypatch):
    folder = tmp_path / "own"
    folder.mkdir()
    monkeypatch.chdir(folder)
    yield folder
    assert not plt.get_fignums(), "a figure was left open"


def places(file):
    """Return the middle of every colour in a saved figure, as fractions (x, y) of its size."""
    pixels = np.asarray(Image.open(file).convert("RGB")).astype(int)
    found = []
    for colour in COLOURS:
        y, x = np.nonzero((abs(pixels - colour) < 8).all(axis=-1))
        found.append((x.mean() / pixels.shape[1], y.mean() / pixels.shape[0]) if len(x) > 50 else None)
    return found


def same(first, second):
    """Compare positions, up to the width of a label."""
    return first == pytest.approx(second, abs=0.01)


# --- the guide's row and a plain grid ---


def test_plot_images_saves_the_guides_row(own_folder):
    plot_images([flat(colour) for colour in COLOURS], [0.75, 0.8, 0.8500000000000001, 0.9], "Strength")
    saved = Image.open("Strength_experiments.png")
    assert saved.width == 1100  # 11 inches at 100 dots
    x = [place[0] for place in places("Strength_experiments.png")]
    assert x == sorted(x)


def test_plot_images_takes_one_image_and_the_guides_title_with_a_colon(own_folder):
    plot_images([flat(COLOURS[0])], [30], "Steps:")
    assert [file.name for file in own_folder.iterdir()] == ["Steps_experiments.png"]


def test_nine_images_make_three_rows_of_three(own_folder):
    images = [flat((9, 9, 9))] * 9
    images[0], images[2], images[6], images[8] = map(flat, COLOURS)
    plot_grid(images, [f"image {i}" for i in range(9)], columns=3, file="grid.png")
    (x0, y0), (x2, y2), (x6, y6), (x8, y8) = places("grid.png")
    assert same(x0, x6) and same(x2, x8) and x0 < x2
    assert same(y0, y2) and same(y6, y8) and y0 < y6


def test_missing_images_and_a_wrong_number_of_titles_are_refused():
    with pytest.raises(InputError, match="images is empty"):
        plot_images([], [], "Strength")
    with pytest.raises(InputError, match="one entry for each image: got 1 for 2 images"):
        plot_grid([flat(COLOURS[0])] * 2, ["one"])


# --- tables of a sweep ---


@dataclass
class Drawn:
    """The contents of a figure: texts and images, each with its box in pixels from the lower left corner."""

    frame: Bbox
    texts: list[tuple[str, Bbox]]
    sizes: list[float]
    images: list[tuple[tuple[int, ...], Bbox]]
    boxes: list[Bbox]

    def box(self, label: str) -> Bbox:
        return next(box for text, box in self.texts if text == label)

    def under(self, column: str, row: str) -> tuple[int, ...] | None:
        """Return the colour of the image below one label and to the right of another."""
        x, y = middle(self.box(column))[0], middle(self.box(row))[1]
        return next((colour for colour, box in self.images if box.contains(x, y)), None)


def middle(box):
    return (box.x0 + box.x1) / 2, (box.y0 + box.y1) / 2


@pytest.fixture
def drawn(monkeypatch):
    """Collect the contents of every finished figure before it is closed."""
    seen, finish = [], plotting.finish

    def measured(figure, file=None, alt=""):
        figure.canvas.draw()
        ax, renderer = figure.axes[0], figure.canvas.get_renderer()
        seen.append(
            Drawn(
                figure.bbox,
                [(" ".join(text.get_text().split()), text.get_window_extent(renderer)) for text in ax.texts],
                [text.get_fontsize() for text in ax.texts],
                [(tuple(image.get_array()[0, 0].tolist()), image.get_window_extent(renderer)) for image in ax.images],
                [
                    ax.transData.transform_bbox(path.get_extents())
                    for boxes in ax.collections
                    for path in boxes.get_paths()
                ],
            )
        )
        finish(figure, file, alt)

    monkeypatch.setattr(plotting, "finish", measured)
    return seen


def sweep_of(cells, size=(64, 64), seconds=1.5, image="day"):
    """Make a finished sweep whose images differ in colour: red 40 for the first cell, 41 for the second."""
    records = [{**DEFAULTS, "image": image, **cell, "steps_run": 24, "seconds": seconds} for cell in cells]
    images = [flat((40 + index, 0, 0), size) for index in range(len(cells))]
    return Sweep(flat(INPUT, size), "a house", cells, Images(images), records)


def number(colour):
    """Return the cell that an image belongs to; None for the input."""
    return None if colour[:3] == INPUT else colour[0] - 40


def check_every_cell(sweep, drawn, column, row):
    """Check that each cell is below and beside the labels that ``column`` and ``row`` make from it."""
    for index, cell in enumerate(sweep.cells):
        assert number(drawn.under(column(cell), row(cell))) == index


def two_axes():
    return sweep_of(grid(strength=[0.5, 0.75, 1.0], guidance_scale=[1, 9]))


def test_arguments_go_along_the_named_sides(drawn):
    two_axes().plot(rows="strength", cols="guidance_scale")
    check_every_cell(
        two_axes(),
        drawn[0],
        lambda cell: f"guidance {cell['guidance_scale']}",
        lambda cell: f"strength {cell['strength']:g}",
    )


def test_by_default_the_argument_with_more_values_goes_along_the_top(drawn):
    two_axes().plot()
    check_every_cell(
        two_axes(),
        drawn[0],
        lambda cell: f"strength {cell['strength']:g}",
        lambda cell: f"guidance {cell['guidance_scale']}",
    )


def test_one_argument_makes_one_row_after_the_input(drawn):
    sweep_of(grid(strength=[0.5, 0.75])).plot()
    assert [number(colour) for colour, _ in sorted(drawn[0].images, key=lambda one: one[1].x0)] == [None, 0, 1]
    assert sorted(text for text, _ in drawn[0].texts) == ["input", "strength 0.5", "strength 0.75"]


def in_reading_order(page):
    """Return the numbers of the cells from left to right, row by row."""
    by_place = sorted((round(-box.y0), round(box.x0), number(colour)) for colour, box in page.images)
    return [index for _, _, index in by_place]


def test_of_three_arguments_two_are_nested_down_the_side(drawn):
    sweep = sweep_of(grid(strength=[0.5, 0.75, 1.0], guidance_scale=[1, 9], seed=[0, 1]))
    sweep.plot()
    wanted = [
        sweep.cells.index({"strength": strength, "guidance_scale": guidance, "seed": seed})
        for guidance in (1, 9)
        for seed in (0, 1)
        for strength in (0.5, 0.75, 1.0)
    ]
    assert in_reading_order(drawn[0]) == [None, *wanted]
    down = sorted(drawn[0].texts, key=lambda one: -middle(one[1])[1])
    assert [text for text, box in down if box.x1 < drawn[0].box("input").x0] == [
        "seed 0",
        "guidance 1",  # centred on the rows that it spans
        "seed 1",
        "seed 0",
        "guidance 9",
        "seed 1",
    ]


def test_four_arguments_are_nested_on_both_sides_and_show_every_cell_once(drawn):
    sweep = sweep_of(
        grid(strength=[0.5, 0.75, 1.0], guidance_scale=[1, 9], seed=[0, 1, 2], num_inference_steps=[20, 30])
    )
    sweep.plot(rows=("num_inference_steps", "seed"), cols=["guidance_scale", "strength"])
    texts = [text for text, _ in drawn[0].texts]
    assert {text: texts.count(text) for text in ("steps 20", "guidance 1", "seed 2", "strength 1", "input")} == {
        "steps 20": 1,
        "guidance 1": 1,
        "seed 2": 2,
        "strength 1": 2,
        "input": 1,
    }
    wanted = [
        sweep.cells.index(
            {"strength": strength, "guidance_scale": guidance, "seed": seed, "num_inference_steps": steps}
        )
        for steps in (20, 30)
        for seed in (0, 1, 2)
        for guidance in (1, 9)
        for strength in (0.5, 0.75, 1.0)
    ]
    assert in_reading_order(drawn[0]) == [None, *wanted]


def test_gaps_between_groups_are_larger_than_within(drawn):
    sweep_of(grid(guidance_scale=[1, 9], strength=[0.5, 0.75])).plot(
        cols=("guidance_scale", "strength"), show_input=False
    )
    boxes = sorted((box for _, box in drawn[0].images), key=lambda box: box.x0)
    gaps = [after.x0 - before.x1 for before, after in pairwise(boxes)]
    assert gaps[0] == pytest.approx(gaps[2]) and gaps[1] > 2 * gaps[0] > 0


def test_a_place_without_a_cell_stays_empty(drawn):
    cells = [cell for cell in grid(strength=[0.5, 0.75], seed=[0, 1]) if cell != {"strength": 0.75, "seed": 1}]
    sweep_of(cells).plot(rows="seed", cols="strength")
    assert drawn[0].under("strength 0.75", "seed 1") is None
    assert len(drawn[0].images) == 4 and not drawn[0].boxes


def test_numbers_ascend_unless_they_were_given_descending(drawn):
    for given, shown in (([0.8, 0.5, 0.6], [0.5, 0.6, 0.8]), ([0.8, 0.6, 0.5], [0.8, 0.6, 0.5])):
        sweep_of(grid(strength=given)).plot(show_input=False)
        texts = sorted(drawn.pop().texts, key=lambda one: one[1].x0)
        assert [text for text, _ in texts] == [f"strength {value}" for value in shown]


def test_where_selects_one_value_or_several(drawn):
    sweep = sweep_of(grid(strength=[0.5, 0.75, 1.0], seed=[0, 1]))
    sweep.plot(where={"seed": 1, "strength": [0.5, 1.0]})
    assert [number(colour) for colour, _ in sorted(drawn[0].images, key=lambda one: one[1].x0)] == [None, 1, 5]


def test_only_the_images_shown_are_read_from_disk(own_folder, drawn):
    sweep = sweep_of(grid(strength=[0.5, 0.75], seed=[0, 1]))
    for index in range(4):
        decinb.images.save_image(sweep.images[index], own_folder / f"{index}.png", {}, sweep.image)
    sweep.images = Images([own_folder / f"{index}.png" for index in range(4)])
    for hidden in (1, 3):
        (own_folder / f"{hidden}.png").unlink()
    sweep.plot(where={"seed": 0})
    assert [number(colour) for colour, _ in sorted(drawn[0].images, key=lambda one: one[1].x0)] == [None, 0, 2]


def test_seconds_are_written_below_each_image_on_request(drawn):
    sweep = two_axes()
    sweep.records[0]["seconds"] = 12.34
    sweep.plot(seconds=True)
    texts = [text for text, _ in drawn[0].texts]
    assert texts.count("1.50 s") == 5 and texts.count("12.3 s") == 1
    (first,) = [box for colour, box in drawn[0].images if number(colour) == 0]
    note = drawn[0].box("12.3 s")
    assert note.y1 <= first.y0 + TOUCH and first.x0 < middle(note)[0] < first.x1
    two_axes().plot()
    assert not any(text.endswith(" s") for text, _ in drawn[1].texts)


def test_the_input_can_be_left_out(drawn):
    two_axes().plot(show_input=False)
    assert "input" not in [text for text, _ in drawn[0].texts] and len(drawn[0].images) == 6


@pytest.mark.parametrize("side", ["rows", "cols"])
def test_each_of_several_inputs_comes_before_its_own_cells(drawn, side):
    inputs = {name: flat((0, 0, shade)) for name, shade in (("one", 100), ("two", 200))}
    cells = grid(image=list(inputs.values()), strength=[0.5, 0.75])
    sweep = sweep_of(cells)
    for record in sweep.records:
        record["image"] = next(name for name, image in inputs.items() if image is record["image"])
    sweep.plot(**{side: "image", "cols" if side == "rows" else "rows": "strength"})
    for name, image in inputs.items():
        column, row = ("input", name) if side == "rows" else (name, "input")
        assert drawn[0].under(column, row)[:3] == image.getpixel((0, 0))


# --- pages ---


def test_a_wide_grid_becomes_numbered_pages(own_folder, drawn):
    strengths = [round(0.05 * i, 2) for i in range(1, 17)]
    sweep_of(grid(strength=strengths, seed=[0, 1])).plot(rows="seed", cols="strength", file="out/wide.png")
    assert sorted(file.name for file in (own_folder / "out").iterdir()) == ["wide-1.png", "wide-2.png"]
    assert [text for page in drawn for text, _ in page.texts if text.startswith("page")] == [
        "page 1 of 2",
        "page 2 of 2",
    ]
    shown = [{number(colour) for colour, _ in page.images} for page in drawn]
    assert shown == [{None, *range(16)}, {None, *range(16, 32)}]  # eight columns on each page, and the input


def test_pages_are_split_between_groups(drawn):
    sweep_of(grid(guidance_scale=[1, 2, 3], strength=[0.5, 0.6, 0.7, 0.8, 0.9])).plot(
        cols=("guidance_scale", "strength")
    )
    assert [len(page.images) for page in drawn] == [1 + 10, 1 + 5]


def test_the_size_of_a_page_can_be_chosen(drawn):
    two_axes().plot(rows="strength", cols="guidance_scale", page=2)
    assert [len(page.images) for page in drawn] == [1 + 4, 1 + 2]


def test_a_single_page_keeps_the_file_name(own_folder, drawn):
    two_axes().plot(file="sweep.png")
    assert [file.name for file in own_folder.iterdir()] == ["sweep.png"]


# --- cells one after another ---


@pytest.mark.parametrize(
    "cells",
    [
        [{"strength": 0.5 + 0.05 * i, "guidance_scale": i, "seed": i} for i in range(6)],
        grid(strength=[0.5, 0.75], guidance_scale=[1, 9], seed=[0, 1], prompt=["a", "b"], num_inference_steps=[20, 30]),
    ],
    ids=["scattered", "five arguments"],
)
def test_cells_that_do_not_make_a_table_follow_each_other_under_titles(drawn, cells):
    sweep = sweep_of(cells)
    sweep.plot()
    in_order = sorted(drawn[0].images, key=lambda one: (-round(one[1].y0), one[1].x0))
    assert [number(colour) for colour, _ in in_order] == [None, *range(len(cells))]
    for colour, box in in_order[1:]:
        titles = [
            text for text, where in drawn[0].texts if box.x0 < middle(where)[0] < box.x1 and where.y0 >= box.y1 - TOUCH
        ]
        assert any(f"seed {cells[number(colour)]['seed']}" in title for title in titles)


# --- labels ---

HARD = {
    "long prompts down the side": (
        grid(prompt=[LONG + "by day", LONG * 9 + "at night", "short"], seed=[0, 1]),
        {"rows": "prompt", "cols": "seed"},
    ),
    "long prompts along the top": (
        grid(prompt=[LONG + "by day", LONG * 9 + "at night", "short"], seed=[0, 1]),
        {"rows": "seed", "cols": "prompt"},
    ),
    "a word wider than its column": (
        grid(
            prompt=["Donaudampfschifffahrtselektrizitätenhauptbetriebswerkbauunterbeamtengesellschaft", "b"],
            seed=[0, 1],
        ),
        {"rows": "seed", "cols": "prompt"},
    ),
    "long numbers in a full page": (
        grid(strength=[round(0.123456 + i / 20, 6) for i in range(3)], seed=[2**63 - 1 - i for i in range(12)]),
        {"seconds": True},
    ),
    "nested prompts and negative prompts": (
        grid(
            prompt=[LONG + "by day", LONG + "at night"], negative_prompt=[None, LONG], strength=[0.5, 1.0], seed=[0, 1]
        ),
        {"seconds": True},
    ),
    "one narrow image": (grid(prompt=[LONG]), {"rows": "prompt", "cols": "negative_prompt"}),
    "titles": (
        [{"prompt": LONG * i, "strength": 0.5 + 0.01 * i, "guidance_scale": i, "seed": i} for i in range(1, 9)],
        {"seconds": True},
    ),
}


@pytest.mark.parametrize("size", [(64, 64), (128, 32), (32, 96)], ids=["square", "flat", "tall"])
@pytest.mark.parametrize("cells, options", HARD.values(), ids=HARD.keys())
def test_labels_are_readable_complete_and_do_not_overlap(drawn, cells, options, size):
    sweep_of(cells, size).plot(**options)
    for page in drawn:
        assert min(page.sizes) >= 8.5  # points, 11 pixels at 96 to the inch
        boxes = [*page.texts, *((f"image {number(colour)}", box) for colour, box in page.images)]
        for name, box in boxes:
            inside = (
                page.frame.x0 <= box.x0
                and box.x1 <= page.frame.x1
                and page.frame.y0 <= box.y0
                and box.y1 <= page.frame.y1
            )
            assert inside, f"{name} is cut off"
        for (one, first), (two, second) in combinations(boxes, 2):
            shared = Bbox.intersection(first, second)
            assert shared is None or min(shared.width, shared.height) <= TOUCH, f"{one} and {two} overlap"


def test_prompts_that_begin_alike_are_labelled_by_their_difference(drawn):
    sweep_of(grid(prompt=[LONG + "by day", LONG + "at night"], seed=[0, 1, 2])).plot()
    assert {"… by day", "… at night"} <= {text for text, _ in drawn[0].texts}


def test_prompts_cut_off_for_their_length_remain_distinguishable(drawn):
    sweep_of(grid(prompt=["x " + LONG * 9 + "by day", "x " + LONG * 9 + "at night", "y"], seed=[0, 1])).plot(
        cols="prompt", rows="seed"
    )
    texts = [text for text, _ in drawn[0].texts]
    assert any(text.endswith("by day") for text in texts) and any(text.endswith("at night") for text in texts)


def test_dollar_signs_in_prompts_are_not_mathematics(drawn):
    prompts = ["a $5 roof", "a \\frac{1}{2} $ roof"]
    sweep_of(grid(prompt=prompts)).plot()
    assert set(prompts) <= {text for text, _ in drawn[0].texts}


# --- invalid arguments ---


@pytest.mark.parametrize(
    "options, message",
    [
        (
            {"rows": "seed", "cols": "strength"},
            "two cells share the place of seed 0, strength 0.5: they also differ in guidance_scale; name it",
        ),
        (
            {"rows": "guidance", "cols": "strength"},
            "rows: 'guidance' is not.*mean 'guidance_scale'.*differ in strength, guid",
        ),
        ({"rows": "strength", "cols": "strength"}, "strength is named in both rows and cols"),
        ({"rows": ("seed", "seed")}, "seed is named twice in rows"),
        ({"rows": ("a", "b", "c")}, "rows must be the name of an argument or a pair of names, got"),
        ({"cols": 3}, "cols must be the name of an argument or a pair of names, got 3"),
        ({"where": {"guidance_scale": 5}}, r"where=.* leaves no cell: guidance_scale is 1 or 9"),
        ({"where": {"sed": 5}}, "'sed'.*mean 'seed'"),
        ({"where": 5}, "where must be a dict"),
        ({"rows": ENDLESS}, "rows: 'x+…x+' is not an argument of every cell"),
        ({"rows": [ENDLESS] * 3}, "rows must be the name of an argument or a pair of names, got .*x…x"),
        ({"rows": (np.array([1, 2]), "seed")}, r"rows: array\(\[1, 2\]\) is not an argument of every cell"),
        ({"where": ENDLESS}, "where must be a dict .*, got 'x+…x+'"),
        ({"where": {"seed": ENDLESS}}, "where={'seed': 'x+…x+'} leaves no cell: seed is 0"),
        ({"where": {"seed": torch.empty(1, device="meta")}}, "seed must be an ordinary tensor, .* on the meta device"),
        ({"page": ENDLESS}, "page must be an integer from 1 to 40, got 'x+…x+'"),
        ({"page": 0}, "page must be an integer from 1 to 40, got 0"),
        ({"page": 100}, "page must be an integer from 1 to 40, got 100"),
    ],
)
def test_invalid_arguments_are_refused_with_a_hint(options, message):
    with pytest.raises(InputError, match=message) as caught:
        two_axes().plot(**options)
    assert len(str(caught.value)) < 200


def test_a_sweep_without_a_finished_cell_is_refused():
    with pytest.raises(InputError, match="no finished cell"):
        sweep_of([]).plot()


def test_a_repeated_cell_is_shown_once(drawn):
    sweep_of([*grid(strength=[0.5, 0.75]), {"strength": 0.5}]).plot()
    assert sorted(number(colour) for colour, _ in drawn[0].images[:-1]) == [0, 1]


# --- hostile titles and files ---

HOSTILE = ["a $\\frac{$ b", "$$", "\ud800", "a\0b", "<b>", "\\", "{0} %s"]


def test_any_title_can_be_drawn(own_folder):
    images = [flat(COLOURS[0])] * len(HOSTILE)
    plot_grid(images, HOSTILE, file="grid.png")
    plot_images(images, HOSTILE, "a $\\frac{$ b")
    links = [{"prompt": prompt, "strength": 0.5, "takes": "latent"} for prompt in HOSTILE]
    records = [{"chain": links[: i + 1]} for i in range(len(links))]
    Chain(None, images, records).plot(file="chain.png")
    sweep_of(grid(prompt=HOSTILE)).plot(file="sweep.png")
    assert all(Path(name).stat().st_size > 1000 for name in ("grid.png", "chain.png", "sweep.png"))


@pytest.mark.parametrize(
    "title", ["../../x", "/x", "~", "..", "C:\\x", "a/b", "x" * 300, "\ud800", "a\0b", "con:", "."]
)
def test_the_guides_row_is_saved_in_the_current_folder_whatever_its_title(own_folder, title):
    plot_images([flat(COLOURS[0])], [1], title)
    (file,) = own_folder.rglob("*")
    assert file.parent == own_folder and file.name.endswith("_experiments.png") and file.name[0] not in ".~"
    assert [path.name for path in own_folder.parent.iterdir()] == [own_folder.name]


def test_a_link_in_place_of_a_figure_is_replaced(own_folder, tmp_path):
    target = tmp_path / "target"
    target.write_text("precious")
    (own_folder / "grid.png").symlink_to(target)
    plot_grid([flat(COLOURS[0])], ["one"], file="grid.png")
    assert target.read_text() == "precious" and not (own_folder / "grid.png").is_symlink()


def test_figures_are_saved_in_the_home_folder_and_in_other_formats(own_folder, monkeypatch):
    monkeypatch.setenv("HOME", str(own_folder))
    plot_grid((flat(colour) for colour in COLOURS), range(len(COLOURS)), file="~/new/grid.svg")
    plot_grid([flat(COLOURS[0])], ["one"], file="plain")
    assert sorted(file.name for file in own_folder.rglob("*.*")) == ["grid.svg", "plain.png"]


@pytest.mark.parametrize(
    ("file", "message"),
    [
        ("grid.exe", "file must end in one of .*png.*, got 'grid.exe'"),
        ("", "file must be a path, got ''"),
        (".", "file must name a file, got the folder '.'"),
        (3, "file must be a path, got 3"),
        ("x" * 300 + ".png", "at most 255 bytes"),
        ("/dev/null/grid.png", "'/dev/null/grid.png' cannot be written: .*dev/null"),
    ],
)
def test_files_that_cannot_be_written_are_refused(file, message):
    with pytest.raises(InputError, match=message):
        plot_grid([flat(COLOURS[0])], ["one"], file=file)
    with pytest.raises(InputError, match=message):
        two_axes().plot(file=file)


def test_endless_images_are_refused():
    with pytest.raises(InputError, match="images has more than 10,000 values, or never ends"):
        plot_grid(itertools.repeat(flat(COLOURS[0])), ["one"])
    with pytest.raises(InputError, match="values must be a list of values, got 3"):
        plot_images([flat(COLOURS[0])], 3, "Steps")


# --- plans and galleries ---


def test_a_plan_is_the_same_grid_with_numbers_of_steps_in_empty_boxes(tiny, drawn):
    cells = grid(strength=[0.5, 1.0], num_inference_steps=[1, 4, 10])
    cells.remove({"strength": 0.5, "num_inference_steps": 1})  # no step would run
    decinb.plan(tiny, "day", "a house", cells, timed=False).plot(
        rows="strength", cols="num_inference_steps", file="plan.png"
    )
    (page,) = drawn
    assert len(page.boxes) == 5 and len(page.images) == 1  # the input
    for cell in cells:
        x, y = (
            middle(page.box(f"steps {cell['num_inference_steps']}"))[0],
            middle(page.box(f"strength {cell['strength']:g}"))[1],
        )
        (box,) = [box for box in page.boxes if box.contains(x, y)]
        steps = int(cell["strength"] * cell["num_inference_steps"])
        assert [text for text, where in page.texts if box.contains(*middle(where))] == [
            f"{steps} step{'s' * (steps > 1)}"
        ]


GALLERY = """
from PIL import Image
import decinb
images = [Image.new("RGB", (32, 32), colour) for colour in ("red", "green", "blue")]
groups, titles = ["warm", "cold & <script>", "cold & <script>"], ["one", "two", "<script>three</script>"]
decinb.show_gallery(images, groups, titles)
"""
TABS = "decinb.show_gallery(images, groups, titles, tabs=True)"


@pytest.mark.slow
def test_in_a_notebook_a_gallery_has_a_section_or_a_tab_for_each_group():
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(text) for text in (GALLERY, TABS)])
    NotebookClient(notebook, kernel_name="python3").execute()
    pages = [cell.outputs[0]["data"]["text/html"] for cell in notebook.cells]
    for page in pages:
        assert page.count(";base64,") >= 3 and "<script" not in page
        assert page.index("warm") < page.index("cold")
        assert all(title in page for title in ("one", "two", "three"))
        assert "://" not in page, "nothing is loaded from a network"
    assert pages[0].count("<details") == 2 and "<style" not in pages[0]
    assert len(re.findall(r'<img src="data:image/webp;base64,[^"]+" alt="(?:one|two|&lt;script)', pages[0])) == 3
    assert "cold &amp; &lt;script&gt;</b> (2 images)" in pages[0]
    assert all("color:" in style and "background:" in style for style in re.findall(r'<td style="([^"]+)', pages[0]))


def test_outside_a_notebook_a_gallery_is_a_grid(tmp_path):
    decinb.show_gallery([Image.new("RGB", (32, 32))] * 2, ["a", "b"])
    with pytest.raises(InputError, match="groups must have one entry for each image: got 1 for 2 images"):
        decinb.show_gallery([Image.new("RGB", (32, 32))] * 2, ["a"])
