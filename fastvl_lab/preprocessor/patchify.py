"""Resized clips to patches in merge order.

A clip is uint8 [T, height, width, 3]: an image has T = 1, a video its own frames, a multiple of F. Shape letters: G grid rows /
merge, H grid columns / merge, m merge size, p patch size, C channels, F frames of a patch (an image is repeated to fill it). A
patch is [C, F, p, p] flattened. Patches that merge into one visual token stand together: [G, H, m, m].
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from fastvl_lab.checkpoint.image_settings import ImageSettings
from fastvl_lab.request import Grid

# [T / f, f, G, m, p, H, m, p, C] -> [T / f, G, H, m, m, C, f, p, p]
PATCH_ORDER = (0, 2, 5, 3, 6, 8, 1, 4, 7)


def with_numpy(clips: Sequence[torch.Tensor], settings: ImageSettings, *, frames: int, normalised: bool) -> torch.Tensor:
    """Plain numpy passes; [n_patches, C * F * p * p], float32 if normalised, else uint8.

    The arithmetic is the stock Pillow backend's, in its order and precision, so normalised patches are bit-equal to it.
    """
    mean, std = (np.array(x, dtype=np.float32).reshape(3, 1, 1, 1) for x in (settings.mean, settings.std))
    patches = []
    for clip in clips:
        values = clip.numpy().reshape(_blocks(clip, settings, frames)).transpose(PATCH_ORDER)
        if normalised:
            values = ((values.astype(np.float64) * settings.rescale).astype(np.float32) - mean) / std
        repeated = np.broadcast_to(values, (*values.shape[:6], frames, *values.shape[7:]))
        patches.append(repeated.reshape(n_patches(clip, settings, frames), -1))
    return torch.from_numpy(np.concatenate(patches))


def with_torch(
    clips: Sequence[torch.Tensor], settings: ImageSettings, *, frames: int, normalised: bool, pinned: bool = False
) -> torch.Tensor:
    """The same in torch, on the clips' device: bytes go into patch order, then are scaled and shifted in one pass.

    Rescale and normalise are one multiply and one subtract, so normalised values differ from the numpy option by rounding.
    pinned: whether the result is to lie in page-locked memory, from which CUDA copies asynchronously.
    """
    device, p = clips[0].device, settings.patch_size
    scale, shift = (x.float().reshape(3, 1, 1, 1).to(device) for x in settings.scale_shift)
    sizes = [n_patches(clip, settings, frames) for clip in clips]
    dtype = torch.float32 if normalised else torch.uint8
    patches = torch.empty((sum(sizes), 3, frames, p, p), dtype=dtype, device=device, pin_memory=pinned)
    for clip, into in zip(clips, patches.split(sizes), strict=True):
        values = clip.reshape(_blocks(clip, settings, frames)).permute(PATCH_ORDER).reshape(len(into), 3, -1, p, p)
        given = values.shape[2]  # frames: all of them, or the one that is repeated
        if normalised:
            torch.mul(values, scale, out=into[:, :, :given]).sub_(shift)
        else:
            into[:, :, :given] = values
        into[:, :, given:] = into[:, :, :1]
    return patches.flatten(1)


def to_picture(patches: torch.Tensor, grid: Grid, settings: ImageSettings) -> torch.Tensor:
    """What `with_torch` and the others have cut, put together again: the first frame of a clip, uint8 [height, width, 3].

    patches: [n_patches, C * F * p * p] of one image; bytes as they are, normalised floats brought back to bytes.
    """
    m, p = settings.merge_size, settings.patch_size
    values = patches.view(grid.t, grid.h // m, grid.w // m, m, m, 3, -1, p, p)[0, ..., 0, :, :]  # [G, H, m, m, C, p, p]
    if patches.is_floating_point():
        scale, shift = (x.float().view(3, 1, 1) for x in settings.scale_shift)
        values = ((values.float() + shift) / scale).round().clamp(0, 255)
    return values.permute(0, 2, 5, 1, 3, 6, 4).reshape(grid.h * p, grid.w * p, 3).to(torch.uint8)


def n_patches(clip: torch.Tensor, settings: ImageSettings, frames: int) -> int:
    """Rows that a clip becomes."""
    length, height, width, _ = clip.shape
    return max(length // frames, 1) * height * width // settings.patch_size**2


def _blocks(clip: torch.Tensor, settings: ImageSettings, frames: int) -> tuple[int, ...]:
    """The shape that splits a clip into patches: [T / f, f, G, m, p, H, m, p, C], where f is 1 for an image."""
    length, height, width, channels = clip.shape
    assert length == 1 or length % frames == 0, "a video has a whole number of patches along time"
    m, p = settings.merge_size, settings.patch_size
    along_time = (1, 1) if length == 1 else (length // frames, frames)
    return (*along_time, height // settings.factor, m, p, width // settings.factor, m, p, channels)
