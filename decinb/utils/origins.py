"""Tell the code of installed packages, which a name identifies, from the user's own, which may change at any time."""

import functools
import operator
import os
import sys
from functools import cache
from pathlib import Path
from types import BuiltinFunctionType, FunctionType, ModuleType
from typing import Any

from torch.nn import functional

OURS = "decinb"
GENERATED = ("namedtuple_", "pybind11_", "_cython_", "nanobind")  # made by Python's collections, and compiled libraries
INSTALLED = {"site-packages", "dist-packages"}
OF_COMPILERS = ("__compiled_fn_", "__resume_at_")  # what torch.compile puts into the modules that it has compiled
HARMLESS = ("load", "save", "__repr__", "__str__", "__format__")  # they compute nothing, and are often replaced


@cache
def is_installed(module: str) -> bool:
    """Return whether a module belongs to Python, to an installed package or to decinb, and not to the user."""
    top = module.partition(".")[0]
    if top == OURS or top.startswith(GENERATED):
        return True
    file = getattr(sys.modules.get(module), "__file__", None) or getattr(sys.modules.get(top), "__file__", None)
    if top == "__main__":
        return False
    if file is None:  # built into the interpreter
        return top in sys.stdlib_module_names
    return _is_in_packages(file)


@cache
def _is_in_packages(file: str) -> bool:
    path = Path(file)
    if INSTALLED & set(path.parts) or path.is_relative_to(Path(os.__file__).parent):  # where Python's own modules are
        return True
    return any(_was_installed(folder, path.relative_to(folder).parts[0]) for folder in path.parents)


@cache
def _was_installed(folder: Path, name: str) -> bool:
    """Return whether pip has put a file or folder into another folder, as ``pip install --target`` does."""
    records = (info / "RECORD" for info in folder.glob("*.dist-info"))
    return any(
        line.startswith((f"{name}/", f"{name},"))
        for record in records
        if record.is_file()
        for line in record.read_text(encoding="utf-8").splitlines()
    )


def module_of(function: Any) -> str:
    """Return the module in which a function was written, also if ``functools.wraps`` gave it the name of another."""
    while isinstance(function, functools.partial):
        function = function.func
    function = getattr(function, "__func__", function)
    found = getattr(function, "__globals__", {}).get("__name__") or getattr(function, "__module__", None)
    return found or ("" if isinstance(function, FunctionType) else "builtins")  # from exec or eval: of no module


_checked: dict[type | ModuleType, list[Any]] = {}  # what classes and modules held when nothing was found in them


def replaced(owner: type | ModuleType) -> list[str]:
    """Return the names of what the user has put into a class or module of an installed package."""
    now = list(vars(owner).values())
    before = _checked.get(owner, [])
    if len(now) == len(before) and all(map(operator.is_, now, before)):
        return []
    found = [
        name
        for name, value in vars(owner).copy().items()
        if name not in HARMLESS and not name.startswith(OF_COMPILERS) and _is_foreign(value)
    ]
    if not found:
        _checked[owner] = now
    return found


# Those of torch.nn.functional when decinb was imported, to notice another installed function in the place of one.
_FUNCTIONS = {
    name: one for name, one in vars(functional).items() if isinstance(one, (FunctionType, BuiltinFunctionType))
}


def exchanged_functions() -> list[str]:
    """Return the names of what has taken the place of a function of ``torch.nn.functional``."""
    now = vars(functional)
    return [f"torch.nn.functional.{name}" for name, one in _FUNCTIONS.items() if now.get(name) is not one]


def _is_foreign(value: Any) -> bool:
    """Return whether a value is a function, a method, a property or a class of the user, or an object of one.

    What ``functools.partial`` makes of an installed function is the user's too, and so is a mock: packages keep none in
    their modules. Of a function with decorators, all parts must be installed.
    """
    if isinstance(value, functools.partial) or type(value).__module__.startswith("unittest."):
        return True
    if isinstance(value, (staticmethod, classmethod)):
        value = value.__func__
    elif isinstance(value, property):
        value = value.fget
    elif isinstance(value, (functools.cached_property, functools.partialmethod)):
        value = value.func
    wrappers = (FunctionType, functools._lru_cache_wrapper)
    beneath = vars(value).get("__wrapped__") if isinstance(value, wrappers) else None
    if beneath is not None and _is_foreign(beneath):
        return True
    return (callable(value) and not is_installed(module_of(value))) or not is_installed(type(value).__module__)
