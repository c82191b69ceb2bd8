"""Slot 1: image bytes to patches."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from PIL import Image

from fastvl_lab.checkpoint import Checkpoint
from fastvl_lab.preprocessor import patchify, resize, stock
from fastvl_lab.preprocessor.decode_image import decode_with_pillow
from fastvl_lab.preprocessor.layout import PatchLayout, shapes_of
from fastvl_lab.recipe import Preprocessor
from fastvl_lab.request import ImageInput, Pixels, Request


@dataclass(frozen=True, kw_only=True)
class BoundPreprocessor:
    """The two stages of the slot: encoded images to RGB, and RGB to patches."""

    decode: Callable[[Sequence[ImageInput]], list[Image.Image]]
    preprocess: Callable[[Sequence[Image.Image], Request], Pixels]


def bind(slot: Preprocessor, checkpoint: Checkpoint) -> BoundPreprocessor:
    """The functions that the slot's toggles name; raises `CheckpointError` where the checkpoint asks for what they have not."""
    decode = {"pillow": decode_with_pillow}[slot.decode]
    if slot.resize == "transformers":
        return BoundPreprocessor(decode=decode, preprocess=lambda images, request: stock.preprocess(images, request, checkpoint))
    layout = PatchLayout.of(checkpoint.image_processor)
    resize_to = {"pillow": resize.with_pillow}[slot.resize]
    to_patches = {"numpy": patchify.with_numpy, "torch": patchify.with_torch}[slot.patchify]

    def preprocess(images: Sequence[Image.Image], request: Request) -> Pixels:
        shapes = shapes_of(images, request, checkpoint)
        resized = [resize_to(image, shape) for image, shape in zip(images, shapes, strict=True)]
        return Pixels(patches=to_patches(resized, layout), shapes=shapes)

    return BoundPreprocessor(decode=decode, preprocess=preprocess)
