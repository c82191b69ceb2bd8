"""Slot 2: patches to visual tokens."""

from __future__ import annotations

from collections.abc import Callable

from fastvl_lab.checkpoint import Checkpoint
from fastvl_lab.recipe import Vit
from fastvl_lab.request import PatchFormat, Pixels, VisionTokens
from fastvl_lab.trace import Tracer
from fastvl_lab.vit import lean, per_window, stock
from fastvl_lab.vit.patch_embed import PatchEmbed, PatchProjection, bind_patch_embed, fold

Tower = Callable[[Pixels, Tracer], VisionTokens]


def bind(slot: Vit, checkpoint: Checkpoint, patch_format: PatchFormat) -> Tower:
    """The function that encodes patches of that format, as the slot's toggles say; the tracer times its blocks."""
    if slot.tower == "transformers":
        assert patch_format == stock_format(checkpoint), "the recipe lets the stock tower have stock patches only"
        return stock.bind_stock(checkpoint)
    assert slot.tower == "lean"
    visual = checkpoint.model.model.visual
    weights = lean.tower_weights(visual, checkpoint.family)
    patch_embed = _patch_embed(slot.patch_embed, checkpoint, patch_format)
    attend = {"per_window": per_window.attend}[slot.attention]
    return lambda pixels, tracer: lean.encode(pixels, weights, patch_embed, attend, tracer.inner)


def stock_format(checkpoint: Checkpoint) -> PatchFormat:
    """Patches as the published model takes them."""
    return PatchFormat(frames=checkpoint.config.vision_config.temporal_patch_size, normalised=True)


def _patch_embed(option: str, checkpoint: Checkpoint, patch_format: PatchFormat) -> PatchEmbed:
    """The checkpoint's own weight where the format is the stock one; else what of the preprocessing is folded into it."""
    conv = checkpoint.model.model.visual.patch_embed.proj
    projection = PatchProjection(weight=conv.weight, bias=conv.bias)
    if patch_format != stock_format(checkpoint):
        scale_shift = None if patch_format.normalised else checkpoint.scale_shift()
        projection = fold(projection, frames=patch_format.frames, scale_shift=scale_shift)
    return bind_patch_embed(option, projection)
