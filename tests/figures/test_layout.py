"""Tests of layouts: which argument goes along which side, in which order, and on which page."""

import pytest

from decinb import InputError, grid
from decinb.figures.layout import Layout, lay_out, titles, varying

DEFAULTS = {
    "image": "day",
    "prompt": "a house",
    "negative_prompt": None,
    "strength": 0.8,
    "guidance_scale": 7.5,
    "num_inference_steps": 30,
    "seed": 0,
}


def with_defaults(cells):
    return [{**DEFAULTS, **cell} for cell in cells]


def sizes(**counts):
    """Return the numbers of rows and columns for a full product of so many values."""
    layout = lay_out(with_defaults(grid(**{name: [i / 100 for i in range(1, n + 1)] for name, n in counts.items()})))
    assert layout.titles is None
    return len(layout.rows), len(layout.columns)


@pytest.mark.parametrize(
    "counts, rows_and_columns",
    [
        ({"strength": 5}, (1, 5)),
        ({"strength": 5, "seed": 3}, (3, 5)),
        ({"seed": 3, "strength": 5}, (3, 5)),
        ({"strength": 6, "seed": 2, "guidance_scale": 3}, (2 * 3, 6)),
        ({"strength": 2, "seed": 2, "guidance_scale": 3, "num_inference_steps": 6}, (2 * 3, 2 * 6)),
        ({"strength": 2, "seed": 5, "guidance_scale": 5, "num_inference_steps": 6}, (2 * 6, 5 * 5)),
    ],
)
def test_the_argument_with_more_values_goes_along_the_top(counts, rows_and_columns):
    assert sizes(**counts) == rows_and_columns


def test_prompts_change_more_slowly_than_numbers_on_a_shared_side():
    layout = lay_out(with_defaults(grid(seed=[0, 1], strength=[0.5, 0.6, 0.7], prompt=["a", "b"])))
    assert layout.rows == [("a", "seed 0"), ("a", "seed 1"), ("b", "seed 0"), ("b", "seed 1")]


def test_the_side_that_is_not_named_takes_what_keeps_cells_apart():
    records = with_defaults(grid(strength=[0.5, 0.6, 0.7], seed=[0, 1], guidance_scale=[1, 9]))
    layout = lay_out(records, rows="strength")
    assert (len(layout.rows), len(layout.columns)) == (3, 4) and layout.columns[0] == ("guidance 1", "seed 0")
    assert len(lay_out(records, cols=("seed", "strength")).rows) == 2
    zipped = with_defaults([{"strength": i / 10, "seed": i} for i in range(1, 5)])
    assert lay_out(zipped, cols="strength").rows == [()]
    with pytest.raises(InputError, match="they also differ in guidance_scale"):
        lay_out([*records, *with_defaults(grid(prompt=["b", "c"], num_inference_steps=[20, 10]))], rows="strength")


def test_a_pair_has_only_existing_combinations():
    cells = [{"strength": 0.5, "seed": 0}, {"strength": 0.5, "seed": 1}, {"strength": 0.75, "seed": 1}]
    layout = lay_out(with_defaults(cells), cols=("strength", "seed"))
    assert layout.columns == [("strength 0.5", "seed 0"), ("strength 0.5", "seed 1"), ("strength 0.75", "seed 1")]
    assert layout.places == {(0, 0): 0, (0, 1): 1, (0, 2): 2}


def test_any_hashable_value_of_a_record_can_be_a_side():
    records = [
        {**record, "steps_run": 15 + i, "versions": {}} for i, record in enumerate(with_defaults([{}, {"seed": 1}]))
    ]
    assert lay_out(records, cols="steps_run").columns == [("steps_run 15",), ("steps_run 16",)]
    with pytest.raises(InputError, match="'versions' is not an argument of every cell; the cells differ in seed"):
        lay_out(records, cols="versions")


def test_cells_of_two_models_in_one_place_are_refused():
    records = [{**record, "model": name} for record in with_defaults(grid(seed=[0, 1])) for name in ("tiny", "large")]
    with pytest.raises(InputError, match="seed 0: they also differ in model; .* where={'model': ...}"):
        lay_out(records, cols="seed")
    assert len(lay_out(records, rows="model", cols="seed").places) == 4
    long = [{**record, "prompt": "a red house " * 300} for record in records]
    with pytest.raises(InputError, match="place of a red house a red house a red house a…, seed 0: they also"):
        lay_out(long, rows="prompt", cols="seed")


def test_a_table_that_would_be_mostly_empty_is_not_made():
    star = [{"strength": 0.5, "seed": 0}, *({"strength": 0.5, "seed": i} for i in range(1, 4))]
    star += [{"strength": 0.5 + i / 10, "seed": 0} for i in range(1, 4)]
    layout = lay_out(with_defaults(star))
    assert layout.titles[0].replace("\u00a0", " ") == "strength 0.5, seed 0"
    assert layout.places == {divmod(i, 4): i for i in range(7)}


def test_free_places_come_first_where_cells_follow_each_other():
    layout = lay_out(
        with_defaults([{"seed": i, "strength": 0.1 * i, "guidance_scale": i} for i in range(1, 8)]), free=1
    )
    assert layout.places[0, 1] == 0 and layout.places[1, 3] == 6 and (0, 0) not in layout.places


def test_titles_name_what_differs_or_everything_if_nothing_does():
    found = [title.replace("\u00a0", " ") for title in titles(with_defaults(grid(prompt=["a", "b"], seed=[0, 1])))]
    assert found == ["seed 0, a", "seed 1, a", "seed 0, b", "seed 1, b"]
    assert titles(with_defaults([{}]))[0].replace("\u00a0", " ") == "strength 0.8, guidance 7.5, steps 30, seed 0"


def test_varying_arguments_have_a_fixed_order():
    assert varying(with_defaults(grid(seed=[0, 1], image=["day", "night"], strength=[0.5]))) == ["image", "seed"]


@pytest.mark.parametrize(
    "prompts, labels",
    [
        (["a house by day", "a house at night"], ["a house by day", "a house at night"]),
        (
            ["a painting of a red house among green trees", "a painting of a blue house among green trees"],
            ["… red …", "… blue …"],
        ),
        (
            ["a painting of a house among some green trees", "a painting of a house among some green trees at night"],
            ["… trees", "… trees at night"],
        ),
        (["one two three four five six seven eight nine ten", "eleven"], None),
    ],
    ids=["short", "middle", "one begins the other", "nothing in common"],
)
def test_words_shared_by_long_prompts_are_left_out(prompts, labels):
    layout = lay_out(with_defaults(grid(prompt=prompts)))
    assert [head[0] for head in layout.columns] == (labels or prompts)


# --- pages ---


def pages(heads, limit):
    layout = Layout([()], heads, {(0, i): i for i in range(len(heads))})
    return [len(part.columns) for part in layout.pages(limit)]


@pytest.mark.parametrize(
    "count, limit, lengths",
    [(12, 12, [12]), (13, 12, [7, 6]), (25, 12, [9, 8, 8]), (3, 1, [1, 1, 1])],
)
def test_pages_are_of_similar_size(count, limit, lengths):
    assert pages([(str(i),) for i in range(count)], limit) == lengths


@pytest.mark.parametrize(
    "groups, lengths",
    [([5, 5, 5], [10, 5]), ([12, 1], [12, 1]), ([4] * 7, [12, 12, 4]), ([20, 2], [10, 12]), ([2, 20], [2, 10, 10])],
)
def test_groups_that_fit_on_a_page_are_not_split(groups, lengths):
    assert pages([(f"group {g}", f"member {i}") for g, size in enumerate(groups) for i in range(size)], 12) == lengths


def test_every_place_is_on_exactly_one_page():
    records = with_defaults(grid(strength=[i / 100 for i in range(1, 31)], seed=range(15)))
    layout = lay_out(records)
    found = [index for part in layout.pages(12) for index in part.places.values()]
    assert sorted(found) == list(range(450))
    for part in layout.pages(12):
        for (row, column), index in part.places.items():
            assert part.rows[row] == (f"seed {records[index]['seed']}",)
            assert part.columns[column] == (f"strength {records[index]['strength']:g}",)
