"""What a vision tower needs to know of its grids: the order of patches, coordinates, rotary tables, interpolation, segments.

All of it follows from the grids, which the host knows, and is computed where the tower runs, from `arange`s: no tensor is copied
to the device or read back. Patches come in merge order: the merge_size**2 patches of one visual token stand together, visual
tokens row by row, frames and images one after another.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from fastvl_lab.request import Grid


class Group(NamedTuple):
    """Consecutive segments of equal length: `number` of them, each of `length` patches, from patch `start` on."""

    start: int
    number: int
    length: int


Groups = tuple[Group, ...]


def _of_lengths(runs: Sequence[tuple[int, int]]) -> Groups:
    """(number, length) pairs in order to groups; neighbours of one length become one group."""
    groups: list[Group] = []
    start = 0
    for number, length in runs:
        if number * length == 0:
            continue
        if groups and groups[-1].length == length:
            groups[-1] = groups[-1]._replace(number=groups[-1].number + number)
        else:
            groups.append(Group(start, number, length))
        start += number * length
    return tuple(groups)


def frames(grids: Sequence[Grid], padding: int = 0) -> Groups:
    """The segments of full attention, which stays inside a frame; patches of padding stand last, in a segment of their own."""
    return _of_lengths([*((grid.t, grid.h * grid.w) for grid in grids), (1, padding)])


def windows(grids: Sequence[Grid], merge_size: int, window: int, padding: int = 0) -> Groups:
    """The segments of windowed attention in the order of `window_rank`; window: visual tokens along one side.

    Patches of padding stand last, in windows of their own.
    """
    runs = []
    for grid in grids:
        for _ in range(grid.t):
            runs += [(number, tokens * merge_size**2) for number, tokens in _kinds(grid, merge_size, window)]
    whole, rest = divmod(padding, (window * merge_size) ** 2)
    return _of_lengths([*runs, (whole, (window * merge_size) ** 2), (1, rest)])


def _kinds(grid: Grid, merge_size: int, window: int) -> list[tuple[int, int]]:
    """How many windows of how many visual tokens a frame has: whole ones, those cut on the right, below, and in the corner."""
    (rows, below), (columns, right) = divmod(grid.h // merge_size, window), divmod(grid.w // merge_size, window)
    return [(rows * columns, window * window), (rows, window * right), (columns, below * window), (1, below * right)]


def window_rank(grid: Grid, merge_size: int, window: int, device: torch.device) -> torch.Tensor:
    """Where each visual token of an image stands when windows are together; int64 [n_visual], a permutation.

    Windows of one kind stand together too, so that those of equal length can share an attention call; nothing else depends on the
    order of windows (which windows there are: Qwen2.5-VL, arXiv 2502.13923, section 2.1.1; `get_window_index` in Transformers).
    """
    height, width = grid.h // merge_size, grid.w // merge_size
    row, column = torch.arange(height, device=device)[:, None], torch.arange(width, device=device)[None]
    whole_rows, whole_columns = height // window, width // window
    below, right = height % window, width % window

    # What stands before a window: all kinds before its own, then those of its own kind before it.
    window_row, window_column = row // window, column // window
    is_below, is_right = window_row == whole_rows, window_column == whole_columns
    area = whole_rows * whole_columns * window**2
    first_right, first_below = area, area + whole_rows * window * right
    corner = first_below + whole_columns * below * window
    start = torch.where(
        is_below,
        torch.where(is_right, corner, first_below + window_column * below * window),
        torch.where(is_right, first_right + window_row * window * right, (window_row * whole_columns + window_column) * window**2),
    )
    within = (row % window) * torch.where(is_right, right, window) + column % window
    rank = (start + within).flatten()
    frame = torch.arange(grid.t, device=device)[:, None] * (height * width)
    return (frame + rank).flatten()


def window_order(grids: Sequence[Grid], merge_size: int, window: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """The visual tokens in window order, and where each has gone; int64 [n_visual] both, inverse to one another."""
    ranks, first = [], 0
    for grid in grids:
        ranks.append(window_rank(grid, merge_size, window, device) + first)
        first += grid.visual_tokens(merge_size)
    rank = torch.cat(ranks)
    return torch.empty_like(rank).scatter_(0, rank, torch.arange(first, device=device)), rank


def coordinates(grids: Sequence[Grid], merge_size: int, device: torch.device) -> torch.Tensor:
    """Row and column of every patch in its image; int64 [n_patches, 2] in merge order."""
    parts = []
    for grid in grids:
        size = (grid.t, grid.h // merge_size, grid.w // merge_size, merge_size, merge_size)
        rows, columns, m = (torch.arange(n, device=device) for n in size[1:4])
        row = rows[:, None, None, None] * merge_size + m[:, None]  # [G, 1, m, 1]
        column = columns[:, None, None] * merge_size + m  # [H, 1, m]
        parts.append(torch.stack([row.expand(size), column.expand(size)], dim=-1).view(-1, 2))
    return torch.cat(parts)


def rotary(row_column: torch.Tensor, inv_freq: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Axial rotary embedding: cosines and sines of one half of a head, float32 [n_patches, head_dim / 2] each.

    row_column: [n_patches, 2]; inv_freq: float32 [head_dim / 4]. A half is [row angles, column angles]; the other is the same.
    """
    angles = (row_column[:, :, None].float() * inv_freq).flatten(1)
    return angles.cos(), angles.sin()


def interpolation(grids: Sequence[Grid], row_column: torch.Tensor, side: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Where each patch reads a side x side table of learned positions: int64 [n_patches, 4] and float32 weights alike.

    Bilinear with the corners aligned: row r of h reads the table at r * (side - 1) / (h - 1) (Qwen3-VL modelling code).
    """
    indices, weights = [], []
    for grid, part in zip(grids, row_column.split([grid.n_patches for grid in grids]), strict=True):
        (top, down), (left, across) = (_between(part[:, axis], size, side) for axis, size in ((0, grid.h), (1, grid.w)))
        bottom, right = (top + 1).clamp_(max=side - 1) * side, (left + 1).clamp_(max=side - 1)
        top = top * side
        indices.append(torch.stack([top + left, top + right, bottom + left, bottom + right], dim=1))
        weights.append(torch.stack([(1 - down) * (1 - across), (1 - down) * across, down * (1 - across), down * across], dim=1))
    return torch.cat(indices), torch.cat(weights)


def _between(position: torch.Tensor, size: int, side: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The row or column of the table before each position, and how far it is to the next."""
    at = position.float() * (side - 1) / max(size - 1, 1)
    floor = at.floor()
    return floor.long(), at - floor
