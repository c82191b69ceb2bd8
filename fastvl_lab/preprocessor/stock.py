"""The checkpoint's own image processor, called as Transformers calls it, with one image at a time."""

from __future__ import annotations

import torch

from fastvl_lab.checkpoint import Checkpoint
from fastvl_lab.preprocessor.layout import AreaLimits
from fastvl_lab.request import ImageShape, Picture


def preprocess(picture: Picture, shape: ImageShape, limits: AreaLimits, checkpoint: Checkpoint) -> torch.Tensor:
    """An RGB image to float32 patches through Transformers' default image processor for this machine.

    A processor does the same to an image alone as to one among others; given one by one, they need not be held together.
    """
    size = {"shortest_edge": limits.least, "longest_edge": limits.most}
    batch = checkpoint.image_processor([picture], size=size, return_tensors="pt")
    assert batch["image_grid_thw"].tolist() == [list(shape.grid)]
    patches: torch.Tensor = batch["pixel_values"]
    return patches
