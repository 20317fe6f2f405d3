"""Errors in a notebook: two lines, and the whole traceback on request."""

import pytest
from nbclient import NotebookClient
from nbformat.v4 import new_code_cell, new_notebook

CELL = """\
strengths = [0.5, 2]
sweep = decinb.run_sweep(pipe, "day", "a house", decinb.grid(strength=strengths))
"""


@pytest.fixture(scope="module")
def outputs() -> list[str]:
    """The text of the error in each cell: a wrong strength, a missing model, the same again by ``%tb``."""
    sources = [
        "import decinb; pipe = decinb.load_pipeline('tiny', device='cpu')",
        CELL,
        "%tb",
        "decinb.load_pipeline('no-such-model')",
    ]
    notebook = new_notebook(cells=[new_code_cell(source) for source in sources])
    NotebookClient(notebook, timeout=300, kernel_name="python3", allow_errors=True).execute()
    return [
        "\n".join(line for output in cell.outputs for line in output.get("traceback", [])) for cell in notebook.cells
    ]


@pytest.mark.slow
def test_an_error_is_the_users_line_and_the_message(outputs):
    assert outputs[1].splitlines() == [
        'line 2: sweep = decinb.run_sweep(pipe, "day", "a house", decinb.grid(strength=strengths))',
        "InputError: cell 1: strength must be above 0 and at most 1, got 2  (%tb shows the traceback)",
    ]
    assert len(outputs[3].splitlines()) == 2 and "no-such-model" in outputs[3]


@pytest.mark.slow
def test_the_traceback_is_shown_on_request(outputs):
    assert "validation.py" in outputs[2] and len(outputs[2].splitlines()) > 10
