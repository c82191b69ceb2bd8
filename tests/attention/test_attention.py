"""Every attention option against float64, by error budget: at most twice the error of the written-out one, plus rounding."""

from __future__ import annotations

import pytest
import torch

from fastvl_lab import toggles
from fastvl_lab.attention import bind, eager
from fastvl_lab.recipe import Attention

OPTIONS = [
    (toggle.name, option.value)
    for toggle in toggles()
    if toggle.slot == "attention"
    for option in toggle.options
    if not option.needs
]


def _qkv(n_q: int, n_kv: int, heads: int, kv_heads: int, dim: int, seed: int) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    shapes = ((n_q, heads, dim), (n_kv, kv_heads, dim), (n_kv, kv_heads, dim))
    return tuple(torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes)


def _naive(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, causal: bool) -> torch.Tensor:
    """Attention head by head and query by query, in float64."""
    out, group = torch.empty_like(q), q.shape[1] // k.shape[1]
    for row in range(q.shape[0]):
        seen = row + 1 if causal else k.shape[0]
        for head in range(q.shape[1]):
            scores = k[:seen, head // group] @ q[row, head] / q.shape[2] ** 0.5
            out[row, head] = scores.softmax(0) @ v[:seen, head // group]
    return out


@pytest.mark.parametrize(("stage", "option"), OPTIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("n", "heads", "kv_heads", "dim"), [(1, 4, 4, 16), (7, 4, 1, 32), (130, 6, 2, 24), (257, 4, 2, 64)])
def test_attention_within_the_error_budget(
    stage: str, option: str, dtype: torch.dtype, n: int, heads: int, kv_heads: int, dim: int
) -> None:
    n_q = n if stage == "prefill" else 1
    q, k, v = _qkv(n_q, n, heads, kv_heads, dim, seed=n)
    truth = _naive(q, k, v, causal=stage == "prefill")
    low = [x.to(dtype) for x in (q, k, v)]
    reference = (getattr(eager, stage)(*low).double() - truth).abs().max()
    attend = getattr(bind(Attention(**{stage: option})), stage)
    # Not contiguous, as slices of a fused projection are.
    strided = [torch.cat([x, x], dim=-1)[..., : x.shape[-1]] for x in low]
    out = attend(*strided)
    assert out.dtype == dtype
    assert out.shape == q.shape
    assert (out.double() - truth).abs().max() <= 2 * reference + 4 * torch.finfo(dtype).eps


def test_prefill_is_causal_and_decode_sees_everything() -> None:
    q, k, v = _qkv(9, 9, 2, 1, 8, seed=0)
    for _, option in (o for o in OPTIONS if o[0] == "prefill"):
        attend = bind(Attention(prefill=option, decode=option))
        full = attend.prefill(q, k, v)
        for step in range(9):
            one = attend.decode(q[step : step + 1], k[: step + 1], v[: step + 1])
            assert torch.allclose(one[0], full[step], atol=1e-12)
