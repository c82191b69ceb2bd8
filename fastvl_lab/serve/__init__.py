"""A recipe behind an OpenAI-compatible HTTP endpoint: `python -m fastvl_lab.serve`, or `serving` for one beside a script.

The life of a request: `request_queue` has a place for it, or it is not read; `app` reads its body within limits, `chat` makes a
`Request` of it, with images that `fetch` may bring, or says in one sentence why not; it waits for the one engine thread, and `app`
streams what that thread makes. All of it has the same few minutes, and a client that leaves takes its request along.
"""

from __future__ import annotations

import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress

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
    with tempfile.TemporaryFile("w+", errors="replace") as said:  # a pipe would fill, and hold the server up
        server = subprocess.Popen([*command, *options], stdout=subprocess.DEVNULL, stderr=said)
        try:
            if not _comes_up(f"http://127.0.0.1:{port}/health", server, time.monotonic() + patience):
                said.seek(0)
                lines = [line for line in said.read().splitlines() if line.strip()]
                raise DeviceError(f"the server did not come up: {lines[-1] if lines else 'no word from it'}")
            yield f"http://127.0.0.1:{port}/v1"
        finally:
            server.terminate()
            try:
                server.wait(30)
            except subprocess.TimeoutExpired:
                server.kill()
                server.wait()


def _comes_up(url: str, server: subprocess.Popen[bytes], deadline: float) -> bool:
    while server.poll() is None and time.monotonic() < deadline:
        with suppress(urllib.error.URLError, ConnectionError, TimeoutError):
            urllib.request.urlopen(url, timeout=5).close()
            return True
        time.sleep(0.1)
    return False
