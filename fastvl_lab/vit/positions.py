"""What a vision tower needs to know of its grids: orders, coordinates, rotary angles, interpolation; all on the host.

Everything here depends on the grids alone and on no weights. Patches come in merge order: the merge_size**2 patches of one visual
token stand together, visual tokens row by row, frames and images one after another.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from fastvl_lab.request import Grid


def coordinates(grids: Sequence[Grid], merge_size: int) -> torch.Tensor:
    """Row and column of every patch in its image; int64 [n_patches, 2] in merge order."""
    parts = []
    for grid in grids:
        rows_columns = torch.stack(torch.meshgrid(torch.arange(grid.h), torch.arange(grid.w), indexing="ij"), dim=-1)
        blocks = rows_columns.view(grid.h // merge_size, merge_size, grid.w // merge_size, merge_size, 2)
        parts.append(blocks.transpose(1, 2).reshape(-1, 2).repeat(grid.t, 1))
    return torch.cat(parts)


def frame_lengths(grids: Sequence[Grid]) -> list[int]:
    """Patches in each frame: full attention stays inside a frame."""
    return [grid.h * grid.w for grid in grids for _ in range(grid.t)]


def window_order(grids: Sequence[Grid], merge_size: int, window: int) -> tuple[torch.Tensor, list[int]]:
    """The order that puts each attention window's visual tokens together, and how many patches each window holds.

    window: visual tokens along one side of a window. Returns int64 [n_visual] and the lengths of the windows, which are smaller at
    the right and lower edges (Qwen2.5-VL, arXiv 2502.13923, section 2.1.1; `get_window_index` in Transformers).
    """
    order, lengths, first = [], [], 0
    for grid in grids:
        h, w = grid.h // merge_size, grid.w // merge_size
        tokens = torch.arange(grid.t * h * w).view(grid.t, h, w) + first
        for frame in tokens:
            for strip in frame.split(window, dim=0):
                for tile in strip.split(window, dim=1):
                    order.append(tile.flatten())
                    lengths.append(tile.numel() * merge_size**2)
        first += grid.t * h * w
    return torch.cat(order), lengths


def rotary(row_column: torch.Tensor, inv_freq: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Axial rotary embedding: cosines and sines, float32 [n_patches, head_dim] each.

    row_column: [n_patches, 2]; inv_freq: float32 [head_dim / 4]. A head is [row angles, column angles] twice.
    """
    angles = (row_column[:, :, None].float() * inv_freq).flatten(1)  # [n_patches, head_dim / 2]
    angles = torch.cat([angles, angles], dim=-1)
    return angles.cos(), angles.sin()


def interpolation(grids: Sequence[Grid], merge_size: int, side: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Where each patch reads a side x side table of learned positions: int64 [n_patches, 4] and float32 weights alike.

    Bilinear with the corners aligned: row r of h reads the table at r * (side - 1) / (h - 1) (Qwen3-VL modelling code).
    """
    indices, weights = [], []
    for grid in grids:
        low, high, fraction = [], [], []
        for size in (grid.h, grid.w):
            at = torch.arange(size, dtype=torch.float32) * (side - 1) / max(size - 1, 1)
            floor = at.floor().long()
            low.append(floor)
            high.append((floor + 1).clamp(max=side - 1))
            fraction.append(at - floor)
        row, column = coordinates([grid], merge_size).unbind(1)
        top, bottom, down = low[0][row] * side, high[0][row] * side, fraction[0][row]
        left, right, across = low[1][column], high[1][column], fraction[1][column]
        indices.append(torch.stack([top + left, top + right, bottom + left, bottom + right], dim=1))
        weights.append(torch.stack([(1 - down) * (1 - across), (1 - down) * across, down * (1 - across), down * across], dim=1))
    return torch.cat(indices), torch.cat(weights)
