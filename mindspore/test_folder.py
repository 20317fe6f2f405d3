"""The folder keeps to itself: it hides no package, decinb does not need it, and its notebook is fit to be read."""

import importlib.machinery
import json
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent
ROOT = FOLDER.parent


def test_the_folder_does_not_hide_the_package_of_the_same_name():
    """Without an __init__.py, Python takes a folder for a package only if there is no real one on the whole path."""
    spec = importlib.machinery.PathFinder.find_spec("mindspore", [str(ROOT), *sys.path])
    assert spec.origin is not None
    assert "site-packages" in spec.origin


def test_decinb_imports_nothing_of_mindspore():
    files = [*(ROOT / "decinb").rglob("*.py"), *(ROOT / "tests").rglob("*.py")]
    assert len(files) > 50
    assert not [file for file in files if "import mind" in file.read_text() or "from mind" in file.read_text()]


@pytest.mark.parametrize("file", FOLDER.glob("*.ipynb"), ids=lambda file: file.name)
def test_the_notebook_was_run_from_top_to_bottom(file):
    text = file.read_text()
    assert len(text) < 500_000
    assert not [word for word in ("/root", "/home", "/work", "/tmp") if word in text]
    cells = [cell for cell in json.loads(text)["cells"] if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    assert not [output for cell in cells for output in cell["outputs"] if output.get("name") == "stderr"]
