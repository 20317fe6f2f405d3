"""The four ways to make a list of cells."""

import itertools
import random

import pytest

from decinb import InputError, grid, one_at_a_time, random_design, zipped

GUIDES = {
    "strength": [0.75 + 0.05 * i for i in range(4)],
    "guidance_scale": [i * 1.5 for i in range(3, 8)],
    "num_inference_steps": range(30, 101, 10),
}


def test_grid_has_every_combination_with_the_last_argument_fastest():
    assert grid(strength=[0.5, 1.0], seed=(1, 2)) == [
        {"strength": 0.5, "seed": 1},
        {"strength": 0.5, "seed": 2},
        {"strength": 1.0, "seed": 1},
        {"strength": 1.0, "seed": 2},
    ]


def test_zipped_pairs_the_values_by_position():
    assert zipped(strength=[0.5, 1.0], num_inference_steps=[30, 15]) == [
        {"strength": 0.5, "num_inference_steps": 30},
        {"strength": 1.0, "num_inference_steps": 15},
    ]
    with pytest.raises(InputError, match="strength has 2, seed has 1"):
        zipped(strength=[0.5, 1.0], seed=[1])


def test_one_at_a_time_changes_one_argument_per_cell_and_has_the_base_once():
    base = {"strength": 0.6, "guidance_scale": 5}
    assert one_at_a_time(base, strength=[0.4, 0.6, 0.8], guidance_scale=[2]) == [
        base,
        {"strength": 0.4, "guidance_scale": 5},
        {"strength": 0.8, "guidance_scale": 5},
        {"strength": 0.6, "guidance_scale": 2},
    ]
    with pytest.raises(InputError, match="base must name seed"):
        one_at_a_time(base, seed=[1])
    with pytest.raises(InputError, match="base must be a dict"):
        one_at_a_time([], seed=[1])


def test_a_random_design_samples_the_grid_reproducibly():
    cells = grid(**GUIDES)
    assert len(cells) == 160
    assert random_design(9, seed=4, **GUIDES) == random.Random(4).sample(cells, 9)
    assert random_design(9, seed=4, **GUIDES) != random_design(9, seed=5, **GUIDES)
    whole = random_design(160, **GUIDES)
    assert sorted(map(str, whole)) == sorted(map(str, cells))


def test_a_random_design_can_vary_seeds_and_does_not_build_the_grid():
    cells = random_design(3, seeds=range(10**9), strength=[i / 1000 for i in range(1, 1001)])
    assert len(cells) == 3 and all(set(cell) == {"seed", "strength"} for cell in cells)


@pytest.mark.parametrize("n", [0, 161, -1, 1.5, True])
def test_a_random_design_of_an_impossible_size_is_refused(n):
    with pytest.raises(InputError, match="n must be an integer from 1 to 160"):
        random_design(n, **GUIDES)


@pytest.mark.parametrize("make", [grid, zipped])
@pytest.mark.parametrize(
    ("axes", "message"),
    [
        ({"strength": 0.5}, "strength must be a list of values, got 0.5"),
        ({"prompt": "night"}, "prompt must be a list"),
        ({"strength": []}, "strength is an empty list"),
    ],
)
def test_an_axis_must_be_a_non_empty_list(make, axes, message):
    with pytest.raises(InputError, match=message):
        make(**axes)


@pytest.mark.parametrize(
    "make",
    [
        grid,
        zipped,
        lambda **axes: one_at_a_time({"seed": 0}, **axes),
        lambda **axes: random_design(1, seeds=axes["seed"]),
    ],
)
def test_an_endless_generator_is_refused(make):
    with pytest.raises(InputError, match="seed has more than 100,000 values, or never ends: give a list"):
        make(seed=itertools.count())


@pytest.mark.parametrize("make", [grid, zipped, lambda **axes: one_at_a_time({"seed": 0}, **axes)])
def test_a_design_of_too_many_cells_is_refused(make):
    with pytest.raises(InputError, match="at most 100,000 cells, got 1,000,000,000"):
        make(seed=range(10**9))
    with pytest.raises(InputError, match="at most 100,000 cells, got 1,000,000"):
        random_design(10**6, seeds=range(10**9))
