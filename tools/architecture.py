"""Read the imports of the package and check them against its layers.

A part is a subpackage, or a module of the core by itself. A part may import only parts of lower layers, so imports go
one way and never in a circle. ``tests/core/test_architecture.py`` checks this, ``tools/draw_architecture.py`` draws it.
"""

import ast
import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

PACKAGE = Path(__file__).parents[1] / "decinb"
MAX_CORE_MODULES = 14  # directly in the package's folder

# From the bottom to the top.
LAYERS = (
    ("errors",),
    ("utils",),
    ("designs", "models", "unet_nas", "metrics"),
    ("scenes",),
    ("images",),
    ("pipeline", "sampling", "runtimes"),
    ("checkpoints", "figures"),
    ("loading", "plotting"),
    ("execution",),
    ("sweep",),
    ("interactive",),
    ("__main__", "lessons", "tiny", "benchmark"),
)
SUBPACKAGES = {
    *("sampling", "execution", "checkpoints", "figures", "runtimes", "interactive"),
    *("benchmark", "lessons", "scenes", "tiny", "utils"),
}
NEVER_IMPORTED = {"benchmark", "lessons", "tiny"}  # tools that use the package; the package does not need them


@dataclass(frozen=True, order=True)
class Import:
    """An import of one module of the package by another, as dotted names."""

    importer: str
    imported: str
    file: str  # relative to the folder of the package
    line: int

    def __str__(self) -> str:
        return f"{self.file}:{self.line} imports {self.imported}"


def find_modules(package: Path = PACKAGE) -> dict[str, Path]:
    """Return the file of every module by its dotted name; a subpackage's is its ``__init__.py``."""
    names = {}
    for file in sorted(package.rglob("*.py")):
        parts = (package.name, *file.relative_to(package).with_suffix("").parts)
        names[".".join(parts).removesuffix(".__init__")] = file
    return names


def find_imports(package: Path = PACKAGE) -> list[Import]:
    """Return the imports between the modules of a package.

    Imports inside functions count. Those under ``if TYPE_CHECKING:`` do not, nor do those of the package's own
    ``__init__.py``, which offers the public names.
    """
    modules = find_modules(package)
    found = set()
    for importer, file in modules.items():
        if importer == package.name:
            continue
        base = importer if file.name == "__init__.py" else importer.rpartition(".")[0]
        for node in _walk_runtime(ast.parse(file.read_text(encoding="utf-8"))):
            for name in _imported_names(node, base):
                while name and name not in modules:  # a name defined in a module is an import of that module
                    name = name.rpartition(".")[0]
                if name and name != importer:
                    found.add(Import(importer, name, file.relative_to(package.parent).as_posix(), node.lineno))
    return sorted(found)


def _walk_runtime(node: ast.AST) -> Iterator[ast.AST]:
    """Yield a tree's nodes without what is under ``if TYPE_CHECKING:``."""
    yield node
    if isinstance(node, ast.If) and ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING"):
        children = node.orelse
    else:
        children = ast.iter_child_nodes(node)
    for child in children:
        yield from _walk_runtime(child)


def _imported_names(node: ast.AST, base: str) -> list[str]:
    """Return the absolute dotted names that one statement imports, where ``base`` is the package it stands in."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom):
        parents = base.split(".")[: len(base.split(".")) - node.level + 1] if node.level else []
        module = ".".join([*parents, *([node.module] if node.module else [])])
        return [f"{module}.{alias.name}" for alias in node.names]
    return []


def part_of(module: str) -> str:
    """Return the part that a module belongs to, e.g. ``sampling`` for ``decinb.sampling.batched``."""
    return module.split(".")[1] if "." in module else ""


def part_imports(imports: Sequence[Import], parts: Sequence[str]) -> dict[str, set[str]]:
    """Return what each part imports of the others."""
    graph: dict[str, set[str]] = {part: set() for part in parts}
    for each in imports:
        if part_of(each.imported) not in ("", part_of(each.importer)):
            graph.setdefault(part_of(each.importer), set()).add(part_of(each.imported))
    return graph


def find_violations(
    package: Path = PACKAGE,
    layers: Sequence[Sequence[str]] = LAYERS,
    subpackages: set[str] = SUBPACKAGES,
    never_imported: set[str] = NEVER_IMPORTED,
    max_core_modules: int = MAX_CORE_MODULES,
) -> list[str]:
    """Return one line for everything in a package that breaks the rules of its architecture.

    Args:
        package: the folder of the package.
        layers: the parts of each layer, from the bottom to the top.
        subpackages: the subpackages that there must be, and no others.
        never_imported: the subpackages that no other part may import.
        max_core_modules: how many modules may lie directly in ``package``.
    """
    modules, imports = find_modules(package), find_imports(package)
    parts = sorted({part_of(module) for module in modules} - {""})
    layer_of = {part: i for i, layer in enumerate(layers) for part in layer}
    violations = []

    core = sorted(file.name for file in package.glob("*.py"))
    if len(core) > max_core_modules:
        violations.append(f"{package.name}/ holds {len(core)} modules, at most {max_core_modules} are allowed: {core}")
    found = {folder.name for folder in package.iterdir() if any(folder.glob("*.py"))}
    violations += [f"{package.name}/{name}/ is not one of the subpackages" for name in sorted(found - subpackages)]
    violations += [f"the subpackage {package.name}/{name}/ is missing" for name in sorted(subpackages - found)]
    violations += [
        f"{package.name}/{name}/ has no __init__.py"
        for name in sorted(found)
        if f"{package.name}.{name}" not in modules
    ]
    violations += [f"{part} is in none of the layers" for part in parts if part not in layer_of]
    violations += [f"{part} is in the layers but not in the package" for part in sorted(set(layer_of) - set(parts))]

    for each in imports:
        importer, imported = part_of(each.importer), part_of(each.imported)
        if not imported:
            violations.append(f"{each}: import from the module that defines the name, not from the package")
        elif importer == imported:
            continue
        elif imported in never_imported:
            violations.append(f"{each}: no other part may import {imported}")
        elif layer_of.get(imported, -1) >= layer_of.get(importer, len(layers)):
            violations.append(f"{each}: {imported} is not in a lower layer than {importer}")

    files: dict[str, set[str]] = {}
    for each in imports:
        files.setdefault(each.importer, set()).add(each.imported)
    for kind, graph in {"files": files, "parts": part_imports(imports, parts)}.items():
        if circle := find_circle(graph):
            steps = list(itertools.pairwise(circle))
            name = str if kind == "files" else part_of
            named = [next(str(i) for i in imports if (name(i.importer), name(i.imported)) == step) for step in steps]
            violations.append(f"a circle between {kind}: {', '.join(named)}")
    return violations


def find_circle(graph: Mapping[str, set[str]]) -> list[str]:
    """Return the nodes of a circle, the first again at its end, or nothing where there is none."""
    try:
        TopologicalSorter({node: sorted(graph[node]) for node in sorted(graph)}).prepare()
    except CycleError as error:
        return error.args[1][::-1]  # graphlib names what comes first first, and that is what is imported
    return []


def reduce(graph: Mapping[str, set[str]]) -> dict[str, set[str]]:
    """Leave out every edge that a longer way implies (the transitive reduction of a graph without circles)."""

    def reached(node: str) -> set[str]:
        return set().union(*({child} | reached(child) for child in graph.get(node, ())))

    return {
        node: {child for child in children if not any(child in reached(other) for other in children - {child})}
        for node, children in graph.items()
    }
