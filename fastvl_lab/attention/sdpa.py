"""torch.nn.functional.scaled_dot_product_attention, which chooses a fused kernel for the device."""

from __future__ import annotations

import torch
import torch.nn.functional as F


def prefill(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Causal attention of a whole prompt, without a mask in memory."""
    return _attend(q, k, v, is_causal=True)


def decode(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """One query against all keys; grouped heads are not repeated in memory."""
    return _attend(q, k, v, is_causal=False)


def _attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, is_causal: bool) -> torch.Tensor:
    q_1HND, k_1HND, v_1HND = (x.transpose(0, 1)[None] for x in (q, k, v))
    out = F.scaled_dot_product_attention(q_1HND, k_1HND, v_1HND, is_causal=is_causal, enable_gqa=q.shape[1] != k.shape[1])
    return out[0].transpose(0, 1)
