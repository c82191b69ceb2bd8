"""The checkpoint's own image processor, called as Transformers calls it, with one image at a time."""

from __future__ import annotations

import torch
from PIL import Image

from fastvl_lab.checkpoint import Checkpoint
from fastvl_lab.preprocessor.layout import AreaLimits
from fastvl_lab.request import ImageShape, Picture


def preprocess(picture: Picture, shape: ImageShape, limits: AreaLimits, checkpoint: Checkpoint) -> torch.Tensor:
    """An RGB image to float32 patches through Transformers' default image processor for this machine.

    A processor does the same to an image alone as to one among others; given one by one, they need not be held together. A size
    that was asked for is reached by Pillow before the processor, as in Qwen's qwen-vl-utils, and left alone by it.
    """
    least, most = limits.least, limits.most
    if limits.asked is not None:
        assert isinstance(picture, Image.Image)
        picture = picture.resize((shape.resized_width, shape.resized_height), Image.Resampling.BICUBIC)
        least = most = picture.width * picture.height
    batch = checkpoint.image_processor([picture], size={"shortest_edge": least, "longest_edge": most}, return_tensors="pt")
    assert batch["image_grid_thw"].tolist() == [list(shape.grid)]
    patches: torch.Tensor = batch["pixel_values"]
    return patches
