"""Widths of the tower's products: as the checkpoint has them, or padded with zeros to whole lines of 64 bytes.

What is padded is what lies between two products, which the second reads with weight zero, and the values of a patch; the residual
stream stays as wide as it is.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch.nn.functional as F

from fastvl_lab.checkpoint.padded import aligned, with_padding
from fastvl_lab.families.vision import Function


def itself(module: Any) -> Function:
    """A linear module, which is a function."""
    function: Function = module
    return function


def as_they_are(
    makers: Sequence[Any], reader: Any, linear: Callable[[Any], Function] = itself
) -> tuple[Sequence[Function], Function]:
    """The modules themselves, or what `linear` makes of each."""
    return [linear(maker) for maker in makers], linear(reader)


def in_lines(makers: Sequence[Any], reader: Any) -> tuple[Sequence[Function], Function]:
    """Products over a width of whole lines, of the same weights and the zeros beside them; the modules where theirs is.

    What is made of a value by itself may stand between them.
    """
    width = aligned(reader.in_features, reader.weight.dtype)
    if width == reader.in_features:
        return as_they_are(makers, reader)
    return [_product(maker, width, maker.in_features) for maker in makers], _product(reader, reader.out_features, width)


def _product(linear: Any, rows: int, columns: int) -> Function:
    """The product of a linear module with its weight, [rows, columns] with padding."""
    bias = None if linear.bias is None else with_padding(linear.bias, (rows,))
    return partial(F.linear, weight=with_padding(linear.weight, (rows, columns)), bias=bias)
