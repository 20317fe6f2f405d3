"""Run the notebooks in place, from the first cell to the last: ``python tools/execute_notebooks.py [name ...]``.

What is left out of the files: the state of widgets, times of execution, and anything a kernel wrote to stderr. Of a
widget that also shows itself as HTML, such as the playground, the HTML remains.
Figures are stored small, in 256 colours. An error stops everything and leaves that notebook as it was.
"""

import base64
import io
import os
import sys
import tempfile
from pathlib import Path

import nbformat
import papermill
from PIL import Image

FOLDER = Path(__file__).parents[1] / "notebooks"
WIDGET = "application/vnd.jupyter.widget-view+json"
MAX_WIDTH = 900  # pixels of a figure: as wide as a page shows it


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
        figure = Image.open(io.BytesIO(base64.b64decode(data["image/png"]))).convert("RGB")
        figure.thumbnail((MAX_WIDTH, 10 * MAX_WIDTH), Image.Resampling.LANCZOS)
        file = io.BytesIO()
        figure.quantize(256, dither=Image.Dither.NONE).save(file, "PNG", optimize=True)
        data["image/png"] = base64.b64encode(file.getvalue()).decode()
    return output


def _is_noise(output: nbformat.NotebookNode) -> bool:
    data = output.get("data", {})
    return (WIDGET in data and "text/html" not in data) or output.get("name") == "stderr"


def main() -> None:
    os.environ["DECINB_MODEL"], os.environ["HF_HUB_OFFLINE"] = "tiny", "1"
    wanted = sys.argv[1:] or [path.stem for path in sorted(FOLDER.glob("*.ipynb"))]
    for name in wanted:
        print("running", name, flush=True)
        execute(FOLDER / f"{name}.ipynb")


if __name__ == "__main__":
    main()
