"""Decide where the cells of a sweep go in a grid: which argument along which side, and what the labels say.

Nothing is drawn here.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from itertools import groupby
from numbers import Real
from textwrap import shorten
from typing import Any

from decinb.errors import InputError
from decinb.utils import validation
from decinb.utils.labels import ARGUMENTS, SHORT, describe, plain

CellValues = Mapping[str, Any]
"""Every argument of one cell with its value, and whatever else is recorded of it; the image may be made or not."""

Axis = str | Sequence[str] | None
Head = tuple[str, ...]
Place = tuple[int, int]

SWEEP_WIDE = ("guidance_rescale", "model", "scheduler", "dtype", "adapters")  # the same for all cells of one sweep
PER_ROW = 4  # cells in a row where they do not make a table
NO_BREAK_SPACE = "\u00a0"
LONG = 40  # characters; if the texts of a side are longer, the words that all of them share are left out


@dataclass(frozen=True)
class Layout:
    """A grid: the labels of its rows and columns, and which cell goes in which place.

    A label has one part for each argument of its side, the one that changes more slowly first. Where the cells do not
    make a table, the labels are empty and every cell has a title instead.
    """

    rows: list[Head]
    columns: list[Head]
    places: dict[Place, int]
    titles: list[str] | None = None

    def pages(self, limit: int) -> Iterator[Layout]:
        """Split the grid into parts of at most ``limit`` rows and columns, between groups where possible."""
        for row_part in _parts(self.rows, limit):
            for column_part in _parts(self.columns, limit):
                places = {
                    (row - row_part.start, column - column_part.start): index
                    for (row, column), index in self.places.items()
                    if row in row_part and column in column_part
                }
                if places:
                    rows, columns = (
                        heads[part.start : part.stop]
                        for heads, part in ((self.rows, row_part), (self.columns, column_part))
                    )
                    yield Layout(rows, columns, places, self.titles)


def lay_out(cells: Sequence[CellValues], rows: Axis = None, cols: Axis = None, free: int = 0) -> Layout:
    """Give every cell a place.

    Args:
        cells: their arguments.
        rows, cols: the argument down the side and the one along the top, or a pair of them, the one that changes more
            slowly first. With neither, the arguments in which the cells differ are used: the one with more values goes
            along the top, and of three or four, some share a side. With more than four, or if most places would be
            empty, the cells are shown one after another instead. With only one of the two named, the other side takes
            one or two further arguments if different cells would otherwise share a place.
        free: places to leave free at the beginning if the cells are shown one after another.

    Raises:
        InputError: a name is unknown or named twice, or two different cells would share a place.
    """
    row_names, col_names = _names(cells, rows, "rows"), _names(cells, cols, "cols")
    for name in row_names:
        if name in col_names:
            raise InputError(f"{name} is named in both rows and cols: name it once")
    if row_names or col_names:
        named = (*row_names, *col_names)
        left = [name for name in varying(cells) if name not in named]
        if len(left) <= 2 and _distinct(cells, named) < _distinct(cells, ARGUMENTS):
            row_names, col_names = row_names or left, col_names or left
        return _table(cells, row_names, col_names)
    sides = _sides(cells)
    if sides is not None:
        table = _table(cells, *sides)
        if 2 * len(table.places) >= len(table.rows) * len(table.columns):
            return table
    return in_sequence(len(cells), min(PER_ROW, free + len(cells)), free, titles(cells))


def in_sequence(count: int, columns: int, free: int = 0, titles: list[str] | None = None) -> Layout:
    """Lay out ``count`` cells one after another in rows of ``columns``, after ``free`` places left free."""
    places = {divmod(free + index, columns): index for index in range(count)}
    return Layout([()] * -(-(free + count) // columns), [()] * columns, places, titles)


def titles(cells: Sequence[CellValues]) -> list[str]:
    """Return a title for every cell that distinguishes it; numbers come first, since a prompt may be cut off."""
    names = sorted(varying(cells), key=lambda name: name not in SHORT) or list(SHORT)
    texts = {name: _texts(name, [cell[name] for cell in cells]) for name in names}
    for name in set(names) & set(SHORT):
        texts[name] = {value: text.replace(" ", NO_BREAK_SPACE) for value, text in texts[name].items()}
    return [", ".join(texts[name][cell[name]] for name in names) for cell in cells]


def varying(cells: Sequence[CellValues]) -> list[str]:
    """Return the arguments in which the cells differ."""
    return [name for name in ARGUMENTS if len({cell.get(name) for cell in cells}) > 1]


def either(values: Iterable[Any]) -> str:
    """List the distinct values in words: ``0, 1 or 2``."""
    distinct = _in_order(values)
    shown = [shorten(plain(value), LONG, placeholder="…") for value in distinct[:8]]
    if len(distinct) > 8:
        return ", ".join([*shown, "..."])
    return " or ".join([", ".join(shown[:-1]), shown[-1]] if len(shown) > 1 else shown)


def _sides(cells: Sequence[CellValues]) -> tuple[list[str], list[str]] | None:
    """Choose the arguments of rows and columns; None if the cells differ in no argument or in more than four."""
    varied = varying(cells)
    counts = {name: len({cell[name] for cell in cells}) for name in varied}
    by_count = sorted(varied, key=counts.get)
    match len(varied):
        case 1:
            rows, cols = [], by_count
        case 2:
            rows, cols = by_count[:1], by_count[1:]
        case 3:
            rows, cols = by_count[:2], by_count[2:]
        case 4:
            # Pairing the most values with the fewest keeps the two sides of similar length.
            rows, cols = by_count[1:3], [by_count[0], by_count[3]]
            if counts[rows[0]] * counts[rows[1]] > counts[cols[0]] * counts[cols[1]]:
                rows, cols = cols, rows
        case _:
            return None
    return [sorted(names, key=ARGUMENTS.index) for names in (rows, cols)]


def _distinct(cells: Sequence[CellValues], names: Sequence[str]) -> int:
    """Count the distinct combinations of values."""
    return len({tuple(cell.get(name) for name in names) for cell in cells})


def _table(cells: Sequence[CellValues], row_names: Sequence[str], col_names: Sequence[str]) -> Layout:
    row_of, rows = _heads(cells, row_names)
    column_of, columns = _heads(cells, col_names)
    places: dict[Place, int] = {}
    for index, (row, column) in enumerate(zip(row_of, column_of, strict=True)):
        first = places.setdefault((row, column), index)
        if differing := _differing(cells[first], cells[index]):
            values = [describe(name, cells[index][name]) for name in (*row_names, *col_names)]
            named = ", ".join(shorten(value, LONG, placeholder="…") for value in values)
            raise InputError(
                f"two cells share the place of {named}: they also differ in {' and '.join(differing)}; "
                f"name it in rows or cols, or choose with where={{{differing[0]!r}: ...}}"
            )
    return Layout(rows, columns, places)


def _heads(cells: Sequence[CellValues], names: Sequence[str]) -> tuple[list[int], list[Head]]:
    """Return each cell's position along a side, and the labels of that side."""
    orders = [_in_order(cell[name] for cell in cells) for name in names]
    texts_of = [_texts(name, order) for name, order in zip(names, orders, strict=True)]
    keys = [tuple(order.index(cell[name]) for name, order in zip(names, orders, strict=True)) for cell in cells]
    position = {key: at for at, key in enumerate(sorted(set(keys)))}
    heads = [
        tuple(texts[order[at]] for texts, order, at in zip(texts_of, orders, key, strict=True)) for key in position
    ]
    return [position[key] for key in keys], heads


def _in_order(values: Iterable[Any]) -> list[Any]:
    """Return the distinct values: numbers ascending unless they were given descending, all else as given."""
    found = list(dict.fromkeys(values))
    if all(isinstance(value, Real) for value in found) and found != sorted(found, reverse=True):
        found.sort()
    return found


def _texts(name: str, values: Sequence[Any]) -> dict[Any, str]:
    """Describe every value. Where long texts begin or end with the same words, those are left out."""
    texts = {value: " ".join(describe(name, value).split()) for value in values}
    words = [text.split() for text in texts.values()]
    if name in SHORT or len(words) < 2 or max(map(len, texts.values())) <= LONG:
        return texts
    spare = min(map(len, words)) - 1  # at least one word of every text stays
    start = _common_words(words, spare)
    end = _common_words([text[::-1] for text in words], spare - start)
    before, after = "… " * (start > 2), " …" * (end > 2)
    kept = slice(start if before else 0, -end if after else None)
    return {value: before + " ".join(text[kept]) + after for value, text in zip(texts, words, strict=True)}


def _common_words(texts: Sequence[Sequence[str]], limit: int) -> int:
    """Count the words with which all texts begin, up to a limit."""
    count = 0
    while count < limit and len({text[count] for text in texts}) == 1:
        count += 1
    return count


def _names(cells: Sequence[CellValues], asked: Axis, side: str) -> list[str]:
    if asked is None:
        return []
    names = [asked] if isinstance(asked, str) else asked
    if not isinstance(names, (list, tuple)) or not 1 <= len(names) <= 2:
        raise InputError(
            f"{side} must be the name of an argument or a pair of names, got {validation.short_repr(asked)}"
        )
    for name in names:
        _check_name(cells, name, side)
    if len(set(names)) < len(names):
        raise InputError(f"{names[0]} is named twice in {side}: name it once")
    return list(names)


def _check_name(cells: Sequence[CellValues], name: Any, side: str) -> None:
    known = [key for key in cells[0] if all(isinstance(cell.get(key, []), Hashable) for cell in cells)]
    if isinstance(name, str) and name in known:
        return
    near = get_close_matches(name, known, 1) if isinstance(name, str) else []
    hint = f"; did you mean {near[0]!r}?" if near else ""
    varied = ", ".join(varying(cells)) or "nothing"
    given = validation.short_repr(name)
    raise InputError(f"{side}: {given} is not an argument of every cell{hint}; the cells differ in {varied}")


def _differing(first: CellValues, second: CellValues) -> list[str]:
    """Return the arguments in which two cells differ."""
    return [name for name in (*ARGUMENTS, *SWEEP_WIDE) if first.get(name) != second.get(name)]


def _parts(heads: Sequence[Head], limit: int) -> list[range]:
    """Split a side into ranges of at most ``limit`` heads; a group that fits on one page is not split."""
    parts: list[range] = []
    start = stop = 0
    for _, group in groupby(heads, key=lambda head: head[:-1]):
        size = len(list(group))
        if stop - start + size > limit and stop > start and len(heads[0]) > 1:
            parts.append(range(start, stop))
            start = stop
        stop += size
        while stop - start > limit:
            # A group too large for one page is split evenly, so that no page holds a single row.
            count = -(-(stop - start) // limit)
            parts.append(range(start, start + -(-(stop - start) // count)))
            start = parts[-1].stop
    return [*parts, range(start, stop)]
