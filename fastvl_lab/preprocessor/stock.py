"""The checkpoint's own image processor, called as Transformers calls it."""

from __future__ import annotations

from fastvl_lab.checkpoint import Checkpoint
from fastvl_lab.request import Decoded, Pixels, Request


def preprocess(decoded: Decoded, request: Request, checkpoint: Checkpoint) -> Pixels:
    """RGB images to float32 patches through Transformers' default image processor for this machine."""
    least, most = checkpoint.pixel_limits(request.min_pixels, request.max_pixels)
    size = {"shortest_edge": least, "longest_edge": most}
    batch = checkpoint.image_processor(list(decoded.pictures), size=size, return_tensors="pt")
    assert batch["image_grid_thw"].tolist() == [list(shape.grid) for shape in decoded.shapes]
    return Pixels(patches=batch["pixel_values"], shapes=decoded.shapes)
