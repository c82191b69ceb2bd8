"""Slot 1: image bytes to patches, one image at a time."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial

import torch

from fastvl_lab.catalogue import Preprocessor
from fastvl_lab.checkpoint import Checkpoint
from fastvl_lab.checkpoint.image_settings import ImageSettings
from fastvl_lab.errors import RequestError
from fastvl_lab.preprocessor import decode_image, patchify, resize, stock, upload
from fastvl_lab.preprocessor.decode_image import Opened, Unpack, as_image, as_tensor, content_of, open_image, read_orientation
from fastvl_lab.preprocessor.layout import AreaLimits, area_limits, own_settings, shapes_of
from fastvl_lab.preprocessor.resize import Each, Resize
from fastvl_lab.preprocessor.upload import Copy, PatchUpload
from fastvl_lab.request import MAX_REQUEST_PIXELS, Grid, ImageShape, PatchFormat, Picture, Pixels, Request
from fastvl_lab.trace import Inner, no_inner

# A resized image, uint8 [height, width, 3], to patches.
ToPatches = Callable[[torch.Tensor], torch.Tensor]

# Pictures that threads unpack at once have no more pixels than this together, unless it is one picture: 100 MB as RGB.
PIXELS_AT_ONCE = 32_000_000


@dataclass(frozen=True, kw_only=True, eq=False)
class OpenedImage:
    """An image whose header has been read, the limits on its area, and what will become of its size."""

    image: Opened
    limits: AreaLimits
    shape: ImageShape


@dataclass(frozen=True, kw_only=True, eq=False)
class OpenedImages:
    """The images of a request, in order."""

    images: tuple[OpenedImage, ...]

    @property
    def shapes(self) -> tuple[ImageShape, ...]:
        return tuple(one.shape for one in self.images)

    @property
    def grids(self) -> tuple[Grid, ...]:
        return tuple(shape.grid for shape in self.shapes)

    def contents(self) -> Iterator[tuple[str, bytes]]:
        """Of each image, what it is resized to and the bytes that stand for it; raises `ImageError`."""
        for one in self.images:
            yield f"{one.shape.resized_width}x{one.shape.resized_height}", content_of(one.image)

    def only(self, numbers: Sequence[int]) -> OpenedImages:
        """Some of them, in order."""
        return OpenedImages(images=tuple(self.images[i] for i in numbers))


@dataclass(frozen=True, kw_only=True)
class BoundPreprocessor:
    """The stages of the slot: an encoded image to RGB, RGB to patches, patches to the device, where they have `patch_format`.

    `open` reads the headers of a request, and raises for all that headers can be refused for. unpack: of some images, which are
    unpacked at once. preprocess: of one. `copy` is how any host tensor reaches the device. at_once: how many images are unpacked at
    once at most.
    """

    open: Callable[[Request], OpenedImages]
    unpack: Callable[[Sequence[OpenedImage]], list[Picture]]
    preprocess: Callable[[Picture, OpenedImage], torch.Tensor]
    upload: PatchUpload
    copy: Copy
    patch_format: PatchFormat
    at_once: int

    def make(self, opened: OpenedImages, span: Inner) -> Pixels:
        """Images as what the vision tower is given, on the device, a span a stage and image.

        An image is unpacked once those before it are patches, but for the few that threads unpack at once; so the pictures of a
        request are never in memory together. Raises `ImageError`, and what a span raises, such as that nobody waits any more.
        """
        return _one_by_one(self, opened, span, self.upload)

    def patches_of_each(self, opened: OpenedImages, span: Inner) -> Iterator[torch.Tensor]:
        """The same, an image at a time, before the upload: what is sent of each, in order."""
        for group in _groups(opened.images, self.at_once):
            with span("decode_image"):
                pictures = self.unpack(group)[::-1]
            for one in group:
                with span("preprocess"):
                    patches = self.preprocess(pictures.pop(), one)
                yield patches

    def pixels(self, request: Request) -> Pixels:
        """All stages of a request's images, from their headers on; raises `ImageError` and `RequestError`."""
        return self.make(self.open(request), no_inner)

    def patches(self, request: Request) -> Pixels:
        """The same before the upload: images as they are sent."""
        return _one_by_one(self, self.open(request), no_inner, lambda patches: patches)


def _one_by_one(bound: BoundPreprocessor, opened: OpenedImages, span: Inner, upload: PatchUpload) -> Pixels:
    rows, at, whole = sum(grid.n_patches for grid in opened.grids), 0, torch.empty(0)
    for patches in bound.patches_of_each(opened, span):
        with span("upload"):
            patches = upload(patches)
            if len(patches) == rows:  # there is one image
                return Pixels(patches=patches, shapes=opened.shapes)
            if at == 0:
                whole = patches.new_empty((rows, *patches.shape[1:]))
            whole[at : at + len(patches)] = patches
        at += len(patches)
    assert at == rows
    return Pixels(patches=whole, shapes=opened.shapes)


def _groups(images: Sequence[OpenedImage], at_once: int) -> Iterator[list[OpenedImage]]:
    """Neighbours that are unpacked at once: at most that many, and of no more than `PIXELS_AT_ONCE` together."""
    group: list[OpenedImage] = []
    for one in images:
        if group and (len(group) == at_once or sum(map(_n_pixels, [*group, one])) > PIXELS_AT_ONCE):
            yield group
            group = []
        group.append(one)
    yield group


def _n_pixels(one: OpenedImage) -> int:
    return one.image.width * one.image.height


def bind(slot: Preprocessor, checkpoint: Checkpoint) -> BoundPreprocessor:
    """The functions that the slot's toggles name; raises `CheckpointError` where the checkpoint asks for what they have not."""
    n_threads = {"one": 1, "all": _n_cores()}[slot.threads]
    each: Each = map if n_threads == 1 else ThreadPoolExecutor(n_threads, thread_name_prefix="fastvl-preprocessor").map
    device, dtype, stock_frames = checkpoint.device, checkpoint.dtype, checkpoint.image_settings.temporal_patch_size
    copy = {"pageable": upload.pageable, "pinned": upload.pinned}[slot.upload](device)
    open_all = partial(open_images, checkpoint=checkpoint)
    unpack = _unpack(slot, checkpoint, copy, each)
    if slot.resize == "transformers":
        return BoundPreprocessor(
            open=open_all,
            unpack=unpack,
            preprocess=lambda picture, one: stock.preprocess(picture, one.shape, one.limits, checkpoint),
            upload=upload.normalised(copy, dtype),
            copy=copy,
            patch_format=PatchFormat(frames=stock_frames, normalised=True),
            at_once=n_threads,
        )
    settings = own_settings(checkpoint)
    frames = {"duplicated": stock_frames, "folded": 1}[slot.temporal]
    resize_to = _resize(slot, checkpoint, copy, each, n_threads)
    to_patches = _to_patches(slot, checkpoint, copy, settings, frames)
    return BoundPreprocessor(
        open=open_all,
        unpack=unpack,
        preprocess=lambda picture, one: to_patches(resize_to(picture, one.shape)),
        upload={
            "float32": upload.normalised(copy, dtype),
            "uint8": upload.normalising(copy, device, dtype, settings, frames),
            "uint8_folded": copy,
        }[slot.payload],
        copy=copy,
        patch_format=PatchFormat(frames=frames, normalised=slot.payload != "uint8_folded"),
        at_once=n_threads,
    )


def _unpack(slot: Preprocessor, checkpoint: Checkpoint, copy: Copy, each: Each) -> Callable[[Sequence[OpenedImage]], list[Picture]]:
    """The pixels of some images, in the form that the resize takes."""
    options: dict[str, Unpack] = {
        "pillow": decode_image.with_pillow,
        "turbojpeg": decode_image.with_turbojpeg,
        "draft": decode_image.with_draft,
        "gpu": partial(decode_image.with_torchvision, copy=copy, device=checkpoint.device),
    }
    unpack = options[slot.decode]
    form: Callable[[Picture], Picture] = as_image if slot.resize in ("transformers", "pillow") else as_tensor
    return lambda images: list(each(lambda one: form(unpack(one.image, one.shape)), images))


def open_images(request: Request, checkpoint: Checkpoint) -> OpenedImages:
    """The headers of a request's images and what will become of their sizes; raises for all that headers can be refused for."""
    images, settings = request.image_inputs, checkpoint.image_settings
    if len(images) > 1:  # so that an error says which
        images = tuple(replace(image, label=f"{image.label}, {n} of {len(images)}") for n, image in enumerate(images, start=1))
    opened = [open_image(image, converts=settings.converts) for image in images]
    n_pixels = sum(one.width * one.height for one in opened)
    if n_pixels > MAX_REQUEST_PIXELS:
        raise RequestError(
            f"the {len(opened)} images of the request have {n_pixels} pixels together, as their headers say; the limit is "
            f"{MAX_REQUEST_PIXELS}; send fewer, or smaller ones"
        )
    limits = [area_limits(image, request, settings) for image in images]
    shapes_of([one.size for one in opened], limits, checkpoint)  # which way up does not matter to the limits
    opened = [read_orientation(one) for one in opened]
    shapes = shapes_of([one.size for one in opened], limits, checkpoint)
    return OpenedImages(
        images=tuple(OpenedImage(image=i, limits=li, shape=s) for i, li, s in zip(opened, limits, shapes, strict=True))
    )


def _resize(slot: Preprocessor, checkpoint: Checkpoint, copy: Copy, each: Each, n_threads: int) -> Resize:
    as_pillow = checkpoint.image_backend == "pillow"
    options: dict[str, Callable[[], Resize]] = {
        "pillow": lambda: resize.with_pillow if n_threads == 1 else resize.with_pillow_in_strips(each, n_threads),
        "torch": lambda: resize.with_torch(as_pillow=as_pillow),
        "device": lambda: resize.on_device(copy, as_pillow=as_pillow),
    }
    return options[slot.resize]()


def _to_patches(slot: Preprocessor, checkpoint: Checkpoint, copy: Copy, settings: ImageSettings, frames: int) -> ToPatches:
    if slot.patchify == "triton":
        from fastvl_lab.preprocessor.patchify_triton import with_triton  # triton is loaded where it is asked for

        return with_triton(settings, frames, copy, checkpoint.device, checkpoint.dtype)
    normalised = slot.payload == "float32"
    options: dict[str, Callable[..., torch.Tensor]] = {
        "numpy": patchify.with_numpy,
        "torch": partial(patchify.with_torch, pinned=slot.upload == "pinned" and slot.resize != "device"),
    }
    to_patches = options[slot.patchify]
    return lambda resized: to_patches([resized[None]], settings, frames=frames, normalised=normalised)


def _n_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
