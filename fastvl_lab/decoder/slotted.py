"""The lab's own Triton kernels, which read keys and values where the cache keeps them, gathering nothing."""

from __future__ import annotations

import torch

from fastvl_lab.decoder.layers import Attend, KvCache, once_a_forward
from fastvl_lab.decoder.segments import Segments
from fastvl_lab.kernels.decode_attention import decode_attention
from fastvl_lab.kernels.prefill_attention import block_size, prefill_attention


def bind_prefill(dtype: torch.dtype, group: int) -> Attend:
    """Causal attention of all sequences in one launch, over exactly the blocks that hold queries.

    dtype: of the queries. group: how many heads share a key head.
    """
    block = block_size(dtype, group)

    def query_blocks(segments: Segments, device: torch.device) -> torch.Tensor:
        """int32 [n_blocks, 4], as `prefill_attention` takes them, written on the device."""
        parts = []
        for number, (start, n) in enumerate(zip(segments.starts[:-1], segments.new, strict=True)):
            first = torch.arange(start, start + n, block, dtype=torch.int32, device=device)
            of_sequence = [torch.full_like(first, x) for x in (start + n, number, segments.before[number] - start)]
            parts.append(torch.stack([first, *of_sequence], dim=1))
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    blocks_of = once_a_forward(query_blocks)

    def prefill(q: torch.Tensor, cache: KvCache, layer: int) -> torch.Tensor:
        slots, longest = cache.slots(layer), max(cache.segments.lengths)
        return prefill_attention(q, slots.keys, slots.values, slots.slot_of, blocks_of(cache, q.device), longest=longest)

    return prefill


def decode(q: torch.Tensor, cache: KvCache, layer: int) -> torch.Tensor:
    """One query a sequence against all of its keys, the keys split among programs."""
    slots = cache.slots(layer)
    return decode_attention(q, slots.keys, slots.values, slots.slot_of, slots.lengths, longest=max(cache.segments.lengths))
