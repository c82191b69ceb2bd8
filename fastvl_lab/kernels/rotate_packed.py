"""Rotary embedding of queries and keys inside their packed projection, in one kernel and in place."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from fastvl_lab.kernels.plain import rotate_half


def rotate_packed_reference(qkv: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """What `rotate_packed` computes, in plain PyTorch and in the precision of `cos` and `sin`; qkv is left as it was."""
    cos, sin = (torch.cat([x, x], dim=-1)[:, None, None] for x in (cos, sin))  # [n, 1, 1, D]
    qk = qkv[:, :2].to(cos.dtype)
    return torch.cat([(qk * cos + rotate_half(qk) * sin).to(qkv.dtype), qkv[:, 2:]], dim=1)


def rotate_packed(qkv: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotate q and k of qkv [n, 3, H, D] by cos and sin, float32 [n, D / 2], and return it; contiguous, float32 inside."""
    n, _, n_heads, head_dim = qkv.shape
    assert qkv.is_contiguous()
    assert cos.is_contiguous()
    assert sin.is_contiguous()
    if n > 0:
        _rotate_kernel[(n,)](
            qkv,
            cos,
            sin,
            n_heads,
            half=head_dim // 2,
            block_heads=triton.next_power_of_2(2 * n_heads),
            block_half=triton.next_power_of_2(head_dim // 2),
        )
    return qkv


@triton.jit
def _rotate_kernel(qkv, cos, sin, n_heads, half: tl.constexpr, block_heads: tl.constexpr, block_half: tl.constexpr):
    """One program a patch: all heads of its q and k, which lie behind one another."""
    patch = tl.program_id(0).to(tl.int64)
    head, column = tl.arange(0, block_heads)[:, None], tl.arange(0, block_half)[None]
    inside = (head < 2 * n_heads) & (column < half)
    first = qkv + patch * (3 * n_heads * 2 * half) + head * (2 * half) + column
    a, b = tl.load(first, mask=inside, other=0).to(tl.float32), tl.load(first + half, mask=inside, other=0).to(tl.float32)
    c = tl.load(cos + patch * half + column, mask=column < half, other=0)
    s = tl.load(sin + patch * half + column, mask=column < half, other=0)
    tl.store(first, (a * c - b * s).to(qkv.dtype.element_ty), mask=inside)
    tl.store(first + half, (b * c + a * s).to(qkv.dtype.element_ty), mask=inside)
