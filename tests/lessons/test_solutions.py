"""The solutions of the exercises run, each in a namespace of its own.

They run in the process of the test, which has imported everything, because a kernel for each takes longer to start than
most solutions to run. The notebooks themselves run in kernels.
"""

import sys
from pathlib import Path

import matplotlib.pyplot as plt
import nbformat
import pytest
from IPython.core.interactiveshell import InteractiveShell

SOLUTIONS = sorted((Path(__file__).parents[2] / "notebooks" / "solutions").glob("*.ipynb"))


@pytest.fixture
def shell(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "__main__", sys.modules["__main__"])  # to be restored: a shell takes its place
    yield InteractiveShell.instance(user_ns={})
    InteractiveShell.clear_instance()
    plt.close("all")


@pytest.mark.slow
@pytest.mark.parametrize("file", SOLUTIONS, ids=[file.stem for file in SOLUTIONS])
def test_a_solution_runs(file, shell):
    for cell in nbformat.read(file, as_version=4).cells:
        if cell.cell_type == "code":
            shell.run_cell(cell.source).raise_error()
