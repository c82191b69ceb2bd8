"""Kernels of the vision tower against their references in float64: in Triton's interpreter on a CPU, natively on a GPU.

The error may be twice that of plain PyTorch in the same dtype, plus rounding. Triton's interpreter truncates to bfloat16 where a
GPU rounds, and computes bfloat16 dots wrongly, so attention in bfloat16 is tested on a GPU alone.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from fastvl_lab.kernels.add_norm import add_layer_norm, add_layer_norm_reference, add_rms_norm, add_rms_norm_reference
from fastvl_lab.kernels.interpolate import interpolate
from fastvl_lab.kernels.plain import interpolate as interpolate_reference
from fastvl_lab.kernels.rotate_packed import rotate_packed, rotate_packed_reference
from fastvl_lab.kernels.segment_attention import block_size, segment_attention, segment_attention_reference
from fastvl_lab.kernels.silu_mul import silu_mul, silu_mul_reference
from fastvl_lab.vit import attention
from fastvl_lab.vit.positions import Group

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
DTYPES = [torch.float32, torch.bfloat16]
Tensors = tuple[torch.Tensor, ...]


def _random(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


def _assert_within_budget(made: Tensors, plain: Tensors, exact: Tensors, dtype: torch.dtype) -> None:
    for ours, theirs, truth in zip(made, plain, exact, strict=True):
        assert (ours.shape, ours.dtype) == (theirs.shape, theirs.dtype)
        assert not ours.isnan().any()
        error, budget = (ours.double() - truth).abs().max(), (theirs.double() - truth).abs().max()
        assert error <= 2 * budget + 4 * torch.finfo(dtype).eps * truth.abs().max()


@pytest.fixture
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a kernel does not write stays NaN."""
    for name in ("empty", "empty_like"):
        make: Callable[..., torch.Tensor] = getattr(torch, name)
        monkeypatch.setattr(torch, name, lambda *a, make=make, **k: _poison(make(*a, **k)))


def _poison(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.fill_(float("nan")) if tensor.is_floating_point() else tensor


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [48, 80, 129])
@pytest.mark.parametrize("has_added", [True, False])
@pytest.mark.parametrize("kind", ["rms", "layer"])
def test_add_norm(dtype: torch.dtype, width: int, has_added: bool, kind: str) -> None:
    hidden, added = _random(7, width, dtype=dtype) + 0.5, _random(7, width, dtype=dtype, seed=1)
    weight, bias = _random(width, dtype=dtype, seed=2) + 1, _random(width, dtype=dtype, seed=3)
    parameters = (weight,) if kind == "rms" else (weight, bias)
    kernel, reference = {"rms": (add_rms_norm, add_rms_norm_reference), "layer": (add_layer_norm, add_layer_norm_reference)}[kind]

    def of(function: Callable[..., Any], *arguments: torch.Tensor) -> Tensors:
        first, second, *rest = arguments
        return function(first.clone(), second if has_added else None, *rest, 1e-6)

    inputs = (hidden, added, *parameters)
    made, plain = of(kernel, *inputs), of(reference, *inputs)
    _assert_within_budget(made, plain, of(reference, *(x.double() for x in inputs)), dtype)
    if dtype == torch.float32 or DEVICE.type == "cuda":
        assert torch.equal(made[0], plain[0])  # the residual stream itself is the same, bit for bit


def test_the_sum_takes_the_residuals_place_and_rows_may_be_apart() -> None:
    wide = _random(6, 40)
    hidden, added, weight = wide[:, :20], _random(6, 20, seed=1), _random(20, seed=2)
    expected = add_rms_norm_reference(hidden.clone(), added, weight, 1e-6)
    made = add_rms_norm(hidden, added, weight, 1e-6)
    assert made[0] is hidden
    assert torch.allclose(hidden, expected[0])
    assert torch.allclose(made[1], expected[1], atol=1e-6)
    assert torch.equal(wide[:, 20:], _random(6, 40)[:, 20:])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("n_heads", "head_dim"), [(2, 40), (3, 72), (16, 80), (1, 8)])
def test_rotate_packed(dtype: torch.dtype, n_heads: int, head_dim: int) -> None:
    qkv = _random(5, 3, n_heads, head_dim, dtype=dtype)
    angles = _random(5, head_dim // 2, seed=1) * 10
    cos, sin = angles.cos(), angles.sin()
    exact = rotate_packed_reference(qkv.double(), cos.double(), sin.double())
    plain = rotate_packed_reference(qkv, cos, sin)
    made = rotate_packed(qkv.clone(), cos, sin)
    _assert_within_budget((made,), (plain,), (exact,), dtype)
    assert torch.equal(made[:, 2], qkv[:, 2])  # values are left alone


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1), (3, 216), (5, 1024), (7, 343)])
def test_silu_mul(dtype: torch.dtype, shape: tuple[int, int]) -> None:
    gate, up = _random(*shape, dtype=dtype) * 20, _random(*shape, dtype=dtype, seed=1)
    exact = silu_mul_reference(gate.double(), up.double())
    _assert_within_budget((silu_mul(gate, up),), (silu_mul_reference(gate, up),), (exact,), dtype)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("n", "width"), [(1, 48), (9, 80), (4, 129)])
def test_interpolate(dtype: torch.dtype, n: int, width: int) -> None:
    table = _random(25, width, dtype=dtype)
    indices = torch.randint(0, 25, (n, 4), generator=torch.Generator().manual_seed(1)).to(DEVICE)
    weights = _random(n, 4, seed=2).softmax(-1)
    exact = interpolate_reference(table.double(), indices, weights.double())
    _assert_within_budget(
        (interpolate(table, indices, weights),), (interpolate_reference(table, indices, weights),), (exact,), dtype
    )


BLOCK = block_size(torch.bfloat16, longest=1000)
SEGMENTS = {
    "one patch": (Group(0, 1, 1),),
    "windows": (Group(0, 5, 16), Group(80, 3, 12), Group(116, 1, 4)),
    "a block and one": (Group(0, 1, BLOCK + 1),),
    "two frames and a long one": (Group(0, 2, BLOCK), Group(2 * BLOCK, 1, 2 * BLOCK + 7)),
}


def _blocks(groups: tuple[Group, ...], dtype: torch.dtype) -> tuple[torch.Tensor, int]:
    """The table of blocks, and how many queries a block may have."""
    prepared = attention.triton(dtype).prepare(groups, DEVICE)
    assert prepared.table is not None
    assert isinstance(prepared.fixed, int)
    return prepared.table, prepared.fixed


def _skip_what_cannot_run(dtype: torch.dtype) -> None:
    if dtype == torch.bfloat16 and DEVICE.type == "cpu":
        pytest.skip("Triton's interpreter computes bfloat16 dots wrongly")


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("segments", SEGMENTS)
@pytest.mark.parametrize("head_dim", [24, 64, 72, 80, 128])
@pytest.mark.parametrize("dtype", DTYPES)
def test_segment_attention(segments: str, head_dim: int, dtype: torch.dtype) -> None:
    _skip_what_cannot_run(dtype)
    groups = SEGMENTS[segments]
    blocks, block = _blocks(groups, dtype)
    n = groups[-1].start + groups[-1].number * groups[-1].length
    q, k, v = _random(n, 3, 2, head_dim, dtype=dtype).permute(1, 2, 0, 3)  # [H, N, D], as they lie in the packed projection
    exact = segment_attention_reference(q.double(), k.double(), v.double(), blocks)
    plain = segment_attention_reference(q, k, v, blocks)
    _assert_within_budget((segment_attention(q, k, v, blocks, block=block),), (plain,), (exact,), dtype)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("block", [32, 64, 128])
@pytest.mark.parametrize("dtype", DTYPES)
def test_segment_attention_in_blocks_of_every_size(block: int, block_k: int, dtype: torch.dtype) -> None:
    """With segments of less than a block of keys, of whole blocks, and of a key more."""
    _skip_what_cannot_run(dtype)
    if DEVICE.type == "cuda" and (dtype == torch.float32) != (block == block_k == 32):
        pytest.skip("on a device, blocks of 32 are for float32, and larger ones for half precision")
    blocks, start = [], 0
    for length in (7, 128, 129):
        blocks += [[first, start, start + length] for first in range(start, start + length, block)]
        start += length
    table = torch.tensor(blocks, dtype=torch.int32, device=DEVICE)
    q, k, v = _random(start, 3, 2, 72, dtype=dtype).permute(1, 2, 0, 3)
    exact = segment_attention_reference(q.double(), k.double(), v.double(), table)
    plain = segment_attention_reference(q, k, v, table)
    _assert_within_budget((segment_attention(q, k, v, table, block=block),), (plain,), (exact,), dtype)


def test_large_scores_do_not_overflow() -> None:
    groups = (Group(0, 1, BLOCK + 30),)
    blocks, block = _blocks(groups, torch.float32)
    q, k, v = (_random(1, BLOCK + 30, 64, seed=seed) * scale for seed, scale in enumerate((100, 100, 1)))
    made = segment_attention(q, k, v, blocks, block=block)
    assert torch.allclose(made, segment_attention_reference(q, k, v, blocks), atol=1e-3)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("segments", SEGMENTS)
def test_every_query_is_in_one_block_and_no_block_is_empty(segments: str, dtype: torch.dtype) -> None:
    groups = SEGMENTS[segments]
    blocks, block = _blocks(groups, dtype)
    assert blocks.dtype == torch.int32
    assert block == block_size(dtype, max(group.length for group in groups))
    queries = [query for first, _, end in blocks.tolist() for query in range(first, min(first + block, end))]
    assert queries == list(range(groups[-1].start + groups[-1].number * groups[-1].length))
    segment_of = [(g.start + i * g.length, g.start + (i + 1) * g.length) for g in groups for i in range(g.number)]
    assert {(start, end) for _, start, end in blocks.tolist()} == set(segment_of)
    assert all(start <= first < end for first, start, end in blocks.tolist())


def test_boundaries_for_variable_length_attention() -> None:
    """Built where they are used, without a copy from the host."""
    prepared = attention.varlen(torch.bfloat16).prepare(SEGMENTS["windows"], DEVICE)
    boundaries, longest = prepared.table, prepared.fixed
    assert boundaries.tolist() == [0, 16, 32, 48, 64, 80, 92, 104, 116, 120]
    assert (boundaries.dtype, longest) == (torch.int32, 16)
