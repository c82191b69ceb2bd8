"""Attention written out: the reference the other options are tested against."""

from __future__ import annotations

import torch

from fastvl_lab.decoder.layers import KvCache


def prefill(q: torch.Tensor, cache: KvCache, layer: int) -> torch.Tensor:
    """Causal attention of new tokens to all of their own sequence; keeps scores [n_heads, n_new, length] in memory."""
    segments, parts = cache.segments, []
    for number, q_NHD in enumerate(q.split(segments.new)):
        before, n = segments.before[number], segments.new[number]
        future = torch.ones(n, before + n, dtype=torch.bool, device=q.device).triu(before + 1)
        parts.append(_attend(q_NHD, *cache.read(layer, number), future))
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def decode(q: torch.Tensor, cache: KvCache, layer: int) -> torch.Tensor:
    """One query a sequence against all of its keys."""
    parts, visible = [], cache.visible
    for number, q_1HD in enumerate(q.split(1)):
        hidden_mask = None if visible is None else ~visible[number]
        parts.append(_attend(q_1HD, *cache.read(layer, number), hidden_mask))
    return parts[0] if len(parts) == 1 else torch.cat(parts)


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
