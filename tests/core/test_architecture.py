"""The package keeps to its layers, and the check itself finds each kind of violation."""

from pathlib import Path

import pytest

from tools.architecture import find_circle, find_imports, find_violations, reduce
from tools.draw_architecture import PAGE, PICTURES, data, list_parts, stored, update_page

RULES = {
    "layers": (("errors",), ("low", "other"), ("high",), ("bench",)),
    "subpackages": {"low", "bench"},
    "never_imported": {"bench"},
    "max_core_modules": 4,
}
SOUND = {
    "__init__.py": "from house.high import run",
    "errors.py": "class InputError(ValueError): ...",
    "other.py": "import math",
    "high.py": "from house.low.a import first\nfrom house import errors",
    "low/__init__.py": "",
    "low/a.py": "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from house.high import run\nfirst = 1",
    "low/b.py": "from . import a\nfrom ..errors import InputError",
    "bench/__init__.py": "",
    "bench/__main__.py": "import house.low.b",
}


def make_package(folder: Path, files: dict[str, str]) -> Path:
    for name, source in files.items():
        file = folder / "house" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(source)
    return folder / "house"


def test_the_package_keeps_to_its_architecture():
    assert not find_violations(), "\n" + "\n".join(find_violations())


def test_a_sound_package_has_no_violations(tmp_path):
    assert not find_violations(make_package(tmp_path, SOUND), **RULES)


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        (
            {"errors.py": "from house.low import a"},
            "house/errors.py:1 imports house.low.a: low is not in a lower layer",
        ),
        ({"errors.py": "import house.high"}, "house/errors.py:1 imports house.high: high is not in a lower layer"),
        ({"low/a.py": "def f():\n    from house.high import run"}, "house/low/a.py:2 imports house.high: high is not"),
        (
            {"low/a.py": "if TYPE_CHECKING:\n    x = 1\nelse:\n    import house.high"},
            "house/low/a.py:4 imports house.high",
        ),
        (
            {"other.py": "from .low import a"},
            "house/other.py:1 imports house.low.a: low is not in a lower layer than other",
        ),
        (
            {"high.py": "from house.bench import x"},
            "house/high.py:1 imports house.bench: no other part may import bench",
        ),
        ({"high.py": "from house import run"}, "house/high.py:1 imports house: import from the module that defines"),
        ({"low/a.py": "from house.low import b"}, "a circle between files: house/low/"),
        ({"errors.py": "import house.low.a"}, "a circle between parts: house/"),
        ({"extra.py": ""}, "extra is in none of the layers"),
        ({"extra.py": ""}, "house/ holds 5 modules, at most 4 are allowed"),
        ({"wing/__init__.py": ""}, "house/wing/ is not one of the subpackages"),
        ({"loose/a.py": ""}, "house/loose/ is not one of the subpackages"),
    ],
)
def test_each_violation_is_found_and_named(tmp_path, files, expected):
    violations = find_violations(make_package(tmp_path, SOUND | files), **RULES)
    assert any(line.startswith(expected) for line in violations), violations


@pytest.mark.parametrize("missing", ["low/__init__.py", "bench", "other.py"])
def test_what_is_missing_is_named(tmp_path, missing):
    files = {name: source for name, source in SOUND.items() if not name.startswith(missing)}
    violations = find_violations(make_package(tmp_path, files), **RULES)
    assert any(missing.partition(".py")[0].partition("/")[0] in line for line in violations), violations


def test_a_circle_is_named_with_the_import_of_every_step(tmp_path):
    files = {"low/a.py": "from house.low.b import x", "low/b.py": "import math\nfrom house.low.c import x"}
    files["low/c.py"] = "from house.low.a import x"
    (line,) = find_violations(make_package(tmp_path, SOUND | files), **RULES)
    for step in ("low/a.py:1 imports house.low.b", "low/b.py:2 imports house.low.c", "low/c.py:1 imports house.low.a"):
        assert step in line


def test_imports_are_found_however_they_are_written(tmp_path):
    sources = {
        "low/b.py": "import house.low.a as x\nfrom house.low.a import first\nfrom .a import first\nfrom . import a\n"
        "from house.low import a\nfrom .. import errors\nfrom ..errors import E\nimport numpy",
    }
    found = [each for each in find_imports(make_package(tmp_path, SOUND | sources)) if each.importer == "house.low.b"]
    assert [(each.imported, each.line) for each in found if "low" in each.imported] == [
        ("house.low.a", line) for line in range(1, 6)
    ]
    assert [each.line for each in found if each.imported == "house.errors"] == [6, 7]
    assert len(found) == 7


def test_circles_and_reduction_of_graphs():
    assert find_circle({"a": {"b"}, "b": {"c"}, "c": {"b"}}) in (["b", "c", "b"], ["c", "b", "c"])
    assert find_circle({"a": {"b", "c"}, "b": {"c"}}) == []
    assert reduce({"a": {"b", "c"}, "b": {"c"}, "c": set()}) == {"a": {"b"}, "b": {"c"}, "c": set()}


@pytest.mark.parametrize("picture", PICTURES.values(), ids=PICTURES)
def test_the_picture_shows_the_imports_of_today(picture):
    assert stored(picture) == data(), "run `make architecture`"


def test_the_page_lists_the_parts_of_today():
    page = PAGE.read_text(encoding="utf-8")
    assert page == update_page(page, list_parts()), "run `make architecture`"
