"""Fewer threads beside busy processes, and all threads again when these have gone.

A machine with a clock of its own stands for the processor, so that nothing depends on how busy this one is.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import decinb
from decinb.utils.threads import SECONDS, SPINS, SWITCH, ThreadChooser, adapt_threads

# Rows a second on two cores with 0, 1 and 2 busy processes beside, as measured on `tiny`, by the number of threads.
TWO_CORES = {2: (157, 43, 55), 1: (102, 102, 69)}


class Machine:
    """A processor whose calls take as long as a table says, with ``busy`` other processes."""

    def __init__(self, rates: dict[int, tuple[float, ...]], cores: int = 2):
        self.rates, self.cores = rates, cores
        self.threads, self.busy, self.now, self.cpu, self.rows = max(rates), 0, 0.0, 0.0, 0
        self.set_to: list[int] = []
        self.chooser = ThreadChooser(lambda: self.threads, self.set, lambda: self.now, lambda: self.cpu)

    def set(self, threads: int) -> None:
        self.threads = threads
        self.set_to.append(threads)

    def call(self, rows: int = 14, work: str = "") -> None:
        self.chooser.before((rows, work))
        seconds = rows / self.rates[self.threads][self.busy]
        self.now += seconds
        self.cpu += seconds * self.threads * min(1, self.cores / (self.threads + self.busy))
        self.rows += rows
        self.chooser.after((rows, work))

    def run(self, seconds: float) -> float:
        """Make calls for some time, and return the rows a second."""
        began, before = self.now, self.rows
        while self.now < began + seconds:
            self.call()
        return (self.rows - before) / (self.now - began)


def test_a_quiet_machine_uses_all_threads_and_never_looks():
    machine = Machine(TWO_CORES)
    machine.run(60)
    assert machine.set_to == []


@pytest.mark.parametrize("busy", [1, 2])
def test_a_busy_machine_costs_little_more_than_its_share(busy):
    machine = Machine(TWO_CORES)
    machine.busy = busy
    wanted = 0.8 * 102 if busy == 1 else 0.8 * 157 / 2
    assert machine.run(20) > wanted


def test_threads_follow_what_comes_and_goes():
    machine = Machine(TWO_CORES)
    machine.run(5)
    machine.busy = 1
    machine.run(3)
    assert machine.threads == 1
    machine.busy = 0
    machine.run(3 * SECONDS)
    assert machine.threads == 2
    machine.busy = 2
    machine.run(3)
    assert machine.threads == 1


def test_many_cores_give_up_one_at_first_and_more_only_if_that_helps():
    rates = {16: (160, 80), 15: (150, 150), 8: (100, 100), 1: (15, 15)}
    machine = Machine(rates, cores=16)
    machine.busy = 1
    machine.run(20)
    assert machine.threads == 15 and 1 not in machine.set_to


def test_a_look_that_costs_much_is_rare():
    machine = Machine({2: (157, 0.6), 1: (102, 26)})  # beside several busy processes
    machine.threads, machine.busy = 2, 1
    assert machine.run(600) > 0.8 * 26


def test_calls_of_another_shape_are_not_compared():
    machine = Machine(TWO_CORES)
    machine.busy = 1
    for i in range(100):
        machine.call(rows=2 + 12 * (i % 2))
    assert machine.set_to == []


def test_a_number_that_the_user_sets_is_the_most():
    machine = Machine({4: (200, 100, 90), 3: (180, 90, 80), **TWO_CORES}, cores=4)
    machine.run(1)
    machine.threads = 2  # as by torch.set_num_threads(2)
    machine.busy = 1
    machine.cores = 2
    machine.run(20)
    assert set(machine.set_to) <= {1, 2}
    machine.busy = 0
    machine.run(20)
    assert machine.threads == 2
    machine.threads, machine.set_to = 1, []
    machine.busy = 1
    machine.run(20)
    assert machine.set_to == []


def test_a_call_that_fails_does_no_harm():
    machine = Machine(TWO_CORES)
    machine.chooser.before("fails")
    machine.busy = 1
    assert machine.run(20) > 0.8 * 102


def test_the_hooks_time_the_calls_of_a_network(monkeypatch):
    monkeypatch.delenv(SWITCH, raising=False)
    network = nn.Linear(2, 2)
    adapt_threads(network)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        with torch.no_grad():
            plain = nn.functional.linear(torch.ones(1, 2), network.weight, network.bias)
            for _ in range(3):
                assert torch.equal(network(torch.ones(1, 2)), plain)
        assert torch.get_num_threads() in (1, 2)
    finally:
        torch.set_num_threads(before)


def test_threads_can_be_left_alone(monkeypatch):
    monkeypatch.setenv(SWITCH, "1")
    network = nn.Linear(2, 2)
    adapt_threads(network)
    assert not network._forward_hooks and not network._forward_pre_hooks


def test_pipelines_adapt_on_the_cpu(monkeypatch):
    monkeypatch.delenv(SWITCH, raising=False)
    pipe = decinb.load_pipeline("tiny", "cpu")
    assert len(pipe.unet._forward_pre_hooks) == len(pipe.unet._forward_hooks) == 1


def test_the_makefile_sets_the_same_bound_for_notebooks():
    makefile = (Path(__file__).parents[2] / "Makefile").read_text()
    assert f"export GOMP_SPINCOUNT ?= {SPINS}\n" in makefile


@pytest.mark.parametrize(
    ("setting", "expected"),
    [
        ({}, str(SPINS)),
        ({"GOMP_SPINCOUNT": "5"}, "5"),
        ({"OMP_WAIT_POLICY": "PASSIVE"}, "None"),
        ({SWITCH: "1"}, "None"),
    ],
)
def test_spinning_is_bounded_unless_the_user_has_chosen(setting, expected):
    names = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY", SWITCH)
    ours = {name: value for name, value in os.environ.items() if name not in names}
    code = "import os, decinb; print(os.environ.get('GOMP_SPINCOUNT'))"
    run = subprocess.run([sys.executable, "-c", code], env={**ours, **setting}, capture_output=True, text=True)
    assert run.stdout.strip() == expected, run.stderr
    late = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.modules['torch'] = sys\n{code}"],
        env=ours,
        capture_output=True,
        text=True,
    )
    assert late.stdout.strip() == "None", "too late, since torch has been loaded"
