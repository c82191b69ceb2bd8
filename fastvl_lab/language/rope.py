"""M-RoPE: rotary embedding whose frequencies are shared out among the temporal, height and width positions."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True, kw_only=True, eq=False)
class MRope:
    """One checkpoint's rotary embedding.

    inv_freq: float32 [head_dim / 2]. sections: how many frequencies each of t, h, w owns (`mrope_section`). Qwen2.5-VL lays them
    out one after another; Qwen3-VL interleaves them, so that every axis owns low and high frequencies (`mrope_interleaved`).
    scaling multiplies cosines and sines (1 unless the checkpoint scales its RoPE).
    """

    inv_freq: torch.Tensor
    scaling: float
    sections: tuple[int, ...]
    interleaved: bool

    def cos_sin(self, positions: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """positions [3, n] -> cosines and sines, [n, 1, head_dim] each, ready to broadcast over heads."""
        angles_3ND = positions[:, :, None].float() * self.inv_freq  # [3, n, head_dim / 2]
        if self.interleaved:
            angles = angles_3ND[0].clone()
            for axis in (1, 2):
                owned = slice(axis, self.sections[axis] * 3, 3)
                angles[:, owned] = angles_3ND[axis, :, owned]
        else:
            parts = angles_3ND.split(self.sections, dim=-1)
            angles = torch.cat([part[axis] for axis, part in enumerate(parts)], dim=-1)
        angles = torch.cat([angles, angles], dim=-1)[:, None]
        return (angles.cos() * self.scaling).to(dtype), (angles.sin() * self.scaling).to(dtype)
