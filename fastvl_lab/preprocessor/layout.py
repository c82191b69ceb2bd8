"""What every way of preprocessing shares: the size an image is resized to, and how it is cut into patches."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image

from fastvl_lab.checkpoint import Checkpoint
from fastvl_lab.errors import CheckpointError, ImageError, RequestError
from fastvl_lab.request import Grid, ImageShape, Request

MAX_ASPECT_RATIO = 200


@dataclass(frozen=True, kw_only=True)
class PatchLayout:
    """How a checkpoint cuts and normalises pixels (preprocessor_config.json)."""

    patch_size: int
    merge_size: int
    temporal_patch_size: int
    rescale: float
    mean: tuple[float, ...]
    std: tuple[float, ...]
    scale_shift: tuple[torch.Tensor, torch.Tensor]

    @classmethod
    def of(cls, checkpoint: Checkpoint) -> PatchLayout:
        """Read a checkpoint's image processor; raises `CheckpointError` for settings that the lab's own preprocessing has not."""
        image_processor = checkpoint.image_processor
        expected = {"do_rescale": True, "do_normalize": True, "resample": Image.Resampling.BICUBIC}
        for name, value in expected.items():
            if getattr(image_processor, name) != value:
                raise CheckpointError(
                    f"preprocessor_config.json has {name}={getattr(image_processor, name)!r}; the lab's own preprocessing has "
                    f"{value!r} only: choose preprocessor.resize=transformers"
                )
        return cls(
            patch_size=image_processor.patch_size,
            merge_size=image_processor.merge_size,
            temporal_patch_size=image_processor.temporal_patch_size,
            rescale=image_processor.rescale_factor,
            mean=tuple(image_processor.image_mean),
            std=tuple(image_processor.image_std),
            scale_shift=checkpoint.scale_shift(),
        )

    @property
    def factor(self) -> int:
        """Pixels along one side of a visual token; resized sides are multiples of it."""
        return self.patch_size * self.merge_size


def smart_resize(height: int, width: int, *, factor: int, min_pixels: int, max_pixels: int) -> tuple[int, int]:
    """The resized (height, width): multiples of `factor` near the original, with an area inside the limits.

    A side never goes under one `factor`, so that very thin images may exceed `max_pixels`, as in Transformers.

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


def shapes_of(sizes: Sequence[tuple[int, int]], request: Request, checkpoint: Checkpoint) -> tuple[ImageShape, ...]:
    """What becomes of images of these widths and heights; raises `ImageError` and `RequestError`."""
    least, most = checkpoint.pixel_limits(request.min_pixels, request.max_pixels)
    if least > most:
        raise RequestError(
            f"min_pixels {least} is over max_pixels {most}: one is the request's, the other the checkpoint's; "
            f"set both in the request"
        )
    shapes = []
    for number, size in enumerate(sizes, start=1):
        try:
            shapes.append(_shape(*size, checkpoint.image_processor, least, most))
        except ImageError as error:
            raise ImageError(f"{error}{f' (image {number} of {len(sizes)})' if len(sizes) > 1 else ''}") from None
    visual_tokens = sum(shape.visual_tokens for shape in shapes)
    if visual_tokens > checkpoint.session_len:
        raise RequestError(
            f"the images alone have {visual_tokens} visual tokens, over session_len, {checkpoint.session_len} tokens (the model's "
            f"own limit is {checkpoint.max_length}); set a smaller max_pixels"
        )
    return tuple(shapes)


def _shape(width: int, height: int, image_processor: Any, least: int, most: int) -> ImageShape:
    patch, merge = image_processor.patch_size, image_processor.merge_size
    resized_height, resized_width = smart_resize(height, width, factor=patch * merge, min_pixels=least, max_pixels=most)
    grid = Grid(1, resized_height // patch, resized_width // patch)
    return ImageShape(
        width=width,
        height=height,
        resized_width=resized_width,
        resized_height=resized_height,
        grid=grid,
        visual_tokens=grid.visual_tokens(merge),
    )
