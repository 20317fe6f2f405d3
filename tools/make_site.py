"""Build the site from the notebooks and the documentation: ``make site``.

Everything is copied to ``runs/site/source`` in the places it has in the repository, so that links between pages hold.
The pages are in ``runs/site/html`` and open without a server and without a network.
"""

import re
import shutil
import sys
from pathlib import Path

from sphinx.cmd.build import build_main

ROOT = Path(__file__).parents[1]
SITE = ROOT / "runs" / "site"
FOLDERS = ("docs", "notebooks", "decinb", "tools", "tests/guarantees", "tests/core", "results", "mindspore")
IGNORED = shutil.ignore_patterns("*.safetensors", "__pycache__", ".ipynb_checkpoints", "*.bin", "*.npz")
BADGE = re.compile(r"\[!\[([^\]]+)\]\(https://[^)]+\.svg\)\]\(([^)]+)\)")
PAGES = {
    "Notebooks": "notebooks/*.ipynb",
    "Solutions": "notebooks/solutions/*.ipynb",
    "Documentation": "docs/*.md",
    "Cards": "decinb/tiny/*/README.md",
    "MindSpore": "mindspore/*.[mi]*",
    "Tests": "tests/guarantees/*.md",
}


def stage(source: Path) -> None:
    """Copy all pages and what they link to, and write the first page with the contents."""
    shutil.rmtree(source, ignore_errors=True)
    for folder in FOLDERS:
        if (ROOT / folder).exists():
            shutil.copytree(ROOT / folder, source / folder, ignore=IGNORED)
    for name in ("LICENSE", "pyproject.toml", "requirements.txt", "Makefile"):
        shutil.copy(ROOT / name, source)
    for notebook in source.rglob("*.ipynb"):
        notebook.write_text(with_links_for_badges(notebook.read_text(encoding="utf-8")), encoding="utf-8")
    (source / "index.md").write_text(first_page(source), encoding="utf-8")


def first_page(source: Path) -> str:
    """Return the README with the contents of the site."""
    parts = [(ROOT / "README.md").read_text(encoding="utf-8")]
    for caption, pattern in PAGES.items():
        files = [file for file in sorted(source.glob(pattern)) if file.suffix in (".md", ".ipynb")]
        names = [
            file.relative_to(source).with_suffix("").as_posix()
            for file in files
            if file.parent.name != "docs" or file.name != "README.md"
        ]
        if names:
            parts.append("\n".join(["```{toctree}", ":hidden:", f":caption: {caption}", "", *names, "```"]))
    return "\n\n".join(parts) + "\n"


def with_links_for_badges(text: str) -> str:
    """Replace badges, which are images from a network, with links of the same text."""
    return BADGE.sub(r"[\1](\2)", text)


def build(source: Path, pages: Path) -> int:
    """Copy everything and build the pages. Return 0 if that worked."""
    stage(source)
    return build_main(["-q", "-b", "html", "-c", str(ROOT / "tools" / "site"), str(source), str(pages)])


def main() -> int:
    status = build(SITE / "source", SITE / "html")
    if not status:
        print(f"done: open {(SITE / 'html' / 'index.html').relative_to(ROOT)}")
    return status


if __name__ == "__main__":
    sys.exit(main())
