"""M-RoPE: rotary embedding whose frequencies are shared out among the temporal, height and width positions."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch


@dataclass(frozen=True, kw_only=True, eq=False)
class MRope:
    """One checkpoint's rotary embedding.

    inv_freq: float32 [head_dim / 2]. sections: how many frequencies each of t, h, w owns (`mrope_section`). Qwen2.5-VL lays them
    out one after another; Qwen3-VL interleaves them, so that every axis owns low and high frequencies (`mrope_interleaved`).
    scaling multiplies cosines and sines (1 unless the checkpoint scales its RoPE). axis: int64 [head_dim / 2], which of t, h, w
    each frequency belongs to.
    """

    inv_freq: torch.Tensor
    scaling: float
    sections: tuple[int, ...]
    interleaved: bool
    axis: torch.Tensor = field(init=False)

    def __post_init__(self) -> None:
        axis = torch.zeros(len(self.inv_freq), dtype=torch.int64)
        if self.interleaved:
            for number in (1, 2):
                axis[number : self.sections[number] * 3 : 3] = number
        else:
            axis = torch.arange(3).repeat_interleave(torch.tensor(self.sections))
        object.__setattr__(self, "axis", axis.to(self.inv_freq.device))

    def cos_sin(self, positions: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """positions [3, n] -> cosines and sines in `dtype`, [n, head_dim] each, as the published modelling code makes them."""
        angles_3ND = positions[:, :, None].float() * self.inv_freq  # [3, n, head_dim / 2]
        if self.interleaved:
            angles = angles_3ND[0].clone()
            for axis in (1, 2):
                owned = slice(axis, self.sections[axis] * 3, 3)
                angles[:, owned] = angles_3ND[axis, :, owned]
        else:
            parts = angles_3ND.split(self.sections, dim=-1)
            angles = torch.cat([part[axis] for axis, part in enumerate(parts)], dim=-1)
        angles = torch.cat([angles, angles], dim=-1)
        return (angles.cos() * self.scaling).to(dtype), (angles.sin() * self.scaling).to(dtype)

    def halves(self, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """positions [3, n], or [1, n] for text -> cosines and sines, float32 [n, head_dim / 2]: each stands for both halves."""
        of_axes = positions.t().float()  # [n, 3], or [n, 1]
        angles = (of_axes if len(positions) == 1 else of_axes.index_select(1, self.axis)) * self.inv_freq  # [n, head_dim / 2]
        cos, sin = angles.cos(), angles.sin()
        return (cos, sin) if self.scaling == 1 else (cos * self.scaling, sin * self.scaling)
