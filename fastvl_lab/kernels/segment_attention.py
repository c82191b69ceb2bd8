"""Attention inside segments of a packed sequence, all segments in one launch (FlashAttention, arXiv 2205.14135, without a mask)."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from fastvl_lab.kernels.tuned import tuned

MAX_HEAD_DIM = 128


def block_size(dtype: torch.dtype, longest: int) -> int:
    """Queries of one program, where the longest segment has so many: a window is one block; few in float32, for exact products."""
    if dtype == torch.float32:
        return 32
    return 64 if longest <= 64 else 128


def segment_attention_reference(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, blocks: torch.Tensor) -> torch.Tensor:
    """What `segment_attention` computes, in plain PyTorch: softmax over each segment, written out."""
    out = torch.empty((q.shape[1], q.shape[0], q.shape[2]), dtype=q.dtype, device=q.device)
    for start, end in dict.fromkeys((start, end) for _, start, end in blocks.tolist()):
        scores = (q[:, start:end] @ k[:, start:end].transpose(1, 2)) * q.shape[2] ** -0.5
        out[start:end] = (scores.softmax(-1) @ v[:, start:end]).transpose(0, 1)
    return out


def segment_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, blocks: torch.Tensor, *, block: int) -> torch.Tensor:
    """Full attention of every query to the keys of its segment; [N, H, D].

    q, k, v: [H, N, D], the last dimension contiguous, D a multiple of 8 up to 128. blocks: int32 [n_blocks, 3], the first query of
    each block of up to `block`, and where its segment starts and ends; every query is in one block, none is empty. block: of
    `block_size`. Sums are float32.
    """
    n_heads, n, head_dim = q.shape
    out = torch.empty((n, n_heads, head_dim), dtype=q.dtype, device=q.device)
    assert q.stride(2) == k.stride(2) == v.stride(2) == 1
    assert head_dim <= MAX_HEAD_DIM
    assert head_dim % 8 == 0
    assert all(stride % 8 == 0 for x in (q, k, v) for stride in x.stride()[:2])
    block_d, block_rest = _parts(head_dim)
    segment_attention_kernel.launch(
        (blocks.shape[0], n_heads),
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
        sizes=(head_dim, block),
        lengths=(n,),
        head_dim=head_dim,
        block_d=block_d,
        block_rest=block_rest,
        block_q=block,
        precision="ieee" if q.dtype == torch.float32 else "tf32",
    )
    return out


def _parts(head_dim: int) -> tuple[int, int]:
    """Powers of two that hold a head: 72 and 80 are 64 and 16 rather than 128, for which products would be a third of nothing."""
    if 64 < head_dim <= 80:
        return 64, 16
    return max(triton.next_power_of_2(head_dim), 16), 0


# Windows and whole frames have blocks of different sizes, and so settings of their own.
@tuned(sizes=("head_dim", "block_q"), lengths=("queries",))
@triton.jit
def segment_attention_kernel(
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
    block_rest: tl.constexpr,
    block_q: tl.constexpr,
    block_k: tl.constexpr,
    precision: tl.constexpr,
):
    """One program a block of queries and head, with the running maximum and sum of an online softmax.

    Whole blocks of keys first, then what is left of the segment. Where a head has a rest, it is a second product on top.
    """
    number, head = tl.program_id(0), tl.program_id(1).to(tl.int64)
    # Strides are multiples of 8, which Triton cannot see in those that 16 does not divide, and would load 2 bytes at a time.
    q += tl.multiple_of(head * q_stride_h, 8)
    k += tl.multiple_of(head * k_stride_h, 8)
    v += tl.multiple_of(head * v_stride_h, 8)
    first = tl.load(blocks + number * 3)
    start, end = tl.load(blocks + number * 3 + 1), tl.load(blocks + number * 3 + 2)
    column = tl.arange(0, block_d)[None]
    in_head = column < head_dim
    rest = block_d + tl.arange(0, max(block_rest, 16))[None]
    in_rest = rest < head_dim

    row = (first + tl.arange(0, block_q)).to(tl.int64)[:, None]
    in_segment = row < end
    queries = tl.load(q + row * q_stride_n + column, mask=in_segment & in_head, other=0)
    mixed = tl.zeros((block_q, block_d), tl.float32)
    if block_rest > 0:
        queries_rest = tl.load(q + row * q_stride_n + rest, mask=in_segment & in_rest, other=0)
        mixed_rest = tl.zeros((block_q, block_rest), tl.float32)
    maximum = tl.full((block_q,), float("-inf"), tl.float32)
    total = tl.zeros((block_q,), tl.float32)
    whole_end = start + (end - start) // block_k * block_k
    for phase in tl.static_range(2):
        low, high = (start, whole_end) if phase == 0 else (whole_end, end)
        for at in range(low, high, block_k):
            key_row = (at + tl.arange(0, block_k)).to(tl.int64)[:, None]
            inside, inside_rest = in_head, in_rest
            if phase == 1:
                inside, inside_rest = (key_row < end) & in_head, (key_row < end) & in_rest
            keys = tl.load(k + key_row * k_stride_n + column, mask=inside, other=0)
            scores = tl.dot(queries, tl.trans(keys), input_precision=precision)
            if block_rest > 0:
                keys_rest = tl.load(k + key_row * k_stride_n + rest, mask=inside_rest, other=0)
                scores = tl.dot(queries_rest, tl.trans(keys_rest), acc=scores, input_precision=precision)
            if phase == 1:
                scores = tl.where(tl.trans(key_row < end), scores, float("-inf"))
            higher = tl.maximum(maximum, tl.max(scores, 1) * scale)
            weights = tl.exp2(scores * scale - higher[:, None])
            shrink = tl.exp2(maximum - higher)
            total = total * shrink + tl.sum(weights, 1)
            values = tl.load(v + key_row * v_stride_n + column, mask=inside, other=0)
            mixed = tl.dot(weights.to(values.dtype), values, acc=mixed * shrink[:, None], input_precision=precision)
            if block_rest > 0:
                values_rest = tl.load(v + key_row * v_stride_n + rest, mask=inside_rest, other=0)
                weighted = mixed_rest * shrink[:, None]
                mixed_rest = tl.dot(weights.to(values.dtype), values_rest, acc=weighted, input_precision=precision)
            maximum = higher
    out += (row * n_heads + head) * head_dim
    tl.store(out + column, (mixed / total[:, None]).to(out.dtype.element_ty), mask=in_segment & in_head)
    if block_rest > 0:
        tl.store(out + rest, (mixed_rest / total[:, None]).to(out.dtype.element_ty), mask=in_segment & in_rest)
