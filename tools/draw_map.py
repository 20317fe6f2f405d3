"""Draw the map of the notebooks, one copy for each notebook with its place marked: ``python -m tools.draw_map``.

Writes ``docs/maps/NN.svg``. Each picture follows the reader's light or dark theme, and a test keeps it up to date.
"""

from dataclasses import dataclass
from html import escape
from itertools import pairwise
from pathlib import Path

FOLDER = Path(__file__).parents[1] / "docs" / "maps"
WIDTH, HEIGHT = 960, 344


@dataclass(frozen=True)
class Stop:
    """A notebook on the map.

    Args:
        title: what it is about, in a few words.
        x, y: the middle of its label.
        where: what the label stands at, for readers who do not see the picture.
    """

    title: str
    x: float
    y: float
    where: str


STOPS: dict[str, Stop] = {
    "00": Stop("from scratch", 560, 285, "the loop of noise, prediction and step"),
    "01": Stop("the parts", 270, 70, "all components of the pipeline"),
    "02": Stop("strength", 400, 225, "how much noise is added to the input"),
    "03": Stop("guidance", 560, 225, "two predictions of the U-Net, combined"),
    "04": Stop("steps", 695, 195, "how often the U-Net is called"),
    "05": Stop("combinations", 190, 325, "all settings of a call at once"),
    "06": Stop("latency", 340, 325, "the time of a whole call"),
    "07": Stop("training", 560, 255, "how the U-Net learned to predict noise"),
    "08": Stop("negative prompts", 690, 35, "the text that a prediction moves away from"),
    "09": Stop("chains", 860, 225, "an output as the next input, and text alone"),
    "10": Stop("other models", 630, 325, "the same call with other models"),
    "11": Stop("depth", 300, 112, "the shapes of the input, as a channel of the U-Net"),
    "12": Stop("runtime options", 485, 325, "the time of a whole call"),
    "13": Stop("playground", 770, 325, "all settings, by hand"),
    "14": Stop("fewer steps", 722, 225, "how often the U-Net is called"),
}

# The components in the order of a call: name, what it gives, left edge, width.
BOXES = [
    ("input image", "128 x 128 pixels", 20, 120),
    ("VAE encoder", "a latent, 16 x 16", 190, 120),
    ("add noise", "up to a timestep", 350, 100),
    ("U-Net-NAS", "predicts the noise", 490, 140),
    ("VAE decoder", "pixels again", 690, 120),
    ("output", "an image", 860, 80),
]
TOP, TALL = 130, 52

STYLE = """
  text { font: 13px system-ui, -apple-system, "Segoe UI", sans-serif; fill: var(--ink); text-anchor: middle }
  .name { font-weight: 600 } .gives { font-size: 11.5px; fill: var(--grey) }
  .part { fill: var(--box); stroke: var(--line) } .arrow { fill: none; stroke: var(--grey); stroke-width: 1.5 }
  .stop { fill: var(--page); stroke: var(--line) } .here { fill: #b84a00; stroke: #b84a00 }
  .at { fill: #ffffff; font-weight: 600 } .page { fill: var(--page) }
  svg { --page: #ffffff; --box: #dcebfa; --ink: #1f2328; --grey: #59636e; --line: #7d8590 }
  @media (prefers-color-scheme: dark) {
    svg { --page: #0d1117; --box: #1f4068; --ink: #e6edf3; --grey: #a3adb8; --line: #7d8590 }
  }
"""


def draw(here: str) -> str:
    """Return the map as SVG with one notebook marked.

    Args:
        here: the number of the notebook, a key of ``STOPS``.
    """
    shapes = [_box(*box) for box in BOXES]
    middle = TOP + TALL / 2
    edges = [(left, left + width) for _, _, left, width in BOXES]
    shapes += [_arrow(f"M{one[1]} {middle}H{two[0] - 3}") for one, two in pairwise(edges)]
    shapes += [
        _box("prompt, text encoder", "one vector for each token", 470, 180, top=52, tall=46),
        _arrow(f"M560 98V{TOP - 3}"),
        # Each step goes back to the U-Net; an output may become the next input; depth goes around the noise.
        _arrow(f"M630 {TOP + 40}h32v34h-122v-{34 - (TALL - 40) - 3}"),
        _arrow(f"M80 {TOP - 3}V112H466V{middle - 12}h21"),
        '<text class="gives" x="66" y="329">the whole call:</text>',
    ]
    shapes += [_stop(number, stop, number == here) for number, stop in STOPS.items()]
    title = escape(describe(here))
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{title}">\n'
        f"<title>{title}</title>\n<style>{STYLE}</style>\n"
        '<defs><marker id="tip" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" orient="auto">'
        '<path d="M0 0L8 4L0 8z" style="fill: var(--grey)"/></marker></defs>\n'
        f'<rect class="page" width="{WIDTH}" height="{HEIGHT}" rx="8"/>\n' + "\n".join(shapes) + "\n</svg>\n"
    )


def describe(here: str) -> str:
    """Return what the map says to readers who do not see it."""
    stop = STOPS[here]
    return f"Map of the collection. Notebook {here}, {stop.title}, is about {stop.where}."


def _box(name: str, gives: str, left: float, width: float, top: float = TOP, tall: float = TALL) -> str:
    x = left + width / 2
    return (
        f'<rect class="part" x="{left}" y="{top}" width="{width}" height="{tall}" rx="6"/>'
        f'<text class="name" x="{x}" y="{top + tall / 2 - 4}">{name}</text>'
        f'<text class="gives" x="{x}" y="{top + tall / 2 + 14}">{gives}</text>'
    )


def _arrow(path: str) -> str:
    return f'<path class="arrow" marker-end="url(#tip)" d="{path}"/>'


def _stop(number: str, stop: Stop, here: bool) -> str:
    text = f"{number} {stop.title}"
    width = 7 * len(text) + 18
    return (
        f'<rect class="{"here" if here else "stop"}" x="{stop.x - width / 2}" y="{stop.y - 11}" width="{width}" '
        f'height="22" rx="11"/><text{" class=" + chr(34) + "at" + chr(34) if here else ""} '
        f'x="{stop.x}" y="{stop.y + 4.5}">{text}</text>'
    )


def main() -> None:
    FOLDER.mkdir(exist_ok=True)
    for number in STOPS:
        (FOLDER / f"{number}.svg").write_text(draw(number), encoding="utf-8")


if __name__ == "__main__":
    main()
