"""Many images in groups as a plain HTML table, which looks the same in any notebook, trusted or not."""

import html
from collections.abc import Sequence

from PIL import Image

from decinb.figures.viewer import data_url

PAGE_WIDTH = 900  # pixels that a row of images may take
COLOURS = "color:#1b1f24;background:#ffffff"  # both, so that a dark page does not hide the text


def gallery(
    images: Sequence[Image.Image], groups: Sequence[str], titles: Sequence[str] | None = None, width: int = 150
) -> str:
    """Return images as HTML: a section that opens and closes for each group, and in it a table.

    There are no scripts and no style sheets, so nothing is lost where a notebook is not trusted.

    Args:
        images: of any size; embedded at most twice ``width`` wide.
        groups: for each image, the name of its section, in the order in which they are first named.
        titles: a line below each image.
        width: of an image in the page, in pixels.
    """
    members: dict[str, list[int]] = {}
    for i, group in enumerate(groups):
        members.setdefault(group, []).append(i)
    columns = max(1, PAGE_WIDTH // (width + 8))
    sections = []
    for group, indices in members.items():
        cells = [_cell(images[i], group if titles is None else titles[i], width) for i in indices]
        rows = ["".join(cells[start : start + columns]) for start in range(0, len(cells), columns)]
        table = "".join(f"<tr>{row}</tr>" for row in rows)
        count = f"{len(indices)} image{'s' * (len(indices) != 1)}"
        sections.append(
            f'<details open style="{COLOURS};padding:4px 8px"><summary style="cursor:pointer">'
            f"<b>{html.escape(group)}</b> ({count})</summary>\n"
            f'<table style="{COLOURS};border-collapse:collapse">{table}</table></details>'
        )
    return "\n".join(sections)


def _cell(image: Image.Image, text: str, width: int) -> str:
    small = image.convert("RGB")
    small.thumbnail((2 * width, 8 * width))
    caption = html.escape(text)
    return (
        f'<td style="{COLOURS};text-align:left;vertical-align:top;padding:4px">'
        f'<img src="{data_url(small)}" alt="{caption}" width="{width}"><br>{caption}</td>'
    )
