"""Every test runs on the bundled model, without a network, on the package of this checkout."""

import copy
import os
from dataclasses import replace
from importlib.metadata import Distribution
from pathlib import Path
from typing import TYPE_CHECKING

os.environ["DECINB_MODEL"] = "tiny"  # reaches the notebooks' kernels too
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("DECINB_TRAIN_MINUTES", "0.2")  # notebook 07 takes five where it is read
os.environ.setdefault("DECINB_COUNT", "3")  # images for each number that the notebooks measure; 32 where they are read
os.environ.setdefault("DECINB_MAX_ROWS", "2")  # of the U-Net calls that notebook 06 times
os.environ.setdefault("DECINB_SIZE", "16")  # of the latents in these calls
os.environ.setdefault("DECINB_STEPS", "2")  # of the images that notebook 12 times
os.environ.setdefault("MPLBACKEND", "agg")
if workers := os.environ.get("PYTEST_XDIST_WORKER_COUNT"):
    # Workers share the processors. torch reads this when it is imported, here and in the notebooks' kernels.
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // int(workers))))

import pytest

import decinb
from tests.helpers.browser import MISSING
from tests.helpers.guarantees import Observed

if TYPE_CHECKING:
    from decinb.pipeline import DeciDiffusionImg2ImgPipeline

ROOT = Path(__file__).parents[1]


def pytest_sessionstart() -> None:
    """Check that the notebooks' kernels, which import the installed package, get the package of this checkout."""
    Distribution.from_name("decinb")
    assert Path(decinb.__file__).parent == ROOT / "decinb", "run `pip install -e .` in this checkout first"


_observed = Observed()


@pytest.fixture
def happened(request: pytest.FixtureRequest):
    """Record the outcome of one of the guaranteed cases: ``happened("E1", str(error))``."""

    def record(case: str, outcome: str) -> None:
        _observed.record(case, outcome, request.node.nodeid)

    return record


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    """Write the table of the guarantees, or, in a worker of pytest-xdist, hand what was seen to the main process."""
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["observed"] = _observed.outcomes
    elif exitstatus == pytest.ExitCode.OK:
        _observed.write()


def pytest_terminal_summary(terminalreporter) -> None:
    """Say in one line which tests of pages were skipped, and how to get them."""
    reasons = [report.longrepr[2].removeprefix("Skipped: ") for report in terminalreporter.stats.get("skipped", [])]
    for missing in MISSING:
        if count := reasons.count(missing):
            terminalreporter.write_line(f"{count} browser tests were skipped: {missing}")


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node) -> None:
    """Gather what a worker of pytest-xdist has seen."""
    _observed.outcomes += getattr(node, "workeroutput", {}).get("observed", [])


@pytest.fixture
def tiny_lcm(tiny, tmp_path, monkeypatch) -> "DeciDiffusionImg2ImgPipeline":
    """``tiny-lcm`` before its training: the U-Net of ``tiny`` with the student's scheduler."""
    from decinb.models import MODELS
    from decinb.tiny import train_lcm

    folder = train_lcm.save(tmp_path / "lcm", copy.deepcopy(tiny.unet))
    monkeypatch.setitem(MODELS, "tiny-lcm", replace(MODELS["tiny-lcm"], source=folder))
    pipe = decinb.load_pipeline("tiny-lcm", device="cpu")
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="session")
def tiny() -> "DeciDiffusionImg2ImgPipeline":
    pipe = decinb.load_pipeline("tiny", device="cpu")
    pipe.set_progress_bar_config(disable=True)
    return pipe
