"""The decoder's kernels against their references: error by budget against float64, outputs poisoned, odd shapes and strides.

On a CPU they run in Triton's interpreter, whose bfloat16 products are wrong; there attention is tested in float32 alone.
"""

from __future__ import annotations

import pytest
import torch

from fastvl_lab.kernels import (
    argmax as argmax_module,
    decode_attention as decode_module,
    prefill_attention as prefill_module,
    rotate_and_keep as rotate_module,
)
from fastvl_lab.kernels.argmax import argmax, argmax_reference
from fastvl_lab.kernels.decode_attention import decode_attention, decode_attention_reference
from fastvl_lab.kernels.prefill_attention import block_size, prefill_attention, prefill_attention_reference
from fastvl_lab.kernels.rotate_and_keep import rotate_and_keep, rotate_and_keep_reference

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
DTYPES = [torch.float32, torch.bfloat16]


@pytest.fixture(autouse=True)
def _poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever a kernel leaves unwritten shows as NaN, or as an impossible place."""

    class Poisoned:
        def __getattr__(self, name: str) -> object:
            return getattr(torch, name)

        @staticmethod
        def empty(*args: object, **kwargs: object) -> torch.Tensor:
            made = torch.empty(*args, **kwargs)  # type: ignore[call-overload]
            return made.fill_(float("nan")) if made.is_floating_point() else made.fill_(-1)

    for module in (argmax_module, decode_module, prefill_module, rotate_module):
        monkeypatch.setattr(module, "torch", Poisoned())


def _budget(ours: torch.Tensor, plain: torch.Tensor, truth: torch.Tensor) -> None:
    eps = torch.finfo(ours.dtype).eps
    error, allowed = (ours.double() - truth).abs().max(), (plain.double() - truth).abs().max()
    assert error <= 2 * allowed + 4 * eps * truth.abs().max()


def _random(*shape: int, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(DEVICE, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("normed", [True, False])
@pytest.mark.parametrize(("n", "heads", "kv_heads", "dim"), [(1, 4, 2, 48), (5, 6, 1, 64), (3, 3, 3, 80), (0, 4, 2, 16)])
def test_rotate_and_keep(dtype: torch.dtype, normed: bool, n: int, heads: int, kv_heads: int, dim: int) -> None:
    packed = _random(n, heads + 2 * kv_heads, dim, dtype=dtype)
    q, k, v = packed.split((heads, kv_heads, kv_heads), dim=1)  # strided, as a fused projection leaves them
    angles = _random(n, dim // 2, dtype=torch.float64, seed=1)
    norms = [_random(dim, dtype=dtype, seed=seed) if normed else None for seed in (2, 3)]
    written = torch.tensor([7, 2, 19, 0, 4][:n], dtype=torch.int64, device=DEVICE)

    def run(function, of: torch.dtype) -> list[torch.Tensor]:  # type: ignore[no-untyped-def]
        kept = [torch.full((20, kv_heads, dim), float("nan"), dtype=of, device=DEVICE) for _ in range(2)]
        cast = [None if norm is None else norm.to(of) for norm in norms]
        table = torch.float64 if of == torch.float64 else torch.float32
        cos_sin = (angles.cos().to(table), angles.sin().to(table))
        return [function(q.to(of), k.to(of), v.to(of), *cos_sin, *cast, 1e-6, *kept, written), *kept]

    ours, plain, truth = (
        run(rotate_and_keep, dtype),
        run(rotate_and_keep_reference, dtype),
        run(rotate_and_keep_reference, torch.float64),
    )
    assert ours[0].shape == (n, heads, dim)
    untouched = torch.ones(20, dtype=torch.bool, device=DEVICE).index_fill(0, written, False)
    for one in ours[1:]:
        assert one[untouched].isnan().all()
    if n > 0:
        _budget(ours[0], plain[0], truth[0])
        _budget(ours[1][written], plain[1][written], truth[1][written])
        assert torch.equal(ours[2][written], v)


def _slots(lengths: list[int], n_slots: int, seed: int = 4) -> torch.Tensor:
    """Every sequence's tokens in slots of its own, in no order; what lies behind its end is a slot that holds NaN."""
    order = torch.randperm(n_slots - 1, generator=torch.Generator().manual_seed(seed))
    table = torch.full((len(lengths), max(lengths) + 3), n_slots - 1)
    at = 0
    for row, length in enumerate(lengths):
        table[row, :length] = order[at : at + length]
        at += length
    return table.to(DEVICE)


def _store(n_slots: int, kv_heads: int, dim: int, dtype: torch.dtype, seed: int) -> torch.Tensor:
    store = _random(n_slots, kv_heads, dim, dtype=dtype, seed=seed)
    store[-1] = float("nan")
    return store


def _attention_dtype(dtype: torch.dtype, block_k: int) -> None:
    if dtype == torch.bfloat16 and DEVICE.type == "cpu":
        pytest.skip("Triton's interpreter computes bfloat16 products wrongly")
    if DEVICE.type == "cuda" and (dtype == torch.float32) != (block_k == 32):
        pytest.skip("on a device, blocks of 32 keys are for float32, and larger ones for half precision")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("before", "new", "heads", "kv_heads", "dim"),
    [
        ([0], [1], 2, 1, 16),
        ([0], [33], 2, 2, 48),
        ([0], [64], 4, 2, 64),
        ([31], [2], 2, 1, 72),
        ([64], [1], 2, 1, 80),
        ([40], [70], 4, 1, 128),
        ([0, 5, 64], [33, 1, 40], 2, 1, 32),
        ([3], [41], 7, 1, 24),  # of a block's rows, some are no query's
        ([0], [5], 40, 1, 16),  # more heads share a key head than a block has rows
    ],
)
def test_prefill_attention(
    dtype: torch.dtype, before: list[int], new: list[int], heads: int, kv_heads: int, dim: int, block_k: int
) -> None:
    _attention_dtype(dtype, block_k)
    lengths = [b + n for b, n in zip(before, new, strict=True)]
    n_slots, size = sum(lengths) + 5, block_size(dtype, heads // kv_heads)
    q = _random(sum(new), heads + 2, dim, dtype=dtype)[:, :heads]
    keys, values = (_store(n_slots, kv_heads, dim, dtype, seed) for seed in (1, 2))
    slot_of, blocks, start = _slots(lengths, n_slots), [], 0
    for sequence, (b, n) in enumerate(zip(before, new, strict=True)):
        blocks += [[first, start + n, sequence, b - start] for first in range(start, start + n, size)]
        start += n
    table = torch.tensor(blocks, dtype=torch.int32, device=DEVICE)
    inputs = (q, keys, values)
    ours = prefill_attention(*inputs, slot_of, table, longest=max(lengths))
    plain = prefill_attention_reference(*inputs, slot_of, table)
    truth = torch.empty_like(q, dtype=torch.float64)
    for first, end, sequence, offset in blocks:  # by the definition, in float64
        for row in range(first, min(first + size, end)):
            seen = slot_of[sequence, : row + offset + 1]
            for head in range(heads):
                k, v = (x[seen, head // (heads // kv_heads)].double() for x in (keys, values))
                truth[row, head] = (k @ q[row, head].double() * dim**-0.5).softmax(0) @ v
    _budget(ours, plain, truth)


@pytest.mark.skipif(DEVICE.type == "cuda", reason="on a device, programs run side by side")
@pytest.mark.parametrize(("heads", "kv_heads"), [(2, 2), (4, 2), (6, 1)])
def test_the_longest_blocks_of_queries_come_first_for_all_heads(heads: int, kv_heads: int) -> None:
    """All blocks write the same rows, each from another number of keys: what is left there is the first block's, the shortest's."""
    n = 100
    q, keys, values = (_random(n, h, 16, dtype=torch.float32, seed=h) for h in (heads, kv_heads, kv_heads))
    slot_of, blocks = torch.arange(n, device=DEVICE)[None], [[0, 3, 0, offset] for offset in (0, 17, n - 3)]

    def made(table: list[list[int]]) -> torch.Tensor:
        return prefill_attention(q, keys, values, slot_of, torch.tensor(table, dtype=torch.int32, device=DEVICE), longest=n)[:3]

    assert torch.equal(made(blocks), made(blocks[:1]))
    assert not torch.equal(made(blocks), made(blocks[1:]))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("lengths", "longest", "heads", "kv_heads", "dim"),
    [
        ([1], 1, 2, 1, 16),
        ([64], 64, 4, 2, 48),
        ([65], 65, 4, 1, 64),
        ([130], 130, 6, 2, 80),
        ([3], 900, 2, 1, 128),  # most shares are empty
        ([1, 200, 67], 200, 4, 2, 32),
    ],
)
def test_decode_attention(
    dtype: torch.dtype, lengths: list[int], longest: int, heads: int, kv_heads: int, dim: int, block_k: int
) -> None:
    _attention_dtype(dtype, block_k)
    n_slots = sum(lengths) + 5
    q = _random(len(lengths), heads + 1, dim, dtype=dtype)[:, :heads]
    keys, values = (_store(n_slots, kv_heads, dim, dtype, seed) for seed in (1, 2))
    slot_of, counts = _slots(lengths, n_slots), torch.tensor(lengths, dtype=torch.int32, device=DEVICE)
    ours = decode_attention(q, keys, values, slot_of, counts, longest=longest)
    plain = decode_attention_reference(q, keys, values, slot_of, counts)
    wide = [x.double() for x in (q, keys, values)]
    truth = decode_attention_reference(*wide, slot_of, counts)
    _budget(ours, plain, truth)


def test_a_very_long_sequence_has_no_more_shares_than_there_may_be() -> None:
    n = 64 * 64 + 70
    q, keys, values = _random(1, 2, 16, dtype=torch.float32), *(_random(n, 1, 16, dtype=torch.float32, seed=s) for s in (1, 2))
    slot_of, counts = torch.arange(n, device=DEVICE)[None], torch.tensor([n], dtype=torch.int32, device=DEVICE)
    ours = decode_attention(q, keys, values, slot_of, counts, longest=n)
    truth = decode_attention_reference(q.double(), keys.double(), values.double(), slot_of, counts)
    assert (ours.double() - truth).abs().max() < 1e-5


@pytest.mark.parametrize("n", [1, 5, 1024, 1025, 5000])
def test_argmax(n: int) -> None:
    x = _random(n, dtype=torch.float32)
    assert argmax(x).tolist() == argmax_reference(x).tolist()
    assert argmax(torch.zeros_like(x)).tolist() == [0]  # of equals, the first
    assert argmax(torch.full_like(x, float("-inf"))).tolist() == [0]
    for place in {0, n // 2, n - 1}:
        one = x.clone()
        one[place] = 1e9
        assert argmax(one).tolist() == [place]
        one[place] = float("nan")
        assert argmax(one).tolist() == argmax_reference(one).tolist() == [place]
        one[0] = float("inf") if place else one[0]  # infinity is less than no number
        assert argmax(one).tolist() == argmax_reference(one).tolist() == [place]
