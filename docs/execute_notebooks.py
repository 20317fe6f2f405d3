"""Run the notebooks in place, from the first cell to the last: ``python docs/execute_notebooks.py [name ...]``.

What is left out of the files: the state of progress bars, times of execution, and anything a kernel wrote to stderr. An
error stops everything and leaves that notebook as it was.
"""

import os
import sys
import tempfile
from pathlib import Path

import nbformat
import papermill

FOLDER = Path(__file__).parents[1] / "notebooks"


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
            cell.outputs = [output for output in cell.outputs if not _is_noise(output)]
    nbformat.write(notebook, path)


def _is_noise(output: nbformat.NotebookNode) -> bool:
    widget = "application/vnd.jupyter.widget-view+json" in output.get("data", {})
    return widget or output.get("name") == "stderr"


def main() -> None:
    os.environ["DECINB_MODEL"], os.environ["HF_HUB_OFFLINE"] = "tiny", "1"
    wanted = sys.argv[1:] or [path.stem for path in sorted(FOLDER.glob("*.ipynb"))]
    for name in wanted:
        print("running", name, flush=True)
        execute(FOLDER / f"{name}.ipynb")


if __name__ == "__main__":
    main()
