"""Resizing by options other than the stock processor's."""

from __future__ import annotations

import numpy as np
from PIL import Image

from fastvl_lab.request import ImageShape


def with_pillow(image: Image.Image, shape: ImageShape) -> np.ndarray:
    """Pillow's bicubic resize; uint8 [resized_height, resized_width, 3], bit-equal to the stock Pillow backend's."""
    size = (shape.resized_width, shape.resized_height)
    return np.array(image if image.size == size else image.resize(size, Image.Resampling.BICUBIC))
