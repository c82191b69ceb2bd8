"""The tower's attention: ways to let each patch see its own segment and nothing else.

An option of `vit.attention` is a function of the dtype of q, k and v, in `OPTIONS`. It has two halves: `prepare` makes of
the segments what its kernel needs, once a plan, and `attend` uses it in every block.
Shape letters: N patches of all segments, H heads, D head_dim.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Hashable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend

from fastvl_lab.inputs import tensors
from fastvl_lab.kernels.backends import on_kernel
from fastvl_lab.kernels.plain import power_of_two
from fastvl_lab.vit.positions import Group, Groups


@dataclass(frozen=True, kw_only=True, eq=False)
class Prepared:
    """What an option made of the segments: a table that its kernel reads, and what its calls themselves depend on."""

    table: torch.Tensor | None = tensors(dim=0, constant=True)
    fixed: Hashable


@dataclass(frozen=True, kw_only=True, eq=False)
class SegmentAttention:
    """prepare(groups, device) -> prepared; attend(q_HND, k_HND, v_HND, prepared) -> [N, H * D].

    room(table) is the same table with room for more segments, so that requests of different images have tables of one size.
    kernel: on CUDA, which of torch's kernels runs its calls of scaled_dot_product_attention, where it has any. operator: what the
    operator that torch.compile is given in its place is called with, the groups or the option's own table; "own" where attend
    calls such an operator itself.
    """

    prepare: Callable[[Groups, torch.device], Prepared]
    attend: Callable[[torch.Tensor, torch.Tensor, torch.Tensor, Prepared], torch.Tensor]
    room: Callable[[torch.Tensor], torch.Tensor] = lambda table: table
    kernel: SDPBackend | None = None
    operator: Literal["groups", "table", "own"] = "groups"

    def on(self, device: torch.device) -> AbstractContextManager[None]:
        """To be entered around a forward on the device."""
        return on_kernel(self.kernel if device.type == "cuda" else None)


def bind(option: str, dtype: torch.dtype, *, compiled: bool = False) -> SegmentAttention:
    """The option of that name; compiled: whether torch.compile is to read what calls it."""
    made = OPTIONS[option](dtype)
    return opaque(option, made) if compiled else made


def per_window(_: torch.dtype) -> SegmentAttention:
    """One call of SDPA a segment, in a Python loop, as the stock tower does."""

    def attend(q_HND: torch.Tensor, k_HND: torch.Tensor, v_HND: torch.Tensor, prepared: Prepared) -> torch.Tensor:
        lengths: Any = prepared.fixed
        segments = zip(*(x.split(lengths, dim=1) for x in (q_HND, k_HND, v_HND)), strict=True)
        outputs = [F.scaled_dot_product_attention(q[None], k[None], v[None])[0] for q, k, v in segments]
        return torch.cat(outputs, dim=1).transpose(0, 1).flatten(1)

    def prepare(groups: Groups, _: torch.device) -> Prepared:
        return Prepared(table=None, fixed=tuple(group.length for group in groups for _ in range(group.number)))

    return SegmentAttention(prepare=prepare, attend=attend, kernel=SDPBackend.EFFICIENT_ATTENTION)


def grouped(_: torch.dtype) -> SegmentAttention:
    """One call of SDPA for all neighbouring segments of equal length."""

    def attend(q_HND: torch.Tensor, k_HND: torch.Tensor, v_HND: torch.Tensor, prepared: Prepared) -> torch.Tensor:
        groups: Any = prepared.fixed
        outputs = []
        for start, number, length in groups:
            batched = [x[:, start : start + number * length].unflatten(1, (number, length)) for x in (q_HND, k_HND, v_HND)]
            out = F.scaled_dot_product_attention(*(x.transpose(0, 1) for x in batched))  # [number, H, length, D]
            outputs.append(out.transpose(1, 2).reshape(number * length, -1))
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs)

    kernel = SDPBackend.EFFICIENT_ATTENTION
    return SegmentAttention(prepare=lambda groups, _: Prepared(table=None, fixed=groups), attend=attend, kernel=kernel)


def grouped_flash(dtype: torch.dtype) -> SegmentAttention:
    """The same calls by torch's flash kernel."""
    return dataclasses.replace(grouped(dtype), kernel=SDPBackend.FLASH_ATTENTION)


def grouped_cudnn(dtype: torch.dtype) -> SegmentAttention:
    """The same calls by cuDNN."""
    return dataclasses.replace(grouped(dtype), kernel=SDPBackend.CUDNN_ATTENTION)


def varlen(_: torch.dtype) -> SegmentAttention:
    """torch's variable-length attention: one call of its flash kernel over all segments, on CUDA in half precision."""
    from torch.nn.attention.varlen import varlen_attn

    def prepare(groups: Groups, device: torch.device) -> Prepared:
        starts = [g.start + g.length * torch.arange(g.number, dtype=torch.int32, device=device) for g in groups]
        end = groups[-1].start + groups[-1].number * groups[-1].length
        boundaries = torch.cat([*starts, torch.full((1,), end, dtype=torch.int32, device=device)])
        return Prepared(table=boundaries, fixed=max(g.length for g in groups))

    def attend(q_HND: torch.Tensor, k_HND: torch.Tensor, v_HND: torch.Tensor, prepared: Prepared) -> torch.Tensor:
        longest: Any = prepared.fixed
        assert prepared.table is not None
        boundaries = prepared.table
        q, k, v = (x.transpose(0, 1) for x in (q_HND, k_HND, v_HND))
        out = varlen_attn(q, k, v, boundaries, boundaries, longest, longest)
        assert isinstance(out, torch.Tensor)
        return out.flatten(1)

    def room(boundaries: torch.Tensor) -> torch.Tensor:
        """Empty segments at the end."""
        return torch.cat([boundaries, boundaries[-1:].expand(power_of_two(len(boundaries)) - len(boundaries))])

    return SegmentAttention(prepare=prepare, attend=attend, room=room, operator="own")


def triton(dtype: torch.dtype) -> SegmentAttention:
    """The lab's own kernel over blocks of queries, none of them empty."""
    from fastvl_lab.kernels.segment_attention import block_size, segment_attention

    def prepare(groups: Groups, device: torch.device) -> Prepared:
        block = block_size(dtype, max(group.length for group in groups))
        return Prepared(table=torch.cat([_query_blocks(*group, block, device) for group in groups]), fixed=block)

    def attend(q_HND: torch.Tensor, k_HND: torch.Tensor, v_HND: torch.Tensor, prepared: Prepared) -> torch.Tensor:
        block: Any = prepared.fixed
        assert prepared.table is not None
        return segment_attention(q_HND, k_HND, v_HND, prepared.table, block=block).flatten(1)

    def room(blocks: torch.Tensor) -> torch.Tensor:
        """Blocks without queries at the end."""
        return F.pad(blocks, (0, 0, 0, power_of_two(len(blocks)) - len(blocks)))

    return SegmentAttention(prepare=prepare, attend=attend, room=room, operator="table")


OPTIONS: dict[str, Callable[[torch.dtype], SegmentAttention]] = {
    "per_window": per_window,
    "grouped": grouped,
    "grouped_flash": grouped_flash,
    "grouped_cudnn": grouped_cudnn,
    "varlen": varlen,
    "triton": triton,
}


def opaque(option: str, attention: SegmentAttention) -> SegmentAttention:
    """The option as one operator, into which torch.compile does not look.

    Else each arrangement of windows would be another program, and a new image size would compile again. Groups come to the operator
    as a table on the host.
    """
    if attention.operator == "own":
        return attention
    operator = _operator(option)

    def prepare(groups: Groups, device: torch.device) -> Prepared:
        if attention.operator == "table":
            return attention.prepare(groups, device)
        none = Group(0, 0, 0)  # torch.compile takes a table of one row for another kind of table
        return Prepared(table=torch.tensor([*groups, none]), fixed=0)

    return SegmentAttention(
        prepare=prepare, attend=lambda q, k, v, prepared: operator(q, k, v, prepared.table, prepared.fixed), room=attention.room
    )


@cache  # an operator has its name once in a process
def _operator(option: str) -> Callable[..., torch.Tensor]:
    attention = OPTIONS[option](torch.float32)

    @torch.library.custom_op(f"fastvl_lab::{option}_attention", mutates_args=())
    def operator(q_HND: torch.Tensor, k_HND: torch.Tensor, v_HND: torch.Tensor, table: torch.Tensor, fixed: int) -> torch.Tensor:
        if attention.operator == "table":
            return attention.attend(q_HND, k_HND, v_HND, Prepared(table=table, fixed=fixed))
        groups = tuple(Group(*row) for row in table.tolist() if row[1] > 0)
        with attention.on(q_HND.device):  # compiled code enters nothing for it
            return attention.attend(q_HND, k_HND, v_HND, attention.prepare(groups, q_HND.device)).contiguous()

    def like(q_HND: torch.Tensor, k_HND: torch.Tensor, v_HND: torch.Tensor, table: torch.Tensor, fixed: int) -> torch.Tensor:
        return q_HND.new_empty(q_HND.shape[1], q_HND.shape[0] * q_HND.shape[2])

    operator.register_fake(like)
    return operator


def _query_blocks(start: int, number: int, length: int, block: int, device: torch.device) -> torch.Tensor:
    """int32 [n_blocks, 3]: the first query of each block, and where its segment starts and ends."""
    per_segment = -(-length // block)
    block_number = torch.arange(number * per_segment, dtype=torch.int32, device=device)
    first = start + torch.div(block_number, per_segment, rounding_mode="floor") * length
    return torch.stack([first + block_number % per_segment * block, first, first + length], dim=1)
