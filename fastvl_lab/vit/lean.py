"""The vision tower of both families as one plain forward over the checkpoint's own parameters.

Qwen2.5-VL: RMSNorm, SwiGLU, windows except in `fullatt_block_indexes`. Qwen3-VL: LayerNorm, GELU, learned positions interpolated
to the grid, full attention, and DeepStack features after the blocks of `deepstack_visual_indexes`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from fastvl_lab.checkpoint import Family
from fastvl_lab.kernels.plain import rms_norm, rotate_half
from fastvl_lab.request import Grid, Pixels, VisionTokens
from fastvl_lab.vit import positions
from fastvl_lab.vit.patch_embed import PatchEmbed

Function = Callable[[torch.Tensor], torch.Tensor]
SegmentAttention = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, Sequence[int]], torch.Tensor]


@dataclass(frozen=True, kw_only=True, eq=False)
class Block:
    """One transformer block; every field maps [n, hidden] to [n, hidden] but qkv, whose output is three times as wide."""

    norm1: Function
    qkv: Function
    proj: Function
    norm2: Function
    mlp: Function
    windowed: bool


@dataclass(frozen=True, kw_only=True, eq=False)
class TowerWeights:
    """A tower over the stock module's parameters, with what its geometry decides.

    window: visual tokens along a window's side, or None without windows. learned_positions: [side * side, hidden] or None.
    deepstack: block index -> merger. merger and deepstack map [n_patches, hidden] to [n_visual, out_hidden].
    """

    blocks: tuple[Block, ...]
    merger: Function
    deepstack: dict[int, Function]
    learned_positions: torch.Tensor | None
    inv_freq: torch.Tensor
    n_heads: int
    merge_size: int
    window: int | None


def tower_weights(visual: Any, family: Family) -> TowerWeights:
    """Read a stock vision module; no parameter is copied."""
    config = visual.config
    build = _block_qwen2_5 if family == "qwen2_5_vl" else _block_qwen3
    shared = {
        "inv_freq": visual.rotary_pos_emb.inv_freq.float().cpu(),
        "n_heads": config.num_heads,
        "merge_size": config.spatial_merge_size,
    }
    if family == "qwen2_5_vl":
        full = set(config.fullatt_block_indexes)
        return TowerWeights(
            blocks=tuple(build(block, windowed=index not in full) for index, block in enumerate(visual.blocks)),
            merger=_merger_qwen2_5(visual.merger),
            deepstack={},
            learned_positions=None,
            window=config.window_size // config.spatial_merge_size // config.patch_size,
            **shared,
        )
    levels = zip(config.deepstack_visual_indexes, visual.deepstack_merger_list, strict=True)
    return TowerWeights(
        blocks=tuple(build(block, windowed=False) for block in visual.blocks),
        merger=_merger_qwen3(visual.merger),
        deepstack={index: _merger_qwen3(merger) for index, merger in levels},
        learned_positions=visual.pos_embed.weight,
        window=None,
        **shared,
    )


def _block_qwen2_5(block: Any, *, windowed: bool) -> Block:
    mlp, activation = block.mlp, block.mlp.act_fn
    return Block(
        norm1=_rms(block.norm1),
        qkv=block.attn.qkv,
        proj=block.attn.proj,
        norm2=_rms(block.norm2),
        mlp=lambda x: mlp.down_proj(activation(mlp.gate_proj(x)) * mlp.up_proj(x)),
        windowed=windowed,
    )


def _block_qwen3(block: Any, *, windowed: bool) -> Block:
    mlp, activation = block.mlp, block.mlp.act_fn
    return Block(
        norm1=block.norm1,
        qkv=block.attn.qkv,
        proj=block.attn.proj,
        norm2=block.norm2,
        mlp=lambda x: mlp.linear_fc2(activation(mlp.linear_fc1(x))),
        windowed=windowed,
    )


def _rms(norm: Any) -> Function:
    return lambda x: rms_norm(x, norm.weight, norm.variance_epsilon)


def _merger_qwen2_5(merger: Any) -> Function:
    first, second, norm = merger.mlp[0], merger.mlp[2], _rms(merger.ln_q)
    return lambda x: second(F.gelu(first(norm(x).view(-1, first.in_features))))


def _merger_qwen3(merger: Any) -> Function:
    """The final merger normalises each patch; a DeepStack merger the patches of a visual token together."""
    first, second, width = merger.linear_fc1, merger.linear_fc2, merger.norm.normalized_shape[0]
    return lambda x: second(F.gelu(first(merger.norm(x.reshape(-1, width)).view(-1, first.in_features))))


def encode(
    pixels: Pixels,
    weights: TowerWeights,
    patch_embed: PatchEmbed,
    attend: SegmentAttention,
    inner: Callable[[str], AbstractContextManager[None]],
) -> VisionTokens:
    """Patches to visual tokens (and DeepStack features), in the order of the prompt's placeholders."""
    grids, merge, device = pixels.grids, weights.merge_size, pixels.patches.device
    hidden = patch_embed(pixels.patches)  # [n_patches, hidden]
    if weights.learned_positions is not None:
        hidden = hidden + _interpolated(weights.learned_positions, grids, merge)

    row_column, frames = positions.coordinates(grids, merge), positions.frame_lengths(grids)
    windows, order = frames, None
    if weights.window is not None:
        order, windows = positions.window_order(grids, merge, weights.window)
        row_column = _by_token(row_column, merge)[order].flatten(0, 1)
        order = order.to(device)
        hidden = _by_token(hidden, merge)[order].flatten(0, 1)
    cos, sin = (table.to(device)[:, None] for table in positions.rotary(row_column, weights.inv_freq))  # [n_patches, 1, d]

    deepstack = []
    for index, block in enumerate(weights.blocks):
        with inner(f"vit.block.{index}"):
            lengths = windows if block.windowed else frames
            hidden = hidden + _attention(block.norm1(hidden), block, weights.n_heads, cos, sin, lengths, attend)
            hidden = hidden + block.mlp(block.norm2(hidden))
        if index in weights.deepstack:
            deepstack.append(weights.deepstack[index](hidden))

    embeds = weights.merger(hidden)  # [n_visual, out_hidden]
    if order is not None:
        embeds = torch.empty_like(embeds).index_copy_(0, order, embeds)
    return VisionTokens(embeds=embeds, deepstack=tuple(deepstack))


def _attention(
    x: torch.Tensor,
    block: Block,
    n_heads: int,
    cos: torch.Tensor,
    sin: torch.Tensor,
    lengths: Sequence[int],
    attend: SegmentAttention,
) -> torch.Tensor:
    q, k, v = block.qkv(x).view(x.shape[0], 3, n_heads, -1).unbind(1)  # [n_patches, n_heads, head_dim]
    # The published code rotates in float32 whatever the model's dtype.
    q, k = ((t.float() * cos + rotate_half(t.float()) * sin).to(x.dtype) for t in (q, k))
    return block.proj(attend(q, k, v, lengths).flatten(1))


def _by_token(x: torch.Tensor, merge_size: int) -> torch.Tensor:
    """[n_patches, …] -> [n_visual, merge_size**2, …]."""
    return x.view(-1, merge_size**2, *x.shape[1:])


def _interpolated(table: torch.Tensor, grids: Sequence[Grid], merge_size: int) -> torch.Tensor:
    """Learned positions at each patch, [n_patches, hidden] in the table's dtype."""
    indices, weights = positions.interpolation(grids, merge_size, side=round(table.shape[0] ** 0.5))
    corners = F.embedding(indices.to(table.device), table)  # [n_patches, 4, hidden]
    return (corners * weights.to(table.device)[:, :, None]).sum(1).to(table.dtype)
