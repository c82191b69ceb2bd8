"""Images from addresses: only where it is allowed, only what is public, and never more or longer than allowed."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from fastvl_lab import ImageError
from fastvl_lab.serve import fetch as fetching
from fastvl_lab.serve.fetch import fetch
from fastvl_lab.serve.settings import Settings

ALLOWED = Settings(image_hosts=("images.example",), fetch_bytes=100_000, fetch_seconds=1.0)
PUBLIC = "93.184.215.14"


class _Images(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        if self.path == "/elsewhere":
            self.send_response(302)
            self.send_header("Location", "http://127.0.0.1/")
            self.end_headers()
            return
        self.send_response(404 if self.path == "/absent" else 200)
        self.end_headers()
        try:
            if self.path == "/slow":
                for _ in range(40):
                    self.wfile.write(b"x")
                    time.sleep(0.1)
            else:
                self.wfile.write(self.headers["Host"].encode() if self.path == "/host?x=1" else b"y" * 300_000)
        except OSError:
            pass  # hung up on

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def images(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str, int], list[str]]]:
    """A web server on this machine that stands at a public address; yields what resolves to it."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Images)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    connect = socket.create_connection

    def here(address: tuple[str, int], timeout: float) -> socket.socket:
        assert address == (PUBLIC, 80)  # the address that was checked, and not the name again
        return connect(("127.0.0.1", server.server_port), timeout)

    monkeypatch.setattr(fetching.socket, "create_connection", here)
    yield lambda host, port: [PUBLIC]
    server.shutdown()


def test_an_allowed_address_is_fetched_under_its_own_name(images: Callable[[str, int], list[str]]) -> None:
    assert fetch("http://images.example/host?x=1", ALLOWED, images) == b"images.example"


@pytest.mark.parametrize(
    ("url", "says"),
    [
        ("http://images.example/elsewhere", "status 302; redirects are not followed"),
        ("http://images.example/absent", "status 404"),
        ("http://images.example/large", "more than 100000 bytes"),
        ("http://images.example/slow", "longer than 1 s"),
        ("http://other.example/", "not at an allowed host; the choices are images.example"),
        ("http://images.example.evil.example/", "not at an allowed host"),
        ("http://images.example@127.0.0.1/", "not at an allowed host"),
        ("ftp://images.example/", "not at an allowed host"),
        ("http://images.example:port/", "cannot be fetched"),
        ("/etc/hostname", "not at an allowed host"),
    ],
)
def test_what_is_not_allowed_is_refused(images: Callable[[str, int], list[str]], url: str, says: str) -> None:
    with pytest.raises(ImageError, match=says):
        fetch(url, ALLOWED, images)


@pytest.mark.parametrize(
    "address", ["127.0.0.1", "10.0.0.8", "192.168.1.1", "169.254.169.254", "::1", "fd00::1", "0.0.0.0", "100.64.0.1"]
)
def test_an_address_that_is_not_public_is_refused_though_its_name_is_allowed(address: str) -> None:
    with pytest.raises(ImageError, match="not public"):
        fetch("http://images.example/", ALLOWED, lambda host, port: [PUBLIC, address])


def test_nothing_is_fetched_unless_hosts_are_listed() -> None:
    with pytest.raises(ImageError, match="this server fetches nothing"):
        fetch("http://images.example/", Settings(), lambda host, port: pytest.fail("it was looked up"))
