"""A sweep as one HTML page with a slider for each axis: in a notebook's output, or as a file that needs nothing else.

Without JavaScript (an untrusted notebook, GitHub) what remains is a plain list of labelled images.
"""

import base64
import html
import io
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from typing import Any
from uuid import uuid4

from PIL import Image

from decinb.errors import InputError
from decinb.images import SAMPLES
from decinb.utils import validation
from decinb.utils.labels import ARGUMENTS, SHORT, describe, label, plain

MAX_SCORES = 100_000  # a generator is read no further
FACTS = (*ARGUMENTS, "scheduler", "steps_run", "seconds")
"""What the panel shows of the current cell, in this order."""

LOSSY_QUALITY = 90  # of WebP: half the size of a lossless image, and no difference that the eye can see


@dataclass(frozen=True, repr=False)
class Fragment:
    """HTML that a notebook shows as the output of a cell."""

    html: str

    def __repr__(self) -> str:  # short, because notebooks store it beside the HTML
        return f"<{len(self.html):,} characters of HTML>"

    def _repr_html_(self) -> str:
        return self.html


def viewer(
    images: Sequence[Image.Image],
    records: Sequence[Mapping[str, Any]],
    input_image: Image.Image | None = None,
    scores: Mapping[str, Sequence[float]] | None = None,
    lossless: bool = False,
) -> str:
    """Return a sweep as an HTML fragment.

    Args:
        images: one for each record.
        records: what made each image, with diffusers' argument names.
        input_image: shown first, and the first choice of what to compare with.
        scores: more numbers to show of each cell, by name: one value for each record.
        lossless: embed the pixels exactly; by default as WebP of quality 90.

    Raises:
        InputError: there are no images, or scores of another number.
    """
    if not records:
        raise InputError("a viewer needs at least one image: the sweep is empty")
    scores = _check_scores(scores, len(records))
    root = f"decinb-{uuid4().hex[:8]}"
    axes = _axes(records)
    names = [", ".join(describe(axis, record[axis]) for axis in axes) or label(record) for record in records]
    shown = [
        *([("input", input_image)] if input_image else []),
        *((name, image) for name, image in zip(names, images, strict=True)),
    ]
    data = {
        "has_input": input_image is not None,
        "axes": [
            {"name": axis, "label": SHORT.get(axis, axis.replace("_", " ")), "values": list(map(_text, values))}
            for axis, values in axes.items()
        ],
        "cells": [
            {
                "at": {axis: values.index(record[axis]) for axis, values in axes.items()},
                "facts": _facts(record) + [[score, plain(values[i])] for score, values in scores.items()],
                "file": re.sub(r"[^\w.=-]+", "_", f"{i:03d}_{names[i]}") + ".webp",
                "code": _code(record, axes),
            }
            for i, record in enumerate(records)
        ],
    }
    figures = "\n".join(_figure(text, image, lossless) for text, image in shown)
    sources = files("decinb.figures")
    script = sources.joinpath("viewer.js").read_text(encoding="utf-8").replace("__ID__", root)
    # "<" is escaped so that a prompt with "</script>" in it cannot end the script.
    embedded = json.dumps(data, ensure_ascii=False).replace("<", "\\u003c")
    return (
        f'<div class="decinb-viewer" id="{root}">\n{sources.joinpath("viewer.html").read_text(encoding="utf-8")}'
        f"<details open><summary>all {len(images)} images</summary>\n"
        f'<div class="all">\n{figures}\n</div></details>\n'
        f'<script type="application/json">{embedded}</script>\n</div>\n<script>\n{script}</script>'
    )


def page(title: str, body: str) -> str:
    """Return a fragment as a whole HTML page that loads nothing from anywhere."""
    policy = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'"
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n'
        f"<title>{html.escape(title)}</title>\n</head>\n<body>\n{body}\n</body>\n</html>\n"
    )


def _check_scores(scores: Any, number: int) -> dict[str, Sequence[Any]]:
    """Return scores as lists, by name; none if there are none."""
    if scores is None:
        return {}
    if not isinstance(scores, Mapping):
        raise InputError(f"scores must be a dict such as {{'adherence': [...]}}, got {validation.short_repr(scores)}")
    lists = {}
    for name, values in scores.items():
        where = f"scores[{validation.short_repr(name)}]"
        listed = validation.bounded_list(values, where, MAX_SCORES)
        if len(listed) != number:
            raise InputError(f"{where} must have one value per image, {number}, got {len(listed)}")
        lists[str(name)] = listed
    return lists


def _axes(records: Sequence[Mapping[str, Any]]) -> dict[str, list[Any]]:
    """Return the arguments in which records differ, each with its values: numbers in order, others as they come."""
    axes = {}
    for name in (*ARGUMENTS, "scheduler"):
        values = list(dict.fromkeys(record.get(name) for record in records))
        if len(values) > 1:
            numeric = all(isinstance(value, (int, float)) for value in values)
            axes[name] = sorted(values) if numeric else values
    return axes


def _text(value: Any) -> str:
    return "none" if value is None else plain(value)


def _facts(record: Mapping[str, Any]) -> list[list[str]]:
    return [[name.replace("_", " "), _text(record[name])] for name in FACTS if record.get(name) is not None]


def _code(record: Mapping[str, Any], axes: Mapping[str, Any]) -> str:
    """Return the lines that make one image again, with its own scheduler and sample where images differ in them."""
    lines = []
    if "scheduler" in axes and record["scheduler"].isidentifier():  # a stranger's record may hold code
        lines += ["import diffusers", ""]
        lines.append(f"pipe.scheduler = diffusers.{record['scheduler']}.from_config(pipe.scheduler.config)")
    arguments = {name: record[name] for name in ("prompt", "negative_prompt", *SHORT) if record.get(name) is not None}
    prompt = arguments.pop("prompt", "")
    image = "None" if record.get("image") is None else "image"
    if "image" in axes and record["image"] in SAMPLES:
        image = f"decinb.load_image({record['image']!r}, size=decinb.image_size(pipe))"
    return "\n".join([*lines, f"decinb.run_sweep(pipe, {image}, {prompt!r}, [{arguments!r}]).images[0]"])


def _figure(text: str, image: Image.Image, lossless: bool) -> str:
    source, caption = data_url(image, lossless), html.escape(text)
    return f'<figure><img src="{source}" alt="{caption}" width="128"><figcaption>{caption}</figcaption></figure>'


def data_url(image: Image.Image, lossless: bool = False) -> str:
    """Return an image as a data URL, as a WebP."""
    data = io.BytesIO()
    image.convert("RGB").save(data, "WEBP", lossless=lossless, quality=LOSSY_QUALITY, method=4)
    return f"data:image/webp;base64,{base64.b64encode(data.getvalue()).decode()}"
