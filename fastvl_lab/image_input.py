"""An image as a client gives it, by name or in person: read into bytes, or taken as the pixels that it is.

Every spelling that Transformers' `load_image` reads is read, but for addresses: the lab fetches nothing.
"""

from __future__ import annotations

import binascii
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias
from urllib.parse import unquote_to_bytes
from urllib.request import url2pathname

import numpy as np
from PIL import Image

from fastvl_lab.errors import ImageError, quoted, shortened

# Of one image, which is refused before it is read, and of all images of a request together. Pixels are limited by what the
# headers say (`preprocessor.open_images`).
MAX_IMAGE_BYTES = 100_000_000
MAX_REQUEST_BYTES = 1_000_000_000

ImageSource: TypeAlias = "bytes | str | Path | Image.Image | np.ndarray"

# How files of the types that are read begin: JPEG, PNG, GIF, WebP, BMP (whose size comes before four zeros), TIFF.
_BEGINNING = re.compile(rb"\xff\xd8\xff|\x89PNG|GIF8|RIFF|BM....\0\0\0\0|II\*\0|MM\0\*", re.DOTALL)

# Characters of base64 that hold a beginning; a path that looks like one is shorter, or is there.
_SHORTEST = 32

# The alphabet for URLs and file names in terms of the usual one (RFC 4648, section 5).
_FROM_URL_SAFE = bytes.maketrans(b"-_", b"+/")


@dataclass(frozen=True, kw_only=True, eq=False)
class ImageInput:
    """One image as the request carries it: encoded bytes, or pixels already unpacked by the caller.

    `data` is bytes (an encoded file), a `PIL.Image`, or a uint8 array [height, width] or [height, width, 3]. `label` names it in
    errors. min_pixels, max_pixels: its own limits on the area of the resized image, which go before the request's. asked: the width
    and height that it is to be resized to, to the nearest multiples of a visual token's side (`resized_width` and
    `resized_height` of Qwen's qwen-vl-utils).
    """

    data: bytes | Image.Image | np.ndarray
    label: str
    min_pixels: int | None = None
    max_pixels: int | None = None
    asked: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "label", shortened(self.label, 80))

    @classmethod
    def of(cls, source: ImageSource | ImageInput) -> ImageInput:
        """Take bytes, an image or an array as they are, and read what a name stands for; raises `ImageError`.

        A name is a path, a `file:` URL, a data URI, or base64 alone.
        """
        if isinstance(source, ImageInput):
            return source
        if isinstance(source, bytes):
            _check_bytes(len(source), f"{len(source)} bytes")
            return cls(data=source, label=f"{len(source)} bytes")
        if isinstance(source, Image.Image):
            return cls(data=source, label=f"PIL image {source.width}x{source.height}")
        if isinstance(source, np.ndarray):
            return cls(data=source, label=f"array {'x'.join(map(str, source.shape))}")
        if isinstance(source, Path):
            return cls._of_path(source)
        if isinstance(source, str):
            return cls._of_name(source)
        raise ImageError(f"an image is given as {type(source).__name__}; give a path, encoded bytes, a PIL.Image or a uint8 array")

    @classmethod
    def _of_name(cls, name: str) -> ImageInput:
        stripped = name.strip()
        scheme = stripped[:6].partition(":")[0].lower()
        if scheme == "data":
            return cls.of(_of_data_uri(stripped))
        if scheme in ("http", "https"):
            raise ImageError(f"image {quoted(name)} is an address, and the lab fetches nothing; give a path, bytes or a data URI")
        if scheme == "file":
            return cls._of_path(Path(_path_of_url(stripped)))
        if not name:  # to pathlib the folder that we are in
            raise ImageError("image '' does not exist; give the path of a file, its bytes, or base64 of an image")
        if not os.path.isfile(name) and (data := _of_bare_base64(stripped)) is not None:
            return cls.of(data)
        return cls._of_path(Path(name))

    @classmethod
    def _of_path(cls, path: Path) -> ImageInput:
        named = f"image {quoted(str(path))}"
        try:
            path = path.expanduser()
            if path.exists() and not path.is_file():  # a folder, a pipe, a device: reading might never end
                raise ImageError(f"{named} is no regular file")
            _check_bytes(path.stat().st_size, str(path))
            return cls(data=path.read_bytes(), label=path.name)
        except FileNotFoundError:
            raise ImageError(f"{named} does not exist; give the path of a file, its bytes, or base64 of an image") from None
        except (OSError, RuntimeError) as error:  # RuntimeError: ~user without such a user
            why = shortened(getattr(error, "strerror", None) or str(error))
            raise ImageError(f"{named} cannot be read: {why}") from None
        except ValueError as error:
            if isinstance(error, ImageError):
                raise
            raise ImageError(f"{named} is no path: {shortened(str(error))}") from None


def _path_of_url(url: str) -> str:
    """The path of a `file:` URL on this machine: file:///a, file://localhost/a and file:/a are one (RFC 8089)."""
    path = url[len("file:") :]
    if path.startswith("//"):
        path = path[2:]
        if path[: len("localhost/")].lower() == "localhost/":
            path = path[len("localhost") :]
    return url2pathname(path)


def _of_data_uri(uri: str) -> bytes:
    """The data of a `data:` URI (RFC 2397), whatever its media type and its parameters."""
    header, comma, payload = uri.partition(",")
    if not comma:
        raise ImageError(f"a data URI has no comma, behind which its data would be: {quoted(uri)}")
    if "%" in payload:
        raw = unquote_to_bytes(payload)
        if _BEGINNING.match(raw):
            return raw
        payload = raw.decode("latin-1")
    if any(parameter.strip().lower() == "base64" for parameter in header.split(";")[1:]):
        try:
            return _decoded(payload)
        except ValueError as error:
            raise ImageError(f"a data URI has broken base64: {shortened(str(error))}") from None
    if (data := _of_bare_base64(payload)) is None:  # to `load_image` it is base64, marked or not
        raise ImageError(f"a data URI is not base64: {quoted(header)}")
    return data


def _decoded(text: str) -> bytes:
    """Base64 in any spelling: wrapped, with or without padding, in either alphabet; raises `ValueError`.

    What belongs to neither alphabet is passed over, as RFC 2045 (section 6.8) asks and `load_image` does.
    """
    digits = text.encode("utf-8", "ignore")
    if (b"-" in digits or b"_" in digits) and not (b"+" in digits or b"/" in digits):
        digits = digits.translate(_FROM_URL_SAFE)
    try:
        data = binascii.a2b_base64(digits)
    except binascii.Error:
        data = binascii.a2b_base64(digits + b"==")  # more padding than is missing does no harm
    if not data:
        raise ValueError("it holds no bytes")
    return data


def _of_bare_base64(text: str) -> bytes | None:
    """The image of a text that says nowhere that it is base64, or None: it has to begin as an image's file does."""
    try:
        return _decoded(text) if len(text) >= _SHORTEST and _BEGINNING.match(_decoded(text[:_SHORTEST])) else None
    except ValueError:
        return None


def _check_bytes(n_bytes: int, label: str) -> None:
    if n_bytes > MAX_IMAGE_BYTES:
        raise ImageError(f"image {quoted(label)} has {n_bytes} bytes; the limit is {MAX_IMAGE_BYTES}")
