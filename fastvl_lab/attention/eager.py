"""Attention written out: the reference the other options are tested against."""

from __future__ import annotations

import torch


def prefill(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Causal attention of a whole prompt; keeps scores [n_heads, n, n] in memory."""
    n = q.shape[0]
    future = torch.ones(n, n, dtype=torch.bool, device=q.device).triu(1)
    return _attend(q, k, v, future)


def decode(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """One query against all keys."""
    return _attend(q, k, v, None)


def _attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, hidden_mask: torch.Tensor | None) -> torch.Tensor:
    group = q.shape[1] // k.shape[1]
    q_HND = q.transpose(0, 1)
    k_HND, v_HND = (x.repeat_interleave(group, dim=1).transpose(0, 1) for x in (k, v))
    scores = q_HND @ k_HND.transpose(1, 2) * q.shape[-1] ** -0.5  # [n_heads, n_q, n_kv]
    if hidden_mask is not None:
        scores.masked_fill_(hidden_mask, float("-inf"))
    weights: torch.Tensor = scores.softmax(-1, dtype=torch.float32).to(q.dtype)
    attended: torch.Tensor = weights @ v_HND
    return attended.transpose(0, 1)
