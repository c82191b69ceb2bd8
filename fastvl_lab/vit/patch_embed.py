"""The first layer: a patch of pixels to a hidden vector."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F

PatchEmbed = Callable[[torch.Tensor], torch.Tensor]


def bind_patch_embed(option: str, conv: torch.nn.Conv3d) -> PatchEmbed:
    """[n_patches, C * T * p * p] -> [n_patches, hidden], by the stock convolution or by the matrix product it amounts to."""
    if option == "conv3d":
        block = conv.weight.shape[1:]  # [C, T, p, p]
        return lambda patches: F.conv3d(patches.view(-1, *block), conv.weight, conv.bias, stride=conv.stride).flatten(1)
    assert option == "linear"
    weight = conv.weight.flatten(1)  # a view: kernel and stride are equal, so each patch meets the kernel once
    return lambda patches: F.linear(patches, weight, conv.bias)
