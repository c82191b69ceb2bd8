"""Projections that read the same input, as one tensor each: q with k and v, gate with up.

The checkpoint's own parameters become views of the fused tensors, so that every engine reads the same memory, and there is no
second copy of any weight.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from fastvl_lab.families.text import Text


def fuse_projections(text: Text) -> None:
    """Lay the decoder's projections out side by side, a layer at a time; the parameters keep their names and values."""
    for layer in text.layers:
        for linears in ((layer.q, layer.k, layer.v), (layer.gate, layer.up)):
            _side_by_side([linear.weight for linear in linears])
            _side_by_side([linear.bias for linear in linears if linear.bias is not None])


@torch.no_grad()
def _side_by_side(parameters: Sequence[torch.Tensor]) -> None:
    if not parameters:
        return
    together = torch.cat([parameter.data for parameter in parameters])
    for parameter, part in zip(parameters, together.split([len(parameter) for parameter in parameters]), strict=True):
        parameter.data = part


def side_by_side(parameters: Sequence[torch.Tensor]) -> torch.Tensor:
    """The one tensor of which these are the parts, in order; they must have been laid out by `fuse_projections`."""
    first, rows = parameters[0], sum(len(parameter) for parameter in parameters)
    at = first.data_ptr()
    for parameter in parameters:
        assert parameter.is_contiguous()
        assert parameter.data_ptr() == at, "the checkpoint's projections are not side by side"
        at += parameter.numel() * parameter.element_size()
    return first.as_strided((rows, *first.shape[1:]), first.stride())
