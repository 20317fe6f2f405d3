"""Draw the parts of the package from its imports and list them in the docs: ``python -m tools.draw_architecture``.

Writes ``docs/architecture.png``, the same for dark pages, and the table in ``docs/architecture.md``. Each picture holds
the imports that it shows in its metadata, so that a test can tell whether it is up to date.
"""

import ast
import json
import re
from pathlib import Path
from textwrap import fill

import matplotlib

matplotlib.use("agg")

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch
from matplotlib.text import Text
from PIL import Image

from tools.architecture import LAYERS, PACKAGE, SUBPACKAGES, find_imports, find_modules, part_imports, reduce

DOCS = PACKAGE.parent / "docs"
PAGE = DOCS / "architecture.md"
PICTURES = {"light": DOCS / "architecture.png", "dark": DOCS / "architecture-dark.png"}
BEGIN, END = "<!-- begin: written by tools/draw_architecture.py -->\n", "<!-- end -->\n"

EVERYWHERE = {"errors", "utils"}  # imported by nearly all: arrows to them would hide the others
TOOLS = {"__main__", "lessons", "tiny", "benchmark"}  # so would arrows from those that use the package from outside
# The horizontal centre and the width of each part, of 7.8 in all. Its height follows from its layer.
PLACES = {
    "errors": (3.9, 7.5),
    "utils": (3.9, 7.5),
    "designs": (0.75, 1.2),
    "models": (2.1, 1.2),
    "unet_nas": (3.45, 1.2),
    "scenes": (6.1, 3.1),
    "metrics": (6.35, 1.2),
    "images": (6.35, 1.2),
    "pipeline": (4.7, 1.2),
    "sampling": (1.9, 2.0),
    "runtimes": (6.7, 1.6),
    "checkpoints": (4.7, 2.0),
    "figures": (1.2, 1.9),
    "loading": (4.7, 1.2),
    "plotting": (1.2, 1.2),
    "execution": (2.95, 2.7),
    "sweep": (2.95, 1.2),
    "interactive": (2.95, 2.2),
    "__main__": (0.62, 1.0),
    "lessons": (1.8, 1.15),
    "tiny": (3.85, 2.7),
    "benchmark": (6.47, 2.4),
}
COLOURS = {
    "light": {"page": "#ffffff", "band": "#f6f8fa", "text": "#1f2328", "core": "#cfe3fb", "package": "#fbe3c0"},
    "dark": {"page": "#0d1117", "band": "#161b22", "text": "#e6edf3", "core": "#1f4068", "package": "#5f431c"},
}
LINE = "#7d8590"


def parts() -> list[str]:
    """Return all parts, from the top layer to the bottom."""
    return [part for layer in reversed(LAYERS) for part in layer]


def data() -> dict[str, dict[str, list[str]]]:
    """Return what the picture shows: each part's modules, and the parts that it imports."""
    imports = part_imports(find_imports(), parts())
    modules: dict[str, list[str]] = {part: [] for part in parts()}
    for name in find_modules():
        _, _, inside = name.partition(".")
        part, _, module = inside.partition(".")
        if module and module != "__main__":
            modules[part].append(module)
    return {part: {"modules": modules[part], "imports": sorted(imports[part])} for part in parts()}


def draw(shown: dict[str, dict[str, list[str]]], file: Path, colours: dict[str, str]) -> None:
    """Draw each part as a box on its layer, and an arrow for each import that no chain of other imports implies."""
    figure = plt.figure(figsize=(8.3, 0.78 * len(LAYERS)), facecolor=colours["page"])
    ax = figure.add_axes((0, 0, 1, 1))
    ax.set(xlim=(0, 7.8), ylim=(-0.5, len(LAYERS) - 0.4))  # the top boxes may be higher than their layer
    ax.axis("off")
    tops, bottoms = {}, {}
    for y, layer in enumerate(LAYERS):
        if y % 2:
            ax.axhspan(y - 0.5, y + 0.5, color=colours["band"], zorder=-1)
        for part in layer:
            x, width = PLACES[part]
            modules = fill(", ".join(shown[part]["modules"]), int(17 * width))
            height = 0.46 + 0.12 * len(modules.splitlines()) + 0.1 * bool(modules)
            colour = colours["package" if part in SUBPACKAGES else "core"]
            style = "round,pad=0,rounding_size=0.08"
            corner = (x - width / 2, y - height / 2)
            ax.add_patch(FancyBboxPatch(corner, width, height, style, facecolor=colour, edgecolor=LINE))
            name = write(ax, x, y, part, colours, weight="bold", size=10)
            if modules:
                name.set(y=y + height / 2 - 0.08, va="top")
                write(ax, x, y - height / 2 + 0.08, modules, colours, size=8, va="bottom")
            tops[part], bottoms[part] = (x, y + height / 2), (x, y - height / 2)
    graph = {part: set(entry["imports"]) - EVERYWHERE for part, entry in shown.items() if part not in TOOLS}
    for importer, imported in reduce(graph).items():
        for part in sorted(imported):
            arrow = FancyArrowPatch(bottoms[importer], tops[part], arrowstyle="-|>", mutation_scale=11, color=LINE)
            ax.add_patch(arrow)
    legend = {
        len(LAYERS) - 2: "The top layer uses the package.\nNothing imports it.",
        len(LAYERS) - 3: "An arrow means “imports”.\nImports that follow from\nother arrows are left out.",
        len(LAYERS) - 4: "Blue: a module of the core.\nOrange: a subpackage\nand its modules.",
        len(LAYERS) - 5: "Nearly everything imports\nthe two bottom layers.",
    }
    for y, text in legend.items():
        write(ax, 6.0, y, text, colours, size=8, ha="left")
    figure.savefig(file, dpi=160, metadata={"Software": None, "Description": json.dumps(shown, sort_keys=True)})
    plt.close(figure)


def write(ax: Axes, x: float, y: float, text: str, colours: dict[str, str], **style: object) -> Text:
    """Write text, around a point unless the style says otherwise."""
    return ax.text(
        x, y, text, **{"ha": "center", "va": "center", "color": colours["text"], "linespacing": 1.15, **style}
    )


def list_parts() -> str:
    """Return the parts as a table in Markdown, each with the first sentence of its docstring."""
    lines = ["| layer | part | purpose |", "|---|---|---|"]
    for number, layer in reversed(list(enumerate(LAYERS))):
        for part in layer:
            folder = part in SUBPACKAGES
            file = PACKAGE / part / "__init__.py" if folder else PACKAGE / f"{part}.py"
            path = f"decinb/{part}/" if folder else f"decinb/{part}.py"
            paragraph = ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))).partition("\n\n")[0]
            purpose = re.split(r"(?<=[.?!])\s", paragraph)[0].replace("``", "`").replace("\n", " ")
            lines.append(f"| {number} | [`{path}`](../{path}) | {purpose} |")
    return "\n".join(lines) + "\n"


def update_page(page: str, table: str) -> str:
    """Return the page with the table between the two marks."""
    before, _, rest = page.partition(BEGIN)
    return before + BEGIN + table + END + rest.partition(END)[2]


def stored(picture: Path) -> dict[str, dict[str, list[str]]]:
    """Return what a picture shows, from its metadata."""
    return json.loads(Image.open(picture).info["Description"])


def main() -> None:
    shown = data()
    for theme, picture in PICTURES.items():
        draw(shown, picture, COLOURS[theme])
    PAGE.write_text(update_page(PAGE.read_text(encoding="utf-8"), list_parts()), encoding="utf-8")


if __name__ == "__main__":
    main()
