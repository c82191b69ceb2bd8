"""The vision tower of both families as one plain forward over the checkpoint's own parameters.

Qwen2.5-VL: RMSNorm, SwiGLU, windows except in `fullatt_block_indexes`. Qwen3-VL: LayerNorm, GELU, learned positions interpolated
to the grid, full attention, and DeepStack features after the blocks of `deepstack_visual_indexes`. Nothing here waits for the
device or reads from it: what the host must know is in the grids.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from fastvl_lab.checkpoint import Family
from fastvl_lab.errors import CheckpointError
from fastvl_lab.request import Grid, VisionTokens
from fastvl_lab.trace import Inner
from fastvl_lab.vit import positions
from fastvl_lab.vit.attention import Prepared, SegmentAttention
from fastvl_lab.vit.operations import AddNorm, Interpolate, Operations, Rotate
from fastvl_lab.vit.padding import Between, Function, as_they_are
from fastvl_lab.vit.patch_embed import PatchEmbed
from fastvl_lab.vit.plan import Plan


@dataclass(frozen=True, kw_only=True, eq=False)
class Block:
    """One transformer block; qkv, proj and mlp map [N, hidden] to [N, hidden], qkv to three times the width."""

    norm1: AddNorm
    qkv: Function
    proj: Function
    norm2: AddNorm
    mlp: Function
    windowed: bool


@dataclass(frozen=True, kw_only=True, eq=False)
class Tower:
    """A tower over the stock module's parameters, with what its geometry decides.

    window: visual tokens along a window's side, or None without windows. learned_positions: [side * side, hidden] or None.
    deepstack: block index -> merger. merger and deepstack map [n_patches, hidden] to [n_visual, out_hidden]. rotate, interpolate:
    the operations of the toggles that are no block's own.
    """

    blocks: tuple[Block, ...]
    merger: Function
    deepstack: dict[int, Function]
    learned_positions: torch.Tensor | None
    inv_freq: torch.Tensor
    n_heads: int
    merge_size: int
    window: int | None
    rotate: Rotate
    interpolate: Interpolate


def tower_of(visual: Any, family: Family, operations: Operations, between: Between = as_they_are) -> Tower:
    """Read a stock vision module, of which no parameter is copied but by `between`, which makes the products of MLPs.

    Raises `CheckpointError` for what the lean tower has not.
    """
    config = visual.config
    if family == "qwen2_5_vl" and config.hidden_act != "silu":
        raise CheckpointError(
            f"vision_config has hidden_act={config.hidden_act!r}; the lean tower has 'silu' only: choose vit.tower=transformers"
        )
    shared = {
        "inv_freq": visual.rotary_pos_emb.inv_freq.float(),
        "n_heads": config.num_heads,
        "merge_size": config.spatial_merge_size,
        "window": positions.window_side(config),
        "rotate": operations.rotate,
        "interpolate": operations.interpolate,
    }
    if family == "qwen2_5_vl":
        full = set(config.fullatt_block_indexes)
        return Tower(
            blocks=tuple(
                _block_qwen2_5(block, index not in full, operations, between) for index, block in enumerate(visual.blocks)
            ),
            merger=_merger_qwen2_5(visual.merger, operations, between),
            deepstack={},
            learned_positions=None,
            **shared,
        )
    levels = zip(config.deepstack_visual_indexes, visual.deepstack_merger_list, strict=True)
    return Tower(
        blocks=tuple(_block_qwen3(block, operations, between) for block in visual.blocks),
        merger=_merger_qwen3(visual.merger, between),
        deepstack={index: _merger_qwen3(merger, between) for index, merger in levels},
        learned_positions=visual.pos_embed.weight,
        **shared,
    )


def _block_qwen2_5(block: Any, windowed: bool, operations: Operations, between: Between) -> Block:
    (gate, up), down = between((block.mlp.gate_proj, block.mlp.up_proj), block.mlp.down_proj)
    return Block(
        norm1=operations.rms_norm(block.norm1.weight, block.norm1.variance_epsilon),
        qkv=block.attn.qkv,
        proj=block.attn.proj,
        norm2=operations.rms_norm(block.norm2.weight, block.norm2.variance_epsilon),
        mlp=lambda x: down(operations.silu_mul(gate(x), up(x))),
        windowed=windowed,
    )


def _block_qwen3(block: Any, operations: Operations, between: Between) -> Block:
    (first,), second = between((block.mlp.linear_fc1,), block.mlp.linear_fc2)
    norm1, norm2 = (operations.layer_norm(norm.weight, norm.bias, norm.eps) for norm in (block.norm1, block.norm2))
    return Block(
        norm1=norm1,
        qkv=block.attn.qkv,
        proj=block.attn.proj,
        norm2=norm2,
        mlp=lambda x: second(block.mlp.act_fn(first(x))),
        windowed=False,
    )


def _merger_qwen2_5(merger: Any, operations: Operations, between: Between) -> Function:
    (first,), second = between((merger.mlp[0],), merger.mlp[2])
    norm, width = operations.rms_norm(merger.ln_q.weight, merger.ln_q.variance_epsilon), merger.mlp[0].in_features
    return lambda x: second(F.gelu(first(norm(x, None)[1].view(-1, width))))


def _merger_qwen3(merger: Any, between: Between) -> Function:
    """The final merger normalises each patch; a DeepStack merger the patches of a visual token together."""
    (first,), second = between((merger.linear_fc1,), merger.linear_fc2)
    of_norm, width = merger.norm.normalized_shape[0], merger.linear_fc1.in_features
    return lambda x: second(F.gelu(first(merger.norm(x.reshape(-1, of_norm)).view(-1, width))))


def build_plan(tower: Tower, attention: SegmentAttention, grids: Sequence[Grid], n_patches: int | None) -> Plan:
    """Orders, tables and segments for these grids, computed on the tower's device.

    n_patches: None, or theirs and more to be shared with other grids. The rest is padding, which stays last, at position 0, in
    segments of its own; tables of segments then have room for those of other grids.
    """
    merge, device = tower.merge_size, tower.inv_freq.device
    padding = 0 if n_patches is None else n_patches - sum(grid.n_patches for grid in grids)
    row_column, frames = positions.coordinates(grids, merge, device), positions.frames(grids, padding)
    order = rank = None
    windows = frames
    if tower.window is not None:
        token_order, rank = positions.window_order(grids, merge, tower.window, device)
        windows = positions.windows(grids, merge, tower.window, padding)
        order = (token_order[:, None] * merge**2 + torch.arange(merge**2, device=device)).flatten()
        row_column = row_column[order]
    learned = None
    if tower.learned_positions is not None:
        side = round(tower.learned_positions.shape[0] ** 0.5)
        learned = tower.interpolate(tower.learned_positions, *positions.interpolation(grids, row_column, side))
    cos, sin = positions.rotary(F.pad(row_column, (0, 0, 0, padding)), tower.inv_freq)
    prepared = [attention.prepare(segments, device) for segments in (windows, frames)]
    if n_patches is not None:
        order, rank = _followed(order, n_patches), _followed(rank, n_patches // merge**2)
        learned = None if learned is None else F.pad(learned, (0, 0, 0, padding))
        prepared = [p if p.table is None else Prepared(attention.room(p.table), p.fixed) for p in prepared]
    return Plan(order=order, rank=rank, cos=cos, sin=sin, learned=learned, windows=prepared[0], frames=prepared[1])


def _followed(order: torch.Tensor | None, n: int) -> torch.Tensor | None:
    """An order of the first of n things, followed by the others as they are."""
    return None if order is None else torch.cat([order, torch.arange(len(order), n, device=order.device)])


def encode(
    patches: torch.Tensor,
    plan: Plan,
    tower: Tower,
    patch_embed: PatchEmbed,
    attention: SegmentAttention,
    inner: Inner,
) -> VisionTokens:
    """Patches to visual tokens (and DeepStack features), in the order of the prompt's placeholders; padding stays last."""
    hidden = patch_embed(patches if plan.order is None else patches.index_select(0, plan.order))  # [N, hidden]
    added = plan.learned

    deepstack = []
    for index, block in enumerate(tower.blocks):
        with inner(f"vit.block.{index}"):
            hidden, normed = block.norm1(hidden, added)
            q, k, v = tower.rotate(block.qkv(normed), tower.n_heads, plan.cos, plan.sin)
            attended = attention.attend(q, k, v, plan.windows if block.windowed else plan.frames)
            hidden, normed = block.norm2(hidden, block.proj(attended))
            added = block.mlp(normed)
        if index in tower.deepstack:
            hidden, added = hidden + added, None
            deepstack.append(tower.deepstack[index](hidden))

    if added is not None:
        hidden = hidden + added
    embeds = tower.merger(hidden)  # [n_visual, out_hidden]
    if plan.rank is not None:
        embeds = embeds.index_select(0, plan.rank)
    return VisionTokens(embeds=embeds, deepstack=tuple(deepstack))
