"""Patchify on the device: the resized image travels as bytes, the fewest there are, and one Triton kernel makes patches of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from fastvl_lab.kernels.patchify import patchify
from fastvl_lab.preprocessor.layout import PatchLayout
from fastvl_lab.preprocessor.upload import Copy


def with_triton(
    layout: PatchLayout, frames: int, copy: Copy, device: torch.device, dtype: torch.dtype
) -> Callable[[Sequence[torch.Tensor]], torch.Tensor]:
    """Images uint8 [height, width, 3], on the host or the device, to normalised patches in the model's dtype on the device."""
    scale, shift = (x.float().to(device) for x in layout.scale_shift)

    def to_patches(resized: Sequence[torch.Tensor]) -> torch.Tensor:
        parts = [
            patchify(
                copy(image)[None],
                scale,
                shift,
                patch_size=layout.patch_size,
                merge_size=layout.merge_size,
                frames=frames,
                dtype=dtype,
            )
            for image in resized
        ]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    return to_patches
