"""What a stage must cost at least: its floating-point operations, and what the device was seen to do per second."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from fastvl_lab.checkpoint import Checkpoint
from fastvl_lab.measure.rounds import now
from fastvl_lab.measure.statistics import median_interval
from fastvl_lab.request import Grid
from fastvl_lab.vit import positions


@dataclass(frozen=True, kw_only=True)
class VitFlops:
    """Floating-point operations of one forward of the vision tower, a multiply and an add counted as two.

    linear: of the matrix products with weights, in proportion to patches. attention: of queries with keys and weights with values,
    in proportion to the sum of squares of segment lengths.
    """

    linear: int
    attention: int

    @property
    def total(self) -> int:
        return self.linear + self.attention


def vit_flops(checkpoint: Checkpoint, grids: Sequence[Grid], *, frames: int | None = None) -> VitFlops:
    """Operations for these grids, whatever does them; frames: how many times an image is in its clip (config: twice)."""
    visual = checkpoint.model.model.visual
    config, merge = visual.config, visual.config.spatial_merge_size
    n_patches = sum(grid.n_patches for grid in grids)
    n_visual = n_patches // merge**2
    frames = config.temporal_patch_size if frames is None else frames
    weights_a_patch = visual.patch_embed.proj.weight.numel() * frames // config.temporal_patch_size
    weights_a_patch += sum(_matrix_weights(block) for block in visual.blocks)
    mergers = [visual.merger, *getattr(visual, "deepstack_merger_list", ())]
    linear = 2 * (n_patches * weights_a_patch + n_visual * sum(_matrix_weights(merger) for merger in mergers))

    segments = positions.frames(grids)
    squares = len(visual.blocks) * _squares(segments)
    if (window := positions.window_side(config)) is not None:
        n_windowed = len(visual.blocks) - len(set(config.fullatt_block_indexes))
        squares += n_windowed * (_squares(positions.windows(grids, merge, window)) - _squares(segments))
    return VitFlops(linear=linear, attention=4 * config.hidden_size * squares)


def _squares(groups: positions.Groups) -> int:
    """Pairs of patches that see one another."""
    return sum(group.number * group.length**2 for group in groups)


def _matrix_weights(module: Any) -> int:
    """Weights that every row meets once: those of the linear layers."""
    return sum(m.weight.numel() for m in module.modules() if isinstance(m, torch.nn.Linear))


def matmul_ceiling(device: torch.device, dtype: torch.dtype, *, size: int | None = None, repeats: int = 5) -> float:
    """Operations a second of a large square matrix product here, the median of some; random values, since zeros run faster.

    size: of one side; by default 8192 on CUDA and 2048 on a CPU.
    """
    side = size or (8192 if device.type == "cuda" else 2048)
    generator = torch.Generator(device).manual_seed(0)
    a, b = (torch.randn(side, side, generator=generator, device=device, dtype=torch.float32).to(dtype) for _ in range(2))
    seconds = []
    for number in range(repeats + 2):
        started = now(device)
        torch.mm(a, b)
        if number >= 2:  # the first ones set libraries up
            seconds.append(now(device) - started)
    return 2 * side**3 / median_interval(seconds).median
