"""Causal attention of packed new tokens to their sequences in the KV cache, all sequences in one launch.

An online softmax over blocks of keys (FlashAttention, arXiv 2205.14135), on top of tokens that were there before. The heads that
share a key head are rows of one product, so that a program reads keys and values for all of them. Blocks of queries start with the
last, which see most keys: what is left for the end is short.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from fastvl_lab.kernels.tuned import tuned

MAX_HEAD_DIM = 128


def block_size(dtype: torch.dtype, group: int) -> int:
    """Queries of one program, where `group` heads share a key head."""
    return _rows(dtype, group) // group


def _rows(dtype: torch.dtype, group: int) -> int:
    """Queries times heads of one program, a power of two: few in float32, for exact products."""
    return max(32 if dtype == torch.float32 else 128, int(triton.next_power_of_2(group)))


def prefill_attention_reference(
    q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, slot_of: torch.Tensor, blocks: torch.Tensor
) -> torch.Tensor:
    """What `prefill_attention` computes, in plain PyTorch, row by row."""
    out, group = torch.empty_like(q), q.shape[1] // keys.shape[1]
    size = block_size(q.dtype, group)
    for first, end, sequence, offset in blocks.tolist():
        for row in range(first, min(first + size, end)):
            seen = slot_of[sequence, : row + offset + 1]
            k, v = (x[seen].repeat_interleave(group, dim=1) for x in (keys, values))  # [length, H, D]
            weights = ((q[row] * k).sum(-1) * q.shape[2] ** -0.5).softmax(0)  # [length, H]
            out[row] = (weights[..., None] * v).sum(0)
    return out


def prefill_attention(
    q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, slot_of: torch.Tensor, blocks: torch.Tensor, *, longest: int
) -> torch.Tensor:
    """Every query against the keys of its sequence up to its own; [n, H, D].

    q: [n, H, D], the last dimension contiguous, D a multiple of 8 up to 128. keys, values: [n_slots, K, D], contiguous. slot_of:
    int64 [B, longest], where each token of each sequence is kept. blocks: int32 [n_blocks, 4]: the first row of each block of up to
    `block_size(dtype, H // K)`, the end of its sequence's rows, the sequence, and what to add to a row to have its place in the
    sequence. longest: the length of the longest sequence, as the host knows it.
    """
    n, n_heads, head_dim = q.shape
    group = n_heads // keys.shape[1]
    assert head_dim <= MAX_HEAD_DIM
    assert head_dim % 8 == 0
    assert q.stride(2) == 1
    assert q.stride(0) % 8 == q.stride(1) % 8 == 0
    assert keys.is_contiguous()
    assert values.is_contiguous()
    assert slot_of.stride(1) == 1
    out = torch.empty((n, n_heads, head_dim), dtype=q.dtype, device=q.device)
    prefill_attention_kernel.launch(
        (keys.shape[1], blocks.shape[0]),
        q,
        keys,
        values,
        slot_of,
        blocks,
        out,
        q.stride(0),
        q.stride(1),
        slot_of.stride(0),
        head_dim**-0.5 * 1.4426950408889634,  # the softmax is taken in powers of two
        sizes=(head_dim, group),
        lengths=(n, longest),
        n_heads=n_heads,
        n_kv_heads=keys.shape[1],
        head_dim=head_dim,
        block_d=max(triton.next_power_of_2(head_dim), 16),
        block_q=block_size(q.dtype, group),
        block_rows=_rows(q.dtype, group),
        precision="ieee" if q.dtype == torch.float32 else "tf32",
    )
    return out


@tuned(sizes=("head_dim", "group"), lengths=("queries", "keys"))
@triton.jit
def prefill_attention_kernel(
    q,
    keys,
    values,
    slot_of,
    blocks,
    out,
    q_stride_n,
    q_stride_h,
    slot_stride,
    scale,
    n_heads: tl.constexpr,
    n_kv_heads: tl.constexpr,
    head_dim: tl.constexpr,
    block_d: tl.constexpr,
    block_q: tl.constexpr,
    block_rows: tl.constexpr,
    block_k: tl.constexpr,
    precision: tl.constexpr,
):
    """One program a key head and block of queries; whole blocks of keys first, then those that the diagonal crosses."""
    kv_head, number = tl.program_id(0), tl.num_programs(1) - 1 - tl.program_id(1)
    group: tl.constexpr = n_heads // n_kv_heads
    first, end = tl.load(blocks + number * 4), tl.load(blocks + number * 4 + 1)
    sequence, offset = tl.load(blocks + number * 4 + 2).to(tl.int64), tl.load(blocks + number * 4 + 3)
    slot_of += sequence * slot_stride
    keys += kv_head * head_dim
    values += kv_head * head_dim
    column = tl.arange(0, block_d)[None]
    in_head = column < head_dim

    row = tl.arange(0, block_rows)  # a query's heads are neighbours
    query, head = first + row // group, kv_head * group + row % group
    place = query + offset  # of each query in its sequence
    inside = ((row < block_q * group) & (query < end))[:, None] & in_head
    at_q = tl.multiple_of(query.to(tl.int64) * q_stride_n, 8)[:, None] + tl.multiple_of(head * q_stride_h, 8)[:, None] + column
    queries = tl.load(q + at_q, mask=inside, other=0)
    maximum = tl.full((block_rows,), float("-inf"), tl.float32)
    total = tl.zeros((block_rows,), tl.float32)
    mixed = tl.zeros((block_rows, block_d), tl.float32)
    seen_by_all = (first + offset + 1) // block_k * block_k
    seen_by_last = tl.minimum(first + block_q, end) + offset
    for phase in tl.static_range(2):
        low, high = (0, seen_by_all) if phase == 0 else (seen_by_all, seen_by_last)
        for at in range(low, high, block_k):
            key = at + tl.arange(0, block_k)
            if phase == 0:
                slot = tl.load(slot_of + key)
                kept = slot[:, None] * (n_kv_heads * head_dim) + column
                k = tl.load(keys + kept, mask=in_head, other=0)
            else:
                slot = tl.load(slot_of + key, mask=key < seen_by_last, other=0)
                kept = slot[:, None] * (n_kv_heads * head_dim) + column
                k = tl.load(keys + kept, mask=(key < seen_by_last)[:, None] & in_head, other=0)
            scores = tl.dot(queries, tl.trans(k), input_precision=precision)
            if phase == 1:
                scores = tl.where(key[None] <= place[:, None], scores, float("-inf"))
            higher = tl.maximum(maximum, tl.max(scores, 1) * scale)
            weights = tl.exp2(scores * scale - higher[:, None])
            shrink = tl.exp2(maximum - higher)
            if phase == 0:
                v = tl.load(values + kept, mask=in_head, other=0)
            else:
                v = tl.load(values + kept, mask=(key < seen_by_last)[:, None] & in_head, other=0)
            total = total * shrink + tl.sum(weights, 1)
            mixed = tl.dot(weights.to(v.dtype), v, acc=mixed * shrink[:, None], input_precision=precision)
            maximum = higher
    mixed = mixed / total[:, None]
    at_out = (query.to(tl.int64) * n_heads + head)[:, None] * head_dim + column
    tl.store(out + at_out, mixed.to(out.dtype.element_ty), mask=inside)
