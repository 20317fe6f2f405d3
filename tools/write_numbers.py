"""Write the measured numbers into the README and the docs: ``python -m tools.write_numbers``, or ``--check``.

The numbers come from the newest measurement of each kind in ``results/``. What has not been measured has no line.
"""

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from decinb.benchmark.latency import Measurement, load, ratio
from decinb.benchmark.neighbours import OPENVINO
from decinb.benchmark.packing import ONE_BY_ONE, PACKED

ROOT = Path(__file__).parents[1]
BEGIN, END = "<!-- begin: written by tools/write_numbers.py -->\n", "<!-- end -->\n"
HEAD = "| compared | result | command |\n|---|---|---|\n"
COMPILED = "torch.compile"

CELLS = {
    "guidance": "7 guidance scales",
    "strength": "6 strengths",
    "steps": "8 step counts",
    "mixed": "48 mixed cells",
}


def newest(results: Path, name: str, model: str | None = "tiny", needs: str = "") -> Measurement | None:
    """Return the newest measurement of a name on a CPU, or None.

    Args:
        results: the folder with a folder for each machine.
        name: the beginning of its file's name.
        model: the model that it must have been made with; None where measurements name none.
        needs: what ``timings`` must contain.
    """
    every = [load(path) for path in results.glob(f"*/{name}-[0-9]*.json")]
    on_cpu = [one for one in every if not one.environment["driver"]]
    fitting = [one for one in on_cpu if one.settings.get("model") == model and (not needs or needs in one.timings)]
    return max(fitting, key=lambda one: one.environment["date"], default=None)


def times(value: float) -> str:
    """Return a ratio as text, with two digits that count."""
    return f"{value:.1f}" if value < 10 else f"{value:.0f}"


# --- lines of the table -----------------------------------------------------------------------------------------------


def sweep_line(results: Path) -> str | None:
    found = newest(results, "benchmark")
    if found is None:
        return None
    faster = {name: ratio(by[ONE_BY_ONE], by[PACKED])[1] for name, by in found.timings.items() if name in CELLS}
    parts = [f"{times(value)} for {CELLS[name]}" for name, value in faster.items()]
    result = f"times faster: {', '.join(parts)}"
    return f"a packed sweep with a loop over the pipeline | {result} | `python -m decinb.benchmark`"


def runtime_line(results: Path) -> str | None:
    found = newest(results, "runtimes")
    if found is None:
        return None
    base = f"{ONE_BY_ONE}, torch"
    parts = []
    for runtime in ("openvino", "openvino-bfloat16"):
        faster = {
            (way, work): ratio(by[base], by[f"{way}, {runtime}"])[1]
            for work, by in found.timings.items()
            for way in (ONE_BY_ONE, PACKED)
            if f"{way}, {runtime}" in by
        }
        sweeps = [value for (way, work), value in faster.items() if way == PACKED and work != "one call"]
        one = faster.get((ONE_BY_ONE, "one call"))
        if one and sweeps:
            parts.append(f"`{runtime}`: one image {times(one)} times faster, {_range(sweeps)} times for packed sweeps")
    return f"the guide's loop in PyTorch with OpenVINO | {'; '.join(parts)} | `python -m decinb.benchmark runtimes`"


def neighbours_line(results: Path) -> str | None:
    found = newest(results, "neighbours")
    if found is None:
        return None
    rates = {work: {way: 1 / timing.median for way, timing in by.items()} for work, by in found.timings.items()}
    parts = []
    for work, by_way in rates.items():
        adapt, fixed = by_way.get("threads adapt"), by_way.get("all threads")
        fast = f", {by_way[OPENVINO]:.0f} with OpenVINO" if OPENVINO in by_way else ""
        beside = "quiet" if work == "0 busy" else f"beside {work.removesuffix(' busy')} busy"
        parts.append(f"{beside} {adapt:.0f} ({fixed:.0f} with fixed threads{fast})")
    return f"rows a second beside busy processes | {'; '.join(parts)} | `python -m decinb.benchmark neighbours`"


def first_image_line(results: Path) -> str | None:
    found = newest(results, "first-image")
    if found is None:
        return None
    seconds = {part: by["torch"].median for part, by in found.timings.items()}
    parts = [f"{part} {value:.1f}" for part, value in seconds.items() if part != "total"]
    command = "`python -m decinb.benchmark first-image`"
    return f"starting Python to the first image | {seconds['total']:.1f} s: {', '.join(parts)} | {command}"


def playground_line(results: Path) -> str | None:
    found = newest(results, "playground")
    if found is None:
        return None
    parts = [
        f"{name}: first preview {1000 * found.timings['preview'][runtime].median:.0f} ms, "
        f"image {found.timings['image'][runtime].median:.1f} s"
        for runtime, name in (("torch", "PyTorch"), ("openvino", "OpenVINO"))
        if runtime in found.timings["preview"]
    ]
    command = "`python -m decinb.benchmark playground`"
    return f"a click in the playground, without the page's own time | {'; '.join(parts)} | {command}"


def loading_line(results: Path) -> str | None:
    found = newest(results, "loading", model=None)
    if found is None:
        return None
    ours, guides = found.timings["load"]["load_pipeline"], found.timings["load"]["the guide's way"]
    weights = found.settings["weights_bytes"]
    return (
        f"loading a full-size model with loading it as the guide does | {times(ratio(guides, ours)[1])} times faster; "
        f"peak memory {ours.peak_bytes / weights:.2f} times the weights (the guide: {guides.peak_bytes / weights:.2f}) "
        "| `python tools/measure_loading.py`"
    )


def import_line(results: Path) -> str | None:
    found = newest(results, "loading", model=None)
    if found is None:
        return None
    alone, both = found.timings["import"].values()
    slower = 100 * (both.median / alone.median - 1)
    return f"`import decinb` with `import diffusers` alone | {slower:.1f} % slower | `python tools/measure_loading.py`"


def compile_line(results: Path) -> str | None:
    found = newest(results, "options", needs=COMPILED)
    if found is None:
        return None
    faster = _range(ratio(*found.timings[COMPILED].values())[::2])
    option = found.settings["options"][COMPILED]
    return (
        f"`load_pipeline(..., compile=True)` with the default | {faster} times faster on `tiny`, with "
        f"a PSNR of {option['psnr']:.0f} dB between the images; the first call takes {option['first']:.0f} s "
        "| `python -m decinb.benchmark options`"
    )


def gpu_line(results: Path) -> str | None:
    files = sorted(results.glob("*/gpu-[0-9]*.json"), key=lambda file: file.stem)
    done = [json.loads(file.read_text()) for file in files]
    with_gpu = [one for one in done if one["environment"]["driver"]]
    if not with_gpu:
        return None
    sweep = with_gpu[-1]["settings"]["stages"].get("sweep", {})
    if "packed_over_loop" not in sweep:
        return None
    return (
        f"a packed sweep at full size with the loop, {with_gpu[-1]['environment']['device']} | "
        f"{times(sweep['packed_over_loop'])} times faster, {sweep['of_matrix_rate']:.0%} of the matrix rate "
        "| `make gpu`"
    )


Line = Callable[[Path], str | None]
LINES: dict[str, tuple[Line, ...]] = {
    "README.md": (sweep_line, runtime_line, loading_line, gpu_line),
    "docs/speed.md": (
        sweep_line,
        runtime_line,
        neighbours_line,
        first_image_line,
        playground_line,
        loading_line,
        import_line,
        compile_line,
        gpu_line,
    ),
}
"""The lines of the table in each page."""


def table(lines: Sequence[Line], results: Path = ROOT / "results") -> str:
    """Return a table in Markdown of what has been measured."""
    written = [line(results) for line in lines]
    return HEAD + "".join(f"| {line} |\n" for line in written if line)


def updated(page: str, new: str) -> str:
    """Return a page with another table between its two comments.

    Raises:
        ValueError: the page does not have both comments, once each.
    """
    if page.count(BEGIN) != 1 or page.count(END) != 1:
        raise ValueError("the page must have both comments, once each")
    before, _, rest = page.partition(BEGIN)
    return before + BEGIN + new + END + rest.partition(END)[2]


def outdated(results: Path = ROOT / "results") -> dict[Path, str]:
    """Return the new text of every page whose numbers differ from ``results``."""
    pages = {ROOT / name: updated((ROOT / name).read_text("utf-8"), table(of, results)) for name, of in LINES.items()}
    return {page: text for page, text in pages.items() if page.read_text("utf-8") != text}


def _range(values: Sequence[float]) -> str:
    least, most = times(min(values)), times(max(values))
    return least if least == most else f"{least} to {most}"


def main(arguments: Sequence[str] | None = None) -> None:
    """Write the pages, or with ``--check`` fail if one of them is out of date."""
    parser = argparse.ArgumentParser(prog="python -m tools.write_numbers", description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="change nothing, and fail if a number is out of date")
    changed = outdated()
    if not parser.parse_args(arguments).check:
        for page, text in changed.items():
            page.write_text(text, "utf-8")
    elif changed:
        sys.exit(f"out of date: {', '.join(page.name for page in changed)}; run `python -m tools.write_numbers`")


if __name__ == "__main__":
    main()
