"""torch's variable-length attention: one call of its flash kernel over all sequences, on CUDA in half precision."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch.nn.attention.varlen import varlen_attn

from fastvl_lab.decoder.layers import Attend, KvCache, once_a_forward


def bind_prefill() -> Attend:
    """Causal prefill; torch 2.11 takes grouped heads without being told, later versions have a switch for it."""
    grouped: dict[str, Any] = {"enable_gqa": True} if "enable_gqa" in inspect.signature(varlen_attn).parameters else {}
    boundaries_of = once_a_forward(
        lambda segments, device: tuple(_boundaries(lengths, device) for lengths in (segments.new, segments.lengths))
    )

    def prefill(q: torch.Tensor, cache: KvCache, layer: int) -> torch.Tensor:
        segments = cache.segments
        read = [cache.read(layer, number) for number in range(len(segments.new))]
        keys, values = (x[0] if len(x) == 1 else torch.cat(x) for x in zip(*read, strict=True))
        ends_q, ends_k = boundaries_of(cache, q.device)
        longest_q, longest_k = max(segments.new), max(segments.lengths)
        out = varlen_attn(q, keys, values, ends_q, ends_k, longest_q, longest_k, window_size=(-1, 0), **grouped)
        assert isinstance(out, torch.Tensor)
        return out

    return prefill


def _boundaries(lengths: tuple[int, ...], device: torch.device) -> torch.Tensor:
    """cu_seqlens, int32 [B + 1], written on the device: nothing is copied there, and nothing waits."""
    boundaries, end = torch.zeros(len(lengths) + 1, dtype=torch.int32, device=device), 0
    for number, length in enumerate(lengths):
        end += length
        boundaries[number + 1 :].fill_(end)
    return boundaries
