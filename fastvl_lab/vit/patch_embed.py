"""The first layer: a patch of pixels to a hidden vector."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F

PatchEmbed = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True, kw_only=True, eq=False)
class PatchProjection:
    """weight [hidden, C, F, p, p], whose kernel is its stride; bias [hidden] or None; centre [C * F * p * p] or None.

    `centre` is what bytes are moved by before the product: whole numbers up to 255, so that bytes and differences are exact in
    bfloat16 too.
    """

    weight: torch.Tensor
    bias: torch.Tensor | None
    centre: torch.Tensor | None = None


def bind_patch_embed(option: str, projection: PatchProjection, width: int | None = None) -> PatchEmbed:
    """[n_patches, C * F * p * p] -> [n_patches, hidden], by a convolution or by the matrix product it amounts to.

    width: what the rows of that product are padded to with zeros. Patches are padded as they come, in one more pass over them.
    """
    weight, bias, centre = projection.weight, projection.bias, projection.centre
    more = 0 if width is None else width - weight[0].numel()
    if centre is not None:
        centre = F.pad(centre, (0, more))

    def values(patches: torch.Tensor) -> torch.Tensor:
        if more:
            patches = F.pad(patches, (0, more))
        return patches if centre is None else patches.to(weight.dtype).sub_(centre)

    if option == "conv3d":
        assert more == 0
        block = weight.shape[1:]  # [C, F, p, p]
        return lambda patches: F.conv3d(values(patches).view(-1, *block), weight, bias, stride=block[1:]).flatten(1)
    assert option == "linear"
    flat = weight.flatten(1)  # a view: kernel and stride are equal, so each patch meets the kernel once
    if more:
        flat = F.pad(flat.detach(), (0, more))
    return lambda patches: F.linear(values(patches), flat, bias)


def fold(projection: PatchProjection, *, frames: int, scale_shift: tuple[torch.Tensor, torch.Tensor] | None) -> PatchProjection:
    """The projection for an image sent `frames` times, and, given scale and shift (float64 [C] each), for bytes.

    An image sent once meets the sum of the temporal slices. For bytes x the published W (x * scale - shift) + b is
    (W * scale) (x - c) + (b - (W * scale) r), where c is shift / scale rounded and r the rest: without c, two large numbers would
    have to cancel in the model's dtype. Computed in float32 and rounded once.
    """
    weight, bias = projection.weight, projection.bias
    wide = weight.float()
    if frames < weight.shape[2]:
        assert frames == 1
        wide = wide.sum(2, keepdim=True)
    if scale_shift is None:
        return PatchProjection(weight=wide.to(weight.dtype), bias=bias)
    scale, shift = (x.to(weight.device) for x in scale_shift)
    per_channel = (1, -1, 1, 1, 1)
    centre = (shift / scale).round()
    folded = (wide * scale.float().view(per_channel)).to(weight.dtype)
    rest = (shift / scale - centre).float().view(per_channel)
    offset = (folded.float() * rest).flatten(1).sum(1)  # [hidden]
    return PatchProjection(
        weight=folded,
        bias=(-offset if bias is None else bias.float() - offset).to(weight.dtype),
        centre=centre.repeat_interleave(folded[0, 0].numel()).to(weight.dtype),
    )
