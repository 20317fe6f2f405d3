"""What is published around the package: the wheel and its notebooks, the rows of versions, files of the repository."""

import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from importlib.metadata import distribution
from pathlib import Path

import nbformat
import pytest
import yaml
from packaging.version import Version

import decinb
from decinb.__main__ import copy_notebooks
from decinb.errors import InputError
from decinb.utils.environment import driver_advice
from tools import rows, stamp

ROOT = Path(__file__).parents[2]


# The driver


@pytest.mark.parametrize(
    "driver, cuda, named",
    [
        (None, "13.0", None),  # no NVIDIA GPU
        (None, None, None),
        ("580.65.06", "13.0", None),
        ("535.104.05", "12.8", None),
        ("470.82.01", "11.8", None),
        ("510.73.05", "13.0", "torch==2.7.1 --index-url https://download.pytorch.org/whl/cu118"),  # Paperspace, 2022
        ("510.73.05", "12.1", "torch==2.7.1 --index-url https://download.pytorch.org/whl/cu118"),
        ("535.104.05", "13.0", "torch==2.9.1 --index-url https://download.pytorch.org/whl/cu126"),
        ("580.65.06", None, "torch==2.9.1 --index-url https://download.pytorch.org/whl/cu130"),
        ("390.157", "12.8", "update the driver"),
    ],
)
def test_a_driver_that_torch_cannot_use_gets_a_build_that_can(driver, cuda, named):
    advice = driver_advice(driver, cuda)
    if named is None:
        assert advice is None
    else:
        assert named in advice and "runs on the CPU" in advice and "\n" not in advice


def test_the_setup_cell_says_so_where_the_driver_is_too_old(tmp_path, capsys, monkeypatch):
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\necho 390.10\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    decinb.check_driver()
    assert "so the notebook runs on the CPU" in capsys.readouterr().out or os.name == "nt"


# Stamps


def test_an_address_is_written_wherever_it_appears():
    text = (
        "[a](https://colab.research.google.com/github/old/name/blob/main/x.ipynb) "
        "[b](https://console.paperspace.com/github/old/name/blob/main/x.ipynb) https://github.com/old/name/tree/main"
    )
    slug = stamp.address().removeprefix("https://github.com/")
    assert stamp.with_address(text) == text.replace("old/name", slug)


def test_the_release_is_this_version():
    assert f"/v{stamp.project()['version']}/" in stamp.release_address()
    assert stamp.release_address() in stamp.setup_cell()


# Versions


def test_the_lowest_versions_are_those_that_were_tried():
    """Tried by ``python -m tools.rows floors``."""
    tried = rows.results()["rows"]["floors"]["versions"]
    floors = {name: rows.floor(one) for name, one in rows.declared().items() if name in tried}
    assert len(floors) >= len(rows.project()["dependencies"])
    differ = [name for name, version in floors.items() if Version(version) != Version(tried[name])]
    # torch is tried with the build that is at hand, the lowest ipywidgets in the browser tests' second Jupyter
    assert set(differ) <= {"torch", "ipywidgets"}, differ


def test_the_tables_of_versions_are_up_to_date():
    page = rows.PAGE.read_text(encoding="utf-8")
    assert rows.update_page(page, rows.tables(rows.results())) == page


def test_a_list_of_installed_packages_is_read():
    freeze = """\
# a comment
diffusers==0.39.0
lazy-loader==0.5
torch==2.11.0+cu128
en_core_web_sm @ https://example.org/en_core_web_sm-3.8.0-py3-none-any.whl#sha256=00
google-colab @ file:///colabtools/dist/google_colab-1.0.0.tar.gz
jupyter_kernel_gateway @ git+https://example.org/kernel_gateway@b134e99
"""
    assert rows.frozen(freeze) == {
        "diffusers": "0.39.0",
        "lazy-loader": "0.5",
        "torch": "2.11.0+cu128",
        "en-core-web-sm": "3.8.0",
    }


# The wheel


def referred(folder: Path) -> set[tuple[str, str]]:
    """Return every file that a notebook of a folder links to or shows, with the notebook."""
    found = set()
    for path in [*folder.glob("*.ipynb"), *folder.glob("solutions/*.ipynb")]:
        texts = [cell.source for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "markdown"]
        for target in re.findall(r"""\]\(([^)\s]+)|src=["']([^"']+)""", "\n".join(texts)):
            name = "".join(target).partition("#")[0]
            if name and not re.match("[a-z]+:", name) and (path.parent / name).exists():
                found.add((path.relative_to(folder).as_posix(), Path(name).name))
    return found


def test_the_notebooks_can_be_copied(tmp_path):
    copied = copy_notebooks(tmp_path / "new")
    files = referred(ROOT / "notebooks")
    assert {Path(name).suffix for _, name in files} >= {".svg", ".ipynb"}
    assert referred(tmp_path / "new") == files, "a copy has every file that the notebooks refer to"
    assert sorted(path.name for path in copied) == sorted(path.name for path in ROOT.glob("notebooks/*.ipynb"))
    with pytest.raises(InputError, match="already has 00_image_to_image"):
        copy_notebooks(tmp_path / "new")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """Build the wheel as ``make wheel`` does, but from a copy and without asking an index for setuptools."""
    source, target = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("dist")
    for name in ("decinb", "notebooks", "docs/maps"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    subprocess.run([*command, "--wheel-dir", target, source], check=True)
    (built,) = target.glob("*.whl")
    assert built.name == Path(stamp.release_address()).name, "the name that the set-up cell asks for"
    return built


@pytest.fixture
def environment(tmp_path) -> Path:
    """Make an environment with everything that is installed here but decinb; return its interpreter."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", tmp_path / "env"], check=True)
    (site,) = (tmp_path / "env").glob("[Ll]ib/**/site-packages")
    for entry in Path(str(distribution("pip").locate_file(""))).iterdir():
        if not entry.name.startswith(("decinb", "__editable__", "__pycache__")):
            (site / entry.name).symlink_to(entry)
    return next((tmp_path / "env").glob("[bS]*/python*"))


@pytest.mark.slow
def test_a_wheel_has_the_notebooks_their_solutions_and_their_pictures(wheel, tmp_path):
    with zipfile.ZipFile(wheel) as archive:
        inside = {name.partition("share/decinb/notebooks/")[2] for name in archive.namelist()} - {""}
    copy_notebooks(tmp_path)
    assert inside == {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*.*")}


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="makes links")
def test_a_wheel_in_an_empty_folder_runs_notebook_02(wheel, environment, tmp_path):
    """No repository and no network: only the wheel. The set-up cell installs it, and the notebook runs."""
    folder = tmp_path / "empty"
    folder.mkdir()
    shutil.copy(wheel, folder)
    clean = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    clean |= {"PIP_NO_INDEX": "1", "DECINB_MODEL": "tiny", "HF_HUB_OFFLINE": "1", "DECINB_COUNT": "2"}

    def run(*code: str) -> subprocess.CompletedProcess:
        return subprocess.run([environment, *code], cwd=folder, env=clean, capture_output=True, text=True)

    without = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(stamp.setup_cell())])
    nbformat.write(without, tmp_path / "without.ipynb")
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    execute = (
        "import papermill, sys; papermill.execute_notebook(*sys.argv[1:3], cwd=sys.argv[3], kernel_name='python3')"
    )
    failed = run("-c", execute, str(tmp_path / "without.ipynb"), str(tmp_path / "out.ipynb"), str(elsewhere))
    assert failed.returncode and "decinb is missing: put its wheel here" in failed.stderr

    installed = run("-c", execute, str(tmp_path / "without.ipynb"), str(tmp_path / "out.ipynb"), str(folder))
    assert not installed.returncode, installed.stderr
    assert not run("-m", "decinb", "notebooks", ".").returncode
    assert referred(folder) == referred(ROOT / "notebooks")
    notebook = nbformat.read(folder / "02_strength_sweep.ipynb", as_version=4)
    (measuring,) = (cell for cell in notebook.cells if "measured_at = [" in cell.source)
    measuring.source = re.sub(r"measured_at = .*", "measured_at = [0.5, 1.0]", measuring.source)  # of seven strengths
    nbformat.write(notebook, folder / "02_strength_sweep.ipynb")
    done = run("-c", execute, "02_strength_sweep.ipynb", "done.ipynb", str(folder))
    assert not done.returncode, done.stderr
    where = run("-c", "import decinb; print(decinb.__file__)").stdout
    assert str(ROOT) not in where and (folder / "Strength_experiments.png").exists()


# The files of the repository


def test_the_issue_form_for_bugs_asks_for_the_report():
    form = yaml.safe_load((ROOT / ".github/ISSUE_TEMPLATE/bug.yml").read_text())
    (report,) = (part for part in form["body"] if "`python -m decinb`" in part["attributes"]["label"])
    assert report["validations"]["required"]


def test_the_citation_and_the_changes_name_this_version():
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert yaml.safe_load((ROOT / "CITATION.cff").read_text())["version"] == version
    assert f"\n## {version}" in (ROOT / "CHANGELOG.md").read_text()


def test_the_workflows_cover_the_systems_and_python_versions():
    quick = yaml.safe_load((ROOT / ".github/workflows/test.yml").read_text())["jobs"]["quick"]["strategy"]["matrix"]
    assert {name.partition("-")[0] for name in quick["system"]} == {"ubuntu", "windows", "macos"}
    assert quick["python"] == ["3.11", "3.12", "3.13", "3.14"]
    for name in ("newest", "release"):
        assert yaml.safe_load((ROOT / f".github/workflows/{name}.yml").read_text())["jobs"]


def test_the_devcontainer_builds_the_dockerfile_and_runs_as_nobody_special():
    folder = ROOT / ".devcontainer"
    container = json.loads((folder / "devcontainer.json").read_text())
    lines = (folder / container["build"]["dockerfile"]).read_text().splitlines()
    assert f"    && useradd --create-home --uid 1000 {container['remoteUser']}" in lines and "USER 1000" in lines
    assert f"EXPOSE {container['forwardPorts'][0]}" in lines


@pytest.mark.skipif(shutil.which("hadolint") is None, reason="hadolint is not installed")
def test_the_dockerfile_has_no_known_mistakes():
    subprocess.run(["hadolint", ROOT / ".devcontainer/Dockerfile"], check=True)
