"""Widths of the tower's products: as the checkpoint has them, or padded with zeros to whole lines of 64 bytes.

Rows that are no multiple of 16 bytes keep a GPU's matrix products from their wide loads. What is padded is what lies between two
products, which the second reads with weight zero, and the values of a patch; the residual stream stays as wide as it is.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache, partial
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F

_LINE = 64

Function = Callable[[torch.Tensor], torch.Tensor]

# (the linear modules that make a width, the one that reads it) -> functions that do the same.
Between = Callable[[Sequence[Any], Any], tuple[Sequence[Function], Function]]


def aligned(width: int, dtype: torch.dtype) -> int:
    """The least width that is not below this one, of which a row in that dtype is whole lines."""
    per_line = _LINE // dtype.itemsize
    return -(-width // per_line) * per_line


def as_they_are(makers: Sequence[Any], reader: Any) -> tuple[Sequence[Function], Function]:
    """The modules themselves."""
    return makers, reader


def in_lines(makers: Sequence[Any], reader: Any) -> tuple[Sequence[Function], Function]:
    """Products over a width of whole lines; the modules themselves where theirs is.

    What is made of a value by itself may stand between them. The padded weights are copies, shared by all who ask while the model
    lives.
    """
    width, dtype = reader.in_features, reader.weight.dtype
    to = aligned(width, dtype)
    if to == width:
        return as_they_are(makers, reader)
    return [_padded(maker, rows=to, columns=maker.in_features) for maker in makers], _padded(
        reader, rows=reader.out_features, columns=to
    )


def _padded(linear: Any, *, rows: int, columns: int) -> Function:
    """The product of a linear module whose weight is [rows, columns], zeros where the module has none."""
    copies = _copies()
    if linear not in copies:
        weight, bias = linear.weight.detach(), linear.bias
        more = rows - len(weight)
        bias = None if bias is None else F.pad(bias.detach(), (0, more))
        copies[linear] = F.pad(weight, (0, columns - weight.shape[1], 0, more)), bias
    weight, bias = copies[linear]
    return partial(F.linear, weight=weight, bias=bias)


@cache
def _copies() -> WeakKeyDictionary[Any, tuple[torch.Tensor, torch.Tensor | None]]:
    """Of each module that somebody has padded."""
    return WeakKeyDictionary()
