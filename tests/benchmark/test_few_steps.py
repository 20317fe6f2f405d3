"""The comparison of packed sweeps of model and student, on a few images."""

from pathlib import Path

import pytest

from decinb import InputError
from decinb.benchmark import __main__ as command_line
from decinb.benchmark import few_steps, latency


def test_sweeps_of_both_are_counted_and_timed_in_turns(tiny, tiny_lcm):
    designs = {"two": [{"strength": 1.0}, {"strength": 0.5, "seed": 1}]}
    found = few_steps.compare(tiny, tiny_lcm, designs, rounds=2)
    counted = found.settings["designs"]["two"]
    assert counted[few_steps.TEACHER] == {"calls": 20, "rows": 2 * (20 + 10)}
    assert counted[few_steps.STUDENT] == {"calls": 4, "rows": 4 + 2}
    assert {len(timing.seconds) for timing in found.timings["two"].values()} == {2}
    assert "times faster" in few_steps.table(found)


def test_the_command_line_writes_what_the_package_reads(tiny_lcm, tmp_path, capsys):
    given = ["few-steps", "--rounds", "1", "--device", "cpu", "--designs", "one image", "--folder", str(tmp_path)]
    command_line.main(given)
    *_, last = capsys.readouterr().out.splitlines()
    assert list(latency.load(Path(last.removeprefix("written to "))).timings) == ["one image"]


def test_rounds_must_be_positive(tiny, tiny_lcm):
    with pytest.raises(InputError, match="rounds must be at least 1, got 0"):
        few_steps.compare(tiny, tiny_lcm, rounds=0)
