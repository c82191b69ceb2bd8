"""The size an image is resized to, and the resize itself."""

from __future__ import annotations

import math

import numpy as np
from PIL import Image

from fastvl_lab.errors import ImageError, RequestError
from fastvl_lab.preprocessor.patchify import PatchLayout
from fastvl_lab.request import Grid, ImageShape

MAX_ASPECT_RATIO = 200


def smart_resize(height: int, width: int, *, factor: int, min_pixels: int, max_pixels: int) -> tuple[int, int]:
    """The resized (height, width): multiples of `factor` near the original, with an area inside the limits.

    factor: patch_size * merge_size, 28 for Qwen2.5-VL and 32 for Qwen3-VL. Sides are rounded to the nearest multiple (halves
    to even); an area over `max_pixels` is scaled down rounding down, one under `min_pixels` up rounding up. Source:
    `smart_resize` in Qwen's qwen-vl-utils and in Transformers. Raises `ImageError` if one side is over 200 times the other.
    """
    if max(height, width) > MAX_ASPECT_RATIO * min(height, width):
        raise ImageError(
            f"an image of {width}x{height} has an aspect ratio of {max(height, width) / min(height, width):.0f}; "
            f"the limit is {MAX_ASPECT_RATIO}"
        )
    rows, columns = round(height / factor), round(width / factor)
    if rows * columns * factor**2 > max_pixels:
        shrink = math.sqrt(height * width / max_pixels)
        rows = max(1, math.floor(height / shrink / factor))
        columns = max(1, math.floor(width / shrink / factor))
    elif rows * columns * factor**2 < min_pixels:
        grow = math.sqrt(min_pixels / (height * width))
        rows, columns = math.ceil(height * grow / factor), math.ceil(width * grow / factor)
    return rows * factor, columns * factor


def shape_of(size: tuple[int, int], layout: PatchLayout, limits: tuple[int, int]) -> ImageShape:
    """What becomes of an image of (width, height) under limits (min_pixels, max_pixels); raises for impossible ones."""
    width, height = size
    least, most = limits
    if least > most:
        raise RequestError(
            f"min_pixels {least} is over max_pixels {most}: one is the request's, the other the checkpoint's; "
            f"set both in the request"
        )
    resized_height, resized_width = smart_resize(height, width, factor=layout.factor, min_pixels=least, max_pixels=most)
    grid = Grid(1, resized_height // layout.patch_size, resized_width // layout.patch_size)
    return ImageShape(
        width=width,
        height=height,
        resized_width=resized_width,
        resized_height=resized_height,
        grid=grid,
        visual_tokens=grid.h * grid.w // layout.merge_size**2,
    )


def with_pillow(image: Image.Image, shape: ImageShape) -> np.ndarray:
    """Pillow's bicubic resize; uint8 [resized_height, resized_width, 3], bit-equal to the stock Pillow backend's."""
    size = (shape.resized_width, shape.resized_height)
    return np.asarray(image if image.size == size else image.resize(size, Image.Resampling.BICUBIC))
