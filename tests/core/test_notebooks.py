"""What every notebook must have, whatever it teaches. nbval tests that it runs."""

import re
from pathlib import Path

import nbformat
import pytest

from decinb.lessons.answers import ANSWERS
from tools.stamp import address, setup_cell, stamped

FOLDER = Path(__file__).parents[2] / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
SOLUTIONS = sorted((FOLDER / "solutions").glob("*.ipynb"))
LESSONS = NOTEBOOKS
LESSON_LINES = 12  # of a cell; the setup cell is the same everywhere
MAX_BYTES = 500_000
MAX_LINES = 15
MACHINE_PATH = re.compile(r"/(home|root|tmp|work|Users|usr|opt)/|site-packages|[A-Z]:\\\\")


def read(path):
    return nbformat.read(path, as_version=4)


def code_cells(path):
    return [cell for cell in read(path).cells if cell.cell_type == "code"]


def has_figure(output) -> bool:
    return "image/png" in output.get("data", {}) or "<img " in str(output.get("data", {}).get("text/html", ""))


def problems(path: Path) -> list[str]:
    """Return everything that is wrong with one notebook."""
    notebook, code = read(path), code_cells(path)
    outputs = [output for cell in code for output in cell.outputs]
    texts = [str(output.get("text", "")) + str(output.get("data", {}).get("text/plain", "")) for output in outputs]
    first = notebook.cells[0].source
    slug = address().removeprefix("https://github.com/")
    tagged = [cell for cell in code if "parameters" in cell.metadata.get("tags", [])]
    checks = {
        "the set-up cell differs from tools/stamp.py": code[0].source != setup_cell(),
        "not exactly one cell is tagged parameters": len(tagged) != 1,
        "it was not run from top to bottom": [c.execution_count for c in code] != list(range(1, len(code) + 1)),
        "an output is an error": any(output.output_type == "error" for output in outputs),
        "stderr is shown": any(output.get("name") == "stderr" for output in outputs),
        "an output shows a machine path": any(MACHINE_PATH.search(text) for text in texts),
        "a code cell is too long": any(len(cell.source.splitlines()) > MAX_LINES for cell in code[1:]),
        "it is too large": path.stat().st_size > MAX_BYTES,
        "it does not say what you will do, learn and need": not all(
            word in first for word in ("**You will**", "**You will learn**", "**You need**")
        ),
        "the title is not a heading": not first.startswith("# "),
        "there is no Colab badge for this file": f"colab-badge.svg)](https://colab.research.google.com/github/{slug}/blob/main/notebooks/{path.name})"
        not in first,
        "there are no exercises": not any("## Exercises" in cell.source for cell in notebook.cells),
        "it has no assert": not any(re.search(r"^\s*assert ", cell.source, re.M) for cell in code),
        "it has no figure": not any(has_figure(output) for output in outputs),
        "it stores widget state": "widgets" in notebook.metadata,
    }
    return [problem for problem, found in checks.items() if found]


def test_the_notebooks_have_numbers_of_their_own():
    numbers = [path.name[:2] for path in NOTEBOOKS]
    assert len(set(numbers)) == len(numbers) >= 6 and all(number.isdecimal() for number in numbers)


@pytest.mark.parametrize("path", LESSONS, ids=lambda path: path.stem)
def test_a_lesson_has_its_place_its_idea_its_summary_and_its_answers(path):
    cells, code = read(path).cells, code_cells(path)
    texts = [cell.source for cell in cells if cell.cell_type == "markdown"]
    headings = [line for text in texts for line in text.splitlines() if line.startswith("## ")]
    assert f"](../docs/maps/{path.stem[:2]}.svg)" in texts[0]
    assert headings[-4:] == ["## What you saw", "## Exercises", "## Clean up", "## Next"]
    assert "decinb.what_you_saw(" in next(cell.source for cell in code if "what_you_saw" in cell.source)
    exercises = next(text for text in texts if "## Exercises" in text)
    assert len(re.findall(r"^\d\. \*", exercises, re.M)) == 3 and "<details><summary>Hints</summary>" in exercises
    assert f"(solutions/{path.name})" in exercises and (FOLDER / "solutions" / path.name).exists()
    assert not [cell.source for cell in code[1:] if len(cell.source.splitlines()) > LESSON_LINES]
    assert not [
        cell.source for cell in code if re.search(r"if (scenes|can_judge) else|image_size\(pipe\) == 128", cell.source)
    ]


@pytest.mark.parametrize("path", LESSONS, ids=lambda path: path.stem)
def test_the_answers_of_a_lesson_can_be_checked(path):
    asked = set(re.findall(r'decinb\.check\("([\d.]+)"', "\n".join(cell.source for cell in read(path).cells)))
    solved = "\n".join(cell.source for cell in code_cells(FOLDER / "solutions" / path.name))
    assert asked == {exercise for exercise in ANSWERS if exercise[:2] == path.stem[:2]}
    assert all(f'decinb.check("{exercise}"' in solved for exercise in asked)


@pytest.mark.parametrize("path", SOLUTIONS, ids=lambda path: path.stem)
def test_a_solution_was_run_and_belongs_to_a_notebook(path):
    code = code_cells(path)
    assert (FOLDER / path.name).exists() and f"(../{path.name})" in read(path).cells[0].source
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    outputs = [output for cell in code for output in cell.outputs]
    assert not [output for output in outputs if output.output_type == "error" or output.get("name") == "stderr"]


@pytest.mark.parametrize("path", LESSONS + SOLUTIONS, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_every_figure_has_a_text_for_readers_who_do_not_see_it(path):
    for cell in code_cells(path):
        for output in cell.outputs:
            html = str(output.get("data", {}).get("text/html", ""))
            assert not re.search(r'<img (?![^>]*alt="[^"]{3,}")', html), cell.source
            assert "image/png" not in output.get("data", {}), cell.source


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_has_no_problems(path):
    assert not problems(path)


def test_everything_stamped_is_up_to_date():
    """``make stamp`` writes the set-up cell, the project's address and its version."""
    assert not [path.name for path, text in stamped() if path.read_text(encoding="utf-8") != text]


def test_the_setup_cell_imports_decinb_before_torch():
    lines = setup_cell().splitlines()
    assert next(i for i, line in enumerate(lines) if line.startswith("import decinb")) < lines.index("import torch")


@pytest.mark.parametrize("path", NOTEBOOKS[7:], ids=lambda path: path.stem)
def test_a_notebook_uses_only_attributes_that_every_pipeline_has(path):
    """``MODEL`` may be Stable Diffusion, whose pipelines are diffusers' own classes."""
    assert not [
        cell.source for cell in code_cells(path) if re.search(r"\b(pipe|text)\.(image_size|deci_)", cell.source)
    ]


def test_the_check_finds_problems(tmp_path):
    notebook = read(NOTEBOOKS[0])
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    code[0].source += "\n# another"
    code[2].execution_count = 99
    code[1].outputs = [
        nbformat.v4.new_output("stream", name="stderr", text="warning in /home/someone/x.py"),
        nbformat.v4.new_output("error", ename="E", evalue="", traceback=[]),
    ]
    broken = tmp_path / "broken.ipynb"
    nbformat.write(notebook, broken)
    found = " ".join(problems(broken))
    for problem in ("set-up cell", "top to bottom", "is an error", "stderr", "machine path", "Colab badge"):
        assert problem in found


def test_the_notebooks_use_the_values_of_the_guide():
    sources = {path.stem[:2]: "\n".join(cell.source for cell in code_cells(path)) for path in NOTEBOOKS}
    assert "[0.75 + 0.05 * i for i in range(6)]" in sources["02"]
    assert "[i * 1.5 for i in range(3, 10)]" in sources["03"]
    assert "list(range(30, 101, 10))" in sources["04"]
    for axis in ("[0.75 + 0.05 * i for i in range(4)]", "[i * 1.5 for i in range(3, 8)]", "list(range(30, 101, 10))"):
        assert axis in sources["05"]


PLACE = re.compile(r"\[(\d\d)\]\(\.\./notebooks/(\w+)\.ipynb\)(?:, ([^|[]+))?")
NOWHERE = ("the first cell of each notebook", "not part of the guide")


@pytest.mark.parametrize(("page", "most"), [("articles.md", 27), ("the_guide.md", 24)])
def test_each_block_of_the_articles_is_where_the_docs_say(page, most):
    text = (FOLDER.parent / "docs" / page).read_text(encoding="utf-8")
    steps = [line for line in text.splitlines() if line.startswith("| ") and not line.endswith("| here |")]
    assert len(steps) == most
    for step in steps:
        places = PLACE.findall(step)
        assert places or any(words in step for words in NOWHERE), step
        for number, name, sections in places:
            there = [cell.source for cell in read(FOLDER / f"{name}.ipynb").cells if cell.cell_type == "markdown"]
            headings = {line.removeprefix("## ") for source in there for line in source.splitlines()}
            assert name.startswith(number)
            for section in filter(None, (part.strip() for part in re.sub(r"\(.*?\)", "", sections).split(";"))):
                assert section in headings or section == "all of", f"{section!r} is not a section of {name}"
