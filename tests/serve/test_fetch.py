"""Images from addresses: only where it is allowed, only what is public, and never more or longer than allowed."""

from __future__ import annotations

import dataclasses
import http.server
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, ClassVar

import pytest

from fastvl_lab import FastvlError, ImageError, RequestError
from fastvl_lab.serve import fetch as fetching
from fastvl_lab.serve.fetch import fetch, fetch_all
from fastvl_lab.serve.settings import Settings

ALLOWED = Settings(image_hosts=("images.example",), fetch_bytes=100_000, fetch_seconds=1.0)
PUBLIC = "93.184.215.14"


class _Images(BaseHTTPRequestHandler):
    asked: ClassVar[list[str]] = []

    def do_GET(self) -> None:
        if self.path == "/elsewhere":
            self.send_response(302)
            self.send_header("Location", "http://127.0.0.1/")
            self.end_headers()
            return
        _Images.asked.append(self.path)
        if self.path == "/dripping":
            with suppress(OSError):
                self.wfile.write(b"HTTP/1.1 200 OK\r\n")
                for number in range(100):  # headers, each in time, that never end
                    self.wfile.write(f"X-{number}: 1\r\n".encode())
                    time.sleep(0.1)
            return
        self.send_response(404 if self.path == "/absent" else 200)
        if self.path == "/short":
            self.send_header("Content-Length", "5")
        self.end_headers()
        try:
            if self.path == "/headers":
                self.wfile.write(json.dumps([self.path, *self.headers.items()]).encode())
            elif self.path == "/short":
                self.wfile.write(b"yy")
            elif self.path == "/slow":
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
        assert address[0] == PUBLIC  # the address that was checked, and not the name again
        assert address[1] in (80, 8080)
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
        ("http://images.example/short", "cannot be fetched: it ended 3 bytes early"),
        ("http://images.example/slow", "longer than 1 s"),
        ("http://images.example/dripping", "longer than 1 s"),
        ("http://images.example:22/", "not at an allowed host"),
        ("http://images.example:8080/", "not at an allowed host"),
        ("http://images\u3002example.evil/", "not at an allowed host"),
        ("http://\u00fc" + "x" * 80 + ".example/", "cannot be fetched"),
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


@pytest.mark.parametrize(
    ("host", "url", "path"),
    [
        ("Images.EXAMPLE", "http://images.example/a", "/a"),
        ("images.example.", "http://IMAGES.example/a", "/a"),
        ("images.example", "http://images.example./a", "/a"),
        ("b\u00fccher.example", "http://B\u00dcCHER.example/a", "/a"),
        ("xn--bcher-kva.example", "http://b\u00fccher.example/a", "/a"),
        (
            "images.example",
            "http://images.example/b\u00e4ume/\u6728 1.png?q=\u00fc&r=%20%C3%BC",
            "/b%C3%A4ume/%E6%9C%A8%201.png?q=%C3%BC&r=%20%C3%BC",
        ),
        ("images.example", "http://images.example", "/"),
        ("images.example:8080", "http://images.example:8080/a", "/a"),
    ],
)
def test_hosts_and_paths_are_compared_and_asked_for_in_their_one_spelling(
    images: Callable[[str, int], list[str]], host: str, url: str, path: str
) -> None:
    assert fetch(url, dataclasses.replace(ALLOWED, image_hosts=(host,), fetch_bytes=10**6), images)
    assert _Images.asked[-1] == path


def test_who_asks_is_said(images: Callable[[str, int], list[str]]) -> None:
    _, *headers = json.loads(fetch("http://images.example/headers", ALLOWED, images))
    assert ["Host", "images.example"] in headers
    assert ["User-Agent", "fastvl-lab"] in headers


@pytest.mark.parametrize(
    "host", ["http://images.example", "images.example/", "", "me@images.example", "images.example:port", "a:99999"]
)
def test_a_host_that_is_none_is_refused_at_the_start(host: str) -> None:
    with pytest.raises(FastvlError, match="it reads host or host:port"):
        Settings(image_hosts=(host,))


def test_several_images_share_bytes_and_seconds(images: Callable[[str, int], list[str]], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fetching.fetch, "__defaults__", (images,))
    urls = [f"http://images.example/host?x=1#{number}" for number in range(3)]
    assert list(fetch_all(urls, ALLOWED, 5).values()) == [b"images.example"] * 3
    with pytest.raises(RequestError, match="more than 20 bytes together"):
        fetch_all(urls, dataclasses.replace(ALLOWED, max_body=20), 5)
    started = time.monotonic()
    with pytest.raises(ImageError, match=r"longer than 0\.[34]"):
        fetch_all(["http://images.example/host?x=1", "http://images.example/slow"], ALLOWED, 0.4)
    assert time.monotonic() - started < 1


def test_a_connection_whose_encryption_fails_is_closed(
    images: Callable[[str, int], list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[socket.socket] = []

    def kept(*address: Any, **options: Any) -> socket.socket:
        server = http.server.HTTPServer(("127.0.0.1", 0), _Images)  # it speaks no TLS
        threading.Thread(target=server.handle_request, daemon=True).start()
        opened.append(socket.socket(socket.AF_INET))
        opened[-1].connect(server.server_address)
        return opened[-1]

    monkeypatch.setattr(fetching.socket, "create_connection", kept)
    with pytest.raises(ImageError, match="cannot be fetched"):
        fetch("https://images.example/", ALLOWED, images)
    assert [one.fileno() for one in opened] == [-1]
    for watch in (thread for thread in threading.enumerate() if isinstance(thread, threading.Timer)):
        watch.join(0.5)  # before its time, which is a second
        assert not watch.is_alive()
