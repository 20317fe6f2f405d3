"""The files around the package say the same thing, and importing it is light."""

import re
import subprocess
import sys
from importlib.metadata import requires
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[2]
MAX_MODEL_BYTES = 24_000_000
MAX_DEPTH_BYTES = 18_000_000
MAX_JUDGE_BYTES = 1_000_000


def named(text: str) -> str:
    return re.sub(r"[-_.]+", "-", text).lower()


def pins() -> dict[str, str]:
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    return {named(name): version for name, version in (line.split("==") for line in lines if line and line[0] != "#")}


def asked() -> list[Requirement]:
    found = [Requirement(line) for line in requires("decinb")]
    return [requirement for requirement in found if named(requirement.name) != "decinb"]


def test_requirements_pin_exactly_what_pyproject_asks_for():
    assert set(pins()) == {named(requirement.name) for requirement in asked()}
    for requirement in asked():
        assert requirement.specifier.contains(pins()[named(requirement.name)]), requirement


def test_torch_and_numpy_have_no_ceiling_so_an_installed_one_stays():
    for requirement in asked():
        if requirement.name in ("torch", "numpy"):
            assert [clause.operator for clause in requirement.specifier] == [">="]


def test_the_conda_environment_is_python_and_the_same_pins():
    environment = yaml.safe_load((ROOT / "environment.yml").read_text())
    pip = next(part["pip"] for part in environment["dependencies"] if isinstance(part, dict))
    assert pip == ["-r requirements.txt", "-e ."]


def test_the_bundled_weights_are_small_and_safe():
    files = [file for file in (ROOT / "decinb" / "tiny").rglob("*") if file.is_file()]
    assert not [file.name for file in files if file.suffix in (".bin", ".pt", ".ckpt", ".pkl", ".pth")]
    for folder, most in {"model": MAX_MODEL_BYTES, "depth": MAX_DEPTH_BYTES}.items():
        assert 0 < sum(file.stat().st_size for file in files if folder in file.parts) <= most
    assert (ROOT / "decinb" / "tiny" / "judge.safetensors").stat().st_size <= MAX_JUDGE_BYTES


def loaded_after(code: str, modules: tuple[str, ...]) -> list[str]:
    told = f"import sys; print(*(name for name in {modules} if name in sys.modules))"
    run = subprocess.run([sys.executable, "-c", f"{code}\n{told}"], capture_output=True, text=True, check=True)
    assert not run.stderr
    return run.stdout.split()


def test_importing_decinb_loads_nothing_before_it_is_needed():
    assert not loaded_after("import decinb", ("torch", "diffusers", "matplotlib", "IPython", "ipywidgets", "requests"))
    pictures = ("matplotlib", "IPython", "ipywidgets", "pandas")
    assert not loaded_after("import decinb; decinb.load_pipeline; decinb.run_sweep; decinb.load_image", pictures)


@pytest.mark.parametrize("name", ["show_gallery", "plan", "replay", "adherence"])  # each begins in another module
def test_whatever_is_asked_for_first_comes_quietly(name):
    loaded_after(f"import decinb; decinb.{name}", ())


@pytest.mark.parametrize("command", ["make demo", "make test"])
def test_the_readme_names_the_two_commands_and_the_makefile_has_them(command):
    assert command in (ROOT / "README.md").read_text()
    assert f"\n{command.split()[1]}:" in (ROOT / "Makefile").read_text()


def test_the_readme_tells_of_every_module():
    readme = (ROOT / "README.md").read_text()
    modules = [file.name for file in (ROOT / "decinb").glob("*.py") if not file.name.startswith("__")]
    assert not [name for name in modules if f"{name}`" not in readme]


def test_ci_calls_the_readmes_test_command():
    assert (ROOT / ".ci" / "run").read_text().rstrip().endswith("make test")
