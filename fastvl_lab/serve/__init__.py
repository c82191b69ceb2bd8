"""A recipe behind an OpenAI-compatible HTTP endpoint: `python -m fastvl_lab.serve`, or `serving` for one beside a script.

The life of a request: `request_queue` has a place for it, or it is not read; `app` reads its body within limits, `chat` makes a
`Request` of it, with images that `fetch` may bring, or says in one sentence why not; it waits for the one engine thread, and `app`
streams what that thread makes. All of it has the same few minutes, and a client that leaves takes its request along.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager

from fastvl_lab.errors import DeviceError


@contextmanager
def serving(checkpoint: str, recipe: str = "fastest", *options: str, patience: float = 120) -> Iterator[str]:
    """A server in a process of its own on a free port of this machine, as its URL ending in /v1; gone on leaving.

    options: more of the command's, such as "--warm-up", "448x448". patience: seconds that loading and warm-up may take. Raises
    `DeviceError` with the server's last words if it does not come up.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "fastvl_lab.serve", "--checkpoint", checkpoint, "--recipe", recipe, "--port", str(port)]
    server = subprocess.Popen([*command, *options], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=os.environ)
    try:
        _wait_for(f"http://127.0.0.1:{port}/health", server, time.monotonic() + patience)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        server.send_signal(signal.SIGTERM)
        try:
            server.communicate(timeout=30)
        except subprocess.TimeoutExpired:
            server.kill()
            server.communicate()


def _wait_for(url: str, server: subprocess.Popen[str], deadline: float) -> None:
    while server.poll() is None and time.monotonic() < deadline:
        try:
            urllib.request.urlopen(url, timeout=5).close()
        except (urllib.error.URLError, ConnectionError, TimeoutError):
            time.sleep(0.1)
        else:
            return
    if server.poll() is None:
        server.kill()
    lines = [line for line in server.communicate()[1].splitlines() if line.strip()]
    raise DeviceError(f"the server did not come up: {lines[-1] if lines else 'no word from it'}")
