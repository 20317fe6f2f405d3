"""Every test runs on the bundled model, without a network, on the package of this checkout."""

import os
from importlib.metadata import Distribution
from pathlib import Path

os.environ["DECINB_MODEL"] = "tiny"  # reaches the notebooks' kernels too
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("DECINB_TRAIN_MINUTES", "0.2")  # notebook 07 takes five where it is read
os.environ.setdefault("MPLBACKEND", "agg")

import pytest

import decinb
from tests.helpers.guarantees import Seen

ROOT = Path(__file__).parents[1]


def pytest_sessionstart() -> None:
    """The kernels of the notebooks import what is installed: that must be what is tested here."""
    Distribution.from_name("decinb")
    assert Path(decinb.__file__).parent == ROOT / "decinb", "run `pip install -e .` in this checkout first"


_seen = Seen()


@pytest.fixture
def happened():
    """Tells of one of the promised cases: ``happened("E1", str(error))``."""
    return _seen.happened


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    if exitstatus == pytest.ExitCode.OK:
        _seen.write()


@pytest.fixture(scope="session")
def tiny() -> decinb.DeciDiffusionImg2ImgPipeline:
    pipe = decinb.load_pipeline("tiny", device="cpu")
    pipe.set_progress_bar_config(disable=True)
    return pipe
