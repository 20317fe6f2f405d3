"""The script that measures how fast a model is loaded, on a small one."""

import importlib.util
import sys
from pathlib import Path

import pytest

from decinb.benchmark import latency
from tests.helpers.small import small_nas, small_sd, small_text_encoder, small_vae

SCRIPT = Path(__file__).parents[2] / "docs" / "measure_loading.py"


@pytest.mark.skipif(sys.platform != "linux", reason="memory is read from /proc")
def test_command_line(tmp_path, monkeypatch, capsys):
    specification = importlib.util.spec_from_file_location("measure_loading", SCRIPT)
    script = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(script)
    for name, build in {
        "flexible_unet": small_nas,
        "vae": small_vae,
        "text_encoder": small_text_encoder,
        "ordinary_unet": small_sd,
    }.items():
        monkeypatch.setitem(script.NETWORKS, name, build)
    script.main(["--rounds", "1", "--warmup", "0", "--folder", str(tmp_path)])
    *_, last = capsys.readouterr().out.splitlines()
    timings = latency.load(Path(last.removeprefix("written to "))).timings
    assert {work: list(by_name) for work, by_name in timings.items()} == {
        "load": ["load_pipeline", "the guide's way"],
        "import": ["diffusers", "diffusers and decinb"],
    }
