"""A Python process of its own for tests of what only a fresh process shows: its cache, its hub, its environment."""

import json
import os
import subprocess
import sys
from pathlib import Path

import decinb
from tests.helpers.fake_hub import FakeHub

WAIT_S = 2  # how long the child waits for a silent hub

CHILD = """
import contextlib, io, json, sys, warnings
import huggingface_hub, torch, decinb
from decinb.loading import _find
from decinb.models import IMAGE_TO_IMAGE, MODELS, Model
from tests.helpers.fake_hub import digest

answers, sys.stdout = sys.stdout, io.StringIO()
for line in sys.stdin:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            answer = {"value": eval(json.loads(line))}
        except Exception as error:
            answer = {"error": type(error).__name__, "message": str(error)}
    answer["warnings"] = [str(warning.message) for warning in caught]
    print(json.dumps(answer), file=answers, flush=True)
"""


class Child:
    """A fresh Python process with its own hub and cache. It evaluates one line of code after another."""

    def __init__(self, hub: FakeHub, cache: Path, **env: str):
        ours = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "DECINB_"))}
        settings = {
            "HF_ENDPOINT": hub.url,
            "HF_HOME": str(cache),
            "HF_HUB_ETAG_TIMEOUT": str(WAIT_S),
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "NO_PROXY": "127.0.0.1",
            "PYTHONPATH": str(Path(decinb.__file__).parents[1]),
        }
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        self.process = subprocess.Popen([sys.executable, "-c", CHILD], env={**ours, **settings, **env}, **pipes)

    def ask(self, code: str) -> dict:
        """Evaluate a line and return its ``value``, or ``error`` and ``message``, and its ``warnings``."""
        self.process.stdin.write(json.dumps(code) + "\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        assert line, "the child process died"
        return json.loads(line)

    def load(self, model: str, **options: object) -> dict:
        """Load a model and return the digest of its weights as ``value``."""
        return self.ask(f"digest(decinb.load_pipeline({model!r}, device='cpu', **{options!r}))")

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait()
