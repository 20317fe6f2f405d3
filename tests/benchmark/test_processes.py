"""What is measured in fresh processes: sweeps beside busy processes, and the time to the first image."""

import json
from functools import partial
from pathlib import Path

import psutil
import pytest

from decinb import InputError
from decinb.benchmark import __main__ as command_line
from decinb.benchmark import first_image, latency, neighbours, packing, playground
from decinb.benchmark.processes import in_turns, run_fresh
from decinb.designs import grid


def test_functions_take_turns_and_the_warm_up_is_left_out():
    seen = []
    results = in_turns(["A", "B"], lambda name: seen.append(name) or len(seen), rounds=2, warmup=1)
    assert "".join(seen) == "BAABBA" and results == {"A": [3, 6], "B": [4, 5]}


def test_a_fresh_process_gets_only_the_settings_of_threads_that_are_given(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    code = "import json, os, sys; print('a line'); print(json.dumps([sys.argv[1], os.environ.get('OMP_NUM_THREADS')]))"
    assert run_fresh(code, "x") == ["x", "7"]
    assert run_fresh(code, "x", env={}) == ["x", None]
    assert run_fresh(code, "x", env={"OMP_NUM_THREADS": "2"}) == ["x", "2"]


def test_busy_processes_end_with_the_block():
    def children() -> int:
        return sum(child.cmdline()[-1:] == [neighbours.BUSY] for child in psutil.Process().children())

    with pytest.raises(KeyError), neighbours.busy_processes(2):
        assert children() == 2
        raise KeyError
    assert children() == 0


def test_the_rate_of_a_sweep_is_measured(monkeypatch):
    monkeypatch.setitem(packing.DESIGNS, "guidance", grid(guidance_scale=[1.0], num_inference_steps=[2]))
    assert 0 < json.loads(neighbours.rate("torch", 0.0)) < 1e5


@pytest.mark.slow
def test_command_lines_write_what_they_measure(tmp_path, monkeypatch, capsys):
    def written(*arguments: str) -> latency.Measurement:
        command_line.main([*arguments, "--rounds", "1", "--folder", str(tmp_path)])
        *table, last = capsys.readouterr().out.splitlines()
        assert len(table) >= 3
        return latency.load(Path(last.removeprefix("written to ")))

    monkeypatch.setattr(neighbours, "WAYS", {"one thread": {"OMP_NUM_THREADS": "1"}})
    monkeypatch.setattr(command_line, "is_installed", lambda: False)
    found = written("neighbours", "--busy", "1", "--seconds", "0")
    assert list(found.timings) == ["1 busy"] and list(found.timings["1 busy"]) == ["one thread"]
    monkeypatch.setattr(
        command_line.first_image, "in_turns", lambda names, run, rounds, warmup: in_turns(names, run, 1)
    )
    found = written("first-image")
    assert list(found.timings) == [*first_image.PARTS, first_image.TOTAL]
    parts = sum(found.timings[part]["torch"].median for part in first_image.PARTS)
    assert found.timings[first_image.TOTAL]["torch"].median == pytest.approx(parts)
    monkeypatch.setattr(playground, "measure_playground", partial(playground.measure_playground, clicks=2))
    found = written("playground")
    assert list(found.timings) == list(playground.PARTS)
    for preview, image in (playground.PARTS[:2], playground.PARTS[2:]):
        assert found.timings[preview]["torch"].slowest < found.timings[image]["torch"].fastest


def test_bad_arguments_are_refused():
    with pytest.raises(InputError, match="ways must be of threads adapt, .* got 'magic'"):
        neighbours.compare(ways=["magic"])
    with pytest.raises(InputError, match="rounds must be at least 1 and busy at least 0, got 0"):
        neighbours.compare(rounds=0)
    with pytest.raises(InputError, match="runtimes must be one of .*, got 'magic'"):
        first_image.measure_first_image(["magic"])
    with pytest.raises(InputError, match="rounds must be at least 1"):
        first_image.measure_first_image(rounds=0)
    with pytest.raises(InputError, match="runtimes must be one of .*, got 'magic'"):
        playground.measure_playground(["magic"])
    with pytest.raises(InputError, match="clicks at least 2, got 4 and 1"):
        playground.measure_playground(clicks=1)
