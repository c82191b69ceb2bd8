"""Slot 2: patches to visual tokens."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F

from fastvl_lab.catalogue import Vit
from fastvl_lab.checkpoint import Checkpoint
from fastvl_lab.checkpoint.padded import aligned
from fastvl_lab.families.vision import Between
from fastvl_lab.inputs import tensors
from fastvl_lab.request import PatchFormat, Pixels, VisionTokens
from fastvl_lab.trace import Inner, Tracer
from fastvl_lab.vit import attention, lean, stock
from fastvl_lab.vit.operations import bind_operations
from fastvl_lab.vit.padding import as_they_are, in_lines
from fastvl_lab.vit.patch_embed import PatchEmbed, PatchProjection, bind_patch_embed, fold
from fastvl_lab.vit.plan import Plan, PlanCache, Planner, recomputed


@dataclass(frozen=True, kw_only=True, eq=False)
class TowerInputs:
    """What the lean tower's forward takes: the patches of a request, padding last, and what follows from its grids."""

    patches: torch.Tensor = tensors(dim=0)
    plan: Plan = tensors()


@dataclass(frozen=True, kw_only=True, eq=False)
class LeanEncoder:
    """The lean tower, to be called as it is, or in its two halves: what follows from the grids, and the forward itself."""

    tower: lean.LeanTower
    patch_embed: PatchEmbed
    attention: attention.SegmentAttention
    planner: Planner

    def __call__(self, pixels: Pixels, tracer: Tracer) -> VisionTokens:
        return self.forward(self.inputs(pixels, tracer, None), tracer.inner)

    def inputs(self, pixels: Pixels, tracer: Tracer, n_patches: int | None) -> TowerInputs:
        """What `forward` takes.

        n_patches: None, or as many as requests of other images have with which the program is to be shared; then what is missing of
        them is padding, rows of zeros at the end.
        """
        with tracer.inner("vit.positions"):
            plan, known = self.planner(pixels.grids, n_patches)
        tracer.count("vit.positions known" if known else "vit.positions built")
        patches = pixels.patches
        if n_patches is not None:
            patches = F.pad(patches, (0, 0, 0, n_patches - len(patches)))
        return TowerInputs(patches=patches, plan=plan)

    def forward(self, inputs: TowerInputs, inner: Inner) -> VisionTokens:
        """Visual tokens of padding come last."""
        with self.attention.on(inputs.patches.device):
            return lean.encode(inputs.patches, inputs.plan, self.tower, self.patch_embed, self.attention, inner)

    def in_parts(self, inputs: TowerInputs) -> TowerInParts:
        """The same forward, to be gone through some blocks at a time."""
        return TowerInParts(self, inputs)


class TowerInParts:
    """A forward of the lean tower that stops between blocks, so that others are served before it goes on."""

    def __init__(self, encoder: LeanEncoder, inputs: TowerInputs) -> None:
        self._encoder, self._inputs = encoder, inputs
        self._passage: lean.Passage | None = None
        self._n_done = 0

    @property
    def n_blocks(self) -> int:
        """Of the tower."""
        return len(self._encoder.tower.blocks)

    @property
    def n_left(self) -> int:
        """Blocks that are still to come."""
        return self.n_blocks - self._n_done

    def go_on(self, n: int, inner: Inner) -> VisionTokens | None:
        """Through the next n blocks; with the last of them come the visual tokens."""
        encoder, inputs = self._encoder, self._inputs
        tower, plan = encoder.tower, inputs.plan
        with encoder.attention.on(inputs.patches.device):
            passage = self._passage or lean.enter(inputs.patches, plan, encoder.patch_embed, inner)
            blocks = range(self._n_done, self._n_done + n)
            self._passage = lean.go_on(passage, blocks, plan, tower, encoder.attention, inner)
            self._n_done += n
            return None if self.n_left > 0 else lean.leave(self._passage, plan, tower)


def bind(
    slot: Vit, checkpoint: Checkpoint, patch_format: PatchFormat, *, compiled: bool = False
) -> stock.StockEncoder | LeanEncoder:
    """The function that encodes patches of that format, as the slot's toggles say; the tracer times its blocks.

    compiled: whether torch.compile is to read it. Raises `CheckpointError` for what the lean tower has not.
    """
    if slot.tower == "transformers":
        assert patch_format == stock_format(checkpoint), "the recipe lets the stock tower have stock patches only"
        return stock.StockEncoder.of(checkpoint)
    assert slot.tower == "lean"
    operations = bind_operations(
        checkpoint.packed,
        weights=slot.weights,
        norms=slot.norms,
        rope=slot.rope,
        activation=slot.activation,
        interpolation=slot.interpolation,
    )
    exact = partial(as_they_are, linear=operations.linear)
    between: dict[str, Between] = {"exact": exact, "aligned": in_lines}
    tower = lean.tower_of(checkpoint, operations, between[slot.padding])
    patch_embed = _patch_embed(slot, checkpoint, patch_format)
    attend = attention.bind(slot.attention, checkpoint.dtype, compiled=compiled)
    build = partial(lean.build_plan, tower, attend)
    planner = {"recomputed": recomputed, "cached": PlanCache}[slot.positions](build)
    return LeanEncoder(tower=tower, patch_embed=patch_embed, attention=attend, planner=planner)


def stock_format(checkpoint: Checkpoint) -> PatchFormat:
    """Patches as the published model takes them."""
    return PatchFormat(frames=checkpoint.patches.temporal_patch_size, normalised=True)


def _patch_embed(slot: Vit, checkpoint: Checkpoint, patch_format: PatchFormat) -> PatchEmbed:
    """The checkpoint's own weight where the format is the stock one; else what of the preprocessing is folded into it."""
    conv = checkpoint.vision.patch_embed
    projection = PatchProjection(weight=conv.weight, bias=conv.bias)
    if patch_format != stock_format(checkpoint):
        scale_shift = None if patch_format.normalised else checkpoint.image_settings.scale_shift
        projection = fold(projection, frames=patch_format.frames, scale_shift=scale_shift)
    width = aligned(projection.weight[0].numel(), checkpoint.dtype) if slot.padding == "aligned" else None
    return bind_patch_embed(slot.patch_embed, projection, width)
