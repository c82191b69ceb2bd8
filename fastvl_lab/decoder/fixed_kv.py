"""The KV cache as a compiled or captured stage sees it: what changes from request to request is in tensors, not in Python."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from fastvl_lab.decoder.layers import Slots
from fastvl_lab.decoder.segments import Segments


@dataclass(kw_only=True, eq=False)
class FixedKv:
    """Keys and values for one forward of `rows` rows: of a prompt, some tokens and then padding, or a token of each of B sequences.

    layers: keys and values of each layer, [n_slots, n_kv_heads, D]; the last slot is no sequence's, and takes what padding writes.
    slot_of: int64 [B, width], where tokens 0 to width - 1 are kept; those beyond a sequence may be any slot that was written or
    zeroed once. lengths: int32 [B], the tokens of each sequence, those of this forward included. padded: whether they may be less
    than width, as those of several sequences may. Before a prompt were width - rows tokens, before a step one less than there are.
    in_place: whether token i of the only sequence is kept in slot i, so that nothing need be gathered.
    """

    layers: Sequence[tuple[torch.Tensor, torch.Tensor]]
    slot_of: torch.Tensor
    lengths: torch.Tensor
    rows: int
    padded: bool
    in_place: bool
    segments: Segments = field(init=False)
    visible: torch.Tensor | None = field(init=False, default=None)
    made: dict[Any, Any] = field(init=False, default_factory=dict)
    written: torch.Tensor = field(init=False)
    last_row: torch.Tensor | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        (n, width), rows, slot_of = self.slot_of.shape, self.rows, self.slot_of
        assert rows == n or n == 1, "a program brings one prompt into the cache, or a token of each sequence"
        before = width - rows // n
        self.segments = Segments(new=(rows // n,) * n, before=(before,) * n)
        if not self.padded:
            assert n == 1
            self.written = slot_of[0, before:]
            return
        self.visible = torch.arange(width, device=slot_of.device) < self.lengths[:, None]
        if rows == n:
            self.written = slot_of.gather(1, self.lengths[:, None].long() - 1)[:, 0]
        else:
            spare = self.layers[0][0].shape[0] - 1
            self.written = torch.where(self.visible[0, before:], slot_of[0, before:], spare)
            self.last_row = self.lengths.long() - 1 - before

    def write(self, layer: int, k: torch.Tensor, v: torch.Tensor) -> None:
        keys, values = self.layers[layer]
        keys.index_copy_(0, self.written, k)
        values.index_copy_(0, self.written, v)

    def read(self, layer: int, sequence: int) -> tuple[torch.Tensor, torch.Tensor]:
        """As many keys and values as the sequence may have here; those that are not `visible` are finite."""
        keys, values = self.layers[layer]
        if self.in_place:
            width = self.slot_of.shape[1]
            return keys[:width], values[:width]
        return keys.index_select(0, self.slot_of[sequence]), values.index_select(0, self.slot_of[sequence])

    def slots(self, layer: int) -> Slots:
        keys, values = self.layers[layer]
        return Slots(keys=keys, values=values, slot_of=self.slot_of, lengths=self.lengths, written=self.written)

    def last(self, x: torch.Tensor) -> torch.Tensor:
        if self.rows == len(self.lengths):
            return x
        return x[-1:] if self.last_row is None else x.index_select(0, self.last_row)
