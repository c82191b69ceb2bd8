"""The stock vision tower, called as Transformers calls it."""

from __future__ import annotations

from collections.abc import Callable

import torch

from fastvl_lab.checkpoint import Checkpoint
from fastvl_lab.request import Pixels, VisionTokens
from fastvl_lab.trace import Tracer


def bind_stock(checkpoint: Checkpoint) -> Callable[[Pixels, Tracer], VisionTokens]:
    """The module's own forward; its grid goes to the device as Transformers' processor output does."""
    visual = checkpoint.model.model.visual
    blocks = {f"vit.block.{index}": block for index, block in enumerate(visual.blocks)}

    def encode(pixels: Pixels, tracer: Tracer) -> VisionTokens:
        grid_thw = torch.tensor(pixels.grids, device=pixels.patches.device)
        with tracer.modules(blocks):
            output = visual(pixels.patches, grid_thw=grid_thw)
        deepstack = getattr(output, "deepstack_features", None) or ()
        return VisionTokens(embeds=output.pooler_output, deepstack=tuple(deepstack))

    return encode
