"""Designs: which settings to try. A cell is a dict of diffusers' arguments, and a design is a list of cells.

Designs are plain lists: join them with ``+``, filter them with a comprehension, sample them with ``random.sample``.
"""

import itertools
import math
import random
import sys
from collections.abc import Sequence
from typing import Any

from decinb.errors import InputError
from decinb.utils import validation

Cell = dict[str, Any]

MAX_CELLS = 100_000  # of a design: weeks of work on any device


def grid(**axes: Sequence[Any]) -> list[Cell]:
    """Return every combination of the given values, with the last argument changing fastest.

    Example: ``grid(strength=[0.5, 0.75], guidance_scale=[5, 7.5])`` gives four cells.

    Raises:
        InputError: an axis is not a list of values, or is empty; there are more than 100,000 combinations.
    """
    lists = _lists(axes)
    total = math.prod(len(values) for values in lists.values())
    if total > MAX_CELLS:
        raise InputError(f"a grid has at most {MAX_CELLS:,} cells, got {total:,}; random_design draws some of them")
    return [dict(zip(lists, values, strict=True)) for values in itertools.product(*lists.values())]


def zipped(**axes: Sequence[Any]) -> list[Cell]:
    """Return one cell from the first values of all arguments, one from the second values, and so on.

    Example: ``zipped(strength=[0.5, 1.0], num_inference_steps=[30, 15])`` gives two cells of 15 steps each.

    Raises:
        InputError: an axis is not a list of values, or is empty; the lists differ in length, or have more than 100,000
            values.
    """
    lists = _lists(axes)
    lengths = {name: len(values) for name, values in lists.items()}
    if len(set(lengths.values())) > 1:
        given = ", ".join(f"{name} has {length}" for name, length in lengths.items())
        raise InputError(f"zipped takes lists of equal length: {given}")
    _check_number(max(lengths.values(), default=0))
    return [dict(zip(lists, values, strict=True)) for values in zip(*lists.values(), strict=True)]


def one_at_a_time(base: Cell, **axes: Sequence[Any]) -> list[Cell]:
    """Return a base cell, and copies of it with one argument changed to each of its values.

    Example: ``one_at_a_time({"strength": 0.6, "guidance_scale": 5}, strength=[0.4, 0.8], guidance_scale=[2])`` gives
    four cells, the base cell first.

    Raises:
        InputError: the base is not a dict, or lacks an argument that changes; an axis is empty or not a list of values.
    """
    if not isinstance(base, dict):
        raise InputError(f"base must be a dict such as {{'strength': 0.6}}, got {validation.short_repr(base)}")
    lists = _lists(axes)
    if missing := [name for name in lists if name not in base]:
        raise InputError(f"base must name {missing[0]}, which is to be changed, got {validation.short_repr(base)}")
    _check_number(sum(map(len, lists.values())))
    changed = [
        {**base, name: value}
        for name, values in lists.items()
        for value in values
        if not validation.equal(value, base[name])
    ]
    return [dict(base), *changed]


def random_design(n: int, seed: int = 0, **axes: Sequence[Any]) -> list[Cell]:
    """Return ``n`` different combinations of the given values, drawn uniformly at random.

    These are the cells that ``random.Random(seed).sample(grid(...), n)`` draws, but the grid is not built. To vary the
    seed of the cells, use ``seeds=[...]``, because ``seed`` is that of the draw.

    Raises:
        InputError: ``n`` is not from 1 to the number of combinations, or there are more than 2**63 - 1; an axis is not
            a list of values, or is empty.
    """
    lists = _lists({("seed" if name == "seeds" else name): values for name, values in axes.items()})
    total = math.prod(len(values) for values in lists.values())
    if total > sys.maxsize:
        raise InputError("random_design draws from at most 2**63 - 1 combinations, got more")
    if isinstance(n, bool) or not isinstance(n, int) or not 1 <= n <= total:
        raise InputError(f"n must be an integer from 1 to {total} (all combinations), got {validation.short_repr(n)}")
    _check_number(n)
    cells = []
    for place in random.Random(validation.seed(seed)).sample(range(total), n):
        values = []
        for axis in reversed(lists.values()):
            place, at = divmod(place, len(axis))
            values.append(axis[at])
        cells.append(dict(zip(lists, reversed(values), strict=True)))
    return cells


def _lists(axes: dict[str, Sequence[Any]]) -> dict[str, Sequence[Any]]:
    lists = {name: validation.bounded_list(values, name, MAX_CELLS) for name, values in axes.items()}
    if empty := [name for name, values in lists.items() if not len(values)]:
        raise InputError(f"{empty[0]} is an empty list: give at least one value")
    return lists


def _check_number(cells: int) -> None:
    if cells > MAX_CELLS:
        raise InputError(f"a design has at most {MAX_CELLS:,} cells, got {cells:,}")
