"""Patchify on the device: the resized image travels as bytes, the fewest there are, and one Triton kernel makes patches of it."""

from __future__ import annotations

from collections.abc import Callable

import torch

from fastvl_lab.checkpoint.image_settings import ImageSettings
from fastvl_lab.kernels.patchify import patchify
from fastvl_lab.preprocessor.upload import Copy


def with_triton(
    settings: ImageSettings, frames: int, copy: Copy, device: torch.device, dtype: torch.dtype
) -> Callable[[torch.Tensor], torch.Tensor]:
    """An image, uint8 [height, width, 3] on the host or the device, to normalised patches in the model's dtype on the device."""
    scale, shift = (x.float().to(device) for x in settings.scale_shift)

    def to_patches(image: torch.Tensor) -> torch.Tensor:
        patch, merge = settings.patch_size, settings.merge_size
        return patchify(copy(image)[None], scale, shift, patch_size=patch, merge_size=merge, frames=frames, dtype=dtype)

    return to_patches
