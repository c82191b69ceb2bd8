"""Slot 1: image bytes to patches."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from PIL import Image

from fastvl_lab.checkpoint import Checkpoint
from fastvl_lab.preprocessor import patchify, resize, stock, upload
from fastvl_lab.preprocessor.decode_image import decode_with_pillow
from fastvl_lab.preprocessor.layout import PatchLayout, shapes_of
from fastvl_lab.recipe import Preprocessor
from fastvl_lab.request import ImageInput, PatchFormat, Pixels, Request


@dataclass(frozen=True, kw_only=True)
class BoundPreprocessor:
    """The stages of the slot: encoded images to RGB, RGB to patches, patches to the device, where they have `patch_format`."""

    decode: Callable[[Sequence[ImageInput]], list[Image.Image]]
    preprocess: Callable[[Sequence[Image.Image], Request], Pixels]
    upload: upload.PatchUpload
    patch_format: PatchFormat


def bind(slot: Preprocessor, checkpoint: Checkpoint) -> BoundPreprocessor:
    """The functions that the slot's toggles name; raises `CheckpointError` where the checkpoint asks for what they have not."""
    decode = {"pillow": decode_with_pillow}[slot.decode]
    device, dtype, stock_frames = checkpoint.device, checkpoint.dtype, checkpoint.image_processor.temporal_patch_size
    if slot.resize == "transformers":
        return BoundPreprocessor(
            decode=decode,
            preprocess=lambda images, request: stock.preprocess(images, request, checkpoint),
            upload=upload.normalised(device, dtype),
            patch_format=PatchFormat(frames=stock_frames, normalised=True),
        )
    layout = PatchLayout.of(checkpoint)
    frames = {"duplicated": stock_frames, "folded": 1}[slot.temporal]
    resize_to = {"pillow": resize.with_pillow}[slot.resize]
    to_patches = {"numpy": patchify.with_numpy, "torch": patchify.with_torch}[slot.patchify]
    upload_patches = {
        "float32": upload.normalised(device, dtype),
        "uint8": upload.normalising(device, dtype, layout, frames),
        "uint8_folded": upload.as_bytes(device),
    }[slot.payload]

    def preprocess(images: Sequence[Image.Image], request: Request) -> Pixels:
        shapes = shapes_of(images, request, checkpoint)
        resized = [resize_to(image, shape) for image, shape in zip(images, shapes, strict=True)]
        patches = to_patches(resized, layout, frames=frames, normalised=slot.payload == "float32")
        return Pixels(patches=patches, shapes=shapes)

    return BoundPreprocessor(
        decode=decode,
        preprocess=preprocess,
        upload=upload_patches,
        patch_format=PatchFormat(frames=frames, normalised=slot.payload != "uint8_folded"),
    )
