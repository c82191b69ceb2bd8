"""Resized images to normalised patches in merge order.

Shape letters: G grid rows / merge, H grid columns / merge, m merge size, p patch size, C channels, T temporal patch size. A
patch is [C, T, p, p] flattened; an image is a clip of T equal frames. Patches that merge into one visual token stand together:
[G, H, m, m].
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from fastvl_lab.preprocessor.layout import PatchLayout

# [G, m, p, H, m, p, C] -> [G, H, m, m, C, p, p]
PATCH_ORDER = (0, 3, 1, 4, 6, 2, 5)


def with_numpy(images: Sequence[np.ndarray], layout: PatchLayout) -> torch.Tensor:
    """Plain numpy passes over uint8 [height, width, 3] images; float32 [n_patches, C * T * p * p].

    The arithmetic is the stock Pillow backend's, in its order and precision, so the patches are bit-equal to it.
    """
    mean = np.array(layout.mean, dtype=np.float32)
    std = np.array(layout.std, dtype=np.float32)
    patches = []
    for image in images:
        rescaled = (image.astype(np.float64) * layout.rescale).astype(np.float32)
        normalised = (rescaled - mean) / std
        blocks = normalised.reshape(layout.blocks(*image.shape[:2])).transpose(PATCH_ORDER)
        g, h, m, _, c, p, _ = blocks.shape
        clips = np.broadcast_to(blocks[..., None, :, :], (g, h, m, m, c, layout.temporal_patch_size, p, p))
        patches.append(clips.reshape(g * h * m * m, -1))
    return torch.from_numpy(np.concatenate(patches))


def with_torch(images: Sequence[np.ndarray], layout: PatchLayout) -> torch.Tensor:
    """The same in torch: uint8 bytes are put into patch order first, then scaled and shifted in one pass into the result.

    Rescale and normalise are one multiply and one subtract, so values differ from the numpy option by rounding.
    """
    # Rank 8 like the patches themselves: [G, H, m, m, C, T, p, p].
    scale = layout.rescale / torch.tensor(layout.std, dtype=torch.float64)
    shift = torch.tensor(layout.mean, dtype=torch.float64) / torch.tensor(layout.std, dtype=torch.float64)
    scale_C11, shift_C11 = (x.to(torch.float32).reshape(3, 1, 1) for x in (scale, shift))
    sizes = [image.shape[0] * image.shape[1] // layout.patch_size**2 for image in images]
    clip = (3, layout.temporal_patch_size, layout.patch_size, layout.patch_size)
    patches = torch.empty((sum(sizes), *clip), dtype=torch.float32)
    for image, clips in zip(images, patches.split(sizes), strict=True):
        blocks = torch.from_numpy(np.array(image)).reshape(layout.blocks(*image.shape[:2])).permute(PATCH_ORDER)
        frames = blocks.reshape(-1, 3, layout.patch_size, layout.patch_size)  # uint8 [n_patches, C, p, p]
        torch.mul(frames, scale_C11, out=clips[:, :, 0]).sub_(shift_C11)
        clips[:, :, 1:] = clips[:, :, :1]
    return patches.reshape(sum(sizes), -1)
