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
    """One sequence's keys and values for one forward of `rows` rows, of which the first are tokens and the rest padding.

    layers: keys and values of each layer, [n_slots, n_kv_heads, D]; the last slot is no sequence's, and takes what padding writes.
    slot_of: int64 [1, width], where tokens 0 to width - 1 are kept; those beyond the sequence may be any slot that was written or
    zeroed once. length: int32 [1], the tokens of the sequence, those of this forward included. padded: whether length may be less
    than width; the tokens that were there before are width - rows either way, but for a decode step (rows 1), where they are
    length - 1. in_place: whether token i is kept in slot i, so that nothing need be gathered.
    """

    layers: Sequence[tuple[torch.Tensor, torch.Tensor]]
    slot_of: torch.Tensor
    length: torch.Tensor
    rows: int
    padded: bool
    in_place: bool
    segments: Segments = field(init=False)
    visible: torch.Tensor | None = field(init=False, default=None)
    made: dict[Any, Any] = field(init=False, default_factory=dict)
    written: torch.Tensor = field(init=False)
    last_row: torch.Tensor | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        width, rows, slots = self.slot_of.shape[1], self.rows, self.slot_of[0]
        before = width - rows
        self.segments = Segments(new=(rows,), before=(before,))
        if not self.padded:
            self.written = slots[before:]
            return
        place = torch.arange(width, device=slots.device)
        self.visible = (place < self.length)[None]
        if rows == 1:
            self.written = slots.index_select(0, self.length.long() - 1)
        else:
            spare = self.layers[0][0].shape[0] - 1
            self.written = torch.where(self.visible[0, before:], slots[before:], spare)
            self.last_row = self.length.long() - 1 - before

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
        return keys.index_select(0, self.slot_of[0]), values.index_select(0, self.slot_of[0])

    def slots(self, layer: int) -> Slots:
        keys, values = self.layers[layer]
        return Slots(keys=keys, values=values, slot_of=self.slot_of, lengths=self.length, written=self.written)

    def last(self, x: torch.Tensor) -> torch.Tensor:
        if self.rows == 1:
            return x
        return x[-1:] if self.last_row is None else x.index_select(0, self.last_row)
