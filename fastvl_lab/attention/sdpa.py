"""torch.nn.functional.scaled_dot_product_attention, which chooses a fused kernel for the device."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch.nn.attention.bias import causal_lower_right

from fastvl_lab.language.decoder import KvCache


def prefill(q: torch.Tensor, cache: KvCache, layer: int) -> torch.Tensor:
    """Causal attention, a call a sequence; without a mask in memory where nothing of the sequence was there before."""
    segments, parts = cache.segments, []
    for number, q_NHD in enumerate(q.split(segments.new)):
        q_1HND, k_1HND, v_1HND = (x.transpose(0, 1)[None] for x in (q_NHD, *cache.read(layer, number)))
        how: dict[str, Any] = {"is_causal": True}
        if segments.before[number] > 0:  # `is_causal` would let the first query see the first key alone
            how = {"attn_mask": _causal(segments.new[number], segments.lengths[number], q.device)}
        out = F.scaled_dot_product_attention(q_1HND, k_1HND, v_1HND, enable_gqa=q_1HND.shape[1] != k_1HND.shape[1], **how)
        parts.append(out[0].transpose(0, 1))
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _causal(new: int, length: int, device: torch.device) -> torch.Tensor:
    """The mask of the last queries of a sequence; torch.compile does not know the one that is no tensor in memory."""
    if torch.compiler.is_compiling():
        return torch.ones(new, length, dtype=torch.bool, device=device).tril(length - new)
    return causal_lower_right(new, length)


def decode(q: torch.Tensor, cache: KvCache, layer: int) -> torch.Tensor:
    """One query a sequence against all of its keys.

    The queries that share a key head stand as rows of one head: they need no causal mask, and keys are read once a group.
    """
    parts = []
    for number, q_1HD in enumerate(q.split(1)):
        keys, values = cache.read(layer, number)
        q_1KGD = q_1HD.view(1, keys.shape[1], -1, q_1HD.shape[2])
        mask = None if cache.visible is None else cache.visible[number].expand(1, 1, q_1KGD.shape[2], -1)
        out = F.scaled_dot_product_attention(q_1KGD, keys.transpose(0, 1)[None], values.transpose(0, 1)[None], attn_mask=mask)
        parts.append(out.view(q_1HD.shape))
    return parts[0] if len(parts) == 1 else torch.cat(parts)
