"""An endpoint in this process that says what it is told to, in its own time."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest


class FakeEndpoint:
    """What it streams, objects as events, bytes as they are, with pauses in seconds; what it lists; and what it was asked with.

    pages: what it answers at other paths, in turn, the last again and again; a path without any is not there. read: those asked.
    """

    def __init__(self) -> None:
        self.script: Sequence[Any] = ()
        self.models: Any = {"data": [{"id": "m"}]}
        self.asked: list[dict[str, Any]] = []
        self.keys: list[str | None] = []
        self.pages: dict[str, list[str]] = {}
        self.read: list[str] = []
        self.url = ""


@contextmanager
def _running() -> Iterator[FakeEndpoint]:
    fake = FakeEndpoint()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            if self.path != "/v1/models":
                fake.read.append(self.path)
                pages = fake.pages.get(self.path, [])
                self._begin(200 if pages else 404)
                self.wfile.write((pages.pop(0) if len(pages) > 1 else "".join(pages)).encode())
                return
            fake.keys.append(self.headers["Authorization"])
            self._begin()
            self.wfile.write(json.dumps(fake.models).encode())

        def do_POST(self) -> None:
            fake.asked.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            self._begin()
            for item in fake.script:
                if isinstance(item, float):
                    time.sleep(item)
                else:
                    self.wfile.write(item if isinstance(item, bytes) else f"data: {json.dumps(item)}\n\n".encode())

        def _begin(self, status: int = 200) -> None:
            self.send_response(status)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    fake.url = f"http://127.0.0.1:{server.server_port}/v1"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield fake
    server.shutdown()
    server.server_close()


@pytest.fixture(scope="session")
def _fake() -> Iterator[FakeEndpoint]:
    with _running() as fake:
        yield fake


@pytest.fixture
def fake(_fake: FakeEndpoint) -> FakeEndpoint:
    """The one endpoint, as new."""
    url = _fake.url
    FakeEndpoint.__init__(_fake)
    _fake.url = url
    return _fake


@pytest.fixture(scope="session")
def chunk() -> Callable[..., dict[str, Any]]:
    """One event of a stream: its text as content, or a delta, and more of the choice."""

    def make(text: str | None = None, *, delta: Any = None, **more: Any) -> dict[str, Any]:
        delta = {"content": text} if delta is None and text is not None else delta
        return {"object": "chat.completion.chunk", "choices": [{"index": 0, "delta": delta, "finish_reason": None, **more}]}

    return make


@pytest.fixture(scope="session")
def usage() -> Callable[..., dict[str, Any]]:
    """The last event: how many tokens, and whatever else is in its usage."""

    def make(completion: int | None, **more: Any) -> dict[str, Any]:
        return {"choices": [], "usage": {"prompt_tokens": 12, "completion_tokens": completion, **more}}

    return make
