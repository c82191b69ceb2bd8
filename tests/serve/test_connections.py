"""Clients that connect and do not ask, or ask and do not read: each is bounded in number and time, and honest ones are served."""

from __future__ import annotations

import contextlib
import json
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from fastvl_lab import FastvlError
from fastvl_lab.serve import app
from fastvl_lab.serve.connections import Connection
from fastvl_lab.serve.settings import Settings

httpx = pytest.importorskip("httpx", reason="tests of the server need httpx (extra dev)")
pytest.importorskip("fastapi", reason="tests of the server need fastapi (extra serve)")

LONG = {"messages": [{"role": "user", "content": "Go on."}], "max_tokens": 20_000, "ignore_eos": True, "stream": True}


@contextmanager
def _connected(server: Any, **options: int) -> Iterator[socket.socket]:
    host, port = server.url.removeprefix("http://").split(":")
    with socket.socket() as connection:
        for name, value in options.items():
            connection.setsockopt(socket.SOL_SOCKET, getattr(socket, name), value)
        connection.settimeout(10)
        connection.connect((host, int(port)))
        yield connection


def _heard(connection: socket.socket) -> bytes:
    """All that comes until the server hangs up."""
    heard = b""
    while piece := connection.recv(65_536):
        heard += piece
    return heard


def _error(answer: bytes) -> dict[str, Any]:
    return dict(json.loads(answer.partition(b"\r\n\r\n")[2])["error"])


def _post(body: dict[str, Any]) -> bytes:
    data = json.dumps(body).encode()
    return b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % len(data) + data


def _healthy(server: Any) -> bool:
    return bool(httpx.get(f"{server.url}/health").status_code == 200)


def test_no_piece_of_text_waits_for_the_one_before(serve: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Also on a socket that was handed in, as it is here."""
    made, waits = Connection.connection_made, list[bool]()

    def seen(self: Connection, transport: Any) -> None:
        made(self, transport)
        waits.append(not transport.get_extra_info("socket").getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY))

    monkeypatch.setattr(Connection, "connection_made", seen)
    with serve() as running:
        assert _healthy(running)
    assert waits
    assert not any(waits)


@pytest.mark.parametrize("sent", [b"", b"GET /health HTTP/1.1\r\nX: ", b"GET /health HTTP/1.1\r\nHost: x\r\n\r\nGET /he"])
def test_a_head_that_does_not_come_is_not_waited_for(serve: Callable[..., Any], sent: bytes) -> None:
    """The first of a connection, or a later one of which only the beginning came; byte by byte gains nothing."""
    with serve(head_seconds=0.4) as running, _connected(running) as slow:
        slow.sendall(sent)
        for _ in range(3 if sent else 0):
            time.sleep(0.1)
            slow.sendall(b"x")
        started = time.monotonic()
        *earlier, last = _heard(slow).split(b"HTTP/1.1 ")[1:]
        assert time.monotonic() - started < 5
        assert [answer[:3] for answer in earlier] == ([b"200"] if b"Host" in sent else [])
        assert last.startswith(b"408")
        assert "no request came in 0.4 s" in _error(last)["message"]


def test_connections_over_the_most_that_may_be_are_told_so(serve: Callable[..., Any]) -> None:
    with serve(max_connections=3) as running, contextlib.ExitStack() as open_ones:
        for _ in range(3):
            open_ones.enter_context(_connected(running))
        until = time.monotonic() + 10
        while (answer := httpx.get(f"{running.url}/health")).status_code == 200:  # those three may not have been taken in yet
            assert time.monotonic() < until
        assert answer.status_code == 503
        assert "3 connections are open already, the limit" in answer.json()["error"]["message"]
        open_ones.close()
        while not _healthy(running):
            assert time.monotonic() < until


def test_who_reads_nothing_of_an_answer_is_cut_off(serve: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Its request is given up, so that its place and its blocks are free; who reads slowly is served to the end."""
    event = app._event
    monkeypatch.setattr(app, "_event", lambda data: event(data) + b":" + b" " * 200_000 + b"\n\n")  # more than buffers take
    with serve(stall_seconds=0.5, recipe="fastest, cache.kv=paged") as running:
        with _connected(running, SO_RCVBUF=4096) as stuck:
            stuck.sendall(_post(LONG))
            assert stuck.recv(100).startswith(b"HTTP/1.1 200")
            until = time.monotonic() + 20
            while _requests(running, 499) == 0:
                assert time.monotonic() < until
                time.sleep(0.1)
        while running.queue._running or running.lab.memory.paged.pool.n_used:
            assert time.monotonic() < until
        with _connected(running) as slow:
            slow.sendall(_post(LONG | {"max_tokens": 30}))
            heard = b""
            while not heard.endswith(b"\r\n0\r\n\r\n"):
                time.sleep(0.01)
                heard = heard[-200:] + slow.recv(100_000)
        assert b"data: [DONE]" in heard


def test_who_reads_a_long_answer_slowly_is_not_cut_off(serve: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """It takes longer than a client may take nothing, and takes something all the while."""
    event = app._event
    monkeypatch.setattr(app, "_event", lambda data: event(data) + b":" + b" " * 8_000_000 + b"\n\n")
    with serve(stall_seconds=0.5, recipe="fastest") as running, _connected(running, SO_RCVBUF=65_536) as slow:
        started = time.monotonic()
        slow.sendall(_post(LONG | {"max_tokens": 1}))
        heard = b""
        while not heard.endswith(b"\r\n0\r\n\r\n") and (piece := slow.recv(65_536)):
            time.sleep(0.01)
            heard = heard[-200:] + piece
        assert b"data: [DONE]" in heard
        assert time.monotonic() - started > 1.0


def _requests(server: Any, status: int) -> float:
    lines = httpx.get(f"{server.url}/metrics").text.splitlines()
    name = f'fastvl_lab_requests_total{{status="{status}"}} '
    return sum(float(line.removeprefix(name)) for line in lines if line.startswith(name))


def test_a_head_without_end_is_refused(server: Any) -> None:
    with _connected(server) as flood:
        with contextlib.suppress(OSError):  # hung up on while it was sending
            flood.sendall(b"GET /health HTTP/1.1\r\n" + b"X-Header: 1\r\n" * 100_000)
        with contextlib.suppress(OSError):
            assert _heard(flood).startswith(b"HTTP/1.1 400")
    assert _healthy(server)


def test_a_client_that_is_gone_while_its_body_was_awaited_leaves_nothing(server: Any) -> None:
    whole = _post(LONG)
    for _ in range(20):
        with _connected(server) as half:
            half.sendall(whole[:-10])
            half.shutdown(socket.SHUT_WR)
    until = time.monotonic() + 10
    while server.queue._reserved:
        assert time.monotonic() < until
        time.sleep(0.02)
    assert _healthy(server)


def test_bodies_are_held_up_to_a_bound_and_give_their_bytes_back(serve: Callable[..., Any]) -> None:
    """Those that are being read and those whose answers are made; who comes over the bound hears so, and others go on."""
    body = {"messages": [{"role": "user", "content": "a" * 3000}], "max_tokens": 2}
    with serve(max_held=8000) as running, contextlib.ExitStack() as sending:
        url, whole = f"{running.url}/v1/chat/completions", _post(body)
        for _ in range(2):
            sending.enter_context(_connected(running)).sendall(whole[:-10])
        until = time.monotonic() + 10
        while (answer := httpx.post(url, json=body, timeout=30)).status_code == 200:  # theirs may not have come yet
            assert time.monotonic() < until
        assert answer.status_code == 429
        assert "bytes, and 8000 are the limit" in answer.json()["error"]["message"]
        assert httpx.post(f"{running.url}/tokenize", json={"prompt": "a" * 200}, timeout=30).status_code == 200
        sending.close()
        for _ in range(8):  # each gives its bytes back
            while (answer := httpx.post(url, json=body | {"stream": True}, timeout=30)).status_code == 429:
                assert time.monotonic() < until
            assert answer.status_code == 200


@pytest.mark.alone
@pytest.mark.parametrize("n", [200, pytest.param(10_000, marks=pytest.mark.nightly)])
def test_a_crowd_that_only_connects_does_not_keep_honest_clients_out(serve: Callable[..., Any], n: int) -> None:
    """They are told that there is no room, or that their time is over; and then there is room again."""
    with serve(max_connections=100, head_seconds=1.0) as running:
        for _ in range(0, n, 200):
            with contextlib.ExitStack() as crowd:
                for _ in range(200):
                    crowd.enter_context(_connected(running))
                started = time.monotonic()
                while not _healthy(running):
                    time.sleep(0.1)
                assert time.monotonic() - started < 10


@pytest.mark.parametrize("bound", ["max_connections", "max_held", "head_seconds", "stall_seconds"])
def test_a_bound_of_nothing_is_refused(bound: str) -> None:
    with pytest.raises(FastvlError, match=f"{bound} is 0; it must be"):
        Settings(**{bound: 0})
