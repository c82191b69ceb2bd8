"""What every way of preprocessing shares: the size an image is resized to, and how it is cut into patches."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from fastvl_lab.checkpoint import Checkpoint
from fastvl_lab.checkpoint.image_settings import ImageSettings
from fastvl_lab.errors import CheckpointError, ImageError, RequestError
from fastvl_lab.request import Grid, ImageInput, ImageShape, Request

MAX_ASPECT_RATIO = 200


class AreaLimits(NamedTuple):
    """The least and greatest area of a resized image, in pixels, and the width and height that it is to have, if that is said."""

    least: int
    most: int
    asked: tuple[int, int] | None = None


def own_settings(checkpoint: Checkpoint) -> ImageSettings:
    """The checkpoint's image settings; raises `CheckpointError` for those that the lab's own preprocessing has not."""
    settings = checkpoint.image_settings
    if settings.unlike:
        raise CheckpointError(
            f"{checkpoint.image_processor_file} has {settings.unlike[0]}; the lab's own preprocessing rescales, normalises and "
            f"has resample=3 (bicubic): choose preprocessor.resize=transformers"
        )
    return settings


def smart_resize(height: int, width: int, *, factor: int, min_pixels: int, max_pixels: int) -> tuple[int, int]:
    """The resized (height, width): multiples of `factor` near the original, with an area inside the limits.

    A side never goes under one `factor`, so that very thin images may exceed `max_pixels`, as in Transformers.

    factor: patch_size * merge_size. Sides are rounded to the nearest multiple (halves to even); an area over `max_pixels` is scaled
    down rounding down, one under `min_pixels` up rounding up. Source: `smart_resize` in Qwen's qwen-vl-utils and in Transformers.
    Raises `ImageError` if one side is over 200 times the other.
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


def area_limits(image: ImageInput, request: Request, settings: ImageSettings) -> AreaLimits:
    """The limits of an image: its own where it has any, else the request's, else the checkpoint's; raises `RequestError`."""
    owners = (("the image's", image), ("the request's", request), ("the checkpoint's", settings))

    def limit(name: str) -> tuple[int, int]:
        """How far down the owners the limit stands, and the limit."""
        return next((at, getattr(owner, name)) for at, (_, owner) in enumerate(owners) if getattr(owner, name) is not None)

    (least_at, least), (most_at, most) = limit("min_pixels"), limit("max_pixels")
    if least > most:
        first, second = sorted((least_at, most_at))
        where = ("beside the image", "in the request")[first]
        raise RequestError(
            f"min_pixels {least} is over max_pixels {most}: one is {owners[first][0]}, the other {owners[second][0]}; "
            f"set both {where}"
        )
    return AreaLimits(least, most, image.asked)


def shapes_of(sizes: Sequence[tuple[int, int]], limits: Sequence[AreaLimits], checkpoint: Checkpoint) -> tuple[ImageShape, ...]:
    """What becomes of images of these widths and heights under their limits; raises `ImageError` and `RequestError`."""
    shapes = []
    for number, (size, limit) in enumerate(zip(sizes, limits, strict=True), start=1):
        try:
            shapes.append(_shape(*size, limit, checkpoint.image_settings))
        except ImageError as error:
            raise ImageError(f"{error}{f' (image {number} of {len(sizes)})' if len(sizes) > 1 else ''}") from None
    visual_tokens = sum(shape.visual_tokens for shape in shapes)
    if visual_tokens > checkpoint.session_len:
        raise RequestError(
            f"the images alone have {visual_tokens} visual tokens, over session_len, {checkpoint.session_len} tokens (the model's "
            f"own limit is {checkpoint.max_length}); set a smaller max_pixels"
        )
    return tuple(shapes)


def _shape(width: int, height: int, limits: AreaLimits, settings: ImageSettings) -> ImageShape:
    wide, high = limits.asked or (width, height)
    resized_height, resized_width = smart_resize(
        high, wide, factor=settings.factor, min_pixels=limits.least, max_pixels=limits.most
    )
    grid = Grid(1, resized_height // settings.patch_size, resized_width // settings.patch_size)
    return ImageShape(
        width=width,
        height=height,
        resized_width=resized_width,
        resized_height=resized_height,
        grid=grid,
        visual_tokens=grid.visual_tokens(settings.merge_size),
    )
