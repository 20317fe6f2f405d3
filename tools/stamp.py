"""Write the set-up cell into every notebook, and the project's address and version where they appear: ``make stamp``.

The address and the version are those of ``pyproject.toml``. ``python -m tools.stamp --check`` writes nothing, names the
files that differ, and fails if there are any. Outputs of notebooks stay as they are.
"""

import argparse
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import nbformat

from tools.rows import ROOT, project

# Files in which every address at GitHub is the project's own.
WITH_ADDRESS = ("README.md", "CHANGELOG.md", "CITATION.cff", "docs/guide.md", ".github/ISSUE_TEMPLATE/config.yml")

CELL = """\
# The same in every notebook: install decinb where it is missing, as on Colab or Paperspace.
import os
from importlib.metadata import packages_distributions
from pathlib import Path

if "decinb" not in packages_distributions():
    release = "{release}"
    nearby = [os.environ.get("DECINB_SOURCE"), *Path().glob("decinb-*.whl"), Path("../decinb/tiny").is_dir() and ".."]
    %pip install -q --find-links . "{{next(filter(None, nearby), release)}}"
    assert "decinb" in packages_distributions(), "decinb is missing: put its wheel here, or its path into DECINB_SOURCE"
import decinb  # first: it may set what torch reads when it is imported

decinb.check_driver()
import matplotlib.pyplot as plt
import torch"""


def address() -> str:
    """Return the address of the repository, without a slash at the end."""
    return project()["urls"]["Repository"].rstrip("/")


def release_address() -> str:
    """Return the address of this version's wheel."""
    table = project()
    name, version = table["name"], table["version"]
    return f"{address()}/releases/download/v{version}/{name}-{version}-py3-none-any.whl"


def setup_cell() -> str:
    """Return the source of the set-up cell."""
    return CELL.format(release=release_address())


def with_address(text: str) -> str:
    """Return a text with the project's address in place of every address at GitHub, and its version in a citation."""
    slug = address().removeprefix("https://github.com/")
    text = re.sub(r"(?<=https://github\.com/)[\w.-]+/[\w-]+", slug, text)
    text = re.sub(r"(?<=colab\.research\.google\.com/github/)[\w.-]+/[\w-]+", slug, text)
    return re.sub(r"(?<=console\.paperspace\.com/github/)[\w.-]+/[\w-]+", slug, text)


def stamped_notebook(path: Path) -> str:
    """Return the text of a notebook file with the set-up cell and the address of the badges."""
    notebook = nbformat.read(path, as_version=4)
    first = next(cell for cell in notebook.cells if cell.cell_type == "code")
    first.source = setup_cell()
    notebook.cells[0].source = with_address(notebook.cells[0].source)
    return nbformat.writes(notebook) + "\n"


def stamped(root: Path = ROOT) -> Iterator[tuple[Path, str]]:
    """Yield each file that holds stamped text, with the text that it should have."""
    for path in sorted((root / "notebooks").glob("*.ipynb")):
        yield path, stamped_notebook(path)
    for name in WITH_ADDRESS:
        if (path := root / name).exists():
            text = with_address(path.read_text(encoding="utf-8"))
            if path.suffix == ".cff":
                text = re.sub(r"(?m)^version: .*$", f"version: {project()['version']}", text)
            yield path, text


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tools.stamp", description=__doc__.partition("\n")[0])
    parser.add_argument("--check", action="store_true", help="write nothing; fail if a file differs")
    check = parser.parse_args().check
    different = [(path, text) for path, text in stamped() if path.read_text(encoding="utf-8") != text]
    for path, text in different:
        print(path.relative_to(ROOT).as_posix(), "differs: run `make stamp`" if check else "written")
        if not check:
            path.write_text(text, encoding="utf-8")
    return int(check and bool(different))


if __name__ == "__main__":
    sys.exit(main())
