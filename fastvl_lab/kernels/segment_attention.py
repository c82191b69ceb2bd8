"""Attention inside segments of a packed sequence, all segments in one launch (FlashAttention, arXiv 2205.14135, without a mask)."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

MAX_HEAD_DIM = 128


def block_size(dtype: torch.dtype) -> int:
    """Queries of one program, and keys of one step: fewer in float32, whose exact products would not fit into shared memory."""
    return 32 if dtype == torch.float32 else 64


def segment_attention_reference(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, blocks: torch.Tensor) -> torch.Tensor:
    """What `segment_attention` computes, in plain PyTorch: softmax over each segment, written out."""
    out = torch.empty((q.shape[1], q.shape[0], q.shape[2]), dtype=q.dtype, device=q.device)
    for start, end in dict.fromkeys((start, end) for _, start, end in blocks.tolist()):
        scores = (q[:, start:end] @ k[:, start:end].transpose(1, 2)) * q.shape[2] ** -0.5
        out[start:end] = (scores.softmax(-1) @ v[:, start:end]).transpose(0, 1)
    return out


def segment_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, blocks: torch.Tensor) -> torch.Tensor:
    """Full attention of every query to the keys of its segment; [N, H, D].

    q, k, v: [H, N, D], the last dimension contiguous, D a multiple of 8 up to 128. blocks: int32 [n_blocks, 3], the first query of
    each block of up to `block_size(dtype)`, and where its segment starts and ends; every query is in one block, none is empty. Sums
    are float32.
    """
    n_heads, n, head_dim = q.shape
    out = torch.empty((n, n_heads, head_dim), dtype=q.dtype, device=q.device)
    assert q.stride(2) == k.stride(2) == v.stride(2) == 1
    assert head_dim <= MAX_HEAD_DIM
    assert head_dim % 8 == 0
    assert all(stride % 8 == 0 for x in (q, k, v) for stride in x.stride()[:2])
    _segment_attention_kernel[(blocks.shape[0], n_heads)](
        q,
        k,
        v,
        out,
        blocks,
        *q.stride()[:2],
        *k.stride()[:2],
        *v.stride()[:2],
        n_heads,
        head_dim**-0.5 * 1.4426950408889634,  # the softmax is taken in powers of two
        head_dim=head_dim,
        block_d=max(triton.next_power_of_2(head_dim), 16),
        block=block_size(q.dtype),
        num_warps=8 if q.dtype == torch.float32 else 4,
        precision="ieee" if q.dtype == torch.float32 else "tf32",
    )
    return out


@triton.jit
def _segment_attention_kernel(
    q,
    k,
    v,
    out,
    blocks,
    q_stride_h,
    q_stride_n: tl.constexpr,  # the same for all images, unlike those of heads
    k_stride_h,
    k_stride_n: tl.constexpr,
    v_stride_h,
    v_stride_n: tl.constexpr,
    n_heads,
    scale,
    head_dim: tl.constexpr,
    block_d: tl.constexpr,
    block: tl.constexpr,
    precision: tl.constexpr,
):
    """One program a block of queries and head, with the running maximum and sum of an online softmax."""
    number, head = tl.program_id(0), tl.program_id(1).to(tl.int64)
    # Strides are multiples of 8, which Triton cannot see in those that 16 does not divide, and would load 2 bytes at a time.
    q += tl.multiple_of(head * q_stride_h, 8)
    k += tl.multiple_of(head * k_stride_h, 8)
    v += tl.multiple_of(head * v_stride_h, 8)
    first = tl.load(blocks + number * 3)
    start, end = tl.load(blocks + number * 3 + 1), tl.load(blocks + number * 3 + 2)
    column = tl.arange(0, block_d)[None]
    in_head = column < head_dim

    row = (first + tl.arange(0, block)).to(tl.int64)[:, None]
    in_segment = row < end
    queries = tl.load(q + row * q_stride_n + column, mask=in_segment & in_head, other=0)
    maximum = tl.full((block,), float("-inf"), tl.float32)
    total = tl.zeros((block,), tl.float32)
    mixed = tl.zeros((block, block_d), tl.float32)
    for at in range(start, end, block):
        key_row = (at + tl.arange(0, block)).to(tl.int64)
        is_key = key_row < end
        keys = tl.load(k + key_row[:, None] * k_stride_n + column, mask=is_key[:, None] & in_head, other=0)
        scores = tl.dot(queries, tl.trans(keys), input_precision=precision) * scale
        scores = tl.where(is_key[None], scores, float("-inf"))
        higher = tl.maximum(maximum, tl.max(scores, 1))
        weights = tl.exp2(scores - higher[:, None])
        shrink = tl.exp2(maximum - higher)
        values = tl.load(v + key_row[:, None] * v_stride_n + column, mask=is_key[:, None] & in_head, other=0)
        total = total * shrink + tl.sum(weights, 1)
        mixed = mixed * shrink[:, None] + tl.dot(weights.to(values.dtype), values, input_precision=precision)
        maximum = higher
    mixed = mixed / total[:, None]
    tl.store(out + (row * n_heads + head) * head_dim + column, mixed.to(out.dtype.element_ty), mask=in_segment & in_head)
