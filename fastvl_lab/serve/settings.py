"""What a server allows."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from urllib.parse import urlsplit

from fastvl_lab.errors import FastvlError
from fastvl_lab.request import check_whole_number

# Of a host that is named without one.
PORTS = {"http": 80, "https": 443}


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Limits and permissions of one server.

    max_queue: requests that may wait, or be on their way in; one more is refused. timeout: seconds from a request's arrival to its
    last chunk. max_body: bytes of a request, and of all images that are fetched for it. max_tokens: of an answer whose request does
    not say, where a session has room for so many; by default all that it has room for. api_key: what clients must show, if set.
    served_name: what the model is called; by default the checkpoint's name, or the last part of its path. origins: of pages whose
    scripts may ask, besides those of this machine; "*" for all.

    max_connections: open at once. head_seconds: in which the head of a request must come. stall_seconds: that a client may take
    nothing of its answer. max_held: bytes of the bodies and fetched images of all requests that are read, wait or are answered.

    image_hosts: from where images may be fetched, none by default: a host, at ports 80 and 443, or host:port; fetch_bytes,
    fetch_seconds: for each. warm_up: (width, height) of images to serve before the first request. Raises `FastvlError` for limits
    that no request could keep.
    """

    max_queue: int = 64
    timeout: float = 300.0
    max_body: int = 64_000_000
    max_tokens: int | None = None
    api_key: str | None = None
    served_name: str | None = None
    origins: tuple[str, ...] = ()
    image_hosts: tuple[str, ...] = ()
    max_connections: int = 512
    head_seconds: float = 10.0
    stall_seconds: float = 30.0
    max_held: int = 1_000_000_000
    fetch_bytes: int = 20_000_000
    fetch_seconds: float = 10.0
    warm_up: tuple[tuple[int, int], ...] = ()

    def __post_init__(self) -> None:
        for name in ("max_queue", "max_body", "max_connections", "max_held", "fetch_bytes"):
            check_whole_number(name, getattr(self, name))
        if self.max_tokens is not None:
            check_whole_number("max_tokens", self.max_tokens)
        for name in ("timeout", "head_seconds", "stall_seconds", "fetch_seconds"):
            if not 0 < getattr(self, name) < math.inf:
                raise FastvlError(f"{name} is {getattr(self, name)!r}; it must be a number of seconds above 0")
        hosts_and_ports(self.image_hosts)
        for origin in self.origins:
            if origin != "*" and not (origin.startswith(("http://", "https://")) and origin.count("/") == 2):
                raise FastvlError(f"origin {origin!r} is none; it reads https://host, or http://host:port, or * for all")


def hosts_and_ports(names: Iterable[str]) -> frozenset[tuple[str, int]]:
    """Where images may be fetched from: of "host" its usual ports, of "host:port" that one; raises `FastvlError`."""
    found = set()
    for name in names:
        try:
            parts = urlsplit(f"//{name}")
            host, port = host_in_ascii(parts.hostname or ""), parts.port
        except ValueError:
            host, port = "", None
        if not host or parts.netloc != name or "@" in name:
            raise FastvlError(f"image host {name!r} is none; it reads host or host:port, without http:// and without a path")
        found |= {(host, port)} if port else {(host, usual) for usual in PORTS.values()}
    return frozenset(found)


def host_in_ascii(host: str) -> str:
    """A host's name as it is looked up: in lower case, without a last dot, and in ASCII (IDNA); raises `UnicodeError`."""
    host = host.lower().removesuffix(".")
    return host if host.isascii() else host.encode("idna").decode()
