"""Encoded bytes to RGB pixels, in two steps: the header, which sizes and limits are read from, then the pixels.

Decoders map an `Opened` image and what is to become of its size to upright RGB: a `PIL.Image`, or a uint8 tensor
[height, width, 3]. What is no image is refused in words.
"""

from __future__ import annotations

import dataclasses
import importlib
import io
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from PIL import ExifTags, Image, ImageOps, JpegImagePlugin, TiffImagePlugin, UnidentifiedImageError

from fastvl_lab.errors import DeviceError, ImageError, require
from fastvl_lab.preprocessor.upload import Copy
from fastvl_lab.request import ImageInput, ImageShape, Picture

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")

# Rows of a Pillow image that are copied into an array at once: few enough to stay in the cache.
_ROWS = 64


@dataclass(frozen=True, kw_only=True, eq=False)
class Opened:
    """An image whose header has been read.

    picture: Pillow's image, its pixels not decoded yet where it came as bytes, or the caller's uint8 array [height, width] or
    [height, width, 3]. data: the encoded bytes, or None. orientation: EXIF's, 1 (upright) to 8, once `read_orientation` has it.
    """

    label: str
    picture: Image.Image | np.ndarray
    data: bytes | None
    orientation: int = 1

    @property
    def size(self) -> tuple[int, int]:
        """Width and height, upright where the orientation is known."""
        if isinstance(self.picture, np.ndarray):
            height, width = self.picture.shape[:2]
        else:
            width, height = self.picture.size
        return (height, width) if self.orientation >= 5 else (width, height)

    @property
    def is_rgb_jpeg(self) -> bool:
        """Whether the bytes are a JPEG of three colours, which is what decoders other than Pillow's are given."""
        if self.data is None or not isinstance(self.picture, JpegImagePlugin.JpegImageFile):  # MPO, of phones, is one too
            return False
        return self.picture.mode == "RGB"


Decoder = Callable[[Opened, ImageShape], Picture]


def open_image(image: ImageInput) -> Opened:
    """Read the header; raises `ImageError` for what is no image, or one of too many pixels."""
    if isinstance(image.data, np.ndarray):
        return Opened(label=image.label, picture=_checked(image.data, image.label), data=None)
    if isinstance(image.data, bytes):
        picture, encoded = _open(image.data, image.label), image.data
    else:
        picture, encoded = image.data, None
        with _broken(image.label):
            picture.load()  # here, on one thread: the same picture may be in the request twice
    if picture.width == 0 or picture.height == 0:
        raise ImageError(f"image {image.label!r} is {picture.width}x{picture.height}; both sides must be at least 1 pixel")
    return Opened(label=image.label, picture=picture, data=encoded)


def read_orientation(opened: Opened) -> Opened:
    """With the EXIF orientation read, for which a PNG may have to be decoded: it can stand behind the pixels.

    Limits on pixels are the same for an image and its transpose, so they can be checked before. Raises `ImageError`.
    """
    if isinstance(opened.picture, np.ndarray | TiffImagePlugin.TiffImageFile):  # Pillow turns TIFF upright itself
        return opened
    with _broken(opened.label):
        orientation = opened.picture.getexif().get(ExifTags.Base.Orientation, 1)
    known = isinstance(orientation, int) and 1 <= orientation <= 8
    return dataclasses.replace(opened, orientation=orientation if known else 1)


def content_of(opened: Opened) -> bytes:
    """Bytes that are equal for equal images: the encoded ones, or the pixels of an image that came without; raises `ImageError`."""
    if opened.data is not None:
        return opened.data
    pixels = as_tensor(with_pillow(opened)).numpy()
    return repr(pixels.shape).encode() + pixels.tobytes()


def with_pillow(opened: Opened, shape: ImageShape | None = None) -> Picture:
    """All pixels by Pillow, upright by their EXIF orientation, as Transformers' `load_image` gives them; raises `ImageError`.

    The caller's own arrays need no decoder, and stay as they are.
    """
    if isinstance(opened.picture, np.ndarray):
        return _of_array(opened.picture)
    picture = opened.picture
    with _broken(opened.label):
        picture.load()
        if opened.orientation != 1:
            picture = ImageOps.exif_transpose(picture)
        return picture if picture.mode == "RGB" else picture.convert("RGB")


def with_draft(opened: Opened, shape: ImageShape) -> Picture:
    """A JPEG at the smallest of 1/1, 1/2, 1/4, 1/8 that is no smaller than the resized image, scaled in the frequency domain.

    Other formats, and images of the caller's own, are decoded in full.
    """
    if opened.is_rgb_jpeg:
        assert isinstance(opened.picture, Image.Image)
        wanted = (shape.resized_width, shape.resized_height)
        opened.picture.draft("RGB", wanted[::-1] if opened.orientation >= 5 else wanted)
    return with_pillow(opened, shape)


def with_turbojpeg(opened: Opened, shape: ImageShape) -> Picture:
    """A JPEG by libjpeg-turbo straight into an array, without Pillow's four bytes a pixel.

    The pixels are Pillow's, bit for bit, where Pillow was built on libjpeg-turbo too, as its wheels are. Other formats, greyscale
    and CMYK go to Pillow, and so does data that libjpeg-turbo finds fault with: Pillow says whether it is an image. Raises
    `ImageError`.
    """
    if not opened.is_rgb_jpeg:
        return with_pillow(opened, shape)
    simplejpeg = require("simplejpeg", "fast")
    try:
        pixels = simplejpeg.decode_jpeg(opened.data, colorspace="RGB")
    except ValueError:
        return with_pillow(opened, shape)
    return _upright(torch.from_numpy(pixels), opened.orientation)


def with_torchvision(opened: Opened, shape: ImageShape, copy: Copy, device: torch.device) -> Picture:
    """A JPEG by nvJPEG into the device's memory; other formats by Pillow on the host, then copied.

    Raises `ImageError` for a broken image, and `DeviceError` where nvJPEG cannot decode what Pillow can.
    """
    if not opened.is_rgb_jpeg:
        return copy(as_tensor(with_pillow(opened, shape)))
    torchvision = importlib.import_module("torchvision.io")
    assert opened.data is not None
    encoded = torch.frombuffer(bytearray(opened.data), dtype=torch.uint8)
    try:
        pixels = torchvision.decode_jpeg(encoded, mode=torchvision.ImageReadMode.RGB, device=device)  # [3, height, width]
    except RuntimeError as error:
        with_pillow(opened, shape)
        raise DeviceError(
            f"nvJPEG cannot decode image {opened.label!r}, which Pillow can ({error}); choose another decode"
        ) from None
    return _upright(pixels.permute(1, 2, 0), opened.orientation)


def as_tensor(picture: Picture) -> torch.Tensor:
    """uint8 [height, width, 3]."""
    if isinstance(picture, torch.Tensor):
        return picture
    pixels = np.empty((picture.height, picture.width, 3), np.uint8)
    for top in range(0, picture.height, _ROWS):  # in strips: Pillow would make two whole copies on the way
        bottom = min(top + _ROWS, picture.height)
        pixels[top:bottom] = np.asarray(picture.crop((0, top, picture.width, bottom)))
    return torch.from_numpy(pixels)


def as_image(picture: Picture) -> Image.Image:
    return picture if isinstance(picture, Image.Image) else Image.fromarray(picture.numpy())


def _of_array(array: np.ndarray) -> torch.Tensor:
    pixels = torch.from_numpy(np.require(array, requirements=["C", "W"]))
    return pixels if pixels.ndim == 3 else pixels[:, :, None].repeat(1, 1, 3)


def _upright(pixels: torch.Tensor, orientation: int) -> torch.Tensor:
    """Undo an EXIF orientation; pixels: [height, width, 3]."""
    if orientation >= 5:
        pixels = pixels.transpose(0, 1)
    # After the transposition: which sides are still the wrong way round.
    flipped = {1: (), 2: (1,), 3: (0, 1), 4: (0,), 5: (), 6: (1,), 7: (0, 1), 8: (0,)}[orientation]
    return (pixels.flip(flipped) if flipped else pixels).contiguous()


@contextmanager
def _broken(label: str) -> Iterator[None]:
    """Turn what decoders raise for broken data into our error."""
    try:
        yield
    except (MemoryError, torch.OutOfMemoryError, ImageError):
        raise
    except Exception as error:  # Pillow and its plugins report broken data by many types, struct.error among them
        raise ImageError(f"image {label!r} is broken: {error}") from None


def _open(data: bytes, label: str) -> Image.Image:
    if len(data) == 0:
        raise ImageError(f"image {label!r} is empty (0 bytes)")
    with _broken(label), warnings.catch_warnings():
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        try:
            return Image.open(io.BytesIO(data), formats=FORMATS)
        except UnidentifiedImageError:
            choices = ", ".join(FORMATS)
            raise ImageError(f"{label!r} is not an image of a supported type; the choices are {choices}") from None
        except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
            limit = Image.MAX_IMAGE_PIXELS
            raise ImageError(f"image {label!r} is too large: {error}; the limit is {limit} pixels") from None


def _checked(array: np.ndarray, label: str) -> np.ndarray:
    if array.dtype != np.uint8 or array.ndim not in (2, 3) or (array.ndim == 3 and array.shape[2] != 3) or array.size == 0:
        raise ImageError(
            f"image {label!r} is {array.dtype} of shape {array.shape}; an array must be uint8, [height, width, 3] or "
            f"[height, width], with no side of zero"
        )
    return array
