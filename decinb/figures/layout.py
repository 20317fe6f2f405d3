"""Where the cells of a sweep stand in a grid: which argument goes along which side, and what the labels say.

Nothing is drawn here. A record is a dict with all arguments of a cell, made or still to be made.
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
from decinb.utils.labels import ARGUMENTS, SHORT, describe, plain

Record = Mapping[str, Any]
Axis = str | Sequence[str] | None
Head = tuple[str, ...]
Place = tuple[int, int]

ORIGIN = ("guidance_rescale", "model", "scheduler", "dtype")  # of a sweep, so never of one sweep's cells alone
IN_A_ROW = 4  # cells beside each other where they do not make a table
NO_BREAK = "\u00a0"  # a space at which no line ends
LONG = 40  # letters of a text above which what all texts of a side share is left out


@dataclass(frozen=True)
class Layout:
    """A grid: the labels of its rows and columns, and which record stands where.

    A label has a part for every argument of its side, the slower one first. Where cells simply follow each other, the
    labels are empty, and every record has a title instead.
    """

    rows: list[Head]
    columns: list[Head]
    places: dict[Place, int]
    titles: list[str] | None = None

    def pages(self, most: int) -> Iterator[Layout]:
        """The grid in parts of at most so many rows and columns, cut between groups where it can be."""
        for row_part in _parts(self.rows, most):
            for column_part in _parts(self.columns, most):
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


def lay_out(records: Sequence[Record], rows: Axis = None, cols: Axis = None, free: int = 0) -> Layout:
    """Give every record a place.

    Args:
        records: one for each cell.
        rows, cols: the argument down the side and the one along the top, or a pair of them, the slower one first. With
            neither, those that differ are taken: the one with more values goes along the top, and of three or four
            some share a side. Where there are more, or most places would be empty, the cells follow each other. With
            one of the two, the other takes one or two more that differ, if without them cells would fall together.
        free: places left free at the beginning where the cells follow each other.

    Raises:
        InputError: a name is unknown or comes twice, or two different cells would stand on one place.
    """
    row_names, col_names = _names(records, rows, "rows"), _names(records, cols, "cols")
    for name in row_names:
        if name in col_names:
            raise InputError(f"{name} is named in both rows and cols: name it once")
    if row_names or col_names:
        named = (*row_names, *col_names)
        left = [name for name in varying(records) if name not in named]
        if len(left) <= 2 and _distinct(records, named) < _distinct(records, ARGUMENTS):
            row_names, col_names = row_names or left, col_names or left
        return _table(records, row_names, col_names)
    sides = _sides(records)
    if sides is not None:
        table = _table(records, *sides)
        if 2 * len(table.places) >= len(table.rows) * len(table.columns):
            return table
    columns = min(IN_A_ROW, free + len(records))
    places = {divmod(free + index, columns): index for index in range(len(records))}
    return Layout([()] * -(-(free + len(records)) // columns), [()] * columns, places, titles(records))


def titles(records: Sequence[Record]) -> list[str]:
    """For every record, what tells it from the others: numbers first, since a prompt may have to be cut off."""
    names = sorted(varying(records), key=lambda name: name not in SHORT) or list(SHORT)
    told_of = {name: _told_of(name, [record[name] for record in records]) for name in names}
    for name in set(names) & set(SHORT):
        told_of[name] = {value: text.replace(" ", NO_BREAK) for value, text in told_of[name].items()}
    return [", ".join(told_of[name][record[name]] for name in names) for record in records]


def varying(records: Sequence[Record]) -> list[str]:
    """The arguments that the records differ in."""
    return [name for name in ARGUMENTS if len({record.get(name) for record in records}) > 1]


def either(values: Iterable[Any]) -> str:
    """What values there are, in words: ``0, 1 or 2``."""
    there = _in_order(values)
    shown = [shorten(plain(value), LONG, placeholder="…") for value in there[:8]]
    if len(there) > 8:
        return ", ".join([*shown, "..."])
    return " or ".join([", ".join(shown[:-1]), shown[-1]] if len(shown) > 1 else shown)


def _sides(records: Sequence[Record]) -> tuple[list[str], list[str]] | None:
    """The arguments for the rows and the columns where none are named, or None if there are too many or none."""
    varied = varying(records)
    counts = {name: len({record[name] for record in records}) for name in varied}
    by_count = sorted(varied, key=counts.get)
    match len(varied):
        case 1:
            rows, cols = [], by_count
        case 2:
            rows, cols = by_count[:1], by_count[1:]
        case 3:
            rows, cols = by_count[:2], by_count[2:]
        case 4:
            # The most values beside the fewest keeps the sides near each other in length.
            rows, cols = by_count[1:3], [by_count[0], by_count[3]]
            if counts[rows[0]] * counts[rows[1]] > counts[cols[0]] * counts[cols[1]]:
                rows, cols = cols, rows
        case _:
            return None
    return [sorted(names, key=ARGUMENTS.index) for names in (rows, cols)]


def _distinct(records: Sequence[Record], names: Sequence[str]) -> int:
    """How many combinations of values the records have."""
    return len({tuple(record.get(name) for name in names) for record in records})


def _table(records: Sequence[Record], row_names: Sequence[str], col_names: Sequence[str]) -> Layout:
    row_keys, rows = _heads(records, row_names)
    col_keys, columns = _heads(records, col_names)
    places: dict[Place, int] = {}
    for index, (row, column) in enumerate(zip(row_keys, col_keys, strict=True)):
        first = places.setdefault((row, column), index)
        if differing := _differing(records[first], records[index]):
            named = ", ".join(describe(name, records[index][name]) for name in (*row_names, *col_names))
            also = " and ".join(differing)
            raise InputError(
                f"two cells fall on {named}: they also differ in {also}; "
                f"name it in rows or cols, or choose with where={{{differing[0]!r}: ...}}"
            )
    return Layout(rows, columns, places)


def _heads(records: Sequence[Record], names: Sequence[str]) -> tuple[list[int], list[Head]]:
    """For every record its place along a side, and the labels of that side."""
    orders = [_in_order([record[name] for record in records]) for name in names]
    told_of = [_told_of(name, order) for name, order in zip(names, orders, strict=True)]
    keys = [tuple(order.index(record[name]) for name, order in zip(names, orders, strict=True)) for record in records]
    along = {key: place for place, key in enumerate(sorted(set(keys)))}
    heads = [tuple(texts[order[at]] for texts, order, at in zip(told_of, orders, key, strict=True)) for key in along]
    return [along[key] for key in keys], heads


def _in_order(values: Iterable[Any]) -> list[Any]:
    """The different values: numbers ascending, unless they came descending; all else as it came."""
    found = list(dict.fromkeys(values))
    if all(isinstance(value, Real) for value in found) and found != sorted(found, reverse=True):
        found.sort()
    return found


def _told_of(name: str, values: Sequence[Any]) -> dict[Any, str]:
    """What to say of every value. Where long texts begin or end alike, what lies between is said."""
    words = {value: " ".join(describe(name, value).split()) for value in values}
    texts = [text.split() for text in words.values()]
    if name in SHORT or len(texts) < 2 or max(map(len, words.values())) <= LONG:
        return words
    spare = min(map(len, texts)) - 1  # no text may vanish altogether
    start = _alike(texts, spare)
    end = _alike([text[::-1] for text in texts], spare - start)
    before, after = "… " * (start > 2), " …" * (end > 2)
    cut = slice(start if before else 0, -end if after else None)
    return {value: before + " ".join(text[cut]) + after for value, text in zip(words, texts, strict=True)}


def _alike(texts: Sequence[Sequence[str]], most: int) -> int:
    """With how many same words the texts begin."""
    count = 0
    while count < most and len({text[count] for text in texts}) == 1:
        count += 1
    return count


def _names(records: Sequence[Record], asked: Axis, side: str) -> list[str]:
    if asked is None:
        return []
    names = [asked] if isinstance(asked, str) else asked
    if not isinstance(names, (list, tuple)) or not 1 <= len(names) <= 2:
        raise InputError(f"{side} must be the name of an argument or a pair of names, got {asked!r}")
    for name in names:
        _check_name(records, name, side)
    if len(set(names)) < len(names):
        raise InputError(f"{names[0]} is named twice in {side}: name it once")
    return list(names)


def _check_name(records: Sequence[Record], name: Any, side: str) -> None:
    known = [key for key in records[0] if all(isinstance(record.get(key, []), Hashable) for record in records)]
    if name in known:
        return
    near = get_close_matches(str(name), known, 1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    varied = ", ".join(varying(records)) or "nothing"
    raise InputError(f"{side}: {name!r} is not an argument of every cell{hint}; the cells differ in {varied}")


def _differing(first: Record, second: Record) -> list[str]:
    """The arguments that two records differ in."""
    return [name for name in (*ARGUMENTS, *ORIGIN) if first.get(name) != second.get(name)]


def _parts(heads: Sequence[Head], most: int) -> list[range]:
    """Stretches of at most so many heads. A group that fits on one page is not torn apart."""
    parts: list[range] = []
    start = stop = 0
    for _, group in groupby(heads, key=lambda head: head[:-1]):
        size = len(list(group))
        if stop - start + size > most and stop > start and len(heads[0]) > 1:
            parts.append(range(start, stop))
            start = stop
        stop += size
        while stop - start > most:
            # What does not fit at all is cut into parts of like size, so that no page holds a single row.
            count = -(-(stop - start) // most)
            parts.append(range(start, start + -(-(stop - start) // count)))
            start = parts[-1].stop
    return [*parts, range(start, stop)]
