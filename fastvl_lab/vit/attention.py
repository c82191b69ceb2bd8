"""The tower's attention: ways to let each patch see its own segment and nothing else.

An option has two halves: `prepare` makes of the segments what its kernel needs, once a plan, and `attend` uses it in every block.
Shape letters: N patches of all segments, H heads, D head_dim.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from fastvl_lab.vit.positions import Groups


@dataclass(frozen=True, kw_only=True, eq=False)
class SegmentAttention:
    """prepare(groups, device) -> prepared; attend(q_HND, k_HND, v_HND, prepared) -> [N, H * D]."""

    prepare: Callable[[Groups, torch.device], Any]
    attend: Callable[[torch.Tensor, torch.Tensor, torch.Tensor, Any], torch.Tensor]


def per_window() -> SegmentAttention:
    """One call of SDPA a segment, in a Python loop, as the stock tower does."""

    def attend(q_HND: torch.Tensor, k_HND: torch.Tensor, v_HND: torch.Tensor, lengths: list[int]) -> torch.Tensor:
        segments = zip(*(x.split(lengths, dim=1) for x in (q_HND, k_HND, v_HND)), strict=True)
        outputs = [F.scaled_dot_product_attention(q[None], k[None], v[None])[0] for q, k, v in segments]
        return torch.cat(outputs, dim=1).transpose(0, 1).flatten(1)

    return SegmentAttention(prepare=lambda groups, device: [g.length for g in groups for _ in range(g.number)], attend=attend)


def grouped() -> SegmentAttention:
    """One call of SDPA for all neighbouring segments of equal length."""

    def attend(q_HND: torch.Tensor, k_HND: torch.Tensor, v_HND: torch.Tensor, groups: Groups) -> torch.Tensor:
        outputs = []
        for start, number, length in groups:
            batched = [x[:, start : start + number * length].unflatten(1, (number, length)) for x in (q_HND, k_HND, v_HND)]
            out = F.scaled_dot_product_attention(*(x.transpose(0, 1) for x in batched))  # [number, H, length, D]
            outputs.append(out.transpose(1, 2).reshape(number * length, -1))
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs)

    return SegmentAttention(prepare=lambda groups, device: groups, attend=attend)


def varlen() -> SegmentAttention:
    """torch's variable-length attention: one call of its flash kernel over all segments, on CUDA in half precision."""
    from torch.nn.attention.varlen import varlen_attn

    def prepare(groups: Groups, device: torch.device) -> tuple[torch.Tensor, int]:
        starts = [g.start + g.length * torch.arange(g.number, dtype=torch.int32, device=device) for g in groups]
        end = groups[-1].start + groups[-1].number * groups[-1].length
        return torch.cat([*starts, torch.full((1,), end, dtype=torch.int32, device=device)]), max(g.length for g in groups)

    def attend(q_HND: torch.Tensor, k_HND: torch.Tensor, v_HND: torch.Tensor, prepared: tuple[torch.Tensor, int]) -> torch.Tensor:
        boundaries, longest = prepared
        q, k, v = (x.transpose(0, 1) for x in (q_HND, k_HND, v_HND))
        out = varlen_attn(q, k, v, boundaries, boundaries, longest, longest)
        assert isinstance(out, torch.Tensor)
        return out.flatten(1)

    return SegmentAttention(prepare=prepare, attend=attend)


def triton(dtype: torch.dtype) -> SegmentAttention:
    """The lab's own kernel over blocks of queries, none of them empty; dtype: of q, k and v."""
    from fastvl_lab.kernels.segment_attention import block_size, segment_attention

    def prepare(groups: Groups, device: torch.device) -> torch.Tensor:
        return torch.cat([_query_blocks(*group, block_size(dtype), device) for group in groups])

    return SegmentAttention(prepare=prepare, attend=lambda q, k, v, blocks: segment_attention(q, k, v, blocks).flatten(1))


def _query_blocks(start: int, number: int, length: int, block: int, device: torch.device) -> torch.Tensor:
    """int32 [n_blocks, 3]: the first query of each block, and where its segment starts and ends."""
    per_segment = -(-length // block)
    block_number = torch.arange(number * per_segment, dtype=torch.int32, device=device)
    first = start + torch.div(block_number, per_segment, rounding_mode="floor") * length
    return torch.stack([first + block_number % per_segment * block, first, first + length], dim=1)
