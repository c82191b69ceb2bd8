"""The vision tower of any family as one plain forward over the checkpoint's own parameters.

Nothing here waits for the device or reads from it: what the host must know is in the grids.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
import torch.nn.functional as F

from fastvl_lab.checkpoint import Checkpoint
from fastvl_lab.families.vision import Between, Block, Function, Interpolate, TowerOperations, TowerRotate, Vision
from fastvl_lab.request import Grid, VisionTokens
from fastvl_lab.trace import Inner
from fastvl_lab.vit import positions
from fastvl_lab.vit.attention import SegmentAttention
from fastvl_lab.vit.padding import as_they_are
from fastvl_lab.vit.patch_embed import PatchEmbed
from fastvl_lab.vit.plan import Plan


@dataclass(frozen=True, kw_only=True, eq=False)
class LeanTower:
    """A tower as functions over the stock module's parameters.

    deepstack: block index -> merger. rotate, interpolate: the operations of the toggles that are no block's own.
    """

    vision: Vision
    merge_size: int
    blocks: tuple[Block, ...]
    merger: Function
    deepstack: dict[int, Function]
    rotate: TowerRotate
    interpolate: Interpolate


def tower_of(checkpoint: Checkpoint, operations: TowerOperations, between: Between = as_they_are) -> LeanTower:
    """The checkpoint's tower, of which no parameter is copied but by `between`, which makes the products of MLPs.

    Raises `CheckpointError` for what the lean tower has not.
    """
    family, vision = checkpoint.family, checkpoint.vision
    return LeanTower(
        vision=vision,
        merge_size=checkpoint.merge_size,
        blocks=family.blocks(vision, operations, between),
        merger=family.merger(vision.merger, operations, between),
        deepstack={index: family.merger(merger, operations, between) for index, merger in vision.deepstack.items()},
        rotate=operations.rotate,
        interpolate=operations.interpolate,
    )


def build_plan(tower: LeanTower, attention: SegmentAttention, grids: Sequence[Grid], n_patches: int | None) -> Plan:
    """Orders, tables and segments for these grids, computed on the tower's device.

    n_patches: None, or theirs and more to be shared with other grids. The rest is padding, which stays last, at position 0, in
    segments of its own; tables of segments then have room for those of other grids.
    """
    vision, merge = tower.vision, tower.merge_size
    device, window, table = vision.inv_freq.device, vision.window, vision.learned_positions
    padding = 0 if n_patches is None else n_patches - sum(grid.n_patches for grid in grids)
    row_column, frames = positions.coordinates(grids, merge, device), positions.frames(grids, padding)
    order = rank = None
    windows = frames
    if window is not None:
        token_order, rank = positions.window_order(grids, merge, window, device)
        windows = positions.windows(grids, merge, window, padding)
        order = (token_order[:, None] * merge**2 + torch.arange(merge**2, device=device)).flatten()
        row_column = row_column[order]
    learned = None
    if table is not None:
        learned = tower.interpolate(table, *positions.interpolation(grids, row_column, math.isqrt(len(table))))
    cos, sin = positions.rotary(F.pad(row_column, (0, 0, 0, padding)), vision.inv_freq)
    prepared = [attention.prepare(segments, device) for segments in (windows, frames)]
    if n_patches is not None:
        order, rank = _followed(order, n_patches), _followed(rank, n_patches // merge**2)
        learned = None if learned is None else F.pad(learned, (0, 0, 0, padding))
        prepared = [p if p.table is None else replace(p, table=attention.room(p.table)) for p in prepared]
    return Plan(order=order, rank=rank, cos=cos, sin=sin, learned=learned, windows=prepared[0], frames=prepared[1])


def _followed(order: torch.Tensor | None, n: int) -> torch.Tensor | None:
    """An order of the first of n things, followed by the others as they are."""
    return None if order is None else torch.cat([order, torch.arange(len(order), n, device=order.device)])


class Passage(NamedTuple):
    """Patches on their way through a tower: hidden [N, hidden], what the block before adds to it or None, DeepStack so far."""

    hidden: torch.Tensor
    added: torch.Tensor | None
    deepstack: tuple[torch.Tensor, ...] = ()


def encode(
    patches: torch.Tensor,
    plan: Plan,
    tower: LeanTower,
    patch_embed: PatchEmbed,
    attention: SegmentAttention,
    inner: Inner,
) -> VisionTokens:
    """Patches to visual tokens (and DeepStack features), in the order of the prompt's placeholders; padding stays last."""
    passage = enter(patches, plan, patch_embed, inner)
    return leave(go_on(passage, range(len(tower.blocks)), plan, tower, attention, inner), plan, tower)


def enter(patches: torch.Tensor, plan: Plan, patch_embed: PatchEmbed, inner: Inner) -> Passage:
    """Patches as the first block takes them."""
    with inner("vit.patch_embed"):
        hidden = patch_embed(patches if plan.order is None else patches.index_select(0, plan.order))  # [N, hidden]
    return Passage(hidden, plan.learned)


def go_on(passage: Passage, blocks: range, plan: Plan, tower: LeanTower, attention: SegmentAttention, inner: Inner) -> Passage:
    """Through these blocks, which follow those that it has been through."""
    hidden, added, deepstack = passage
    for index in blocks:
        block = tower.blocks[index]
        with inner(f"vit.block.{index}"):
            hidden, normed = block.norm1(hidden, added)
            q, k, v = tower.rotate(block.qkv(normed), tower.vision.n_heads, plan.cos, plan.sin)
            attended = attention.attend(q, k, v, plan.frames if tower.vision.full_attention[index] else plan.windows)
            hidden, normed = block.norm2(hidden, block.proj(attended))
            added = block.mlp(normed)
        if index in tower.deepstack:
            hidden, added = hidden + added, None
            deepstack += (tower.deepstack[index](hidden),)
    return Passage(hidden, added, deepstack)


def leave(passage: Passage, plan: Plan, tower: LeanTower) -> VisionTokens:
    """What the last block made, merged and in the prompt's order."""
    hidden = passage.hidden if passage.added is None else passage.hidden + passage.added
    embeds = tower.merger(hidden)  # [n_visual, out_hidden]
    if plan.rank is not None:
        embeds = embeds.index_select(0, plan.rank)
    return VisionTokens(embeds=embeds, deepstack=passage.deepstack)
