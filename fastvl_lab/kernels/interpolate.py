"""Rows of a table mixed by weights: learned positions interpolated to a grid, in one kernel."""

from __future__ import annotations

import torch
import triton
import triton.language as tl


def interpolate(table: torch.Tensor, indices: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """What `plain.interpolate` computes; [n, width] in the table's dtype, float32 inside.

    table: [rows, width], contiguous; indices: int64 [n, k]; weights: float32 [n, k], contiguous both.
    """
    n, k = indices.shape
    width = table.shape[1]
    assert table.is_contiguous()
    assert indices.is_contiguous()
    assert weights.is_contiguous()
    out = torch.empty((n, width), dtype=table.dtype, device=table.device)
    if n > 0:
        _interpolate_kernel[(n,)](table, indices, weights, out, width, k=k, block=triton.next_power_of_2(width))
    return out


@triton.jit
def _interpolate_kernel(table, indices, weights, out, width, k: tl.constexpr, block: tl.constexpr):
    """One program a row of the result."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, block)
    inside = column < width
    total = tl.zeros((block,), dtype=tl.float32)
    for corner in tl.static_range(k):
        index = tl.load(indices + row * k + corner)
        value = tl.load(table + index * width + column, mask=inside, other=0).to(tl.float32)
        total += value * tl.load(weights + row * k + corner)
    tl.store(out + row * width + column, total.to(out.dtype.element_ty), mask=inside)
