"""The stock vision tower, called as Transformers calls it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from fastvl_lab.checkpoint import Checkpoint
from fastvl_lab.request import Pixels, VisionTokens
from fastvl_lab.trace import Inner, Tracer


@dataclass(frozen=True, kw_only=True, eq=False)
class StockInputs:
    """Pixels, and who times the module's blocks."""

    pixels: Pixels
    tracer: Tracer


@dataclass(frozen=True, kw_only=True, eq=False)
class StockEncoder:
    """The module's own forward over patches and grids, and what it is made of by the names of spans; never padded or captured."""

    run: Callable[[torch.Tensor, torch.Tensor], VisionTokens]
    blocks: Mapping[str, torch.nn.Module]

    @classmethod
    def of(cls, checkpoint: Checkpoint) -> StockEncoder:
        vision, stock = checkpoint.vision, checkpoint.family.stock_vision
        blocks = {"vit.patch_embed": vision.patch_embed}
        blocks |= {f"vit.block.{index}": block for index, block in enumerate(vision.blocks)}
        return cls(run=lambda patches, grid_thw: stock(vision.module, patches, grid_thw), blocks=blocks)

    def __call__(self, pixels: Pixels, tracer: Tracer) -> VisionTokens:
        return self.forward(self.inputs(pixels, tracer, None), tracer.inner)

    def inputs(self, pixels: Pixels, tracer: Tracer, n_patches: int | None) -> StockInputs:
        assert n_patches is None
        return StockInputs(pixels=pixels, tracer=tracer)

    def forward(self, inputs: StockInputs, inner: Inner) -> VisionTokens:
        """The grid goes to the device as Transformers' processor output does."""
        pixels = inputs.pixels
        grid_thw = torch.tensor(pixels.grids, device=pixels.patches.device)
        with inputs.tracer.modules(self.blocks):
            return self.run(pixels.patches, grid_thw)
