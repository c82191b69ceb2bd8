"""The first layer: a patch of pixels to a hidden vector."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F

PatchEmbed = Callable[[torch.Tensor], torch.Tensor]


def bind_patch_embed(option: str, weight: torch.Tensor, bias: torch.Tensor | None) -> PatchEmbed:
    """[n_patches, C * F * p * p] -> [n_patches, hidden], by a convolution or by the matrix product it amounts to.

    weight: [hidden, C, F, p, p], whose kernel is its stride; patches of another dtype (bytes) take the weight's.
    """
    if option == "conv3d":
        block = weight.shape[1:]  # [C, F, p, p]
        return lambda patches: F.conv3d(patches.to(weight.dtype).view(-1, *block), weight, bias, stride=block[1:]).flatten(1)
    assert option == "linear"
    flat = weight.flatten(1)  # a view: kernel and stride are equal, so each patch meets the kernel once
    return lambda patches: F.linear(patches.to(weight.dtype), flat, bias)


def fold_frames(weight: torch.Tensor) -> torch.Tensor:
    """The weight for an image sent once: [hidden, C, T, p, p] -> [hidden, C, 1, p, p], its temporal slices added in float32."""
    return weight.float().sum(2, keepdim=True).to(weight.dtype)


def fold_normalisation(
    weight: torch.Tensor, bias: torch.Tensor | None, scale: torch.Tensor, shift: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Weight and bias that take bytes: W (x * scale - shift) + b = (W * scale) x + (b - W shift), computed in float32.

    scale, shift: float32 [C], as `PatchLayout.scale_shift` gives them.
    """
    per_channel = (1, -1, 1, 1, 1)
    wide, scale, shift = weight.float(), scale.to(weight.device).view(per_channel), shift.to(weight.device).view(per_channel)
    offset = (wide * shift).flatten(1).sum(1)  # [hidden]
    folded_bias = -offset if bias is None else bias.float() - offset
    return (wide * scale).to(weight.dtype), folded_bias.to(weight.dtype)
