"""Images from addresses, for servers that allow it: of listed hosts only, at public addresses only, within bytes and seconds."""

from __future__ import annotations

import http.client
import ipaddress
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from urllib.parse import quote, urlsplit

from fastvl_lab.errors import ImageError, RequestError
from fastvl_lab.serve.settings import PORTS, Settings, host_in_ascii, hosts_and_ports

# A host and port to the addresses it has, as `socket.getaddrinfo` finds them.
Resolve = Callable[[str, int], list[str]]

_PIECE = 65536
_HEADERS = {"Accept": "image/*", "User-Agent": "fastvl-lab", "Connection": "close"}

# Stands as it is in a path or a query (RFC 3986); what is escaped already stays so.
_SAFE = "/?:@!$&'()*+,;=-._~%"


def resolve(host: str, port: int) -> list[str]:
    """All addresses of a host."""
    return [str(found[4][0]) for found in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)]


def fetch_all(urls: Iterable[str], settings: Settings, seconds: float) -> dict[str, bytes]:
    """What is at each address; raises `ImageError`, and `RequestError` once all together are more than a body may be.

    seconds: for all of them.
    """
    until, found, n_bytes = time.monotonic() + seconds, dict[str, bytes](), 0
    for url in urls:
        found[url] = fetch(url, settings, seconds=until - time.monotonic())
        n_bytes += len(found[url])
        if n_bytes > settings.max_body:
            raise RequestError(f"the images at addresses have more than {settings.max_body} bytes together, the limit of a body")
    return found


def fetch(url: str, settings: Settings, resolve: Resolve = resolve, *, seconds: float | None = None) -> bytes:
    """The bytes at an http(s) address; raises `ImageError` for what is not allowed, not there, too large or too slow.

    The connection goes to the address that was checked, so a name that changes its mind gains nothing; redirects are refused.
    seconds: where there are fewer than the settings give.
    """
    shown = url[:80]
    seconds = settings.fetch_seconds if seconds is None else min(settings.fetch_seconds, max(seconds, 0))
    until = time.monotonic() + seconds
    if not settings.image_hosts:
        raise ImageError(f"image {shown!r} is an address, and this server fetches nothing; send the image as a data URI")
    try:
        parts = urlsplit(url)
        host, port = host_in_ascii(parts.hostname or ""), parts.port or PORTS.get(parts.scheme, 0)
        if parts.scheme not in PORTS or (host, port) not in hosts_and_ports(settings.image_hosts):
            raise ImageError(f"image {shown!r} is not at an allowed host; the choices are {', '.join(settings.image_hosts)}")
        addresses = resolve(host, port)
        if not addresses or not all(ipaddress.ip_address(address).is_global for address in addresses):
            raise ImageError(f"image {shown!r} is at an address that is not public")
        with _connected(parts.scheme, host, port, addresses[0], until) as connection:
            path = quote(parts.path, safe=_SAFE) or "/"
            path += f"?{quote(parts.query, safe=_SAFE)}" if parts.query else ""
            connection.request("GET", path, headers=_HEADERS)
            response = connection.getresponse()
            if response.status != 200:
                raise ImageError(f"image {shown!r} was answered with status {response.status}; redirects are not followed")
            data = _read(response, shown, settings)
        if time.monotonic() < until:  # else it was cut off
            return data
    except (OSError, http.client.HTTPException, ValueError) as error:
        if isinstance(error, ImageError):
            raise
        if time.monotonic() < until:
            raise ImageError(f"image {shown!r} cannot be fetched: {error or type(error).__name__}") from None
    raise ImageError(f"image {shown!r} took longer than {seconds:.3g} s")


@contextmanager
def _connected(scheme: str, host: str, port: int, address: str, until: float) -> Iterator[http.client.HTTPConnection]:
    """A connection to that address and no other, under the host's name; cut off when it is time.

    A socket's own timeout is for each of its reads, of which a slow sender may have many.
    """
    held = socket.create_connection((address, port), timeout=max(until - time.monotonic(), 0.001))

    def cut() -> None:
        with suppress(OSError):  # it has ended already
            socket.socket.shutdown(held, socket.SHUT_RDWR)  # TLS's own would take its state from under who reads

    watch = threading.Timer(max(until - time.monotonic(), 0), cut)
    watch.daemon = True
    watch.start()
    connection = http.client.HTTPConnection(host, port)
    connection.default_port = PORTS[scheme]  # which the Host header goes without
    try:
        if scheme == "https":
            context = ssl.create_default_context()
            held = secured = context.wrap_socket(held, server_hostname=host, do_handshake_on_connect=False)
            secured.do_handshake()
        connection.sock = held
        yield connection
    finally:
        watch.cancel()
        connection.close()
        held.close()


def _read(response: http.client.HTTPResponse, shown: str, settings: Settings) -> bytes:
    data = bytearray()
    while piece := response.read1(_PIECE):
        data += piece
        if len(data) > settings.fetch_bytes:
            raise ImageError(f"image {shown!r} has more than {settings.fetch_bytes} bytes, the limit for what is fetched")
    if response.length:  # of the bytes that it announced
        raise http.client.HTTPException(f"it ended {response.length} bytes early")
    return bytes(data)
