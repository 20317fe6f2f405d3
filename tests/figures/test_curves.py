"""Curves show what was measured, leave out what is unknown, and every figure says what it shows."""

import math
import re

import matplotlib.pyplot as plt
import nbformat
import pytest
from nbclient import NotebookClient

import decinb
from decinb import InputError
from decinb.figures import curves, page
from decinb.scenes import estimates


@pytest.fixture
def shown(monkeypatch):
    """Collect the finished figures with their texts for readers who do not see them."""
    seen = []
    monkeypatch.setattr(curves, "finish", lambda figure, file=None, alt="": seen.append((figure, alt)))
    yield seen
    plt.close("all")


def test_each_measure_has_a_panel_with_its_interval(shown):
    points = [estimates.fraction([True] * k + [False] * (10 - k)) for k in (2, 5, 9)]
    decinb.plot_curves(
        [0.2, 0.5, 0.9], {"changed": {"one": points, "two": points[::-1]}, "kept": [1, 2, 3]}, "strength"
    )
    ((figure, alt),) = shown
    changed, kept = figure.axes
    assert (changed.get_ylabel(), kept.get_ylabel(), kept.get_xlabel()) == ("changed", "kept", "strength")
    assert [text.get_text() for text in changed.get_legend().get_texts()] == ["one", "two"] and not kept.get_legend()
    assert len(changed.collections) == 2 and not kept.collections
    top = max(point["high"] for point in points)
    assert changed.get_ylim()[1] >= top, "nothing is cut off"
    assert "changed, one: 0.2 at 0.2 and 0.9 at 0.9" in alt


def test_an_unknown_measure_is_left_out_and_never_a_blank_panel(shown, capsys):
    unknown = {"value": math.nan, "low": math.nan, "high": math.nan}
    decinb.plot_curves([1, 2], {"adherence": [unknown] * 2, "spread": [0.1, 0.2]}, "guidance scale")
    assert [ax.get_ylabel() for ax in shown[0][0].axes] == ["spread"]
    decinb.plot_curves([1, 2], {"adherence": [unknown] * 2}, "guidance scale")
    assert len(shown) == 1 and "cannot be measured for this model" in capsys.readouterr().out


def test_numbers_of_links_have_no_ticks_between_them(shown):
    decinb.plot_curves([0, 1, 2], {"kept": [0.3, 0.2, 0.1]}, "link")
    assert all(tick == int(tick) for tick in shown[0][0].axes[0].get_xticks())


def test_bars_have_intervals_and_maps_have_numbers(shown):
    points = [estimates.fraction([True] * k + [False] * (10 - k)) for k in (2, 9)]
    decinb.plot_bars(["trees", "a lake"], {"without": points, "with": points[::-1]}, "fraction of images")
    decinb.plot_maps({"change": [[0.1, 0.5], [0.2, 0.9]]}, [0.4, 0.8], [1, 7.5], "strength", "guidance scale")
    (bars, said), (maps, over) = shown
    assert [bar.get_width() for bar in bars.axes[0].patches] == [0.2, 0.9, 0.9, 0.2]
    assert "trees: 0.2 without, 0.9 with" in said
    assert [text.get_text() for text in maps.axes[0].texts] == ["0.10", "0.50", "0.20", "0.90"]
    assert over == "Maps over strength and guidance scale: change from 0.10 to 0.90."


def test_a_curve_of_another_length_is_refused():
    with pytest.raises(InputError, match="panels: kept, one has 1 points, x has 2"):
        decinb.plot_curves([1, 2], {"kept": {"one": [1]}}, "strength")


def test_a_figure_without_a_text_says_what_is_written_in_it():
    figure, (left, right) = plt.subplots(1, 2)
    left.set(title="a <b>", xlabel="steps", ylabel="seconds")
    right.text(0, 0, "two\nlines")
    html = page.as_html(figure)
    plt.close(figure)
    assert 'alt="a &lt;b&gt;; seconds against steps; two lines"' in html
    assert re.search(r'width="\d+" style="max-width: none" src="data:image/png;base64,', html)


CELL = """
from PIL import Image
import decinb
decinb.plot_grid([Image.new("RGB", (32, 32), colour) for colour in ("red", "green")] * 3, ["one", "two"] * 3, columns=6)
"""


@pytest.mark.slow
def test_in_a_notebook_every_figure_has_a_text_and_fits_the_page():
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(CELL)])
    NotebookClient(notebook, kernel_name="python3").execute()
    (output,) = notebook.cells[0].outputs
    html = output["data"]["text/html"]
    assert 'alt="Images, each under its title: one; two; one; two; one; two"' in html
    assert int(re.search(r'width="(\d+)"', html)[1]) <= 1056
