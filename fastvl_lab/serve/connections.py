"""The side of a server that faces the network: how many are connected, how soon they must ask, and who is hung up on."""

from __future__ import annotations

import asyncio
import json
import socket
from functools import partial
from typing import Any

from fastvl_lab.errors import require
from fastvl_lab.serve.chat import error_body
from fastvl_lab.serve.settings import Settings

_REASONS = {408: b"Request Timeout", 503: b"Service Unavailable"}


def uvicorn_options(settings: Settings) -> dict[str, Any]:
    """What uvicorn is told besides its address: HTTP/1.1 alone, within the settings' bounds on connections.

    A request's head has at most 64 KiB, as uvicorn reads it with h11.
    """
    return {"http": partial(Connection, settings), "ws": "none", "access_log": False}


class Connection(asyncio.Protocol):
    """uvicorn's protocol of one connection, whose client must ask and must read in time.

    A connection over the most that may be is answered 503. One on which no whole head of a request comes in `head_seconds` is
    answered 408. One that takes nothing of its answer for `stall_seconds` is cut off, and its request given up.
    """

    def __init__(self, settings: Settings, **given: Any) -> None:
        self._http = require("uvicorn.protocols.http.h11_impl", "serve").H11Protocol(**given)
        self._settings = settings
        self._head: asyncio.TimerHandle | None = None
        self._stall: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        if isinstance(transport.get_extra_info("peername"), tuple):  # a Unix socket has none
            # asyncio does so only where the listening socket names its protocol, which one handed in rarely does. A piece of text
            # then waits for the client's word that the one before has come, which many keep back for 40 ms.
            transport.get_extra_info("socket").setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._http.connection_made(transport)
        if len(self._http.connections) > (most := self._settings.max_connections):
            self._hang_up(503, f"{most} connections are open already, the limit; try again later")
        else:
            self._await_head()

    def data_received(self, data: bytes) -> None:
        if self._transport.is_closing():
            return
        before = self._http.cycle
        if self._head is None and (before is None or before.response_complete):  # the next request's begins
            self._await_head()
        self._http.data_received(data)
        if self._http.cycle is not before:
            self._head = _cancelled(self._head)

    def eof_received(self) -> bool | None:
        ends: bool | None = self._http.eof_received()
        return ends

    def pause_writing(self) -> None:
        self._http.pause_writing()
        self._await_reading()

    def resume_writing(self) -> None:
        self._stall = _cancelled(self._stall)
        self._http.resume_writing()

    def connection_lost(self, exc: Exception | None) -> None:
        self._head, self._stall = _cancelled(self._head), _cancelled(self._stall)
        self._http.connection_lost(exc)

    def _await_head(self) -> None:
        seconds = self._settings.head_seconds
        said = f"no request came in {seconds:g} s, the limit for its head"
        self._head = asyncio.get_running_loop().call_later(seconds, self._hang_up, 408, said)

    def _await_reading(self) -> None:
        """Cut the client off unless it takes something in time, and something again."""
        unsent = self._transport.get_write_buffer_size()

        def look() -> None:
            if self._transport.get_write_buffer_size() < unsent:
                self._await_reading()
            else:
                self._transport.abort()

        self._stall = asyncio.get_running_loop().call_later(self._settings.stall_seconds, look)

    def _hang_up(self, status: int, said: str) -> None:
        body = json.dumps(error_body(said, "invalid_request_error" if status < 500 else "server_error")).encode()
        head = b"HTTP/1.1 %d %s\r\nContent-Type: application/json\r\nContent-Length: %d\r\nConnection: close\r\n\r\n"
        self._transport.write(head % (status, _REASONS[status], len(body)) + body)
        self._transport.close()


def _cancelled(timer: asyncio.TimerHandle | None) -> asyncio.TimerHandle | None:
    """None, in the place of a timer that has no more to do."""
    if timer is not None:
        timer.cancel()
    return None
