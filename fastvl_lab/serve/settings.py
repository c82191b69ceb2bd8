"""What a server allows."""

from __future__ import annotations

import math
from dataclasses import dataclass

from fastvl_lab.errors import FastvlError
from fastvl_lab.request import check_whole_number


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Limits and permissions of one server.

    max_queue: requests that may wait; one more is refused. timeout: seconds from a request's arrival to its last chunk. max_body:
    bytes of a request. max_tokens: of an answer whose request does not say. api_key: what clients must show, if set. image_hosts:
    from which addresses may be fetched, none by default; fetch_bytes, fetch_seconds: for each. warm_up: (width, height) of images
    to serve before the first request. Raises `FastvlError` for limits that no request could keep.
    """

    max_queue: int = 64
    timeout: float = 300.0
    max_body: int = 64_000_000
    max_tokens: int = 512
    api_key: str | None = None
    image_hosts: tuple[str, ...] = ()
    fetch_bytes: int = 20_000_000
    fetch_seconds: float = 10.0
    warm_up: tuple[tuple[int, int], ...] = ()

    def __post_init__(self) -> None:
        for name in ("max_queue", "max_body", "max_tokens", "fetch_bytes"):
            check_whole_number(name, getattr(self, name))
        for name in ("timeout", "fetch_seconds"):
            if not 0 < getattr(self, name) < math.inf:
                raise FastvlError(f"{name} is {getattr(self, name)!r}; it must be a number of seconds above 0")
