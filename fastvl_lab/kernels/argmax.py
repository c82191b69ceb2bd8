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
def _first_largest(value, place, inside, behind):
    """The largest value and its first place, or a NaN and the first place of one; `behind` is after all places."""
    is_nan = (value != value) & inside
    has_nan = tl.max(is_nan.to(tl.int32)) > 0
    largest = tl.max(tl.where(inside & (value == value), value, float("-inf")))
    is_largest = (is_nan & has_nan) | ((value == largest) & inside & (has_nan == 0))
    return tl.where(has_nan, float("nan"), largest), tl.min(tl.where(is_largest, place, behind))


@triton.jit
def _block_kernel(x, largest, places, n, block: tl.constexpr):
    """One program a block."""
    number = tl.program_id(0)
    place = number.to(tl.int64) * block + tl.arange(0, block)
    value, first = _first_largest(tl.load(x + place, mask=place < n, other=0), place, place < n, n)
    tl.store(largest + number, value)
    tl.store(places + number, first)


@triton.jit
def _last_kernel(largest, places, out, n_blocks, block: tl.constexpr):
    """One program: the first block that holds the largest value."""
    number = tl.arange(0, block)
    inside = number < n_blocks
    _, first = _first_largest(tl.load(largest + number, mask=inside, other=0), number, inside, block)
    tl.store(out, tl.load(places + first))
