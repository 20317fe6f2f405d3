"""Describe the machine and the software that a result depends on. No host names, user names or paths."""

import os
import platform
import re
import subprocess
import sys
import warnings
from collections.abc import Iterable
from datetime import UTC, datetime
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import nn

OLDEST_DRIVERS = {13: 580, 12: 525, 11: 450}  # NVIDIA's minimum for each major version of CUDA
TORCH_BUILDS = {  # by the oldest driver that runs them
    580: "torch==2.9.1 --index-url https://download.pytorch.org/whl/cu130",
    525: "torch==2.9.1 --index-url https://download.pytorch.org/whl/cu126",
    450: "torch==2.7.1 --index-url https://download.pytorch.org/whl/cu118",
}


def versions(packages: Iterable[str] = ("decinb", "diffusers", "torch")) -> dict[str, str]:
    """Return the installed versions of packages; by default of those that decide an image's pixels."""
    return {package: _version(package) for package in packages}


def environment(device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    """Return what a measured time depends on: device, driver, number format, threads, load, versions and date."""
    device = torch.device(device)
    return {
        "device": device_name(device),
        "driver": _driver() if device.type == "cuda" else None,
        "dtype": str(dtype).removeprefix("torch."),
        "threads": torch.get_num_threads(),
        "load": _load(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        **versions(("torch", "diffusers")),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def describe_pipeline(pipe: Any) -> dict[str, Any]:
    """Return the environment of a pipeline, with the number of parameters of each of its networks."""
    networks = {name: part for name, part in pipe.components.items() if isinstance(part, nn.Module)}
    return {
        **environment(pipe.device, pipe.dtype),
        **versions(["transformers"]),
        "parameters": {name: sum(weight.numel() for weight in part.parameters()) for name, part in networks.items()},
    }


def device_name(device: torch.device) -> str:
    """Return the model of a GPU or CPU, such as ``NVIDIA A10``."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type == "mps":
        return f"{platform.machine()} MPS"
    try:
        found = re.search(r"^model name\s*: (.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        found = None
    return found[1].strip() if found else platform.processor() or platform.machine()


def check_driver() -> None:
    """Print what to do if there is an NVIDIA driver, but torch cannot use it; print nothing otherwise."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's own words name no build
        usable = torch.cuda.is_available()
    if not usable and (advice := driver_advice(_driver(), torch.version.cuda)):
        print(advice)


def driver_advice(driver: str | None, cuda: str | None) -> str | None:
    """Return what to do if a driver is too old for a build of torch, or the build has no CUDA; None if all is well.

    Args:
        driver: the version of the NVIDIA driver; None if there is none.
        cuda: the version of CUDA that torch was built for; None if it was built for the CPU only.
    """
    found = re.match(r"\d+", driver or "")
    if not found:
        return None
    version = int(found[0])
    if cuda and version >= OLDEST_DRIVERS.get(int(cuda.partition(".")[0]), 0):
        return None
    build = next((build for oldest, build in TORCH_BUILDS.items() if version >= oldest), None)
    is_for = f"needs a newer NVIDIA driver than {driver}" if cuda else "was built without CUDA"
    return f"torch {torch.__version__} {is_for}, so the notebook runs on the CPU. " + (
        f"To use the GPU, run `%pip install {build}`, restart the kernel, and run all cells again."
        if build
        else "To use the GPU, update the driver."
    )


def in_notebook() -> bool:
    """Return whether images can be shown in a notebook."""
    ipython = sys.modules.get("IPython")  # a notebook has imported it already
    shell = ipython.get_ipython() if ipython else None
    return hasattr(shell, "kernel")


_installed_version = cache(version)  # reading it takes milliseconds; a missing package is looked for again


def _version(package: str) -> str:
    try:
        return _installed_version(package)
    except PackageNotFoundError:
        return "not installed"


def _load() -> float | None:
    """Return the processes that wanted a core over the last minute: near 0 on a quiet machine, None on Windows."""
    return round(os.getloadavg()[0], 1) if hasattr(os, "getloadavg") else None


def _driver() -> str | None:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        output = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return None
    return output.split("\n")[0].strip()
