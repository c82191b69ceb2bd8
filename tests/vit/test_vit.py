"""The lean tower against the stock one, and its tables against Transformers'."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoConfig, AutoModelForImageTextToText
from transformers.vision_utils import (
    get_vision_interpolation_indices_and_weights,
    get_vision_position_ids,
    get_vision_window_index,
)

from fastvl_lab import Lab, Recipe
from fastvl_lab.checkpoint import tiny
from fastvl_lab.checkpoint.random_weights import randomise
from fastvl_lab.request import Grid, ImageShape, Pixels
from fastvl_lab.trace import Tracer
from fastvl_lab.vit import bind, lean, per_window, positions, stock_format
from fastvl_lab.vit.patch_embed import PatchProjection, bind_patch_embed, fold

OFF = Tracer(torch.device("cpu"), "off")

grids_strategy = st.lists(
    st.builds(lambda t, h, w: Grid(t, 2 * h, 2 * w), st.integers(1, 3), st.integers(1, 17), st.integers(1, 17)),
    min_size=1,
    max_size=3,
)


def _pixels(grids: list[Grid], patch_dim: int, seed: int = 0) -> Pixels:
    n = sum(g.t * g.h * g.w for g in grids)
    patches = torch.randn(n, patch_dim, generator=torch.Generator().manual_seed(seed))
    shapes = [
        ImageShape(width=0, height=0, resized_width=0, resized_height=0, grid=g, visual_tokens=g.t * g.h * g.w // 4) for g in grids
    ]
    return Pixels(patches=patches, shapes=tuple(shapes))


def _projection(visual: torch.nn.Module) -> PatchProjection:
    return PatchProjection(weight=visual.patch_embed.proj.weight, bias=visual.patch_embed.proj.bias)


def _patch_dim(visual: torch.nn.Module) -> int:
    return visual.patch_embed.proj.weight[0].numel()


@torch.inference_mode()
def _assert_lean_equals_stock(visual: torch.nn.Module, family: str, grids: list[Grid]) -> None:
    pixels = _pixels(grids, _patch_dim(visual))
    expected = visual(pixels.patches, grid_thw=torch.tensor(grids))
    for option in ("conv3d", "linear"):
        embed = bind_patch_embed(option, _projection(visual))
        vision = lean.encode(pixels, lean.tower_weights(visual, family), embed, per_window.attend, lambda _: nullcontext())
        assert (vision.embeds - expected.pooler_output).abs().max() < 1e-4
        features = getattr(expected, "deepstack_features", None) or []
        assert len(vision.deepstack) == len(features)
        for ours, stock in zip(vision.deepstack, features, strict=True):
            assert (ours - stock).abs().max() < 1e-4


@settings(max_examples=15, deadline=None)
@given(grids=grids_strategy)
@pytest.mark.parametrize("name", tiny.NAMES)
def test_lean_equals_stock_over_random_grids_and_mixes(labs: dict[str, Lab], name: str, grids: list[Grid]) -> None:
    """Several images of odd sizes; grids with a time axis, as video will have, too."""
    checkpoint = labs[name].checkpoint
    _assert_lean_equals_stock(checkpoint.model.model.visual, checkpoint.family, grids)


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("tiny-qwen2.5-vl", {"depth": 3, "num_heads": 4, "hidden_size": 96, "fullatt_block_indexes": [0], "window_size": 56}),
        ("tiny-qwen2.5-vl", {"depth": 2, "fullatt_block_indexes": [], "window_size": 168, "intermediate_size": 100}),
        ("tiny-qwen3-vl", {"depth": 5, "num_heads": 3, "deepstack_visual_indexes": [4, 1], "num_position_embeddings": 100}),
        ("tiny-qwen3-vl", {"depth": 2, "deepstack_visual_indexes": [], "out_hidden_size": 64}),
    ],
)
def test_lean_equals_stock_on_other_geometries(name: str, changes: dict) -> None:
    config = AutoConfig.from_pretrained(tiny.folder(name))
    for field, value in changes.items():
        setattr(config.vision_config, field, value)
    model = AutoModelForImageTextToText.from_config(config, dtype=torch.float32, attn_implementation="sdpa").eval()
    randomise(model, seed=3)
    _assert_lean_equals_stock(model.model.visual, config.model_type, [Grid(1, 10, 14), Grid(1, 2, 30), Grid(1, 8, 8)])


@settings(max_examples=50, deadline=None)
@given(grids=grids_strategy, window=st.integers(1, 6))
def test_position_tables_equal_transformers(grids: list[Grid], window: int) -> None:
    grid_thw = torch.tensor(grids)
    assert torch.equal(positions.coordinates(grids, 2), get_vision_position_ids(grid_thw, 2))
    order, lengths = positions.window_order(grids, 2, window)
    stock_order, boundaries = get_vision_window_index(grid_thw, spatial_merge_size=2, window_size=window * 28, patch_size=14)
    assert torch.equal(order, stock_order)
    assert torch.equal(torch.tensor([0, *lengths]).cumsum(0), boundaries.long())
    indices, weights = positions.interpolation(grids, 2, side=48)
    stock_indices, stock_weights = get_vision_interpolation_indices_and_weights(
        grid_thw, num_grid_per_side=48, mode="bilinear", align_corners=True, spatial_merge_size=2
    )
    table = torch.randn(48 * 48, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    ours, stock = ((table[i] * w[:, :, None]).sum(1) for i, w in ((indices, weights), (stock_indices, stock_weights)))
    assert torch.allclose(ours, stock, atol=1e-5)


@pytest.mark.parametrize("option", ["conv3d", "linear"])
@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("spread", [128, 5, 0])
@pytest.mark.parametrize("name", tiny.NAMES)
def test_folding_keeps_the_error_budget(
    labs: dict[str, Lab], name: str, option: str, has_bias: bool, dtype: torch.dtype, spread: int
) -> None:
    """Bytes sent once, against the same bytes normalised and sent twice, by their errors against float64.

    Also on pictures that are nearly flat around the mean, where bytes and bias would have to cancel.
    """
    generator = torch.Generator().manual_seed(spread)
    weight = torch.randn(16, 3, 2, 14, 14, generator=generator) / 1176**0.5 + 0.01  # with a DC part, as trained ones have
    bias = torch.randn(16, generator=generator) * 0.1 if has_bias else None
    scale, shift = labs[name].checkpoint.scale_shift()
    mean = (shift / scale).round().int().view(1, 3, 1, 1, 1)
    noise = torch.randint(-spread, spread + 1, (40, 3, 1, 14, 14), generator=generator, dtype=torch.int32)
    clip = (mean + noise).clamp(0, 255).to(torch.uint8)
    per_channel = (1, 3, 1, 1, 1)
    normalised = (clip.double() * scale.view(per_channel) - shift.view(per_channel)).expand(40, 3, 2, 14, 14)

    def embed(projection: PatchProjection, patches: torch.Tensor) -> torch.Tensor:
        return bind_patch_embed(option, projection)(patches.flatten(1)).double()

    truth = embed(PatchProjection(weight=weight.double(), bias=None if bias is None else bias.double()), normalised)
    low = PatchProjection(weight=weight.to(dtype), bias=None if bias is None else bias.to(dtype))
    stock = (embed(low, normalised.to(dtype)) - truth).norm()
    folded = (embed(fold(low, frames=1, scale_shift=(scale, shift)), clip) - truth).norm()
    assert folded <= 2 * stock + 4 * torch.finfo(dtype).eps * truth.norm()


def test_windows_see_only_themselves_and_full_blocks_the_frame() -> None:
    """Changing one patch changes its own segment of the output, and no other."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(20, 2, 8, generator=generator) for _ in range(3))
    lengths = [4, 1, 8, 7]
    before = per_window.attend(q, k, v, lengths)
    k[6] += 1
    changed = (per_window.attend(q, k, v, lengths) - before).abs().amax((1, 2)) > 0
    assert changed.tolist() == [5 <= patch < 13 for patch in range(20)]


def test_the_lean_tower_copies_no_parameter(lab: Lab) -> None:
    visual = lab.checkpoint.model.model.visual
    weights = lean.tower_weights(visual, lab.checkpoint.family)
    assert weights.blocks[0].qkv.weight is visual.blocks[0].attn.qkv.weight  # type: ignore[attr-defined]
    if weights.learned_positions is not None:
        assert weights.learned_positions is visual.pos_embed.weight


def test_lean_in_bfloat16_is_within_the_error_budget(picture: bytes) -> None:
    """The error of bfloat16 against float64 is at most twice that of the stock tower in bfloat16."""
    for name in tiny.NAMES:
        exact = Lab(name, device="cpu", dtype="float32").checkpoint
        visual = exact.model.model.visual.double()
        pixels = _pixels([Grid(1, 12, 18)], _patch_dim(visual))
        with torch.inference_mode():
            truth = visual(pixels.patches.double(), grid_thw=torch.tensor(pixels.grids)).pooler_output
            half = Lab(name, device="cpu", dtype="bfloat16").checkpoint
            low = Pixels(patches=pixels.patches.bfloat16(), shapes=pixels.shapes)
            errors = {
                tower: (bind(recipe.vit, half, stock_format(half))(low, OFF).embeds.double() - truth).norm() / truth.norm()
                for tower, recipe in (("stock", Recipe.baseline()), ("lean", Recipe.fastest()))
            }
        assert 0 < errors["stock"] < 0.05
        assert errors["lean"] <= 2 * errors["stock"] + 1e-3
