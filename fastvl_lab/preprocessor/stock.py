"""The checkpoint's own image processor, called as Transformers calls it."""

from __future__ import annotations

from collections.abc import Sequence

from PIL import Image

from fastvl_lab.checkpoint import Checkpoint
from fastvl_lab.preprocessor.layout import shapes_of
from fastvl_lab.request import Pixels, Request


def preprocess(images: Sequence[Image.Image], request: Request, checkpoint: Checkpoint) -> Pixels:
    """RGB images to float32 patches through Transformers' default image processor for this machine."""
    least, most = checkpoint.pixel_limits(request.min_pixels, request.max_pixels)
    # Computed first: an impossible shape is refused in the lab's words, and the stock result is checked against it.
    shapes = shapes_of(images, request, checkpoint)
    size = {"shortest_edge": least, "longest_edge": most}
    batch = checkpoint.image_processor(list(images), size=size, return_tensors="pt")
    assert batch["image_grid_thw"].tolist() == [list(shape.grid) for shape in shapes]
    return Pixels(patches=batch["pixel_values"], shapes=shapes)
