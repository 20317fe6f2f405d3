"""Tell the code of installed packages, which a name identifies, from the user's own, which may change at any time."""

import functools
import sys
import sysconfig
from functools import cache
from pathlib import Path
from typing import Any

OURS = "decinb"
INSTALLED = {"site-packages", "dist-packages"}


@cache
def is_installed(module: str) -> bool:
    """Return whether a module belongs to Python, to an installed package or to decinb, and not to the user."""
    top = module.partition(".")[0]
    if top == OURS or top in sys.builtin_module_names:
        return True
    file = getattr(sys.modules.get(module), "__file__", None) or getattr(sys.modules.get(top), "__file__", None)
    if top == "__main__" or file is None:
        return False
    return _is_in_packages(file)


@functools.cache
def _is_in_packages(file: str) -> bool:
    path = Path(file)
    return bool(INSTALLED & set(path.parts)) or path.is_relative_to(sysconfig.get_path("stdlib"))


def module_of(function: Any) -> str:
    """Return the module in which a function was written, also if ``functools.wraps`` gave it the name of another."""
    while isinstance(function, functools.partial):
        function = function.func
    function = getattr(function, "__func__", function)
    found = getattr(function, "__globals__", {}).get("__name__") or getattr(function, "__module__", None)
    return found or "builtins"
