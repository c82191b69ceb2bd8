"""Slot 1: image bytes to patches."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial

import torch

from fastvl_lab.checkpoint import Checkpoint
from fastvl_lab.preprocessor import decode_image, patchify, resize, stock, upload
from fastvl_lab.preprocessor.decode_image import Decoder, Opened, as_image, as_tensor, content_of, open_image, read_orientation
from fastvl_lab.preprocessor.layout import PatchLayout, shapes_of
from fastvl_lab.preprocessor.resize import Each, Resize
from fastvl_lab.preprocessor.upload import Copy, PatchUpload
from fastvl_lab.recipe import Preprocessor
from fastvl_lab.request import Decoded, Grid, ImageShape, PatchFormat, Picture, Pixels, Request

# Resized images, uint8 [height, width, 3], to patches.
ToPatches = Callable[[Sequence[torch.Tensor]], torch.Tensor]


@dataclass(frozen=True, kw_only=True, eq=False)
class OpenedImages:
    """Images whose headers have been read, and what will become of their sizes."""

    images: tuple[Opened, ...]
    shapes: tuple[ImageShape, ...]

    @property
    def grids(self) -> tuple[Grid, ...]:
        return tuple(shape.grid for shape in self.shapes)

    def contents(self) -> Iterator[tuple[str, bytes]]:
        """Of each image, what it is resized to and the bytes that stand for it; raises `ImageError`."""
        for image, shape in zip(self.images, self.shapes, strict=True):
            yield f"{shape.resized_width}x{shape.resized_height}", content_of(image)

    def only(self, numbers: Sequence[int]) -> OpenedImages:
        """Some of them, in order."""
        return OpenedImages(images=tuple(self.images[i] for i in numbers), shapes=tuple(self.shapes[i] for i in numbers))


@dataclass(frozen=True, kw_only=True)
class BoundPreprocessor:
    """The stages of the slot: encoded images to RGB, RGB to patches, patches to the device, where they have `patch_format`.

    `open` reads the headers, and raises for all that headers can be refused for. `copy` is how any host tensor reaches the device.
    """

    open: Callable[[Request], OpenedImages]
    read: Callable[[OpenedImages], Decoded]
    preprocess: Callable[[Decoded, Request], Pixels]
    upload: PatchUpload
    copy: Copy
    patch_format: PatchFormat

    def decode(self, request: Request) -> Decoded:
        """Headers, then pixels."""
        return self.read(self.open(request))

    def pixels(self, request: Request) -> Pixels:
        """All three stages: the request's images as what the vision tower is given, on the device."""
        return upload.upload_pixels(self.preprocess(self.decode(request), request), self.upload)


def bind(slot: Preprocessor, checkpoint: Checkpoint) -> BoundPreprocessor:
    """The functions that the slot's toggles name; raises `CheckpointError` where the checkpoint asks for what they have not."""
    n_threads = {"one": 1, "all": _n_cores()}[slot.threads]
    each: Each = map if n_threads == 1 else ThreadPoolExecutor(n_threads, thread_name_prefix="fastvl-preprocessor").map
    device, dtype, stock_frames = checkpoint.device, checkpoint.dtype, checkpoint.image_processor.temporal_patch_size
    copy = {"pageable": upload.pageable, "pinned": upload.pinned}[slot.upload](device)
    open_all = partial(open_images, checkpoint=checkpoint, each=each)
    read = _read(slot, checkpoint, copy, each)
    if slot.resize == "transformers":
        return BoundPreprocessor(
            open=open_all,
            read=read,
            preprocess=lambda decoded, request: stock.preprocess(decoded, request, checkpoint),
            upload=upload.normalised(copy, dtype),
            copy=copy,
            patch_format=PatchFormat(frames=stock_frames, normalised=True),
        )
    layout = PatchLayout.of(checkpoint)
    frames = {"duplicated": stock_frames, "folded": 1}[slot.temporal]
    resize_to = _resize(slot, checkpoint, copy, each, n_threads)
    to_patches = _to_patches(slot, checkpoint, copy, layout, frames)

    def preprocess(decoded: Decoded, request: Request) -> Pixels:
        resized = [resize_to(picture, shape) for picture, shape in zip(decoded.pictures, decoded.shapes, strict=True)]
        return Pixels(patches=to_patches(resized), shapes=decoded.shapes)

    return BoundPreprocessor(
        open=open_all,
        read=read,
        preprocess=preprocess,
        upload={
            "float32": upload.normalised(copy, dtype),
            "uint8": upload.normalising(copy, device, dtype, layout, frames),
            "uint8_folded": copy,
        }[slot.payload],
        copy=copy,
        patch_format=PatchFormat(frames=frames, normalised=slot.payload != "uint8_folded"),
    )


def _read(slot: Preprocessor, checkpoint: Checkpoint, copy: Copy, each: Each) -> Callable[[OpenedImages], Decoded]:
    """The pixels, in the form that the resize takes."""
    decoders: dict[str, Decoder] = {
        "pillow": decode_image.with_pillow,
        "turbojpeg": decode_image.with_turbojpeg,
        "draft": decode_image.with_draft,
        "gpu": partial(decode_image.with_torchvision, copy=copy, device=checkpoint.device),
    }
    decoder = decoders[slot.decode]
    form: Callable[[Picture], Picture] = as_image if slot.resize in ("transformers", "pillow") else as_tensor

    def read(opened: OpenedImages) -> Decoded:
        pictures = tuple(each(lambda one, shape: form(decoder(one, shape)), opened.images, opened.shapes))
        return Decoded(pictures=pictures, shapes=opened.shapes)

    return read


def open_images(request: Request, checkpoint: Checkpoint, each: Each = map) -> OpenedImages:
    """The headers of a request's images and what will become of their sizes; raises for all that headers can be refused for."""
    images = request.image_inputs
    if len(images) > 1:  # so that an error says which
        images = tuple(replace(image, label=f"{image.label}, {n} of {len(images)}") for n, image in enumerate(images, start=1))
    opened = [open_image(image) for image in images]
    shapes_of([one.size for one in opened], request, checkpoint)  # which way up does not matter to the limits
    opened = list(each(read_orientation, opened))
    return OpenedImages(images=tuple(opened), shapes=shapes_of([one.size for one in opened], request, checkpoint))


def _resize(slot: Preprocessor, checkpoint: Checkpoint, copy: Copy, each: Each, n_threads: int) -> Resize:
    as_pillow = checkpoint.image_backend == "pillow"
    if slot.resize == "pillow":
        return resize.with_pillow if n_threads == 1 else resize.with_pillow_in_strips(each, n_threads)
    if slot.resize == "torch":
        return resize.with_torch(as_pillow=as_pillow)
    assert slot.resize == "device"
    return resize.on_device(copy, as_pillow=as_pillow)


def _to_patches(slot: Preprocessor, checkpoint: Checkpoint, copy: Copy, layout: PatchLayout, frames: int) -> ToPatches:
    if slot.patchify == "triton":
        from fastvl_lab.preprocessor.patchify_triton import with_triton  # triton is loaded where it is asked for

        return with_triton(layout, frames, copy, checkpoint.device, checkpoint.dtype)
    normalised = slot.payload == "float32"
    options: dict[str, Callable[..., torch.Tensor]] = {
        "numpy": patchify.with_numpy,
        "torch": partial(patchify.with_torch, pinned=slot.upload == "pinned" and slot.resize != "device"),
    }
    to_patches = options[slot.patchify]
    return lambda resized: to_patches([image[None] for image in resized], layout, frames=frames, normalised=normalised)


def _n_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
