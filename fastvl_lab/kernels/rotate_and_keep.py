"""Norm of each head of q and k, rotary embedding, and the write of k and v into the KV cache, in one kernel."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from fastvl_lab.kernels.plain import rms_norm, rotate_half


def rotate_and_keep_reference(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    q_norm: torch.Tensor | None,
    k_norm: torch.Tensor | None,
    eps: float,
    keys: torch.Tensor,
    values: torch.Tensor,
    written: torch.Tensor,
) -> torch.Tensor:
    """What `rotate_and_keep` computes, in plain PyTorch and in the precision of `cos` and `sin`."""
    cos, sin = (torch.cat([x, x], dim=-1)[:, None] for x in (cos, sin))  # [n, 1, D]

    def rotated(x: torch.Tensor, norm: torch.Tensor | None) -> torch.Tensor:
        wide = x.to(cos.dtype) if norm is None else rms_norm(x.to(cos.dtype), norm.to(cos.dtype), eps)
        return (wide * cos + rotate_half(wide) * sin).to(x.dtype)

    keys.index_copy_(0, written, rotated(k, k_norm))
    values.index_copy_(0, written, v)
    return rotated(q, q_norm)


def rotate_and_keep(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    q_norm: torch.Tensor | None,
    k_norm: torch.Tensor | None,
    eps: float,
    keys: torch.Tensor,
    values: torch.Tensor,
    written: torch.Tensor,
) -> torch.Tensor:
    """q normalised and rotated, [n, H, D]; k likewise, and v as it is, written to rows `written` of the cache.

    q: [n, H, D]; k, v: [n, K, D], the last dimension of each contiguous and rows of heads D apart. cos, sin: float32 [n, D / 2].
    q_norm, k_norm: [D], or None both. keys, values: [n_slots, K, D]; written: int64 [n]. float32 inside.
    """
    n, n_heads, head_dim = q.shape
    n_kv_heads = k.shape[1]
    assert all(x.stride(2) == 1 and x.stride(1) == head_dim for x in (q, k, v))
    assert all(x.is_contiguous() for x in (cos, sin, written))
    assert all(x.stride() == (n_kv_heads * head_dim, head_dim, 1) for x in (keys, values))
    assert (q_norm is None) == (k_norm is None)
    out = torch.empty((n, n_heads, head_dim), dtype=q.dtype, device=q.device)
    if n > 0:
        _rotate_and_keep_kernel[(n,)](
            q,
            k,
            v,
            cos,
            sin,
            q if q_norm is None else q_norm,
            k if k_norm is None else k_norm,
            eps,
            out,
            keys,
            values,
            written,
            q.stride(0),
            k.stride(0),
            v.stride(0),
            n_heads=n_heads,
            n_kv_heads=n_kv_heads,
            half=head_dim // 2,
            has_norm=q_norm is not None,
            block_heads=triton.next_power_of_2(n_heads),
            block_kv_heads=triton.next_power_of_2(n_kv_heads),
            block_half=triton.next_power_of_2(head_dim // 2),
        )
    return out


@triton.jit
def _rotate_heads(
    source,
    target,
    cos,
    sin,
    norm,
    eps,
    n_heads: tl.constexpr,
    half: tl.constexpr,
    has_norm: tl.constexpr,
    block_heads: tl.constexpr,
    block_half: tl.constexpr,
):
    """All heads of one token, a half of each at a time."""
    head, column = tl.arange(0, block_heads)[:, None], tl.arange(0, block_half)[None]
    inside = (head < n_heads) & (column < half)
    at = head * (2 * half) + column
    a = tl.load(source + at, mask=inside, other=0).to(tl.float32)
    b = tl.load(source + at + half, mask=inside, other=0).to(tl.float32)
    if has_norm:
        scale = 1 / tl.sqrt(tl.sum(a * a + b * b, axis=1) / (2 * half) + eps)[:, None]
        a = a * scale * tl.load(norm + column, mask=column < half, other=0).to(tl.float32)
        b = b * scale * tl.load(norm + half + column, mask=column < half, other=0).to(tl.float32)
    c, s = tl.load(cos + column, mask=column < half, other=0), tl.load(sin + column, mask=column < half, other=0)
    tl.store(target + at, (a * c - b * s).to(target.dtype.element_ty), mask=inside)
    tl.store(target + at + half, (b * c + a * s).to(target.dtype.element_ty), mask=inside)


# `written` begins anywhere in a longer tensor; an odd place is no reason to compile again.
@triton.jit(do_not_specialize_on_alignment=["written"])
def _rotate_and_keep_kernel(
    q,
    k,
    v,
    cos,
    sin,
    q_norm,
    k_norm,
    eps,
    out,
    keys,
    values,
    written,
    q_stride,
    k_stride,
    v_stride,
    n_heads: tl.constexpr,
    n_kv_heads: tl.constexpr,
    half: tl.constexpr,
    has_norm: tl.constexpr,
    block_heads: tl.constexpr,
    block_kv_heads: tl.constexpr,
    block_half: tl.constexpr,
):
    """One program a token."""
    token = tl.program_id(0).to(tl.int64)
    slot = tl.load(written + token)
    cos += token * half
    sin += token * half
    kept = slot * (n_kv_heads * 2 * half)
    _rotate_heads(
        q + token * q_stride,
        out + token * (n_heads * 2 * half),
        cos,
        sin,
        q_norm,
        eps,
        n_heads,
        half,
        has_norm,
        block_heads,
        block_half,
    )
    _rotate_heads(k + token * k_stride, keys + kept, cos, sin, k_norm, eps, n_kv_heads, half, has_norm, block_kv_heads, block_half)
    head, column = tl.arange(0, block_kv_heads)[:, None], tl.arange(0, 2 * block_half)[None]
    inside = (head < n_kv_heads) & (column < 2 * half)
    at = head * (2 * half) + column
    tl.store(values + kept + at, tl.load(v + token * v_stride + at, mask=inside, other=0), mask=inside)
