"""Attention as the stock tower does it: one call a segment, in a Python loop."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F


def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, lengths: Sequence[int]) -> torch.Tensor:
    """Full attention inside each segment of `lengths` patches; q, k, v and the result are [n_patches, n_heads, head_dim]."""
    segments = zip(*(x.transpose(0, 1).split(list(lengths), dim=1) for x in (q, k, v)), strict=True)  # [n_heads, n, d]
    outputs = [F.scaled_dot_product_attention(q_HND[None], k_HND[None], v_HND[None])[0] for q_HND, k_HND, v_HND in segments]
    return torch.cat(outputs, dim=1).transpose(0, 1)
