"""Resizing by options other than the stock processor's: antialiased bicubic in two passes of one axis each.

Every option ends with uint8 [resized_height, resized_width, 3]. All of them round to bytes between the two passes, as Pillow and
torch do; so the order of the passes shows: on noise, where the rounding also clips, two orders differ by up to 22 of 255.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import PIL
import torch
import torch.nn.functional as F
from PIL import Image

from fastvl_lab.errors import ImageError
from fastvl_lab.preprocessor.upload import Copy
from fastvl_lab.request import ImageShape, Picture

Resize = Callable[[Picture, ImageShape], torch.Tensor]
Each = Callable[..., Iterable[Any]]

# Lines of a strip that one thread resizes.
_STRIP = 64

_PILLOW = tuple(int(part) for part in PIL.__version__.split(".")[:2])


def columns_first(width: int, height: int, shape: ImageShape) -> bool:
    """Whether Pillow shrinks the height before the width: libImaging/Resample.c, in 12.2 and 12.3 `Image.resize`; before, never."""
    less_height, less_width = height - shape.resized_height, width - shape.resized_width
    if _PILLOW >= (13, 0):
        return less_height > max(0, 2 * less_width)
    return _PILLOW >= (12, 2) and height > 100 * width and less_height > 0


def with_pillow(image: Picture, shape: ImageShape) -> torch.Tensor:
    """Pillow's resize in one call; bit-equal to the stock Pillow backend's."""
    assert isinstance(image, Image.Image)
    size = (shape.resized_width, shape.resized_height)
    return torch.from_numpy(np.array(image if image.size == size else image.resize(size, Image.Resampling.BICUBIC)))


def with_pillow_in_strips(each: Each, n_threads: int) -> Resize:
    """The same passes, each cut along its other axis into strips that `each`, a map over threads, works on at once.

    A pass along one axis treats every line of the other alike and alone, so the result is bit-equal whatever the cuts.
    """

    def resize(image: Picture, shape: ImageShape) -> torch.Tensor:
        assert isinstance(image, Image.Image)
        axes = ("height", "width") if columns_first(*image.size, shape) else ("width", "height")
        for axis in axes:
            image = _pass_in_strips(image, axis, shape, each, n_threads)
        return torch.from_numpy(np.array(image))

    return resize


def _pass_in_strips(image: Image.Image, axis: str, shape: ImageShape, each: Each, n_threads: int) -> Image.Image:
    width, height = image.size
    new_width, new_height = (shape.resized_width, height) if axis == "width" else (width, shape.resized_height)
    if (new_width, new_height) == (width, height):
        return image
    resized = Image.new("RGB", (new_width, new_height))

    def one(start: int, end: int) -> None:
        if axis == "width":
            box, size = (0, start, width, end), (new_width, end - start)
        else:
            box, size = (start, 0, end, height), (end - start, new_height)
        resized.paste(image.crop(box).resize(size, Image.Resampling.BICUBIC), box[:2])

    cuts = _cuts(height if axis == "width" else width, n_threads)
    list(each(one, cuts[:-1], cuts[1:]))
    return resized


def _cuts(length: int, n_threads: int) -> Sequence[int]:
    """Where to cut `length` lines: a strip a thread at least, and none so thick that the strips at work make up the image again."""
    n_strips = min(length, max(n_threads, length // _STRIP))
    return [length * i // n_strips for i in range(n_strips + 1)]


def with_torch(*, as_pillow: bool) -> Resize:
    """torch's uint8 kernel on interleaved channels: the kernel of Transformers' torchvision backend.

    as_pillow: whether to take Pillow's order of passes, which is then at most one level a pass off Pillow's result; else torch's
    own, the width first.
    """

    def resize(pixels: Picture, shape: ImageShape) -> torch.Tensor:
        assert isinstance(pixels, torch.Tensor)
        between, last = _sizes(pixels, shape, as_pillow=as_pillow)
        # [1, 3, height, width], interleaved: the batch dimension is added first, or its stride would hide the layout from torch,
        # which would then take the planes apart and double the time.
        image = pixels[None].permute(0, 3, 1, 2)
        if between[0] == last[0]:  # the height first; the other order is one call, and faster so
            image = _bicubic(image, between)
        return _bicubic(image, last)[0].permute(1, 2, 0)

    return resize


def on_device(copy: Copy, *, as_pillow: bool) -> Resize:
    """Send the whole image as bytes and resize it on the device in float32, rounded to bytes after each pass.

    torch has no uint8 kernel of this kind for CUDA; torchvision computes in float32 there too, but rounds only once.
    """

    def resize(pixels: Picture, shape: ImageShape) -> torch.Tensor:
        assert isinstance(pixels, torch.Tensor)
        image = copy(pixels).permute(2, 0, 1)[None].float()
        for size in _sizes(pixels, shape, as_pillow=as_pillow):
            try:
                image = _bicubic(image, size).round_().clamp_(0, 255)
            except RuntimeError as error:
                if "shared memory" not in str(error):
                    raise
                raise ImageError(
                    f"an image of {pixels.shape[1]}x{pixels.shape[0]} cannot be shrunk to {shape.resized_width}x"
                    f"{shape.resized_height} by torch's kernel on the device ({error}); choose preprocessor.resize=torch"
                ) from None
        return image[0].permute(1, 2, 0).to(torch.uint8)

    return resize


def _sizes(pixels: torch.Tensor, shape: ImageShape, *, as_pillow: bool) -> tuple[tuple[int, int], tuple[int, int]]:
    """Height and width after each of the two passes."""
    height, width = pixels.shape[:2]
    last = (shape.resized_height, shape.resized_width)
    first = (last[0], width) if as_pillow and columns_first(width, height, shape) else (height, last[1])
    return first, last


def _bicubic(image: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    return image if image.shape[2:] == size else F.interpolate(image, size, mode="bicubic", antialias=True)
