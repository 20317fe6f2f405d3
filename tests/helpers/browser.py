"""A real browser, and real Jupyter servers for it: JupyterLab, and the versions that Colab has."""

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NoReturn
from urllib.request import urlopen

import nbformat
import pytest

ROOT = Path(__file__).parents[2]
SHOTS = ROOT / "runs" / "browser"
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
NO_CHROMIUM = "no Chromium; to run them: apt-get install chromium"
NO_PLAYWRIGHT = "no playwright; to run them: pip install playwright"
NO_LAB = "no JupyterLab; to run them: pip install jupyterlab"
NO_CLASSIC = "no second Jupyter with the versions of Colab; to run them: make classic"
MISSING = (NO_CHROMIUM, NO_PLAYWRIGHT, NO_LAB, NO_CLASSIC)
TOKEN = "for-tests-only"
TIMEOUT = 240_000  # milliseconds
CLASSIC = ROOT / ".venv-classic" / "bin" / "python"  # `make classic` creates it


@contextmanager
def open_browser() -> Iterator[Any]:
    """Start Chromium, or skip the test if there is none."""
    if CHROMIUM is None:
        _skip(NO_CHROMIUM)
    if find_spec("playwright") is None:
        _skip(NO_PLAYWRIGHT)
    from playwright.sync_api import sync_playwright

    with sync_playwright() as running:
        chromium = running.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield chromium
        chromium.close()


def open_tab(browser: Any, **options: Any) -> Any:
    """Open a tab that waits long, because the machine may be busy."""
    context = browser.new_context(**options)
    context.set_default_timeout(TIMEOUT)
    context.set_default_navigation_timeout(TIMEOUT)
    return context.new_page()


class Jupyter:
    """A Jupyter server in a folder of its own, on the loopback.

    Args:
        python: of the environment that it is installed in.
        app: "lab" or "classic".
        folder: where the notebooks are.
    """

    def __init__(self, python: str | Path, app: str, folder: Path):
        self.app, self.folder = app, folder
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        main = "jupyterlab" if app == "lab" else "notebook"
        options = [
            f"--port={self.port}",
            "--ip=127.0.0.1",
            "--no-browser",
            "--allow-root",
            f"--{'IdentityProvider' if app == 'lab' else 'NotebookApp'}.token={TOKEN}",
            f"--{'ServerApp.root_dir' if app == 'lab' else 'NotebookApp.notebook_dir'}={folder}",
        ]
        share = [str(Path(sys.prefix) / "share" / "jupyter")]  # where the widgets' extension may be
        environment = {
            **os.environ,
            "PYTHONPATH": str(ROOT),
            "JUPYTER_CONFIG_DIR": str(folder / ".config"),
            "JUPYTER_DATA_DIR": str(folder / ".data"),
            "JUPYTER_RUNTIME_DIR": str(folder / ".runtime"),
            "IPYTHONDIR": str(folder / ".ipython"),
            **({"JUPYTER_PATH": os.pathsep.join(share)} if app == "lab" else {}),
        }
        config = folder / ".config" / "labconfig" / "page_config.json"  # no news over the page
        config.parent.mkdir(parents=True)
        config.write_text(json.dumps({"disabledExtensions": {"@jupyterlab/apputils-extension:announcements": True}}))
        self.log = folder / "server.log"
        self.process = subprocess.Popen(
            [str(python), "-m", main, *options],
            cwd=folder,
            env=environment,
            stdout=self.log.open("w"),
            stderr=subprocess.STDOUT,
        )
        try:
            self._wait()
        except BaseException:
            self.stop()
            raise

    def _wait(self) -> None:
        for _ in range(2400):
            if self.process.poll() is not None:
                raise RuntimeError(f"the server ended: {self.log.read_text()[-2000:]}")
            try:
                with urlopen(f"http://127.0.0.1:{self.port}/api?token={TOKEN}", timeout=1):
                    return
            except OSError:  # not listening yet
                time.sleep(0.25)
        raise RuntimeError(f"the server did not start: {self.log.read_text()[-2000:]}")

    def write(self, name: str, *sources: str) -> str:
        """Write a notebook with code cells, and return the address at which it opens."""
        cells = [nbformat.v4.new_code_cell(source) for source in sources]
        kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
        notebook = nbformat.v4.new_notebook(cells=cells, metadata={"kernelspec": kernel})
        nbformat.write(notebook, self.folder / name)
        place = "lab/tree" if self.app == "lab" else "notebooks"
        return f"http://127.0.0.1:{self.port}/{place}/{name}?token={TOKEN}"

    def stop(self) -> None:
        """End the server and its kernels."""
        self.process.terminate()
        try:
            self.process.wait(20)
        except subprocess.TimeoutExpired:
            self.process.kill()


def python_of(app: str) -> str | Path:
    """Return the Python of the environment of an app, or skip the test."""
    if app == "lab":
        if find_spec("jupyterlab") is None:
            _skip(NO_LAB)
        return sys.executable
    if not CLASSIC.exists():
        _skip(NO_CLASSIC)
    return CLASSIC


def _skip(reason: str) -> NoReturn:
    """Skip the test, or fail where a browser is required, as in `.ci/run`."""
    if os.environ.get("DECINB_REQUIRE_BROWSER"):
        pytest.fail(reason)
    pytest.skip(reason)


def run_all(tab: Any, app: str) -> None:
    """Run all cells of the notebook that is open, as soon as its kernel is ready."""
    if app == "lab":
        tab.locator(".jp-Notebook").wait_for()
        tab.locator(".jp-CodeCell").first.wait_for()
        tab.get_by_text(re.compile(r"Python 3.*\| Idle|Python 3.*Idle")).first.wait_for()
        tab.locator(".jp-CodeCell .cm-content").first.click()
        tab.get_by_role("menuitem", name="Run", exact=True).click()
        tab.get_by_text("Run All Cells", exact=True).click()
    else:
        tab.locator("#notebook-container .cell").first.wait_for()
        # Widgets that are made before their manager is there would never be shown.
        tab.wait_for_function(
            "window.Jupyter && Jupyter.notebook && Jupyter.notebook.kernel && Jupyter.notebook.kernel.is_connected() "
            "&& Jupyter.notebook.kernel.widget_manager"
        )
        tab.wait_for_function("Jupyter.notebook.kernel.info_reply.status === 'ok'")
        tab.evaluate("Jupyter.notebook.execute_all_cells()")
