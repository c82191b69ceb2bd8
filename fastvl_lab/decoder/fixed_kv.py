"""The KV cache as a compiled or captured stage sees it: what changes from request to request is in tensors, not in Python."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol

import torch

from fastvl_lab.decoder.layers import Slots
from fastvl_lab.decoder.segments import Segments
from fastvl_lab.inputs import tensors


class Store(Protocol):
    """Keys and values of each layer, [n_slots, n_kv_heads, D]; the last slot is no sequence's, and takes what padding writes."""

    @property
    def layers(self) -> Sequence[tuple[torch.Tensor, torch.Tensor]]: ...


@dataclass(frozen=True, kw_only=True, eq=False)
class KvTable:
    """Where B sequences lie in a store, as a stage's input.

    slot_of: int64 [B, width], where tokens 0 to width - 1 are kept; those beyond a sequence may be any slot that was written or
    zeroed once. lengths: int32 [B], the tokens of each sequence, those of the forward included. padded: whether they may be less
    than width, as those of several sequences may.
    """

    slot_of: torch.Tensor = tensors(dim=1)
    lengths: torch.Tensor = tensors()
    store: Store
    padded: bool
    in_place: ClassVar[bool] = False

    def open(self, rows: int) -> FixedKv:
        """For a forward of so many rows: of one prompt, or one of each sequence."""
        return FixedKv(table=self, rows=rows)


@dataclass(frozen=True, kw_only=True, eq=False)
class KvTableInPlace(KvTable):
    """That of one sequence whose token i is kept in slot i, so that nothing need be gathered."""

    slot_of: torch.Tensor = tensors(dim=1, implied=True)
    in_place: ClassVar[bool] = True


@dataclass(kw_only=True, eq=False)
class FixedKv:
    """Keys and values for one forward of `rows` rows: of a prompt, some tokens and then padding, or a token of each sequence.

    Before a prompt there were width - rows tokens; before a step, of each sequence one less than there are.
    """

    table: KvTable
    rows: int
    segments: Segments = field(init=False)
    visible: torch.Tensor | None = field(init=False, default=None)
    made: dict[Any, Any] = field(init=False, default_factory=dict)
    written: torch.Tensor = field(init=False)
    last_row: torch.Tensor | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        slot_of, lengths, rows = self.table.slot_of, self.table.lengths, self.rows
        n, width = slot_of.shape
        assert rows == n or n == 1, "a program brings one prompt into the cache, or a token of each sequence"
        before = width - rows // n
        self.segments = Segments(new=(rows // n,) * n, before=(before,) * n)
        if not self.table.padded:
            assert n == 1
            self.written = slot_of[0, before:]
            return
        self.visible = torch.arange(width, device=slot_of.device) < lengths[:, None]
        if rows == n:
            self.written = slot_of.gather(1, lengths[:, None].long() - 1)[:, 0]
        else:
            spare = self.table.store.layers[0][0].shape[0] - 1
            self.written = torch.where(self.visible[0, before:], slot_of[0, before:], spare)
            self.last_row = lengths.long() - 1 - before

    def write(self, layer: int, k: torch.Tensor, v: torch.Tensor) -> None:
        keys, values = self.table.store.layers[layer]
        keys.index_copy_(0, self.written, k)
        values.index_copy_(0, self.written, v)

    def read(self, layer: int, sequence: int) -> tuple[torch.Tensor, torch.Tensor]:
        """As many keys and values as the sequence may have here; those that are not `visible` are finite."""
        keys, values = self.table.store.layers[layer]
        slot_of = self.table.slot_of
        if self.table.in_place:
            width = slot_of.shape[1]
            return keys[:width], values[:width]
        return keys.index_select(0, slot_of[sequence]), values.index_select(0, slot_of[sequence])

    def slots(self, layer: int) -> Slots:
        keys, values = self.table.store.layers[layer]
        return Slots(keys=keys, values=values, slot_of=self.table.slot_of, lengths=self.table.lengths, written=self.written)

    def last(self, x: torch.Tensor) -> torch.Tensor:
        if self.rows == len(self.table.lengths):
            return x
        return x[-1:] if self.last_row is None else x.index_select(0, self.last_row)
