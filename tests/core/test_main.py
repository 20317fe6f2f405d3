"""``python -m decinb``: what a bug report needs, without secrets, paths or names."""

import os
import socket
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

import decinb
from tests.helpers.fake_hub import FakeHub

SECRETS = {
    "HF_TOKEN": "hf_abcdefghijklmnop",
    "HF_HUB_TOKEN_NUMBER": "4711",
    "HOME": "/home/grace-hopper",
    "USER": "grace-hopper",
    "LOGNAME": "grace-hopper",
    "HF_HOME": "/home/grace-hopper/cache",
    "DECINB_MODEL": "/home/grace-hopper/model",
}


@pytest.mark.slow
def test_the_report_has_no_secrets():
    hub = FakeHub({})
    package = Path(decinb.__file__).parents[1]
    settings = {**SECRETS, "HF_ENDPOINT": hub.url, "HF_HUB_ETAG_TIMEOUT": "2", "PYTHONPATH": str(package)}
    ours = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    run = subprocess.run(
        [sys.executable, "-m", "decinb"], env={**ours, **settings}, capture_output=True, text=True, timeout=120
    )
    hub.stop()
    assert run.returncode == 0, run.stderr
    lines = dict(line.split(": ", 1) for line in run.stdout.splitlines())
    assert lines["torch"] == version("torch") and lines["diffusers"] == version("diffusers")
    assert {"python", "decinb", "device", "memory", "threads", "dtype"} <= lines.keys()
    assert lines["model tiny"] == "bundled" and lines["model decidiffusion-v1-0"] == "not cached"
    assert lines["HF_TOKEN"] == lines["HF_HOME"] == lines["DECINB_MODEL"] == lines["HF_ENDPOINT"] == "set"
    assert lines["HF_HUB_TOKEN_NUMBER"] == "set", "a number can be a secret"
    assert lines["HF_HUB_ETAG_TIMEOUT"] == "2"
    for secret in [*SECRETS.values(), "grace", "127.0.0.1", str(package)]:
        assert secret not in run.stdout
    if len(socket.gethostname()) > 3:
        assert socket.gethostname() not in run.stdout
    assert not hub.requests, "the report made a request"
