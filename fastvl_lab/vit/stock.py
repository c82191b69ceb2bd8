"""The stock vision tower, called as Transformers calls it."""

from __future__ import annotations

from collections.abc import Callable

import torch

from fastvl_lab.checkpoint import Checkpoint
from fastvl_lab.request import Pixels, VisionTokens
from fastvl_lab.trace import Tracer


def bind_stock(checkpoint: Checkpoint) -> Callable[[Pixels, Tracer], VisionTokens]:
    """The module's own forward; its grid goes to the device as Transformers' processor output does."""
    vision, stock = checkpoint.vision, checkpoint.family.stock_vision
    blocks = {f"vit.block.{index}": block for index, block in enumerate(vision.blocks)}

    def encode(pixels: Pixels, tracer: Tracer) -> VisionTokens:
        grid_thw = torch.tensor(pixels.grids, device=pixels.patches.device)
        with tracer.modules(blocks):
            return stock(vision.module, pixels.patches, grid_thw)

    return encode
