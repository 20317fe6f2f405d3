"""The numbers in the README and the docs are those in ``results/``."""

import shutil

import pytest

from decinb.benchmark import latency
from decinb.benchmark.latency import Measurement, Timing
from tools import write_numbers

WHERE = {"device": "a CPU", "driver": None, "threads": 2, "date": "2100-01-01T00:00:00+00:00"}


def save(folder, name, timings, settings):
    timed = {work: {way: Timing(tuple(seconds)) for way, seconds in by_way.items()} for work, by_way in timings.items()}
    return latency.save(Measurement(timed, settings, WHERE), folder, name)


def test_the_pages_hold_the_numbers_of_results():
    assert not write_numbers.outdated(), "run `python -m tools.write_numbers`"
    write_numbers.main(["--check"])


def test_a_newer_measurement_makes_the_pages_out_of_date(tmp_path):
    shutil.copytree(write_numbers.ROOT / "results", tmp_path / "results")
    save(
        tmp_path / "results",
        "benchmark",
        {"guidance": {"one by one": [30.0, 30.0], "packed": [2.0, 3.0]}},
        {"model": "tiny"},
    )
    changed = write_numbers.outdated(tmp_path / "results")
    assert {page.name for page in changed} == {"README.md", "speed.md"}
    assert all("times faster: 12 for 7 guidance scales |" in text for text in changed.values())


def test_every_line_is_written_from_its_measurement(tmp_path):
    ways = {
        f"{way}, {runtime}": [seconds]
        for runtime, a, b in (("torch", 6.0, 3.0), ("openvino", 3.0, 2.0))
        for way, seconds in (("one by one", a), ("packed", b))
    }
    save(tmp_path, "runtimes", {"one call": ways, "guidance": ways}, {"model": "tiny"})
    assert "`openvino`: one image 2.0 times faster, 3.0 times for packed" in write_numbers.runtime_line(tmp_path)
    rates = {"threads adapt": [1 / 150], "all threads": [1 / 8]}
    save(tmp_path, "neighbours", {"0 busy": rates, "1 busy": rates}, {"model": "tiny"})
    assert "quiet 150 (8 with fixed threads); beside 1 busy 150" in write_numbers.neighbours_line(tmp_path)
    save(tmp_path, "first-image", {"import torch": {"torch": [1.0]}, "total": {"torch": [4.0]}}, {"model": "tiny"})
    assert "4.0 s: import torch 1.0 |" in write_numbers.first_image_line(tmp_path)
    save(tmp_path, "playground", {"preview": {"torch": [0.15]}, "image": {"torch": [1.4]}}, {"model": "tiny"})
    assert "| PyTorch: first preview 150 ms, image 1.4 s |" in write_numbers.playground_line(tmp_path)


def test_what_was_not_measured_has_no_line(tmp_path):
    lines = [line for of in write_numbers.LINES.values() for line in of]
    assert [line(tmp_path) for line in lines] == [None] * len(lines)
    assert write_numbers.table(lines, tmp_path) == write_numbers.HEAD


def test_a_page_without_its_comments_is_refused():
    with pytest.raises(ValueError, match="both comments"):
        write_numbers.updated("a page", "")
