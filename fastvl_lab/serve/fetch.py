"""Images from addresses, for servers that allow it: of listed hosts only, at public addresses only, within bytes and seconds."""

from __future__ import annotations

import http.client
import ipaddress
import socket
import ssl
import time
from collections.abc import Callable
from urllib.parse import urlsplit

from fastvl_lab.errors import ImageError
from fastvl_lab.serve.settings import Settings

# A host and port to the addresses it has, as `socket.getaddrinfo` finds them.
Resolve = Callable[[str, int], list[str]]

_PIECE = 65536


def resolve(host: str, port: int) -> list[str]:
    """All addresses of a host."""
    return [str(found[4][0]) for found in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)]


def fetch(url: str, settings: Settings, resolve: Resolve = resolve) -> bytes:
    """The bytes at an http(s) address; raises `ImageError` for what is not allowed, not there, too large or too slow.

    The connection goes to the address that was checked, so a name that changes its mind gains nothing; redirects are refused.
    """
    parts = urlsplit(url)
    host, shown = parts.hostname or "", url[:80]
    if not settings.image_hosts:
        raise ImageError(f"image {shown!r} is an address, and this server fetches nothing; send the image as a data URI")
    if parts.scheme not in ("http", "https") or host not in settings.image_hosts:
        raise ImageError(f"image {shown!r} is not at an allowed host; the choices are {', '.join(settings.image_hosts)}")
    deadline = time.monotonic() + settings.fetch_seconds
    try:
        port = parts.port or {"http": 80, "https": 443}[parts.scheme]
        addresses = resolve(host, port)
        if not all(ipaddress.ip_address(address).is_global for address in addresses):
            raise ImageError(f"image {shown!r} is at an address that is not public")
        connection = _connect(parts.scheme, host, port, addresses[0], settings.fetch_seconds)
        try:
            path = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
            connection.request("GET", path, headers={"Accept": "image/*", "Connection": "close"})
            response = connection.getresponse()
            if response.status != 200:
                raise ImageError(f"image {shown!r} was answered with status {response.status}; redirects are not followed")
            return _read(response, shown, settings, deadline)
        finally:
            connection.close()
    except (OSError, http.client.HTTPException, ValueError) as error:
        if isinstance(error, ImageError):
            raise
        raise ImageError(f"image {shown!r} cannot be fetched: {error or type(error).__name__}") from None


def _connect(scheme: str, host: str, port: int, address: str, seconds: float) -> http.client.HTTPConnection:
    """A connection to that address and no other, under the host's name."""
    connection = http.client.HTTPConnection(host, port, timeout=seconds)
    plain = socket.create_connection((address, port), timeout=seconds)
    connection.sock = plain if scheme == "http" else ssl.create_default_context().wrap_socket(plain, server_hostname=host)
    return connection


def _read(response: http.client.HTTPResponse, shown: str, settings: Settings, deadline: float) -> bytes:
    data = bytearray()
    while piece := response.read1(_PIECE):
        data += piece
        if len(data) > settings.fetch_bytes:
            raise ImageError(f"image {shown!r} has more than {settings.fetch_bytes} bytes, the limit for what is fetched")
        if time.monotonic() > deadline:
            raise ImageError(f"image {shown!r} took longer than {settings.fetch_seconds:g} s")
    return bytes(data)
