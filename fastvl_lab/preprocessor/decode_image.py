"""Encoded bytes to RGB pixels, and a clear refusal of what is no image."""

from __future__ import annotations

import io
import warnings
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from fastvl_lab.errors import ImageError
from fastvl_lab.request import ImageInput, ImageSource

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")


def decode_with_pillow(images: Sequence[ImageSource | ImageInput]) -> list[Image.Image]:
    """RGB images, upright by their EXIF orientation, as Transformers' `load_image` gives them; raises `ImageError`."""
    return [_decode(ImageInput.of(image)) for image in images]


def _decode(image: ImageInput) -> Image.Image:
    if isinstance(image.data, bytes):
        picture = _open(image.data, image.label)
    elif isinstance(image.data, np.ndarray):
        picture = _of_array(image.data)
    else:
        picture = image.data
    if picture.width == 0 or picture.height == 0:
        raise ImageError(f"image {image.label!r} is {picture.width}x{picture.height}; both sides must be at least 1 pixel")
    try:
        picture = ImageOps.exif_transpose(picture)
        return picture if picture.mode == "RGB" else picture.convert("RGB")
    except MemoryError:
        raise
    except Exception as error:  # Pillow and its plugins report broken data by many types, struct.error among them
        raise ImageError(f"image {image.label!r} is broken: {error}") from None


def _open(data: bytes, label: str) -> Image.Image:
    if len(data) == 0:
        raise ImageError(f"image {label!r} is empty (0 bytes)")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            return Image.open(io.BytesIO(data), formats=FORMATS)
    except UnidentifiedImageError:
        raise ImageError(f"{label!r} is not an image of a supported type; the choices are {', '.join(FORMATS)}") from None
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise ImageError(f"image {label!r} is too large: {error}; the limit is {Image.MAX_IMAGE_PIXELS} pixels") from None
    except MemoryError:
        raise
    except Exception as error:  # as above
        raise ImageError(f"image {label!r} is broken: {error}") from None


def _of_array(array: np.ndarray) -> Image.Image:
    if array.dtype != np.uint8 or array.ndim not in (2, 3) or (array.ndim == 3 and array.shape[2] != 3) or array.size == 0:
        raise ImageError(
            f"an image array is {array.dtype} of shape {array.shape}; it must be uint8, [height, width, 3] or [height, width], "
            f"with no side of zero"
        )
    return Image.fromarray(array)
