"""Slot 3: the decoder's attention, for prefill and for one decode step.

Every option has one signature: q is [n_q, n_heads, head_dim], k and v are [n_kv, n_kv_heads, head_dim], the result is like q.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from fastvl_lab.attention import eager, sdpa
from fastvl_lab.recipe import Attention

Attend = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


@dataclass(frozen=True, kw_only=True)
class BoundAttention:
    """The attention of prefill (causal, all of the prompt) and of decode (the last token against everything)."""

    prefill: Attend
    decode: Attend


def bind(slot: Attention) -> BoundAttention:
    """The functions that the slot's toggles name."""
    return BoundAttention(
        prefill={"eager": eager.prefill, "sdpa": sdpa.prefill}[slot.prefill],
        decode={"eager": eager.decode, "sdpa": sdpa.decode}[slot.decode],
    )
