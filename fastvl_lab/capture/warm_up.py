"""Requests that stand in for those to come, so that what they need is made before them."""

from __future__ import annotations

import io
import math
from collections.abc import Iterable
from numbers import Integral

import numpy as np
from PIL import Image

from fastvl_lab.errors import RequestError
from fastvl_lab.request import Request

# A size of an image, (width, height), or a request as it will come.
Shape = tuple[int, int] | Request


def requests_of(shapes: Iterable[Shape], max_new_tokens: int) -> list[Request]:
    """A request for each shape: itself, or one with a JPEG of that size and a short prompt; raises `RequestError`."""
    return [shape if isinstance(shape, Request) else _with_image(shape, max_new_tokens) for shape in shapes]


def _with_image(size: tuple[int, int], max_new_tokens: int) -> Request:
    if not (isinstance(size, tuple | list) and len(size) == 2 and all(isinstance(side, Integral) and side > 0 for side in size)):
        raise RequestError(f"a shape to warm up is {size!r}; give a Request, or the (width, height) of an image in pixels")
    width, height = map(int, size)  # NumPy's would overflow
    if width * height > (most := Image.MAX_IMAGE_PIXELS or math.inf):
        raise RequestError(f"a shape to warm up is {width}x{height}; an image may have {most} pixels")
    noise = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    encoded = io.BytesIO()
    Image.fromarray(noise).save(encoded, format="JPEG")
    return Request(images=[encoded.getvalue()], prompt="Warm up.", max_new_tokens=max_new_tokens, ignore_eos=True)
