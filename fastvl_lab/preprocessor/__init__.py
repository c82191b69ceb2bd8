"""Slot 1: image bytes to patches."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from PIL import Image

from fastvl_lab.checkpoint import Checkpoint
from fastvl_lab.preprocessor import patchify, resize, stock
from fastvl_lab.recipe import Preprocessor
from fastvl_lab.request import Pixels, Request

Preprocess = Callable[[Sequence[Image.Image], Request], Pixels]


def bind(slot: Preprocessor, checkpoint: Checkpoint) -> Preprocess:
    """The function that turns decoded images into patches, as the slot's toggles say."""
    if slot.resize == "transformers":
        return lambda images, request: stock.preprocess(images, request, checkpoint)
    layout = patchify.PatchLayout.of(checkpoint.image_processor)
    to_patches = {"numpy": patchify.with_numpy, "torch": patchify.with_torch}[slot.patchify]

    def preprocess(images: Sequence[Image.Image], request: Request) -> Pixels:
        limits = checkpoint.pixel_limits(request.min_pixels, request.max_pixels)
        shapes = tuple(resize.shape_of(image.size, layout, limits) for image in images)
        resized = [resize.with_pillow(image, shape) for image, shape in zip(images, shapes, strict=True)]
        return Pixels(patches=to_patches(resized, layout), shapes=shapes)

    return preprocess
