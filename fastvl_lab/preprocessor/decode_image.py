"""What an image is given as, to upright RGB: first the header, which sizes and limits are read from, then the pixels.

There is one way to RGB, Transformers': `load_image`, which turns by the EXIF orientation and converts the mode, then the image
processor's own conversion, which puts a transparent colour on white. Options map an `Opened` image and what is to become of its
size to a `PIL.Image` or a uint8 tensor [height, width, 3], and take from Pillow only what they make equal pixels of. What is no
image is refused in words.
"""

from __future__ import annotations

import dataclasses
import importlib
import io
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from PIL import ExifTags, Image, ImageOps, JpegImagePlugin, PngImagePlugin, TiffImagePlugin, UnidentifiedImageError
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from fastvl_lab.errors import DeviceError, ImageError, require, shortened
from fastvl_lab.preprocessor.upload import Copy
from fastvl_lab.request import ImageInput, ImageShape, Picture

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")

# Rows of a Pillow image that are copied into an array at once: few enough to stay in the cache.
_ROWS = 64


@dataclass(frozen=True, kw_only=True, eq=False)
class Opened:
    """An image whose header has been read; nothing of it is unpacked, and nothing is held that unpacking would fill.

    source: the encoded bytes, or what the caller gave in their place: a picture, or a uint8 array [height, width] or
    [height, width, 3]. width, height: as stored. orientation: EXIF's, 1 (upright) to 8. is_rgb_jpeg: whether the bytes are a JPEG
    of three colours, which is what options other than Pillow's are given. converts: whether the checkpoint's image processor
    converts pictures itself (`do_convert_rgb`).
    """

    label: str
    source: bytes | Image.Image | np.ndarray
    width: int
    height: int
    orientation: int = 1
    is_rgb_jpeg: bool = False
    converts: bool = True

    @property
    def size(self) -> tuple[int, int]:
        """Width and height, upright where the orientation is known."""
        return (self.height, self.width) if self.orientation >= 5 else (self.width, self.height)


Unpack = Callable[[Opened, ImageShape], Picture]


def open_image(image: ImageInput, *, converts: bool = True) -> Opened:
    """Read the header; raises `ImageError` for what is no image, or one of too many pixels.

    Of a picture of the caller's own the orientation is left to `read_orientation`.
    """
    data, label = image.data, image.label
    if isinstance(data, np.ndarray):
        height, width = _checked(data, label).shape[:2]
        return Opened(label=label, source=data, width=width, height=height, converts=converts)
    if isinstance(data, Image.Image):
        opened = Opened(label=label, source=data, width=data.width, height=data.height, converts=converts)
    else:
        picture = _open(data, label)
        with _broken(label):
            orientation = _orientation_of_bytes(picture, data)
        opened = Opened(
            label=label,
            source=data,
            width=picture.width,
            height=picture.height,
            orientation=orientation,
            is_rgb_jpeg=isinstance(picture, JpegImagePlugin.JpegImageFile) and picture.mode == "RGB",  # MPO, of phones, is one too
            converts=converts,
        )
        if isinstance(picture, TiffImagePlugin.TiffImageFile):
            width, height = _stored_size(picture)
            opened = dataclasses.replace(opened, width=width, height=height)
    if opened.width == 0 or opened.height == 0:
        raise ImageError(f"image {label!r} is {opened.width}x{opened.height}; both sides must be at least 1 pixel")
    return opened


def read_orientation(opened: Opened) -> Opened:
    """With the orientation of a picture of the caller's own, which Pillow may have to unpack for it; raises `ImageError`.

    Limits on pixels are the same for an image and its transpose, so they can be checked before.
    """
    picture = opened.source
    if not isinstance(picture, Image.Image):
        return opened
    with _broken(opened.label):
        picture.load()  # which turns a TIFF upright
        return dataclasses.replace(opened, width=picture.width, height=picture.height, orientation=_orientation(picture.getexif()))


def _orientation(exif: Image.Exif) -> int:
    """The orientation as `ImageOps.exif_transpose` understands it: by value, whatever its type, and upright if it is none."""
    return {number: number for number in range(1, 9)}.get(exif.get(ExifTags.Base.Orientation, 1), 1)


def _orientation_of_bytes(picture: Image.Image, data: bytes) -> int:
    """The orientation that the picture will have been given once it is unpacked, without unpacking it.

    A PNG's may stand behind the pixels, which Pillow unpacks to reach it. But for that, its own way to it is that of all pictures.
    """
    if not isinstance(picture, PngImagePlugin.PngImageFile):
        return _orientation(picture.getexif())
    late = _chunks_behind_pixels(data, animated=picture.is_animated)
    if late is None:
        return _orientation(Image.Image.getexif(picture))
    try:
        header = Image.open(io.BytesIO(late))
    except Exception:  # something that Pillow takes behind the pixels, and not before them
        return _orientation(picture.getexif())
    return _orientation(Image.Image.getexif(header))


def _chunks_behind_pixels(data: bytes, *, animated: bool) -> bytes | None:
    """A PNG without its pixels, and what it says of itself behind them moved to their place; None where that is nothing."""
    at, pixels_at, late = 8, None, []
    while at + 12 <= len(data):
        length, kind = int.from_bytes(data[at : at + 4], "big"), data[at + 4 : at + 8]
        if kind == b"IEND" or (kind == b"fcTL" and animated and pixels_at is not None):
            break
        if kind == b"IDAT" and pixels_at is None:
            pixels_at = at
        if pixels_at is not None and kind in (b"eXIf", b"tEXt", b"zTXt", b"iTXt"):
            late.append(_chunk(kind, data[at + 8 : at + 8 + length]))
        at += 12 + length
    return b"".join([data[:pixels_at], *late, _chunk(b"IEND", b"")]) if late else None


def _chunk(kind: bytes, content: bytes) -> bytes:
    return len(content).to_bytes(4, "big") + kind + content + zlib.crc32(kind + content).to_bytes(4, "big")


def _stored_size(picture: TiffImagePlugin.TiffImageFile) -> tuple[int, int]:
    """A TIFF's width and height as stored: Pillow's are turned already where its own tag asks for it, and by nothing else."""
    turned = picture.tag_v2.get(ExifTags.Base.Orientation) in (5, 6, 7, 8)
    return (picture.height, picture.width) if turned else picture.size


def content_of(opened: Opened) -> bytes:
    """Bytes that are equal for equal images: the encoded ones, or the pixels of an image that came without; raises `ImageError`."""
    if isinstance(opened.source, bytes):
        return opened.source
    pixels = as_tensor(_picture(opened)).numpy()
    return repr(pixels.shape).encode() + pixels.tobytes()


def rgb_of(image: ImageInput) -> Image.Image:
    """An image in any form as upright RGB, with what is transparent as Transformers shows it to a model; raises `ImageError`."""
    return as_image(_picture(read_orientation(open_image(image))))


def with_pillow(opened: Opened, shape: ImageShape) -> Picture:
    """All pixels by Pillow; raises `ImageError`. The caller's own arrays are pixels already, and stay as they are."""
    return _picture(opened)


def _picture(opened: Opened) -> Picture:
    source = opened.source
    if isinstance(source, np.ndarray):
        return _of_array(source)
    picture = _rgb(_open(source, opened.label) if isinstance(source, bytes) else source, opened)
    if picture.size != opened.size:  # the prompt was written for another grid
        raise ImageError(
            f"image {opened.label!r} says that it is {opened.size[0]}x{opened.size[1]}, and is {picture.width}x{picture.height}"
        )
    return picture


def _rgb(picture: Image.Image, opened: Opened) -> Image.Image:
    """What `load_image` and then the image processor make of a picture; no copy where it is upright RGB already."""
    with _broken(opened.label):
        picture.load()
        if opened.orientation != 1:
            picture = ImageOps.exif_transpose(picture)
    with _broken(opened.label, "cannot be turned into RGB"):
        if picture.mode != "RGB":
            picture = picture.convert("RGB")
        if opened.converts and picture.info.get("transparency") is not None:  # from a palette, or a colour that stands for it
            channels_first = Qwen2VLImageProcessorPil().process_image(picture, do_convert_rgb=True)
            picture = Image.fromarray(np.ascontiguousarray(channels_first.transpose(1, 2, 0)))
        return picture


def with_draft(opened: Opened, shape: ImageShape) -> Picture:
    """A JPEG at the smallest of 1/1, 1/2, 1/4, 1/8 that is no smaller than the resized image, scaled in the frequency domain.

    Other formats are unpacked in full, and so are images of the caller's own.
    """
    if not opened.is_rgb_jpeg:
        return with_pillow(opened, shape)
    assert isinstance(opened.source, bytes)
    picture, wanted = _open(opened.source, opened.label), (shape.resized_width, shape.resized_height)
    picture.draft("RGB", wanted[::-1] if opened.orientation >= 5 else wanted)
    return _rgb(picture, opened)


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
        pixels = simplejpeg.decode_jpeg(opened.source, colorspace="RGB")
    except ValueError:
        return with_pillow(opened, shape)
    return _upright(torch.from_numpy(pixels), opened.orientation)


def with_torchvision(opened: Opened, shape: ImageShape, copy: Copy, device: torch.device) -> Picture:
    """A JPEG by nvJPEG into the device's memory; other formats by Pillow on the host, then copied.

    Raises `ImageError` for a broken image, and `DeviceError` where nvJPEG cannot unpack what Pillow can.
    """
    if not opened.is_rgb_jpeg:
        return copy(as_tensor(with_pillow(opened, shape)))
    torchvision = importlib.import_module("torchvision.io")
    assert isinstance(opened.source, bytes)
    encoded = torch.frombuffer(bytearray(opened.source), dtype=torch.uint8)
    try:
        pixels = torchvision.decode_jpeg(encoded, mode=torchvision.ImageReadMode.RGB, device=device)  # [3, height, width]
    except RuntimeError as error:
        with_pillow(opened, shape)
        raise DeviceError(
            f"nvJPEG cannot unpack image {opened.label!r}, which Pillow can ({shortened(str(error))}); choose another decode"
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
def _broken(label: str, what: str = "is broken") -> Iterator[None]:
    """Turn what libraries raise for broken data into our error."""
    try:
        yield
    except (MemoryError, torch.OutOfMemoryError, ImageError):
        raise
    except Exception as error:  # Pillow and its plugins report broken data by many types, struct.error among them
        raise ImageError(f"image {label!r} {what}: {shortened(str(error))}") from None


def _open(data: bytes, label: str) -> Image.Image:
    if len(data) == 0:
        raise ImageError(f"image {label!r} is empty (0 bytes)")
    limit = Image.MAX_IMAGE_PIXELS
    with _broken(label):
        try:
            picture = Image.open(io.BytesIO(data), formats=FORMATS)
            n_pixels = picture.width * picture.height
            if limit is not None and n_pixels > limit:  # Pillow only warns up to twice as many, and filters are of all threads
                raise Image.DecompressionBombError(f"it has {n_pixels} pixels")
            return picture
        except UnidentifiedImageError:
            choices = ", ".join(FORMATS)
            raise ImageError(f"{label!r} is not an image of a supported type; the choices are {choices}") from None
        except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
            raise ImageError(f"image {label!r} is too large: {shortened(str(error))}; the limit is {limit} pixels") from None


def _checked(array: np.ndarray, label: str) -> np.ndarray:
    if array.dtype != np.uint8 or array.ndim not in (2, 3) or (array.ndim == 3 and array.shape[2] != 3) or array.size == 0:
        raise ImageError(
            f"image {label!r} is {array.dtype} of shape {array.shape}; an array must be uint8, [height, width, 3] or "
            f"[height, width], with no side of zero"
        )
    return array
