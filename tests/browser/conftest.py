"""A headless Chromium, and a JupyterLab to point it at."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from jupyter_client import BlockingKernelClient
from ports import free_port

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


@pytest.fixture
def barriers(page: Any) -> Callable[..., list[str]]:
    """What keeps people out, by axe-core: a line for each element that it finds serious or critical, of the page or a part of it.

    It looks below the fold too, but not at what an SVG has drawn.
    """
    axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="needs axe-core (extra dev)").Axe()

    def found(within: str | None = None) -> list[str]:
        response = axe.run(page, within).response
        assert response["passes"], "axe has looked at nothing"
        return [
            f"{rule['id']}, {rule['impact']}: {node['failureSummary']} {node['html'][:160]}"
            for rule in response["violations"]
            if rule["impact"] in ("serious", "critical")
            for node in rule["nodes"]
        ]

    return found


@dataclass(frozen=True)
class JupyterLab:
    """A running server: `url` of a notebook in its root folder, in a workspace of no tab but that one."""

    port: int
    home: Path

    @property
    def root(self) -> Path:
        return self.home / "root"

    def url(self, notebook: str) -> str:
        return f"http://127.0.0.1:{self.port}/lab/tree/{notebook}?token={TOKEN}&reset"

    def ask(self, path: str, method: str = "GET") -> Any:
        """What the server's own interface answers."""
        url = f"http://127.0.0.1:{self.port}/api/{path}?token={TOKEN}"
        with urllib.request.urlopen(urllib.request.Request(url, method=method), timeout=20) as answer:
            return json.loads(answer.read() or b"null")

    def clear(self) -> None:
        """Empty the kernel of bench.ipynb for whoever opens it next: to start one and import takes a third of most tests.

        Every other kernel goes, and this one too where it does not answer.
        """
        for session in self.ask("sessions"):
            kernel = self.home / "jupyter_runtime_dir" / f"kernel-{session['kernel']['id']}.json"
            try:
                if session["path"] == "bench.ipynb":
                    executed(kernel, CLEAR, seconds=20)
                    continue
            except (RuntimeError, TimeoutError):
                pass
            self.ask(f"sessions/{session['id']}", "DELETE")


CLEAR = """
bench.close()
__import__("ipywidgets").Widget.close_all()
get_ipython().run_line_magic("reset", "-f")
"""


def executed(connection_file: Path, source: str, seconds: float) -> str:
    """What a running kernel prints as it executes the source. Raises RuntimeError where it fails, TimeoutError where it is late."""
    printed: list[str] = []

    def hear(message: Any) -> None:
        if message["msg_type"] == "stream":
            printed.append(message["content"]["text"])

    def ask() -> Any:
        client = BlockingKernelClient(connection_file=str(connection_file))
        client.load_connection_file()
        client.start_channels()
        try:
            client.wait_for_ready(timeout=seconds)
            return client.execute_interactive(source, store_history=False, timeout=seconds, output_hook=hear)["content"]
        finally:
            client.stop_channels()

    with ThreadPoolExecutor(1) as thread:  # playwright's loop runs in this one
        answer = thread.submit(ask).result()
    if answer["status"] != "ok":
        raise RuntimeError(f"{answer['ename']}: {answer['evalue']}")
    return "".join(printed)


@pytest.fixture
def in_kernel() -> Callable[..., str]:
    return executed


@pytest.fixture
def page_of_its_own(tmp_path: Path) -> Iterator[Callable[..., str]]:
    """Serves the workbench by its command: given the command's options, the page's URL."""
    pytest.importorskip("voila", reason="the stand-alone page needs voila (extra notebooks)")
    servers = []

    def start(*options: str) -> str:
        port = free_port()
        names = ("JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR", "JUPYTER_RUNTIME_DIR", "IPYTHONDIR")
        environment = os.environ | {name: str(tmp_path / name.lower()) for name in names}
        with (tmp_path / "voila.log").open("w") as log:
            command = [sys.executable, "-m", "fastvl_lab.view.workbench", f"--port={port}", "--no-browser"]
            command += [f"--Voila.connection_dir_root={tmp_path}", *options]
            servers.append(subprocess.Popen(command, env=environment, stdout=log, stderr=log, cwd=tmp_path))
        _wait_for(f"http://127.0.0.1:{port}/voila/static/voila.js")
        return f"http://127.0.0.1:{port}/"

    yield start
    for server in servers:
        server.terminate()
    for server in servers:
        server.wait(20)


@pytest.fixture(scope="session")
def running_jupyterlab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[JupyterLab]:
    """JupyterLab with its own configuration and root folder; news and update pop-ups are off."""
    home = tmp_path_factory.mktemp("jupyter")
    (home / "root").mkdir()
    names = ("JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR", "JUPYTER_RUNTIME_DIR", "JUPYTERLAB_WORKSPACES_DIR", "IPYTHONDIR")
    environment = os.environ | {name: str(home / name.lower()) for name in names}
    settings = home / "jupyter_config_dir" / "lab" / "user-settings" / "@jupyterlab" / "apputils-extension"
    settings.mkdir(parents=True)
    quiet = {"fetchNews": "false", "checkForUpdates": False}
    (settings / "notification.jupyterlab-settings").write_text(json.dumps(quiet))
    lab = JupyterLab(free_port(), home)
    options = [f"--ServerApp.port={lab.port}", f"--ServerApp.root_dir={lab.root}", f"--IdentityProvider.token={TOKEN}"]
    options += ["--LabApp.expose_app_in_browser=True", "--ServerApp.allow_root=True", "--ServerApp.ip=127.0.0.1", "--no-browser"]
    with (home / "server.log").open("w") as log:
        server = subprocess.Popen([sys.executable, "-m", "jupyterlab", *options], env=environment, stdout=log, stderr=log)
        try:
            _wait_for(f"http://127.0.0.1:{lab.port}/api/status?token={TOKEN}")
            yield lab
        finally:
            server.terminate()
            server.wait(20)


@pytest.fixture
def jupyterlab(running_jupyterlab: JupyterLab) -> Iterator[JupyterLab]:
    yield running_jupyterlab
    running_jupyterlab.clear()


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
