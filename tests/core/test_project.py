"""The files around the package agree with each other, and importing the package is light."""

import ast
import re
import subprocess
import sys
from importlib.metadata import requires
from pathlib import Path
from urllib.parse import unquote

import nbformat
import pytest
import yaml
from packaging.requirements import Requirement

from tools import run_demo

ROOT = Path(__file__).parents[2]
DOCS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
MODEL_CARDS = sorted((ROOT / "decinb").rglob("*.md"))
MAX_README_LINES = 80
MAX_MODEL_BYTES = 24_000_000
MAX_DEPTH_BYTES = 18_000_000
MAX_LCM_BYTES = 17_000_000
MAX_JUDGE_BYTES = 1_000_000


def name_of(file: Path) -> str:
    return file.relative_to(ROOT).as_posix()


def normalized(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def pins() -> dict[str, str]:
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    pairs = (line.split("==") for line in lines if line and line[0] != "#")
    return {normalized(name): version for name, version in pairs}


def declared() -> list[Requirement]:
    requirements = [Requirement(line) for line in requires("decinb")]
    return [requirement for requirement in requirements if normalized(requirement.name) != "decinb"]


def test_requirements_pin_exactly_what_pyproject_declares():
    assert set(pins()) == {normalized(requirement.name) for requirement in declared()}
    for requirement in declared():
        assert requirement.specifier.contains(pins()[normalized(requirement.name)]), requirement


def test_torch_and_numpy_have_no_upper_bound_so_that_installed_ones_are_kept():
    for requirement in declared():
        if requirement.name in ("torch", "numpy"):
            assert [clause.operator for clause in requirement.specifier] == [">="]


def test_the_conda_environment_is_python_and_the_same_pins():
    environment = yaml.safe_load((ROOT / "environment.yml").read_text())
    pip = next(part["pip"] for part in environment["dependencies"] if isinstance(part, dict))
    assert pip == ["-r requirements.txt", "-e ."]


def test_the_bundled_weights_are_small_and_are_safetensors():
    files = [file for file in (ROOT / "decinb").rglob("*") if file.is_file()]
    assert not [file.name for file in files if file.suffix in (".bin", ".pt", ".ckpt", ".pkl", ".pth")]
    for folder, most in {"model": MAX_MODEL_BYTES, "depth": MAX_DEPTH_BYTES, "lcm": MAX_LCM_BYTES}.items():
        tiny = ROOT / "decinb" / "tiny" / folder
        assert 0 < sum(file.stat().st_size for file in tiny.rglob("*") if file.is_file()) <= most
    (judge,) = (file for file in files if file.name == "judge.safetensors")
    assert judge.stat().st_size <= MAX_JUDGE_BYTES


def loaded_after(code: str, modules: tuple[str, ...]) -> list[str]:
    """Return which of some modules are loaded after code ran in a new process without printing anything."""
    report = f"import sys; print(*(name for name in {modules} if name in sys.modules))"
    run = subprocess.run([sys.executable, "-c", f"{code}\n{report}"], capture_output=True, text=True, check=True)
    assert not run.stderr
    return run.stdout.split()


def test_importing_decinb_loads_no_large_library_until_it_is_needed():
    assert not loaded_after("import decinb", ("torch", "diffusers", "matplotlib", "IPython", "ipywidgets", "requests"))
    plotting = ("matplotlib", "IPython", "ipywidgets", "pandas")
    assert not loaded_after("import decinb; decinb.load_pipeline; decinb.run_sweep; decinb.load_image", plotting)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["show_gallery", "plan", "replay", "adherence"])  # each starts in another module
def test_any_public_name_can_be_the_first_and_imports_without_output(name):
    loaded_after(f"import decinb; decinb.{name}", ())


def test_the_readme_is_short_and_shows_the_two_commands():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(readme.splitlines()) <= MAX_README_LINES
    assert "\nmake demo " in readme and "\nmake test " in readme


@pytest.mark.parametrize("page", DOCS, ids=name_of)
def test_every_make_command_in_the_docs_exists(page):
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    commands = re.findall(r"(?:^|`)make ([a-z]+)", page.read_text(encoding="utf-8"), re.MULTILINE)
    assert not [command for command in commands if f"\n{command}:" not in makefile]


def test_notebooks_measure_on_fewer_images_where_the_demo_and_the_tests_say_so():
    for notebook in sorted((ROOT / "notebooks").glob("*.ipynb")):
        cells = nbformat.read(notebook, as_version=4).cells
        (parameters,) = (cell.source for cell in cells if "parameters" in cell.metadata.get("tags", []))
        for count in re.findall(r"^(?:COUNT|SEEDS) = (.*?)  #", parameters, re.MULTILINE):
            usual = re.fullmatch(r'(?:min\(8, )?int\(os.environ.get\("DECINB_COUNT", (\d+)\)\)\)?|(\d+)', count)
            assert usual, (notebook.name, count)
            assert int(usual[1]) > run_demo.COUNT if usual[1] else int(usual[2]) <= run_demo.COUNT, notebook.name


def links(text: str) -> list[str]:
    """Return the targets of the links and images of a page, in Markdown or HTML."""
    text = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
    return [match[1] or match[2] for match in re.finditer(r"\]\(([^)\s]+)\)|(?:href|src|srcset)=\"([^\"]+)\"", text)]


def anchors(page: Path) -> set[str]:
    """Return the anchors of a page's headings, as GitHub names them."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def broken_links(page: Path) -> list[str]:
    """Return the relative links of a page whose file or heading does not exist."""
    broken = []
    for link in links(page.read_text(encoding="utf-8")):
        path, _, anchor = unquote(link).partition("#")
        target = page.parent / path if path else page
        if re.match(r"[a-z]+:", link):
            continue
        if not target.exists() or (anchor and target.suffix == ".md" and anchor not in anchors(target)):
            broken.append(link)
    return broken


@pytest.mark.parametrize("page", DOCS + MODEL_CARDS, ids=name_of)
def test_every_relative_link_leads_somewhere(page):
    assert not broken_links(page)


def test_broken_links_are_found(tmp_path):
    page = tmp_path / "page.md"
    page.write_text('# A title\n[a](page.md#a-title) [b](none.md) [c](#nowhere) <img src="no.png"> [d](https://x.org)')
    assert broken_links(page) == ["none.md", "#nowhere", "no.png"]


@pytest.mark.parametrize("index", ["README.md", "docs/README.md"])
def test_every_page_of_the_docs_is_linked(index):
    text = (ROOT / index).read_text(encoding="utf-8")
    pages = [page.name for page in (ROOT / "docs").glob("*.md") if page.name != "README.md"]
    assert not [name for name in pages if f"{name})" not in text]


@pytest.mark.parametrize("page", DOCS, ids=name_of)
def test_every_file_that_the_docs_name_exists(page):
    named = re.findall(r"`((?:[\w-]+/)*[\w-]+\.(?:py|ipynb|json))`", page.read_text(encoding="utf-8"))
    assert not [name for name in named if not ((ROOT / name).exists() or (ROOT / "decinb" / name).exists())]


def test_ci_runs_the_test_command_of_the_readme():
    assert (ROOT / ".ci" / "run").read_text().rstrip().endswith("make test")


def test_no_test_imports_another_test():
    for file in (ROOT / "tests").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom):
                names = [f"{node.module or ''}.{alias.name}" for alias in node.names]
            else:
                names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            assert not [name for name in names if re.search(r"(^|\.)(test_\w+|conftest)\b", name)], (
                f"{file.relative_to(ROOT)}:{node.lineno} imports from a test; move what is shared to tests/helpers/"
            )
