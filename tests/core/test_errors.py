"""Errors in a notebook: two lines, and the whole traceback on request."""

import pytest
from nbclient import NotebookClient
from nbformat.v4 import new_code_cell, new_notebook

CELL = """\
strengths = [0.5, 2]
sweep = decinb.run_sweep(pipe, "day", "a house", decinb.grid(strength=strengths))
"""


INTERRUPTED = """\
import os, signal
hook = pipe.unet.register_forward_hook(lambda *_: os.kill(os.getpid(), signal.SIGINT))
cells = decinb.grid(strength=[0.5, 1.0], num_inference_steps=[2])
sweep = decinb.run_sweep(pipe, "day", "a house", cells, progress=False)
reached = True
"""


@pytest.fixture(scope="module")
def outputs() -> list[str]:
    """The error of each cell, or what it printed: a wrong strength, a missing model, ``%tb``, an interrupt."""
    sources = [
        "import decinb; pipe = decinb.load_pipeline('tiny', device='cpu')",
        CELL,
        "%tb",
        "decinb.load_pipeline('no-such-model')",
        INTERRUPTED,
        "import sys\nprint('reached' in globals(), type(sys.last_value.done).__name__)",
    ]
    notebook = new_notebook(cells=[new_code_cell(source) for source in sources])
    NotebookClient(notebook, timeout=300, kernel_name="python3", allow_errors=True).execute()
    return [
        "\n".join(line for output in cell.outputs for line in output.get("traceback", [output.get("text", "")]))
        for cell in notebook.cells
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


@pytest.mark.slow
def test_an_interrupt_ends_the_cell_in_two_lines(outputs, happened):
    *_, line, message = outputs[4].splitlines()
    assert line.startswith("line 4: sweep = decinb.run_sweep")
    assert "0 of 2 cells are done, and sys.last_value.done holds them; with folder=..." in message
    assert outputs[5].strip() == "False Sweep"
    happened("K7", message)
