"""Write the arguments of a cell and their values as labels, and wrap text."""

from collections.abc import Callable, Iterable, Mapping
from textwrap import shorten
from typing import Any

LONG = 60  # characters of a prompt in a label

SHORT = {"strength": "strength", "guidance_scale": "guidance", "num_inference_steps": "steps", "seed": "seed"}
"""The arguments in labels and file names, in this order, and their short names."""

ARGUMENTS = ("image", "prompt", "negative_prompt", *SHORT)
"""The arguments of a cell. If two share a side of a grid, the earlier one here changes more slowly."""

SELECTABLE = (*ARGUMENTS, "steps_run")
"""The fields of a record by which images can be selected."""

FORMULA_STARTS = ("=", "+", "-", "@", "\t", "\r")


def label(cell: Mapping[str, Any], texts: Iterable[str] = ()) -> str:
    """Return a cell as the label of its image: its numbers, and those of its texts that are named."""
    numbers = [describe(name, cell[name]) for name in SHORT if name in cell]
    words = [shorten(describe(name, cell[name]), LONG, placeholder="…") for name in texts if name in cell]
    return ", ".join(numbers + words) or "defaults"


def describe(name: str, value: Any) -> str:
    """Return an argument and its value in a few words; prompts and names of images without the argument's name."""
    if name == "negative_prompt":
        return f"negative prompt: {printable(str(value))}" if value else "no negative prompt"
    if name == "image" and value is None:
        return "from text alone"
    if name in ("prompt", "image"):
        return printable(str(value)) or "no prompt"
    return f"{SHORT.get(name, name)} {plain(value)}"


def plain(value: Any) -> str:
    """Return a value with six significant digits: 0.85, not 0.8500000000000001."""
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def printable(text: str) -> str:
    """Return a text that can be encoded and drawn: the name of a file need not be valid Unicode."""
    return text.encode("utf-8", "backslashreplace").decode().replace("\0", "\\0")


def spreadsheet_cell(value: Any) -> Any:
    """Return a value for a CSV file: a text that a spreadsheet would run as a formula gets an apostrophe in front."""
    return f"'{value}" if isinstance(value, str) and value.lstrip().startswith(FORMULA_STARTS) else value


def wrap(text: str, fits: Callable[[str], bool], most: int | None = None, end: bool = False) -> list[str]:
    """Break a text into lines that fit.

    A word that does not fit on a line is broken. Lines beyond ``most`` are dropped, with an ellipsis in their place.

    Args:
        text: words with single spaces between them.
        fits: returns whether a line is short enough.
        most: the maximum number of lines; None for any.
        end: keep the end of the text instead of its beginning.
    """
    lines = [""]
    for word in text.split(" "):
        if lines[-1] and fits(f"{lines[-1]} {word}"):
            lines[-1] += f" {word}"
            continue
        if lines[-1]:
            lines.append("")
        for piece in [word] if fits(word) else word:
            if lines[-1] and not fits(lines[-1] + piece):
                lines.append("")
            lines[-1] += piece
    if most is None or len(lines) <= most:
        return lines
    if end:
        lines = lines[-most:]
        while len(lines[0]) > 1 and not fits("…" + lines[0]):
            lines[0] = lines[0][1:]
        return ["…" + lines[0].lstrip(), *lines[1:]]
    lines = lines[:most]
    while len(lines[-1]) > 1 and not fits(lines[-1] + "…"):
        lines[-1] = lines[-1][:-1]
    return [*lines[:-1], lines[-1].rstrip(" ,") + "…"]
