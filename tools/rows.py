"""Try the versions that ``pyproject.toml`` allows: ``python -m tools.rows floors``.

A row is one environment: ``floors`` has the lowest version of every dependency, ``lock`` the versions of
``requirements.txt``, ``newest`` the newest that pip finds. Each is installed under ``runs/rows/``, and the tests run in
it. ``python -m tools.rows beside pip-freeze.txt`` asks which packages of a machine pip would replace to install decinb;
it installs nothing. Results are kept in ``results/versions.json``, and the tables in ``docs/versions.md`` follow them.
"""

import argparse
import json
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterable, Mapping
from datetime import date
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "results" / "versions.json"
PAGE = ROOT / "docs" / "versions.md"
BEGIN, END = "<!-- begin: written by tools/rows.py -->\n", "<!-- end -->\n"
ROWS = ("floors", "lock", "newest")


def project() -> dict[str, Any]:
    """Return the table ``project`` of ``pyproject.toml``."""
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def declared() -> dict[str, Requirement]:
    """Return all dependencies by name, those of the extras too."""
    table = project()
    lines = [*table["dependencies"], *(line for extra in table["optional-dependencies"].values() for line in extra)]
    requirements = {canonicalize_name(Requirement(line).name): Requirement(line) for line in lines}
    return {name: one for name, one in requirements.items() if name != table["name"]}


def floor(requirement: Requirement) -> str:
    """Return the lowest version that a requirement allows."""
    return next(clause.version for clause in requirement.specifier if clause.operator == ">=")


def specifications(row: str) -> dict[str, str]:
    """Return what a row asks pip for, by package."""
    if row == "floors":
        return {name: f"{name}=={floor(one)}" for name, one in declared().items()}
    if row == "lock":
        lines = (ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines()
        return {canonicalize_name(line.partition("==")[0]): line for line in lines if line and line[0] != "#"}
    return {name: str(one) for name, one in declared().items()}


# --- a row ------------------------------------------------------------------------------------------------------------


def run_row(row: str, python: str, instead: Iterable[str], tests: list[str], folder: Path) -> int:
    """Install a row, run the tests in it, keep the result, and return pytest's status.

    Args:
        row: one of ``ROWS``.
        python: the interpreter.
        instead: requirements that replace those of the row, such as ``torch==2.13.0`` where only that build is at hand.
        tests: arguments of pytest; none runs everything.
        folder: where the environment is made.
    """
    wanted = specifications(row) | {canonicalize_name(Requirement(one).name): one for one in instead}
    inside = _new_environment(folder / row, python)
    _pip(inside, "install", "--quiet", *wanted.values())
    _pip(inside, "install", "--quiet", "--no-deps", "--editable", str(ROOT))
    run = subprocess.run([inside, "-m", "pytest", "-q", *tests], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    print(run.stdout)
    listed = {one["name"]: one["version"] for one in json.loads(_pip(inside, "list", "--format", "json"))}
    versions = {canonicalize_name(name): version for name, version in listed.items()}
    last = run.stdout.strip().splitlines()[-1].strip("= ")
    result = {
        "date": date.today().isoformat(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": _version(inside),
        "tests": shlex.join(tests) or "all",
        "outcome": re.sub(r" in \d.*", "", last),
        "versions": {name: versions[name] for name in wanted},
    }
    keep("rows", row, result)
    return run.returncode


def _new_environment(folder: Path, python: str) -> Path:
    """Make an empty virtual environment, and return its interpreter."""
    shutil.rmtree(folder, ignore_errors=True)
    subprocess.run([python, "-m", "venv", folder], check=True)
    return folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")


def _pip(inside: Path, *arguments: str) -> str:
    command = [inside, "-m", "pip", "--disable-pip-version-check", *arguments]
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout


def _version(inside: Path) -> str:
    return subprocess.run([inside, "-V"], check=True, stdout=subprocess.PIPE, text=True).stdout.split()[1]


# --- beside what a machine has ----------------------------------------------------------------------------------------


def replaced_beside(freeze: str, python: str, folder: Path) -> dict[str, str]:
    """Return the packages of a machine that pip would replace to install decinb, each with both versions.

    An environment pretends to hold the packages. Those that decinb leads to get the requirements that their version
    has in the index, so that pip decides as it would on that machine.

    Args:
        freeze: what ``pip freeze`` prints there.
        python: an interpreter of the same version as there.
        folder: where the environment is made.
    """
    inside = _new_environment(folder / "beside", python)
    site = next(inside.parents[1].glob("[Ll]ib/**/site-packages"))
    there = frozen(freeze)
    for name, version in there.items():
        _pretend(site, name, version)
    wanted = project()["dependencies"]
    to_visit, visited = {canonicalize_name(Requirement(line).name) for line in wanted}, set[str]()
    while names := (to_visit & there.keys()) - visited:
        visited |= names
        for name in names:
            needs = _requirements_of(inside, name, there[name])
            _pretend(site, name, there[name], needs)
            to_visit |= {canonicalize_name(Requirement(line).name) for line in needs}
    changes = _dry_run(inside, *wanted)
    return {name: f"{there[name]} to {version}" for name, version in changes.items() if name in there}


def frozen(freeze: str) -> dict[str, str]:
    """Return the versions that ``pip freeze`` printed, by package; the version of an address is taken from its file."""
    versions = {}
    for line in freeze.splitlines():
        if found := re.match(r"([\w.-]+)(?:==| @ \S*/\1-)([\w.+!]+?)(?:-|\.tar|$)", line):
            versions[canonicalize_name(found[1])] = found[2]
    return versions


def _pretend(site: Path, name: str, version: str, requirements: Iterable[str] = ()) -> None:
    """Make pip believe that a package is installed."""
    if name == "pip":  # this one is really there
        return
    folder = site / f"{name.replace('-', '_')}-{version}.dist-info"
    folder.mkdir(exist_ok=True)
    lines = ["Metadata-Version: 2.1", f"Name: {name}", f"Version: {version}"]
    (folder / "METADATA").write_text("\n".join([*lines, *(f"Requires-Dist: {one}" for one in requirements)]) + "\n")
    (folder / "RECORD").touch()
    (folder / "INSTALLER").write_text("pip\n")


def _requirements_of(inside: Path, name: str, version: str) -> list[str]:
    """Return what a version in the index requires; nothing for a build that is not there, such as a machine's torch."""
    if "+" in version:
        return []
    arguments = ["install", "--quiet", "--dry-run", "--no-deps", "--ignore-installed", "--report", "-"]
    (found,) = json.loads(_pip(inside, *arguments, f"{name}=={version}"))["install"]
    return [line for line in found["metadata"].get("requires_dist", []) if "extra ==" not in line]


def _dry_run(inside: Path, *wanted: str) -> dict[str, str]:
    """Return the version of every package that pip would install."""
    report = json.loads(_pip(inside, "install", "--quiet", "--dry-run", "--report", "-", *wanted))
    names = [(one["metadata"]["name"], one["metadata"]["version"]) for one in report["install"]]
    return {canonicalize_name(name): version for name, version in names}


# --- what is kept -----------------------------------------------------------------------------------------------------


def results() -> dict[str, Any]:
    """Return what was kept of earlier runs."""
    return json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else {"rows": {}, "beside": {}}


def keep(kind: str, name: str, result: Mapping[str, Any]) -> None:
    """Keep a result, and write the tables again."""
    kept = results()
    kept[kind][name] = result
    RESULTS.write_text(json.dumps(kept, indent=1) + "\n", encoding="utf-8")
    write_page()


def write_page() -> None:
    """Write the tables of the page again."""
    PAGE.write_text(update_page(PAGE.read_text(encoding="utf-8"), tables(results())), encoding="utf-8")


def tables(kept: Mapping[str, Any]) -> str:
    """Return the results as tables in Markdown."""
    rows = {name: kept["rows"][name] for name in ROWS if name in kept["rows"]}
    lines = ["| | declared | " + " | ".join(rows) + " |", "|---" * (2 + len(rows)) + "|"]
    for label in ("python", "date", "system", "tests", "outcome"):
        lines.append(f"| {label} | | " + " | ".join(row[label] for row in rows.values()) + " |")
    for name, requirement in declared().items():
        versions = (row["versions"].get(name, "") for row in rows.values())
        lines.append(f"| `{name}` | {requirement.specifier} | " + " | ".join(versions) + " |")
    lines += ["", "| beside the packages of | Python | date | pip would replace |", "|---|---|---|---|"]
    for name, one in kept["beside"].items():
        changes = ", ".join(f"{package} {change}" for package, change in one["replaced"].items())
        lines.append(f"| {name} | {one['python']} | {one['date']} | {changes or 'nothing'} |")
    return "\n".join(lines) + "\n"


def update_page(page: str, text: str) -> str:
    """Return the page with the text between the two marks."""
    before, _, rest = page.partition(BEGIN)
    return before + BEGIN + text + END + rest.partition(END)[2]


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tools.rows", description=__doc__.partition("\n")[0])
    parser.add_argument("row", choices=[*ROWS, "beside", "tables"])
    parser.add_argument("arguments", nargs="*", help="of pytest, after --; for `beside` a file and a name")
    parser.add_argument("--python", default=sys.executable, help="the interpreter, by default this one")
    parser.add_argument("--instead", action="append", default=[], help="a requirement that replaces one of the row")
    parser.add_argument("--folder", type=Path, default=ROOT / "runs" / "rows", help="where environments are made")
    options = parser.parse_args()
    if options.row == "tables":
        write_page()
        return 0
    if options.row != "beside":
        return run_row(options.row, options.python, options.instead, options.arguments, options.folder)
    file, name = options.arguments
    replaced = replaced_beside(Path(file).read_text(encoding="utf-8"), options.python, options.folder)
    inside = options.folder / "beside" / "bin" / "python"
    keep("beside", name, {"date": date.today().isoformat(), "python": _version(inside), "replaced": replaced})
    print("\n".join(f"{package}: {change}" for package, change in replaced.items()) or "pip would replace nothing")
    return 0


if __name__ == "__main__":
    sys.exit(main())
