"""The place of the largest value of a long vector, in two launches over many programs."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

_BLOCK = 1024


def argmax_reference(x: torch.Tensor) -> torch.Tensor:
    """What `argmax` computes, in plain PyTorch."""
    return x.argmax(keepdim=True)


def argmax(x: torch.Tensor) -> torch.Tensor:
    """The first index of the largest value of float32 [n]: int64 [1]. A NaN counts as the largest, as in torch."""
    assert x.is_contiguous()
    assert x.dtype == torch.float32
    n = x.shape[0]
    n_blocks = triton.cdiv(n, _BLOCK)
    largest = torch.empty(n_blocks, dtype=torch.float32, device=x.device)
    places = torch.empty(n_blocks, dtype=torch.int64, device=x.device)
    out = torch.empty(1, dtype=torch.int64, device=x.device)
    _block_kernel[(n_blocks,)](x, largest, places, n, block=_BLOCK)
    _last_kernel[(1,)](largest, places, out, n_blocks, block=triton.next_power_of_2(n_blocks))
    return out


@triton.jit
def _block_kernel(x, largest, places, n, block: tl.constexpr):
    """One program a block."""
    number = tl.program_id(0)
    place = number.to(tl.int64) * block + tl.arange(0, block)
    value = tl.load(x + place, mask=place < n, other=float("-inf"))
    value = tl.where(value != value, float("inf"), value)
    maximum = tl.max(value)
    tl.store(largest + number, maximum)
    tl.store(places + number, tl.min(tl.where((value == maximum) & (place < n), place, n)))


@triton.jit
def _last_kernel(largest, places, out, n_blocks, block: tl.constexpr):
    """One program: the first block that holds the maximum."""
    number = tl.arange(0, block)
    value = tl.load(largest + number, mask=number < n_blocks, other=float("-inf"))
    first = tl.min(tl.where((value == tl.max(value)) & (number < n_blocks), number, block))
    tl.store(out, tl.load(places + first))
