"""Resized images to patches in merge order.

Shape letters: G grid rows / merge, H grid columns / merge, m merge size, p patch size, C channels, F frames of the clip an image
becomes. A patch is [C, F, p, p] flattened. Patches that merge into one visual token stand together: [G, H, m, m].
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from fastvl_lab.preprocessor.layout import PatchLayout

# [G, m, p, H, m, p, C] -> [G, H, m, m, C, p, p]
PATCH_ORDER = (0, 3, 1, 4, 6, 2, 5)


def with_numpy(images: Sequence[np.ndarray], layout: PatchLayout, *, frames: int, normalised: bool) -> torch.Tensor:
    """Plain numpy passes over uint8 [height, width, 3] images; [n_patches, C * F * p * p], float32 if normalised, else uint8.

    The arithmetic is the stock Pillow backend's, in its order and precision, so normalised patches are bit-equal to it.
    """
    mean, std = (np.array(x, dtype=np.float32).reshape(3, 1, 1) for x in (layout.mean, layout.std))
    patches = []
    for image in images:
        values = image.reshape(layout.blocks(*image.shape[:2])).transpose(PATCH_ORDER)
        if normalised:
            values = ((values.astype(np.float64) * layout.rescale).astype(np.float32) - mean) / std
        g, h, m, _, c, p, _ = values.shape
        clips = np.broadcast_to(values[..., None, :, :], (g, h, m, m, c, frames, p, p))
        patches.append(clips.reshape(g * h * m * m, -1))
    return torch.from_numpy(np.concatenate(patches))


def with_torch(images: Sequence[np.ndarray], layout: PatchLayout, *, frames: int, normalised: bool) -> torch.Tensor:
    """The same in torch: bytes are put into patch order first, then scaled and shifted in one pass into the result.

    Rescale and normalise are one multiply and one subtract, so normalised values differ from the numpy option by rounding.
    """
    scale, shift = (x.float().reshape(3, 1, 1) for x in layout.scale_shift)
    sizes = [image.shape[0] * image.shape[1] // layout.patch_size**2 for image in images]
    shape = (sum(sizes), 3, frames, layout.patch_size, layout.patch_size)
    patches = torch.empty(shape, dtype=torch.float32 if normalised else torch.uint8)
    for image, clips in zip(images, patches.split(sizes), strict=True):
        blocks = torch.from_numpy(image).reshape(layout.blocks(*image.shape[:2])).permute(PATCH_ORDER)
        values = blocks.reshape(-1, 3, layout.patch_size, layout.patch_size)  # uint8 [n_patches, C, p, p]
        if normalised:
            torch.mul(values, scale, out=clips[:, :, 0]).sub_(shift)
        else:
            clips[:, :, 0] = values
        clips[:, :, 1:] = clips[:, :, :1]
    return patches.flatten(1)
