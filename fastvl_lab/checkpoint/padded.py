"""Weights of the vision tower with room beside them: rows and columns up to whole lines of 64 bytes, filled with zeros.

Rows of no multiple of 16 bytes keep a GPU's matrix products from their wide loads. The checkpoint's own parameters become views of
the padded tensors, so that every engine reads the same memory, and there is no second copy of any weight.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

_LINE = 64


def aligned(width: int, dtype: torch.dtype) -> int:
    """The least width that is not below this one, of which a row in that dtype is whole lines."""
    per_line = _LINE // dtype.itemsize
    return -(-width // per_line) * per_line


@torch.no_grad()
def pad_widths(visual: Any) -> None:
    """Lay out the linear modules of a vision tower with padding, one at a time; the parameters keep their names and values."""
    for linear in (module for module in visual.modules() if isinstance(module, torch.nn.Linear)):
        (rows, columns), dtype = linear.weight.shape, linear.weight.dtype
        more_rows, more_columns = aligned(rows, dtype) - rows, aligned(columns, dtype) - columns
        if more_rows or more_columns:
            linear.weight.data = F.pad(linear.weight.data, (0, more_columns, 0, more_rows))[:rows, :columns]
        if more_rows and linear.bias is not None:
            linear.bias.data = F.pad(linear.bias.data, (0, more_rows))[:rows]


def with_padding(parameter: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    """A parameter together with its padding, up to that shape; it must have been laid out by `pad_widths`."""
    lines = tuple(aligned(width, parameter.dtype) for width in parameter.shape)
    assert parameter.stride() == (*lines[1:], 1), "the tower's weights are not padded"
    assert all(n <= line for n, line in zip(shape, lines, strict=True))
    return parameter.detach().as_strided(shape, parameter.stride())
