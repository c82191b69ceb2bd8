"""Slot 2: patches to visual tokens."""

from __future__ import annotations

from collections.abc import Callable

from fastvl_lab.checkpoint import Checkpoint
from fastvl_lab.recipe import Vit
from fastvl_lab.request import Pixels, VisionTokens
from fastvl_lab.trace import Tracer
from fastvl_lab.vit import lean, per_window, stock
from fastvl_lab.vit.patch_embed import bind_patch_embed

Tower = Callable[[Pixels, Tracer], VisionTokens]


def bind(slot: Vit, checkpoint: Checkpoint) -> Tower:
    """The function that encodes patches, as the slot's toggles say; the tracer times its blocks."""
    if slot.tower == "transformers":
        return stock.bind_stock(checkpoint)
    visual = checkpoint.model.model.visual
    assert slot.tower == "lean"
    weights = lean.tower_weights(visual, checkpoint.family)
    patch_embed = bind_patch_embed(slot.patch_embed, visual.patch_embed.proj)
    attend = {"per_window": per_window.attend}[slot.attention]
    return lambda pixels, tracer: lean.encode(pixels, weights, patch_embed, attend, tracer.inner)
