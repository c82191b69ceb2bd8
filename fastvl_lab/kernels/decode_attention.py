"""One query a sequence against all keys of it in the KV cache, the keys split among programs (Flash-Decoding).

Heads that share a key head are rows of one product, so that keys and values are read once a group. Each program leaves the maximum,
sum and mix of its share; a second kernel brings the shares together. Source: https://pytorch.org/blog/flash-decoding
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from fastvl_lab.kernels.tuned import tuned

MAX_HEAD_DIM = 128
MAX_SPLITS = 64
_LEAST_SHARE = 64


def decode_attention_reference(
    q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, slot_of: torch.Tensor, lengths: torch.Tensor
) -> torch.Tensor:
    """What `decode_attention` computes, in plain PyTorch, sequence by sequence."""
    out, group = torch.empty_like(q), q.shape[1] // keys.shape[1]
    for sequence, length in enumerate(lengths.tolist()):
        seen = slot_of[sequence, :length]
        k, v = (x[seen].repeat_interleave(group, dim=1) for x in (keys, values))  # [length, H, D]
        weights = ((q[sequence] * k).sum(-1) * q.shape[2] ** -0.5).softmax(0)  # [length, H]
        out[sequence] = (weights[..., None] * v).sum(0)
    return out


def decode_attention(
    q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, slot_of: torch.Tensor, lengths: torch.Tensor, *, longest: int
) -> torch.Tensor:
    """Each sequence's query against all of its keys; [B, H, D].

    q: [B, H, D], the last dimension contiguous, D a multiple of 8 up to 128. keys, values: [n_slots, K, D], contiguous. slot_of:
    int64 [B, longest], where each token of each sequence is kept; lengths: int32 [B], at least 1 each. longest: the greatest
    length, as the host knows it, which decides how many shares are made.
    """
    n, n_heads, head_dim = q.shape
    n_kv_heads = keys.shape[1]
    assert head_dim <= MAX_HEAD_DIM
    assert head_dim % 8 == 0
    assert q.stride(2) == 1
    assert keys.is_contiguous()
    assert values.is_contiguous()
    assert slot_of.stride(1) == 1
    splits = min(triton.cdiv(longest, _LEAST_SHARE), MAX_SPLITS)
    mixes = torch.empty((n, n_heads, splits, head_dim), dtype=torch.float32, device=q.device)
    maxima, sums = (torch.empty((n, n_heads, splits), dtype=torch.float32, device=q.device) for _ in range(2))
    out = torch.empty((n, n_heads, head_dim), dtype=q.dtype, device=q.device)
    block_d = max(triton.next_power_of_2(head_dim), 16)
    block_group = max(triton.next_power_of_2(n_heads // n_kv_heads), 16)  # the least that a product takes
    decode_share_kernel.launch(
        (n, n_kv_heads, splits),
        q,
        keys,
        values,
        slot_of,
        lengths,
        mixes,
        maxima,
        sums,
        q.stride(0),
        q.stride(1),
        slot_of.stride(0),
        head_dim**-0.5 * 1.4426950408889634,  # the softmax is taken in powers of two
        splits,
        sizes=(head_dim, block_group),
        lengths=(longest,),
        n_heads=n_heads,
        n_kv_heads=n_kv_heads,
        head_dim=head_dim,
        block_d=block_d,
        block_group=block_group,
        precision="ieee" if q.dtype == torch.float32 else "tf32",
    )
    _gather_kernel[(n, n_heads)](
        mixes, maxima, sums, out, splits, n_heads=n_heads, head_dim=head_dim, block_d=block_d, block_splits=MAX_SPLITS
    )
    return out


# A number of shares is no reason to compile again while tokens are made: none of its values is special.
@tuned(sizes=("head_dim", "block_group"), lengths=("keys",))
@triton.jit(do_not_specialize=["splits"])
def decode_share_kernel(
    q,
    keys,
    values,
    slot_of,
    lengths,
    mixes,
    maxima,
    sums,
    q_stride_n,
    q_stride_h,
    slot_stride,
    scale,
    splits,
    n_heads: tl.constexpr,
    n_kv_heads: tl.constexpr,
    head_dim: tl.constexpr,
    block_d: tl.constexpr,
    block_group: tl.constexpr,
    block_k: tl.constexpr,
    precision: tl.constexpr,
):
    """One program a sequence, key head and share of its keys; a share may be empty."""
    sequence, kv_head, split = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2)
    group: tl.constexpr = n_heads // n_kv_heads
    length = tl.load(lengths + sequence)
    share = tl.cdiv(tl.cdiv(length, block_k), splits) * block_k
    start = split * share
    end = tl.minimum(start + share, length)
    member, column = tl.arange(0, block_group), tl.arange(0, block_d)[None]
    in_head = column < head_dim
    is_member = member < group
    head = kv_head * group + member

    slot_of += sequence * slot_stride
    keys += kv_head * head_dim
    values += kv_head * head_dim
    at_q = sequence * q_stride_n + head[:, None] * q_stride_h + column
    queries = tl.load(q + at_q, mask=is_member[:, None] & in_head, other=0)
    maximum = tl.full((block_group,), float("-inf"), tl.float32)
    total = tl.zeros((block_group,), tl.float32)
    mixed = tl.zeros((block_group, block_d), tl.float32)
    for at in range(start, end, block_k):
        key = at + tl.arange(0, block_k)
        is_key = key < end
        slot = tl.load(slot_of + key, mask=is_key, other=0)
        kept = slot[:, None] * (n_kv_heads * head_dim) + column
        inside = is_key[:, None] & in_head
        k = tl.load(keys + kept, mask=inside, other=0)
        scores = tl.dot(queries, tl.trans(k), input_precision=precision)
        scores = tl.where(is_key[None], scores, float("-inf"))
        higher = tl.maximum(maximum, tl.max(scores, 1) * scale)
        weights = tl.exp2(scores * scale - higher[:, None])
        shrink = tl.exp2(maximum - higher)
        v = tl.load(values + kept, mask=inside, other=0)
        total = total * shrink + tl.sum(weights, 1)
        mixed = tl.dot(weights.to(v.dtype), v, acc=mixed * shrink[:, None], input_precision=precision)
        maximum = higher
    at = (sequence * n_heads + head) * splits + split
    tl.store(maxima + at, maximum, mask=is_member)
    tl.store(sums + at, total, mask=is_member)
    tl.store(mixes + at[:, None] * head_dim + column, mixed, mask=is_member[:, None] & in_head)


@triton.jit(do_not_specialize=["splits"])
def _gather_kernel(
    mixes,
    maxima,
    sums,
    out,
    splits,
    n_heads: tl.constexpr,
    head_dim: tl.constexpr,
    block_d: tl.constexpr,
    block_splits: tl.constexpr,
):
    """One program a sequence and head."""
    at = tl.program_id(0).to(tl.int64) * n_heads + tl.program_id(1)
    split, column = tl.arange(0, block_splits), tl.arange(0, block_d)[None]
    is_split = split < splits
    maximum = tl.load(maxima + at * splits + split, mask=is_split, other=float("-inf"))
    weight = tl.exp2(maximum - tl.max(maximum))  # of an empty share: exp2(-inf), which is 0
    total = tl.sum(weight * tl.load(sums + at * splits + split, mask=is_split, other=0))
    inside = is_split[:, None] & (column < head_dim)
    mixed = tl.load(mixes + (at * splits + split)[:, None] * head_dim + column, mask=inside, other=0)
    mixed = tl.sum(mixed * weight[:, None], axis=0) / total
    column = tl.arange(0, block_d)
    tl.store(out + at * head_dim + column, mixed.to(out.dtype.element_ty), mask=column < head_dim)
