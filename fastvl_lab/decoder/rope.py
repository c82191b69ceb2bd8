"""M-RoPE: rotary embedding whose frequencies are shared out among the temporal, height and width positions."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True, kw_only=True, eq=False)
class MRope:
    """One checkpoint's rotary embedding.

    inv_freq: float32 [head_dim / 2]. scaling multiplies cosines and sines (1 unless the checkpoint scales its RoPE). axis: int64
    [head_dim / 2], which of the temporal, height and width positions each frequency turns by.
    """

    inv_freq: torch.Tensor
    scaling: float
    axis: torch.Tensor

    def cos_sin(self, positions: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """positions [3, n] -> cosines and sines in `dtype`, [n, head_dim] each, as the published modelling code makes them."""
        angles_3ND = positions[:, :, None].float() * self.inv_freq  # [3, n, head_dim / 2]
        angles = angles_3ND.gather(0, self.axis.expand(1, *angles_3ND.shape[1:]))[0]
        angles = torch.cat([angles, angles], dim=-1)
        return (angles.cos() * self.scaling).to(dtype), (angles.sin() * self.scaling).to(dtype)

    def halves(self, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """positions [3, n], or [1, n] for text -> cosines and sines, float32 [n, head_dim / 2]: each stands for both halves."""
        of_axes = positions.t().float()  # [n, 3], or [n, 1]
        angles = (of_axes if len(positions) == 1 else of_axes.index_select(1, self.axis)) * self.inv_freq  # [n, head_dim / 2]
        cos, sin = angles.cos(), angles.sin()
        return (cos, sin) if self.scaling == 1 else (cos * self.scaling, sin * self.scaling)
