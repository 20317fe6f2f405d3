"""Run the notebooks in place, from the first cell to the last: ``python tools/execute_notebooks.py [name ...]``.

A solution is named with its folder: ``solutions/02_strength_sweep``.

What is left out of the files: the state of widgets, times of execution, and anything a kernel wrote to stderr. Of a
widget that also shows itself as HTML, such as the playground, the HTML remains.
Figures are stored small, in 256 colours. An error stops everything and leaves that notebook as it was.
"""

import base64
import io
import os
import re
import sys
import tempfile
from pathlib import Path

import nbformat
import papermill
from PIL import Image

FOLDER = Path(__file__).parents[1] / "notebooks"
WIDGET = "application/vnd.jupyter.widget-view+json"
MAX_WIDTH = 900  # pixels of an image by itself: as wide as a page shows it
FIGURE = re.compile(r'(width="(\d+)" style="max-width: none" src="data:image/)png;base64,([A-Za-z0-9+/=]+)')
WEBP_SAVES = (
    0.7  # a figure is stored as WebP where that is smaller than this share of its PNG: grids of images, not curves
)


def execute(path: Path) -> None:
    """Run one notebook on the bundled model, in a folder that is thrown away, and write its outputs into it."""
    before = nbformat.read(path, as_version=4)
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder) / path.name
        papermill.execute_notebook(path, result, cwd=folder, progress_bar=False, kernel_name="python3")
        notebook = nbformat.read(result, as_version=4)
    notebook.metadata = {name: before.metadata[name] for name in ("kernelspec", "language_info")}
    for cell, old in zip(notebook.cells, before.cells, strict=True):
        cell.metadata = old.metadata
        if cell.cell_type == "code":
            cell.outputs = [_small(output) for output in cell.outputs if not _is_noise(output)]
    nbformat.write(notebook, path)


def _small(output: nbformat.NotebookNode) -> nbformat.NotebookNode:
    data = output.get("data", {})
    data.pop(WIDGET, None)
    if "image/png" in data:
        data["image/png"] = _small_png(data["image/png"], MAX_WIDTH)
    if FIGURE.search(str(data.get("text/html", ""))):
        html = data["text/html"]
        data["text/html"] = FIGURE.sub(lambda found: found[1] + _small_figure(found[3], int(found[2])), html)
    return output


def _small_figure(encoded: str, width: int) -> str:
    """Return a PNG or, where it is clearly smaller, a WebP, as the end of an address of data."""
    png, file = _small_png(encoded, width), io.BytesIO()
    _at_most(encoded, width).save(file, "WEBP", quality=85, method=6)
    webp = base64.b64encode(file.getvalue()).decode()
    return f"webp;base64,{webp}" if len(webp) < WEBP_SAVES * len(png) else f"png;base64,{png}"


def _at_most(encoded: str, width: int) -> Image.Image:
    figure = Image.open(io.BytesIO(base64.b64decode(encoded))).convert("RGB")
    figure.thumbnail((width, 10 * width), Image.Resampling.LANCZOS)
    return figure


def _small_png(encoded: str, width: int) -> str:
    """Return a PNG in base64 with at most ``width`` columns and 256 colours."""
    figure, file = _at_most(encoded, width), io.BytesIO()
    figure.quantize(256, dither=Image.Dither.NONE).save(file, "PNG", optimize=True)
    return base64.b64encode(file.getvalue()).decode()


def _is_noise(output: nbformat.NotebookNode) -> bool:
    data = output.get("data", {})
    return (WIDGET in data and "text/html" not in data) or output.get("name") == "stderr"


def main() -> None:
    os.environ["DECINB_MODEL"], os.environ["HF_HUB_OFFLINE"] = "tiny", "1"
    wanted = sys.argv[1:] or [path.relative_to(FOLDER).with_suffix("") for path in sorted(FOLDER.rglob("*.ipynb"))]
    for name in wanted:
        print("running", name, flush=True)
        execute(FOLDER / f"{name}.ipynb")


if __name__ == "__main__":
    main()
