"""A server with 32 clients at once, some of whom vanish or send what is no image: answers are right, and nothing is left behind."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import io
import json
import os
import random
import signal
import struct
import subprocess
import sys
import time
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

import pytest
from PIL import Image
from ports import free_port

from fastvl_lab import Lab, Request, photo

httpx = pytest.importorskip("httpx", reason="tests of the server need httpx (extra dev)")
pytest.importorskip("fastapi", reason="tests of the server need fastapi (extra serve)")

CLIENTS = 32
RECIPE = (
    "fastest, cache.kv=paged, schedule.batching=continuous, schedule.max_batch=32, schedule.prefill=chunked, schedule.budget=128"
)
TEXTS = ("Hi", "What is this?", "Go on.")
PICTURES = [photo(name, size) for name, size in (("astronaut", (84, 112)), ("coffee", (112, 84)), ("cat", (140, 112)))]
FOUR = [photo(name, (224, 168)) for name in ("astronaut", "coffee", "cat", "rocket")]


def _png(width: int, height: int, data: bytes) -> bytes:
    """A PNG that says to be so large, with these bytes for all its pixels."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", data) + chunk(b"IEND", b"")


def _ico() -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (56, 56)).save(buffer, "ICO")
    return buffer.getvalue()


# What a client sends as an image, and what the refusal says.
HOSTILE: dict[str, tuple[Any, str]] = {
    "a JPEG cut in its middle": (PICTURES[0][: len(PICTURES[0]) // 2], "is broken: image file is truncated"),
    "a JPEG cut in its header": (PICTURES[0][:30], "is broken"),
    "a bomb by its header": (_png(60_000, 60_000, zlib.compress(bytes(10**6))), "is too large"),
    "a PNG with too few pixels": (_png(300, 300, zlib.compress(b"few")), "is broken: image file is truncated"),
    "a PNG of rubbish": (_png(300, 300, bytes(range(256))), "is broken: broken data stream"),
    "a thread of pixels": (_png(3_000, 1, zlib.compress(bytes(9_001))), "an aspect ratio of 3000; the limit is 200"),
    "a page": (b"<html>no image</html>", "is not an image of a supported type"),
    "an ICO": (_ico(), "is not an image of a supported type"),
    "nothing": (b"", "it holds no bytes"),
    "a number": (7, "an image_url without a url"),
    "a path": ("/etc/hostname", "fetches"),
}


@dataclass(frozen=True, kw_only=True)
class Asked:
    """What a client may ask, and the tokens of its answer."""

    kind: str
    body: dict[str, Any]
    tokens: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class Came:
    """When a request was sent, and when how many tokens of its answer came, in seconds of one clock."""

    sent: float
    pieces: tuple[tuple[float, int], ...]

    @property
    def ttft(self) -> float:
        return self.pieces[0][0] - self.sent

    @property
    def end(self) -> float:
        return self.pieces[-1][0]


@dataclass(frozen=True, kw_only=True)
class Seen:
    """How clients fared, by kind, and the seconds to first tokens of texts and of four images."""

    ends: Counter[str] = field(default_factory=Counter)
    text: list[float] = field(default_factory=list)
    four: list[float] = field(default_factory=list)


def _messages(images: list[Any], text: str) -> list[dict[str, Any]]:
    urls = [f"data:image/jpeg;base64,{base64.b64encode(image).decode()}" if isinstance(image, bytes) else image for image in images]
    parts: list[dict[str, Any]] = [{"type": "image_url", "image_url": {"url": url}} for url in urls]
    return [{"role": "user", "content": [*parts, {"type": "text", "text": text}]}]


def _asked(lab: Lab, kind: str, images: list[bytes], text: str, most: int) -> Asked:
    """With the tokens that the lab makes of it alone."""
    messages = _messages(images, text)
    tokens = lab.run(Request(messages=messages, max_new_tokens=most, ignore_eos=True), "fastest").tokens
    more = {"ignore_eos": True, "return_token_ids": True, "stream": True}
    return Asked(kind=kind, body={"messages": messages, "max_tokens": most, **more}, tokens=tokens)


async def _answer(client: Any, url: str, asked: Asked) -> Came:
    """Read an answer to its end, and hold its tokens to those that are right."""
    sent, pieces, tokens, last = time.monotonic(), list[tuple[float, int]](), list[int](), ""
    async with client.stream("POST", url, json=asked.body) as answer:
        assert answer.status_code == 200, await answer.aread()
        async for line in answer.aiter_lines():
            last = line or last
            if line.startswith("data: {"):
                new = [token for choice in json.loads(line[6:])["choices"] for token in choice.get("token_ids", [])]
                pieces.append((time.monotonic(), len(new)))
                tokens += new
    assert last == "data: [DONE]"
    assert tuple(tokens) == asked.tokens, asked.kind
    return Came(sent=sent, pieces=tuple(pieces))


async def _vanish(client: Any, url: str, asked: Asked, drawn: random.Random) -> None:
    """Leave in the middle of the body, after it, or after the first words of the answer."""
    when = drawn.choice(("sending", "waiting", "reading"))
    if when == "reading":
        async with client.stream("POST", url, json=asked.body) as answer:
            async for _ in answer.aiter_lines():
                return
    parts, data = urlsplit(url), json.dumps(asked.body).encode()
    _, writer = await asyncio.open_connection(parts.hostname, parts.port)
    writer.write(f"POST {parts.path} HTTP/1.1\r\nHost: {parts.netloc}\r\nContent-Length: {len(data)}\r\n\r\n".encode())
    writer.write(data[: len(data) // 2] if when == "sending" else data)
    await writer.drain()
    await asyncio.sleep(drawn.random() * 0.05)
    writer.close()


async def _refused(client: Any, url: str, image: Any, says: str) -> None:
    body = {"messages": _messages([image], "?"), "max_tokens": 4}
    answer = await client.post(url, json=body)
    assert answer.status_code == 400, answer.text
    assert says in answer.json()["error"]["message"]


async def _late(client: Any, url: str, asked: Asked) -> None:
    """A request without time."""
    answer = await client.post(url, json={**asked.body, "stream": False, "max_tokens": 400, "timeout": 0.05})
    assert answer.status_code == 504, answer.text


async def _one_client(number: int, client: Any, url: str, choices: list[Asked], until: float, seen: Seen) -> None:
    """Ask again and again until the time is over; the first of all clients always with four images."""
    drawn = random.Random(number)
    while time.monotonic() < until:
        asked = choices[0] if number == 0 else drawn.choice(choices[1:])
        share = 1.0 if number == 0 else drawn.random()
        if share < 0.2:
            await _vanish(client, url, asked, drawn)
            seen.ends["vanished"] += 1
        elif share < 0.3:
            await _refused(client, url, *drawn.choice(list(HOSTILE.values())))
            seen.ends["refused"] += 1
        elif share < 0.35:
            await _late(client, url, asked)
            seen.ends["late"] += 1
        else:
            came = await _answer(client, url, asked)
            seen.ends[asked.kind] += 1
            if asked.kind in ("text", "four"):
                (seen.text if asked.kind == "text" else seen.four).append(came.ttft)


async def _held(url: str, choices: list[Asked], seconds: float) -> Seen:
    seen, until, complete = Seen(), time.monotonic() + seconds, f"{url}/v1/chat/completions"
    limits = httpx.Limits(max_connections=2 * CLIENTS)
    async with httpx.AsyncClient(timeout=60, limits=limits) as client:
        await asyncio.gather(*(_one_client(n, client, complete, choices, until, seen) for n in range(CLIENTS)))
    return seen


def _metrics(server: str) -> dict[str, float]:
    lines = httpx.get(f"{server}/metrics").text.splitlines()
    return {name: float(value) for name, _, value in (line.rpartition(" ") for line in lines if line and line[0] != "#")}


def _at_rest(server: str, n: int) -> dict[str, float]:
    """The metrics once so many requests have come to an end, and nobody is served or waits any more."""
    until = time.monotonic() + 20
    while True:
        found = _metrics(server)
        ended = sum(value for name, value in found.items() if name.startswith("fastvl_lab_requests_total"))
        if ended == n and found["fastvl_lab_requests_running"] == found["fastvl_lab_requests_waiting"] == 0:
            return found
        assert time.monotonic() < until, f"{ended:.0f} of {n} requests have ended"
        time.sleep(0.05)


def _of_status(status: int) -> str:
    return f'fastvl_lab_requests_total{{status="{status}"}}'


@contextmanager
def _apart(name: str) -> Iterator[str]:
    """The address of a server in a process of its own, with so few blocks that not all clients' requests find room at once.

    On a CPU oneDNN and torch keep products that are compiled for shapes, up to a number, which are no request's memory: here none.
    """
    port = free_port()
    asked = ["--checkpoint", name, "--recipe", RECIPE, "--device", "cpu", "--session-len", "512", "--port", str(port)]
    kept = {"ONEDNN_PRIMITIVE_CACHE_CAPACITY": "0", "LRU_CACHE_CAPACITY": "1"}  # oneDNN's and torch's
    server = subprocess.Popen(
        [sys.executable, "-m", "fastvl_lab.serve", *asked], env={**os.environ, **kept}, stderr=subprocess.DEVNULL
    )
    try:
        until = time.monotonic() + 120
        while True:
            with contextlib.suppress(httpx.TransportError):
                if httpx.get(f"http://127.0.0.1:{port}/health").status_code == 200:
                    break
            assert server.poll() is None
            assert time.monotonic() < until, "it does not start"
            time.sleep(0.2)
        yield f"http://127.0.0.1:{port}"
        server.terminate()
        assert server.wait(60) == -signal.SIGTERM  # which uvicorn sends on to itself once all is answered
    finally:
        server.kill()
        server.wait()


@pytest.mark.alone
@pytest.mark.parametrize(
    ("name", "seconds"),
    [
        ("tiny-qwen2.5-vl", 4),
        pytest.param("tiny-qwen2.5-vl", 600, marks=pytest.mark.nightly),
        pytest.param("tiny-qwen3-vl", 60, marks=pytest.mark.nightly),
    ],
)
def test_32_clients_are_held(labs: dict[str, Lab], name: str, seconds: float) -> None:
    """No token is wrong, no request lost and no memory; and a short text waits about as long as four images do, not for ever."""
    lab = labs[name]
    choices = [_asked(lab, "four", FOUR, "Which is the odd one?", 4)]
    choices += [_asked(lab, "text", [], text, most) for text in TEXTS for most in (4, 64)]
    choices += [_asked(lab, "image", [image], "What is this?", 6) for image in PICTURES]
    with _apart(name) as url:
        filled = asyncio.run(_held(url, choices, min(seconds, 60)))  # until the allocators of all threads hold what they will
        before = _at_rest(url, filled.ends.total())
        seen = asyncio.run(_held(url, choices, seconds))
        after = _at_rest(url, filled.ends.total() + seen.ends.total())
        assert httpx.get(f"{url}/health").status_code == 200
    assert set(seen.ends) == {"four", "text", "image", "vanished", "refused", "late"}
    ended = {status: after[name] - before.get(name, 0) for status, name in ((n, _of_status(n)) for n in (200, 400, 504))}
    answered = sum(seen.ends[kind] for kind in ("four", "text", "image"))
    assert (ended[400], ended[504]) == (seen.ends["refused"], seen.ends["late"])
    assert answered <= ended[200] <= answered + seen.ends["vanished"], "a short answer may be there before its client has gone"
    assert after["fastvl_lab_kv_blocks_used"] == 0
    assert after["fastvl_lab_batch_size_sum"] > 2 * after["fastvl_lab_batch_size_count"], "answers share steps"
    assert after["process_open_fds"] <= before["process_open_fds"] + 4
    grown = after["process_resident_memory_bytes"] - before["process_resident_memory_bytes"]
    p99, slowest = sorted(seen.text)[int(0.99 * len(seen.text))], max(seen.four)
    print(f"{dict(seen.ends)}; memory grew by {grown / 1e6:.1f} MB")
    n_preempted = after["fastvl_lab_preemptions_total"]
    print(f"TTFT of texts, p99 {p99:.2f} s; of four images, at most {slowest:.2f} s; {n_preempted:.0f} times one gave way")
    assert grown < 16e6
    if len(seen.four) >= 10:  # of few, the slowest says little
        assert p99 < 2 * slowest
        assert n_preempted > 0, "there was room for all"


def test_texts_go_on_while_four_images_are_prefilled(shallow_labs: dict[str, Lab], serve: Callable[..., Any]) -> None:
    """An answer under way grows with each piece of their prompt, and who comes meanwhile is served beside their answer."""
    lab = shallow_labs["tiny-qwen3-vl"]
    long = _asked(lab, "text", [], "Go on.", 200)
    four = _asked(lab, "four", [photo("astronaut", (308, 308))] * 4, "Which is the odd one?", 60)
    short = _asked(lab, "text", [], "Hi", 4)
    n_pieces = -(-lab.run(Request(messages=four.body["messages"], max_new_tokens=1), "fastest").n_prompt // 128)
    assert n_pieces > 3

    async def together(url: str) -> tuple[Came, Came, Came]:
        async with httpx.AsyncClient(timeout=60) as client:
            first = asyncio.create_task(_answer(client, url, long))
            while len(server.queue._running) < 1:
                await asyncio.sleep(0.001)
            second = asyncio.create_task(_answer(client, url, four))
            while len(server.queue._running) < 2:
                await asyncio.sleep(0.001)
            last = await _answer(client, url, short)
            return await first, await second, last

    with serve(lab=lab, recipe=RECIPE) as server:
        under_way, images, late = asyncio.run(together(f"{server.url}/v1/chat/completions"))
    meanwhile = sum(n for when, n in under_way.pieces if images.sent < when < images.sent + images.ttft)
    assert meanwhile >= n_pieces - 1
    assert late.end < images.end
