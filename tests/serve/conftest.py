"""A server of a built-in checkpoint in this process, on a free port."""

from __future__ import annotations

import base64
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pytest

from fastvl_lab import Lab
from fastvl_lab.serve.app import create_app
from fastvl_lab.serve.connections import uvicorn_options
from fastvl_lab.serve.settings import Settings

RECIPE = "fastest, cache.kv=paged, cache.prefix_reuse=on"


@dataclass(frozen=True)
class Server:
    """A running server: its URL without /v1, its lab, and the queue before its engine."""

    url: str
    lab: Lab
    queue: Any


@pytest.fixture(scope="session")
def serve(labs: dict[str, Lab]) -> Callable[..., Any]:
    uvicorn = pytest.importorskip("uvicorn")
    pytest.importorskip("fastapi")

    @contextmanager
    def start(name: str = "tiny-qwen2.5-vl", recipe: str = RECIPE, lab: Lab | None = None, **settings: Any) -> Iterator[Server]:
        lab = (lab or labs[name]).apart()
        limits = Settings(**settings)
        app = create_app(lab, recipe, limits)
        with socket.socket() as listening:
            listening.bind(("127.0.0.1", 0))
            listening.listen(128)
            server = uvicorn.Server(uvicorn.Config(app, log_level="warning", **uvicorn_options(limits)))
            thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, daemon=True)
            thread.start()
            deadline = time.monotonic() + 20
            while not server.started:
                assert time.monotonic() < deadline
                time.sleep(0.02)
            app.state.queue.ready.wait(20)
            try:
                yield Server(f"http://127.0.0.1:{listening.getsockname()[1]}", lab, app.state.queue)
            finally:
                server.should_exit = True
                thread.join(30)
                assert not thread.is_alive()

    return start


@pytest.fixture(scope="session")
def server(serve: Callable[..., Any]) -> Iterator[Server]:
    with serve(max_body=2_000_000, max_queue=8) as running:
        yield running


@pytest.fixture(scope="session")
def data_uri() -> Callable[[bytes], str]:
    """A picture as clients send it."""
    return lambda picture: f"data:image/jpeg;base64,{base64.b64encode(picture).decode()}"
