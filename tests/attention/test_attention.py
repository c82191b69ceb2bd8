"""Every attention option against float64, by error budget: at most twice the error of the written-out one, plus rounding."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch

from fastvl_lab import toggles
from fastvl_lab.attention import eager, sdpa
from fastvl_lab.cache.concat import ConcatKv

STAGES = {"prefill": {"eager": eager.prefill, "sdpa": sdpa.prefill}, "decode": {"eager": eager.decode, "sdpa": sdpa.decode}}
OPTIONS = [(stage, option) for stage, options in STAGES.items() for option in options]


def test_every_option_that_needs_no_gpu_is_tested_here() -> None:
    for toggle in toggles():
        if toggle.slot == "attention" and toggle.name in STAGES:
            assert [o.value for o in toggle.options if not o.needs] == list(STAGES[toggle.name])


def _naive(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """The last queries of a sequence, head by head and query by query, in float64."""
    out, group, before = torch.empty_like(q), q.shape[1] // k.shape[1], k.shape[0] - q.shape[0]
    for row in range(q.shape[0]):
        seen = before + row + 1
        for head in range(q.shape[1]):
            scores = k[:seen, head // group] @ q[row, head] / q.shape[2] ** 0.5
            out[row, head] = scores.softmax(0) @ v[:seen, head // group]
    return out


def _sequences(
    lengths: Sequence[int], new: Sequence[int], heads: int, kv_heads: int, dim: int
) -> list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(sum(lengths))
    shapes = [((n, heads, dim), (length, kv_heads, dim), (length, kv_heads, dim)) for length, n in zip(lengths, new, strict=True)]
    return [tuple(torch.randn(s, generator=generator, dtype=torch.float64) for s in three) for three in shapes]  # type: ignore[misc]


def _cached(sequences: list, new: Sequence[int], dtype: torch.dtype) -> ConcatKv:
    """Their keys and values in a cache: what was before, then what is new."""
    cache = ConcatKv(1, len(sequences))
    before = [len(k) - n for (_, k, _), n in zip(sequences, new, strict=True)]
    for cut in ([slice(0, b) for b in before], [slice(b, None) for b in before]):
        parts = [(k[c].to(dtype), v[c].to(dtype)) for (_, k, v), c in zip(sequences, cut, strict=True)]
        if all(len(k) for k, _ in parts):
            cache.extend([len(k) for k, _ in parts])
            # Not contiguous, as slices of a fused projection are.
            k, v = (torch.cat([torch.cat(x)] * 2, dim=-1)[..., : parts[0][0].shape[-1]] for x in zip(*parts, strict=True))
            cache.write(0, k, v)
    return cache


CASES = [
    ([1], [1], 4, 4, 16),
    ([7], [7], 4, 1, 32),
    ([130], [130], 6, 2, 24),
    ([257], [257], 4, 2, 64),
    ([90], [13], 4, 2, 16),
    ([64, 3, 17], [64, 3, 17], 4, 2, 16),
    ([64, 9, 17], [2, 3, 16], 4, 1, 16),
]


@pytest.mark.parametrize(("stage", "option"), OPTIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("lengths", "new", "heads", "kv_heads", "dim"), CASES)
def test_attention_within_the_error_budget(
    stage: str, option: str, dtype: torch.dtype, lengths: list[int], new: list[int], heads: int, kv_heads: int, dim: int
) -> None:
    """One sequence and several, from the start and on top of what the cache holds."""
    new = new if stage == "prefill" else [1] * len(lengths)
    sequences = _sequences(lengths, new, heads, kv_heads, dim)
    truth = torch.cat([_naive(*sequence) for sequence in sequences])
    cache = _cached(sequences, new, dtype)
    q = torch.cat([q for q, _, _ in sequences]).to(dtype)
    q = torch.cat([q, q], dim=-1)[..., :dim]
    reference = (STAGES[stage]["eager"](q, cache, 0).double() - truth).abs().max()
    out = STAGES[stage][option](q, cache, 0)
    assert out.dtype == dtype
    assert out.shape == q.shape
    assert (out.double() - truth).abs().max() <= 2 * reference + 4 * torch.finfo(dtype).eps
    if dtype == torch.float32:
        assert reference < 1e-5


def test_decode_sees_what_prefill_saw_at_its_place() -> None:
    ((q, k, v),) = _sequences([9], [9], 2, 1, 8)
    for option in STAGES["prefill"]:
        whole = STAGES["prefill"][option](q, _cached([(q, k, v)], [9], q.dtype), 0)
        for step in range(9):
            upto = (q[step : step + 1], k[: step + 1], v[: step + 1])
            one = STAGES["decode"][option](upto[0], _cached([upto], [1], q.dtype), 0)
            assert torch.allclose(one[0], whole[step], atol=1e-12)
