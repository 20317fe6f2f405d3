"""Make slides from the notebooks: ``make slides``.

Each section of a notebook becomes a slide, and each of its further texts and figures a slide below it. The slides are
in ``runs/slides``, with all that they need beside them.
"""

import re
import shutil
from importlib.resources import files
from pathlib import Path

import nbformat
from latex2mathml.converter import convert
from nbconvert import SlidesExporter

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "runs" / "slides"
TEMPLATES = ROOT / "tools" / "site"
LAST = ("## Clean up", "## Next")  # these sections and what follows them are left out
BADGE = re.compile(r"\[!\[[^\]]+\]\(https://[^)]+\.svg\)\]\([^)]+\)")
CODE = re.compile(r"(```.*?```|`[^`]*`)", re.DOTALL)
FORMULA = re.compile(r"\$\$(.+?)\$\$|\$(\S(?:[^$\n]*?\S)?)\$", re.DOTALL)


def as_slides(notebook: nbformat.NotebookNode) -> nbformat.NotebookNode:
    """Return a notebook with formulas as MathML, and each cell marked as a slide, one below it, or left out."""
    shown, full = True, False  # full: the slide has a figure already
    for cell in notebook.cells:
        first = cell.source.lstrip().split("\n")[0]
        figure = any("text/html" in output.get("data", {}) for output in cell.get("outputs", []))
        if cell.cell_type == "markdown":
            kind, full = ("slide" if first.startswith("#") else "subslide"), False
        else:
            kind, full = ("subslide" if full and figure else "-"), full or figure
        shown = shown and not first.startswith(LAST)
        hidden = not shown or "parameters" in cell.metadata.get("tags", []) or "packages_distributions" in cell.source
        cell.metadata["slideshow"] = {"slide_type": "skip" if hidden else kind}
        if cell.cell_type == "markdown":
            cell.source = with_formulas(BADGE.sub("", cell.source))
    return notebook


def with_formulas(text: str) -> str:
    """Replace formulas between dollar signs by MathML, but not those in code."""

    def formula(match: re.Match) -> str:
        return convert(match[1], display="block") if match[1] else convert(match[2])

    return "".join(part if part.startswith("`") else FORMULA.sub(formula, part) for part in CODE.split(text))


def main() -> None:
    shutil.rmtree(FOLDER, ignore_errors=True)
    shutil.copytree(files("sphinx_revealjs") / "_static" / "revealjs", FOLDER / "reveal")
    shutil.copytree(ROOT / "docs" / "maps", FOLDER.parent / "docs" / "maps", dirs_exist_ok=True)
    exporter = SlidesExporter(
        extra_template_basedirs=[str(TEMPLATES)],
        template_name="slides",
        reveal_url_prefix="reveal",
        reveal_theme="white",
    )
    for path in sorted((ROOT / "notebooks").glob("*.ipynb")):
        notebook = as_slides(nbformat.read(path, as_version=4))
        notebook.metadata["title"] = notebook.cells[0].source.split("\n")[0].lstrip("# ")
        page, _ = exporter.from_notebook_node(notebook)
        (FOLDER / f"{path.stem}.html").write_text(page, encoding="utf-8")
    print(f"done: the slides are in {FOLDER}")


if __name__ == "__main__":
    main()
