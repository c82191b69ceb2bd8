"""Files and arrays that are no images, or lie about being one: each is an error of ours, soon and in little memory."""

from __future__ import annotations

import contextlib
import io
import resource
import struct
import threading
import time
import warnings
import zlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from PIL import Image

from fastvl_lab import ImageError
from fastvl_lab.preprocessor.decode_image import FORMATS, Unpack, as_tensor, open_image, with_pillow, with_turbojpeg
from fastvl_lab.request import MAX_IMAGE_BYTES, MAX_IMAGES, Grid, ImageInput, ImageShape, Request, RequestError

Decode = Callable[[Sequence[object]], list[Image.Image]]

SHAPE = ImageShape(width=0, height=0, resized_width=28, resized_height=28, grid=Grid(1, 2, 2), visual_tokens=1)

MAX_SECONDS = 1
MAX_BYTES = 300e6


def _encoded(form: str, size: tuple[int, int] = (200, 160)) -> bytes:
    noise = np.random.default_rng(0).integers(256, size=(size[1], size[0], 3), dtype=np.uint8)
    out = io.BytesIO()
    Image.fromarray(noise).save(out, form)
    return out.getvalue()


def _png(width: int, height: int, body: bytes = b"") -> bytes:
    """A PNG whose header claims a size that its data has not."""

    def block(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = block(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + block(b"IDAT", zlib.compress(body)) + block(b"IEND", b"")


def _bmp(width: int, height: int) -> bytes:
    return b"BM" + struct.pack("<IHHI", 100, 0, 0, 54) + struct.pack("<IiiHHIIiiII", 40, width, height, 1, 24, 0, 0, 0, 0, 0, 0)


def _hostile() -> Iterator[tuple[str, object]]:
    for form in FORMATS:
        data = _encoded(form)
        for share in (0.02, 0.1, 0.3, 0.5, 0.8):
            yield f"{form} cut at {share}", data[: int(len(data) * share)]
        yield f"{form} without its first byte", data[1:]
        yield f"{form} behind a newline", b"\n" + data
    for side in (20_000, 60_000, 2**31 - 1):
        yield f"PNG bomb {side}", _png(side, side, bytes(1000))
        yield f"BMP bomb {side}", _bmp(side, side)
    yield "PNG of less than it says", _png(300, 300, bytes(10))
    yield "PNG of zero width", _png(0, 10)
    yield "GIF of 65535x65535", b"GIF89a" + struct.pack("<HH", 65535, 65535) + bytes(50)
    yield "TIFF that points past its end", b"II*\0" + struct.pack("<I", 2**31)
    yield "WebP without a body", b"RIFF\xff\xff\xff\x7fWEBPVP8 "
    yield "nothing", b""
    yield "zeros", bytes(5000)
    yield "SVG", b"<svg xmlns='http://www.w3.org/2000/svg'><script/></svg>"
    yield "HTML", b"<!DOCTYPE html><html></html>"
    yield "PDF", b"%PDF-1.7\n"
    yield "ZIP", b"PK\x03\x04" + bytes(100)
    yield "EPS, which could run programs", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n"
    yield "PPM, which is not on the list", b"P6 2 2 255\n" + bytes(12)
    for seed in range(5):
        yield f"random bytes {seed}", np.random.default_rng(seed).bytes(3000)
    yield "NaN", np.full((8, 8, 3), np.nan, np.float32)
    yield "floats", np.zeros((8, 8, 3))
    yield "16-bit integers", np.zeros((8, 8, 3), np.uint16)
    yield "booleans", np.zeros((8, 8, 3), bool)
    yield "objects", np.array([["a"]], dtype=object)
    yield "two channels", np.zeros((8, 8, 2), np.uint8)
    yield "channels first", np.zeros((3, 8, 8), np.uint8)
    yield "a video", np.zeros((2, 8, 8, 3), np.uint8)
    yield "a row", np.zeros(8, np.uint8)
    yield "no rows", np.zeros((0, 8, 3), np.uint8)
    yield "an empty picture", Image.new("RGB", (0, 0))


HOSTILE = dict(_hostile())


def test_the_corpus_is_large_enough() -> None:
    assert len(HOSTILE) >= 60


@pytest.mark.filterwarnings("ignore::UserWarning")  # Pillow warns of what it skips
@pytest.mark.parametrize("name", HOSTILE)
def test_it_is_an_error_of_ours_soon_and_in_little_memory(decode: Decode, name: str) -> None:
    before, begin = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.perf_counter()
    with pytest.raises(ImageError):
        decode([HOSTILE[name]])
    assert time.perf_counter() - begin < MAX_SECONDS
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 < MAX_BYTES


@pytest.mark.filterwarnings("ignore::UserWarning")
@settings(max_examples=300, deadline=None)
@given(form=st.sampled_from(FORMATS), data=st.data())
def test_flipped_bytes_are_an_image_or_an_error_of_ours(decode: Decode, form: str, data: st.DataObject) -> None:
    encoded = bytearray(_encoded(form, (20, 12)))
    for _ in range(data.draw(st.integers(1, 6))):
        encoded[data.draw(st.integers(0, len(encoded) - 1))] = data.draw(st.integers(0, 255))
    try:
        decoded = decode([bytes(encoded)])[0]
    except ImageError:
        return
    assert decoded.mode == "RGB"


def _pixels(unpack: Unpack, data: bytes) -> torch.Tensor | None:
    """What an option makes of bytes, or None for an error of ours."""
    try:
        return as_tensor(unpack(open_image(ImageInput.of(data)), SHAPE))
    except ImageError:
        return None


@pytest.mark.filterwarnings("ignore::UserWarning")
@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_of_damaged_jpegs_turbojpeg_makes_what_pillow_makes(data: st.DataObject) -> None:
    """The same pixels, or an error of ours from both."""
    encoded = bytearray(_encoded("JPEG", (40, 24)))
    for _ in range(data.draw(st.integers(0, 3))):
        encoded[data.draw(st.integers(0, len(encoded) - 1))] = data.draw(st.integers(0, 255))
    end = data.draw(st.one_of(st.just(len(encoded)), st.integers(0, len(encoded))))
    ours, pillows = (_pixels(unpack, bytes(encoded[:end])) for unpack in (with_turbojpeg, with_pillow))
    assert (ours is None) == (pillows is None)
    assert ours is None or torch.equal(ours, pillows)


@pytest.mark.filterwarnings("ignore::UserWarning")
@settings(max_examples=200, deadline=None)
@given(form=st.sampled_from(FORMATS), body=st.binary(max_size=300))
def test_any_bytes_behind_a_true_beginning_are_an_image_or_an_error_of_ours(decode: Decode, form: str, body: bytes) -> None:
    with contextlib.suppress(ImageError):
        assert decode([_encoded(form, (4, 4))[:24] + body])[0].mode == "RGB"


def test_too_many_bytes_and_too_many_images_are_refused_before_they_are_read(tmp_path: Path) -> None:
    large = tmp_path / "large.jpg"
    with large.open("wb") as file:
        file.truncate(MAX_IMAGE_BYTES + 1)  # a sparse file: it takes no disk, and would take memory if read
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(ImageError, match=f"has {MAX_IMAGE_BYTES + 1} bytes; the limit is {MAX_IMAGE_BYTES}"):
        ImageInput.of(large)
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 < MAX_IMAGE_BYTES / 2
    with pytest.raises(RequestError, match=f"{MAX_IMAGES + 1} images; the limit is {MAX_IMAGES}"):
        Request(images=["no/such.jpg"] * (MAX_IMAGES + 1), prompt="?")


def test_images_that_threads_open_at_once_leave_the_processs_warnings_as_they_were(monkeypatch: pytest.MonkeyPatch) -> None:
    """Filters of warnings are of all threads: what one changes for a while, another may find, and put back for good."""
    data, opens, before = _encoded("PNG"), Image.open, list(warnings.filters)
    two_are_in, one_is_out = threading.Barrier(2, timeout=10), threading.Event()

    def meeting(*given: object, **named: object) -> Image.Image:
        if two_are_in.wait() == 1:  # who came last leaves last
            one_is_out.wait(10)
        return opens(*given, **named)

    def one() -> None:
        open_image(ImageInput.of(data))
        one_is_out.set()

    monkeypatch.setattr(Image, "open", meeting)
    with ThreadPoolExecutor(2) as pool:
        for opened in [pool.submit(one), pool.submit(one)]:
            opened.result()
    after = list(warnings.filters)
    warnings.filters[:] = before
    assert after == before
