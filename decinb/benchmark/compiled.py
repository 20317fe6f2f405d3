"""Compare U-Nets as they are with compiled ones, and count what the first call costs."""

import time
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import nn

from decinb.benchmark.counting import NETWORKS, random_model
from decinb.benchmark.latency import Measurement, Timing, measure, ratio, unet_call
from decinb.errors import InputError
from decinb.utils.acceleration import compile_network, has_compiler, keep_freed_memory, uncompile_network
from decinb.utils.device import choose_workload
from decinb.utils.environment import environment

EAGER, COMPILED, GRAPHS = "eager", "compiled", "CUDA graphs"
MODES: dict[str, str | None] = {EAGER: None, COMPILED: "default", GRAPHS: "reduce-overhead"}
"""The mode of ``torch.compile`` of each way to run a network."""


def modes_of(device: torch.device) -> list[str]:
    """Return the ways to run a network that a device has: graphs need CUDA, and compiling for the CPU a compiler."""
    if device.type == "cuda":
        return list(MODES)
    return [EAGER, COMPILED] if device.type == "cpu" and has_compiler() else [EAGER]


def compare(
    device: torch.device | str | None = None,
    dtype: torch.dtype | str | None = None,
    size: int | None = None,
    repeats: int = 4,
    rows: int = 2,
    networks: Mapping[str, Callable[[], nn.Module]] = NETWORKS,
    modes: Sequence[str] | None = None,
) -> Measurement:
    """Time calls of U-Nets with random weights in every mode, in turns.

    Args:
        device, dtype, size: as for ``decinb.benchmark.latency.compare``.
        repeats: how often each call is timed; an even number is fairer.
        rows: of a call; a guided step has two.
        networks: functions that build the U-Nets, by name.
        modes: keys of ``MODES``, ``EAGER`` first; None takes all that the device has.

    Returns:
        Times as ``timings[network][mode]``; the seconds of the first call, with the compilation, as
        ``settings["first"][network][mode]``.

    Raises:
        InputError: ``repeats`` or ``rows`` is below 1, or there is no such mode on this device.
    """
    device, dtype, size = choose_workload(device, dtype, size)
    available = modes_of(device)
    names = available if modes is None else list(modes)
    if repeats < 1 or rows < 1:
        raise InputError(f"repeats and rows must be at least 1, got {repeats} and {rows}")
    if names[:1] != [EAGER] or not set(names) <= set(available):
        raise InputError(f"modes must be {EAGER!r} and others of {available} on {device.type}, got {names}")
    where = environment(device, dtype)
    if device.type == "cpu":
        keep_freed_memory()
    timings: dict[str, dict[str, Timing]] = {}
    first: dict[str, dict[str, float]] = {}
    for name, build in networks.items():
        unet = random_model(build, device, dtype)
        call = unet_call(unet, rows, size)

        def switch(mode: str, unet: nn.Module = unet) -> None:
            uncompile_network(unet)
            if MODES[mode] is not None:
                compile_network(unet, MODES[mode])

        first[name] = {}
        for mode in names:
            switch(mode)
            started = time.perf_counter()
            float(call().flatten()[0])  # waits for a GPU
            first[name][mode] = time.perf_counter() - started
        timings[name] = measure(dict.fromkeys(names, call), repeats, warmup=1, prepare=switch)
        uncompile_network(unet)
    return Measurement(timings, {"size": size, "rows": rows, "repeats": repeats, "first": first}, where)


def calls_to_pay_back(measurement: Measurement, network: str, mode: str) -> float:
    """Return after how many calls a mode has saved the time of its first call; infinite if it saves none."""
    timings, first = measurement.timings[network], measurement.settings["first"][network]
    saved = timings[EAGER].median - timings[mode].median
    return (first[mode] - timings[mode].median) / saved if saved > 0 else float("inf")


def table(measurement: Measurement) -> str:
    """Return what ``compare`` measured as text: a line for each network and mode."""
    where, settings = measurement.environment, measurement.settings
    lines = [
        f"{where['device']}, {where['dtype']}, threads {where['threads']}, load {where['load']}; "
        f"{settings['rows']} rows, latent {settings['size']}",
        f"{'U-Net':12}{'mode':14}{'first call s':>13}{'median s':>10}{'faster':>8}{'paid back after':>17}",
    ]
    for network, timings in measurement.timings.items():
        for mode, timing in timings.items():
            calls = calls_to_pay_back(measurement, network, mode)
            paid = "" if mode == EAGER else "never" if calls == float("inf") else f"{calls:.0f} calls"
            lines.append(
                f"{network:12}{mode:14}{settings['first'][network][mode]:13.2f}{timing.median:10.4f}"
                f"{ratio(timings[EAGER], timing)[1]:8.2f}{paid:>17}"
            )
    return "\n".join(lines)
