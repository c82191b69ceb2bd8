"""Slot 2: patches to visual tokens."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager

from fastvl_lab.checkpoint import Checkpoint
from fastvl_lab.recipe import Vit
from fastvl_lab.request import Pixels, VisionTokens
from fastvl_lab.vit import lean, per_window, stock
from fastvl_lab.vit.patch_embed import bind_patch_embed

Tower = Callable[[Pixels, Callable[[str], AbstractContextManager[None]]], VisionTokens]


def bind(slot: Vit, checkpoint: Checkpoint) -> Tower:
    """The function that encodes patches, as the slot's toggles say; its second argument opens a span a block."""
    if slot.tower == "transformers":
        return stock.bind_stock(checkpoint)
    visual = checkpoint.model.model.visual
    weights = lean.tower_weights(visual, checkpoint.family)
    patch_embed = bind_patch_embed(slot.patch_embed, visual.patch_embed.proj)
    attend = {"per_window": per_window.attend}[slot.attention]
    return lambda pixels, inner: lean.encode(pixels, weights, patch_embed, attend, inner)
