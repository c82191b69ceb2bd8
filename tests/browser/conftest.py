"""A headless Chromium, and a JupyterLab to point it at."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

TOKEN = "a-token-for-tests"


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """Chromium through playwright; skips, with the reason, where either is missing.

    Not for the session: while it lives, an event loop runs in this thread, and no other test could start one.
    """
    playwright = pytest.importorskip("playwright.sync_api", reason="browser tests need playwright (extra dev)")
    chromium = shutil.which("chromium")
    if chromium is None:
        pytest.skip("browser tests need a chromium on the PATH, and there is none")
    arguments = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]
    with playwright.sync_playwright() as driver:
        running = driver.chromium.launch(executable_path=chromium, args=arguments)
        yield running
        running.close()


@pytest.fixture
def page(browser: Any) -> Iterator[Any]:
    context = browser.new_context(viewport={"width": 1280, "height": 800})
    yield context.new_page()
    context.close()


@dataclass(frozen=True)
class JupyterLab:
    """A running server: `url` of a notebook in its root folder."""

    port: int
    root: Path

    def url(self, notebook: str) -> str:
        return f"http://127.0.0.1:{self.port}/lab/tree/{notebook}?token={TOKEN}"


@pytest.fixture
def page_of_its_own(tmp_path: Path) -> Iterator[Callable[..., str]]:
    """Serves the workbench by its command: given the command's options, the page's URL."""
    pytest.importorskip("voila", reason="the stand-alone page needs voila (extra notebooks)")
    servers = []

    def start(*options: str) -> str:
        port = _free_port()
        names = ("JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR", "JUPYTER_RUNTIME_DIR", "IPYTHONDIR")
        environment = os.environ | {name: str(tmp_path / name.lower()) for name in names}
        with (tmp_path / "voila.log").open("w") as log:
            command = [sys.executable, "-m", "fastvl_lab.view.workbench", f"--port={port}", "--no-browser", *options]
            servers.append(subprocess.Popen(command, env=environment, stdout=log, stderr=log, cwd=tmp_path))
        _wait_for(f"http://127.0.0.1:{port}/voila/static/voila.js")
        return f"http://127.0.0.1:{port}/"

    yield start
    for server in servers:
        server.terminate()
        server.wait(20)


@pytest.fixture
def jupyterlab(tmp_path: Path) -> Iterator[JupyterLab]:
    """JupyterLab with its own configuration and root folder; news and update pop-ups are off."""
    root, home = tmp_path / "root", tmp_path / "jupyter"
    root.mkdir()
    names = ("JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR", "JUPYTER_RUNTIME_DIR", "JUPYTERLAB_WORKSPACES_DIR", "IPYTHONDIR")
    environment = os.environ | {name: str(home / name.lower()) for name in names}
    settings = home / "jupyter_config_dir" / "lab" / "user-settings" / "@jupyterlab" / "apputils-extension"
    settings.mkdir(parents=True)
    quiet = {"fetchNews": "false", "checkForUpdates": False}
    (settings / "notification.jupyterlab-settings").write_text(json.dumps(quiet))
    port = _free_port()
    options = [f"--ServerApp.port={port}", f"--ServerApp.root_dir={root}", f"--IdentityProvider.token={TOKEN}", "--no-browser"]
    options += ["--LabApp.expose_app_in_browser=True", "--ServerApp.allow_root=True", "--ServerApp.ip=127.0.0.1"]
    with (tmp_path / "server.log").open("w") as log:
        server = subprocess.Popen([sys.executable, "-m", "jupyterlab", *options], env=environment, stdout=log, stderr=log)
        try:
            _wait_for(f"http://127.0.0.1:{port}/api/status?token={TOKEN}")
            yield JupyterLab(port, root)
        finally:
            server.terminate()
            server.wait(20)


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
        return port


def _wait_for(url: str) -> None:
    """Until a server answers."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        try:
            urllib.request.urlopen(url, timeout=5).close()
        except (urllib.error.URLError, ConnectionError, TimeoutError):
            time.sleep(0.3)
        else:
            return
    raise TimeoutError(f"no answer from {url}")
