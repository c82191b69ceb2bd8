"""Keys and values in slots of a tensor that is allocated once: of a session as a whole, or block by block."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Self

import torch
import torch.nn.functional as F

from fastvl_lab.checkpoint import Checkpoint
from fastvl_lab.decoder.fixed_kv import KvTable, KvTableInPlace
from fastvl_lab.decoder.layers import Slots
from fastvl_lab.decoder.segments import Segments
from fastvl_lab.families.text import head_dim


@dataclass(frozen=True, kw_only=True, eq=False)
class KvShape:
    """What a token takes in the cache, in every layer and all together."""

    n_layers: int
    n_kv_heads: int
    head_dim: int
    dtype: torch.dtype
    device: torch.device

    @classmethod
    def of(cls, checkpoint: Checkpoint) -> KvShape:
        config = checkpoint.config.get_text_config()
        return cls(
            n_layers=config.num_hidden_layers,
            n_kv_heads=config.num_key_value_heads,
            head_dim=head_dim(config),
            dtype=checkpoint.dtype,
            device=checkpoint.device,
        )

    @property
    def bytes_per_token(self) -> int:
        return 2 * self.n_layers * self.n_kv_heads * self.head_dim * self.dtype.itemsize

    def allocate(self, n_slots: int, *, in_place: bool = False) -> KvStore:
        """Room for that many tokens and one more, all zero.

        The last slot is no sequence's. What was never written must be finite: a padded stage reads it, with weight zero.
        """
        shape = (n_slots + 1, self.n_kv_heads, self.head_dim)

        def zeros() -> torch.Tensor:
            return torch.zeros(shape, dtype=self.dtype, device=self.device)

        return KvStore(layers=tuple((zeros(), zeros()) for _ in range(self.n_layers)), in_place=in_place)


@dataclass(frozen=True, kw_only=True, eq=False)
class KvStore:
    """Slots for keys and values: a pair of tensors a layer, [n_slots, n_kv_heads, D] each.

    in_place: whether it is for one sequence at a time, token i of which is kept in slot i.
    Each is a tensor of its own: torch.compile takes views of one tensor that are written to for one thing to write.
    """

    layers: tuple[tuple[torch.Tensor, torch.Tensor], ...]
    in_place: bool

    @property
    def n_slots(self) -> int:
        return len(self.layers[0][0])

    @property
    def device(self) -> torch.device:
        return self.layers[0][0].device

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for pair in self.layers for tensor in pair)

    @cached_property
    def places(self) -> torch.Tensor:
        """int64 [1, n_slots], the slots of a sequence whose token i is in slot i; never changed."""
        return torch.arange(self.n_slots, device=self.device)[None]

    def table(self, slot_of: torch.Tensor, lengths: torch.Tensor, *, padded: bool) -> KvTable:
        kind = KvTableInPlace if self.in_place else KvTable
        return kind(slot_of=slot_of, lengths=lengths, store=self, padded=padded)

    def blank(self, width: int, rows: int = 1) -> KvTable:
        """Sequences of so many tokens each that are no request's: where slots are not their tokens' own, all are the last."""
        slots = self.places if self.in_place else torch.full_like(self.places, self.n_slots - 1).expand(rows, -1)
        lengths = torch.full((rows,), width, dtype=torch.int32, device=self.device)
        return self.table(slots[:, :width], lengths, padded=True)  # a view, as of a request's sequence

    def copy_slots(self, source: int, target: int, n: int) -> None:
        """Copy n slots, from one on, to others, in every layer: one call, since each layer's is small."""
        sides = [side for pair in self.layers for side in pair]
        torch._foreach_copy_([side[target : target + n] for side in sides], [side[source : source + n] for side in sides])


class SlottedSequence:
    """One sequence in a store: its blocks in order, and `length` tokens, those of a forward under way included.

    block_size: in tokens. longest: how many tokens it may come to have.
    """

    def __init__(self, store: KvStore, blocks: Sequence[int] = (), *, block_size: int, longest: int) -> None:
        self.store, self.block_size, self.longest = store, block_size, longest
        self.blocks: list[int] = []
        self.in_one_piece = True
        self.length = 0
        self.add_blocks(blocks)

    @property
    def n_bytes(self) -> int:
        """What its blocks take, filled or not; in place, all of the store."""
        if self.store.in_place:
            return self.store.nbytes
        return len(self.blocks) * self.block_size * (self.store.nbytes // self.store.n_slots)

    def add_blocks(self, blocks: Sequence[int]) -> None:
        """The sequence goes on in these blocks of the store."""
        for block in blocks:
            if self.blocks and block != self.blocks[-1] + 1:
                self.in_one_piece = False
            self.blocks.append(block)

    def grow(self, length: int) -> None:
        """Have blocks for that many tokens."""
        assert length <= len(self.blocks) * self.block_size, "more tokens than slots"


class SlottedKv:
    """The KV cache of some sequences of one store.

    Tensors of slots and lengths are made when they are first asked for, and on the device: the host knows what they say.
    """

    def __init__(self, sequences: Sequence[SlottedSequence]) -> None:
        self._sequences = sequences
        self.store = sequences[0].store
        self.layers = self.store.layers
        self.segments = Segments.before_any(sequences)
        self.made: dict[Any, Any] = {}
        self.visible = None  # all keys that `read` gives are the sequence's
        assert len(sequences) == 1 or not self.store.in_place
        self._slots: torch.Tensor | None = None  # int64 [B, longest]
        self._n_blocks = [0] * len(sequences)  # of each sequence, those whose slots are there
        self._lengths: torch.Tensor | None = None
        self._written: torch.Tensor | None = None

    def extend(self, new: Sequence[int]) -> None:
        """The next forward brings this many tokens of each sequence."""
        told = self.segments.lengths
        self.segments, self.made = Segments.extending(self._sequences, new), {}
        for sequence in self._sequences:
            sequence.grow(sequence.length)
        if self._slots is not None:
            self._write_slots(self._slots)
        self._written = None
        if self._lengths is not None:
            if set(new) == {1} and told == self.segments.before:
                self._lengths.add_(1)
            else:
                self._lengths = None

    def open(self, rows: int) -> Self:
        """A forward that is launched from Python has the cache as it is."""
        return self

    def write(self, layer: int, k: torch.Tensor, v: torch.Tensor) -> None:
        keys, values = self.layers[layer]
        first = self._sequences[0]
        if len(self._sequences) == 1 and first.in_one_piece:
            start = first.blocks[0] * first.block_size + self.segments.before[0]
            keys[start : start + len(k)] = k
            values[start : start + len(v)] = v
        else:
            written = self._slots_written()
            keys.index_copy_(0, written, k)
            values.index_copy_(0, written, v)

    def read(self, layer: int, sequence: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Views where the sequence lies in one piece, else a copy."""
        keys, values = self.layers[layer]
        of, length = self._sequences[sequence], self.segments.lengths[sequence]
        if of.in_one_piece:
            start = of.blocks[0] * of.block_size
            return keys[start : start + length], values[start : start + length]
        slots = self._slot_of()[sequence, :length]
        return keys.index_select(0, slots), values.index_select(0, slots)

    def slots(self, layer: int) -> Slots:
        keys, values = self.layers[layer]
        return Slots(keys=keys, values=values, slot_of=self._slot_of(), lengths=self._lengths_now(), written=self._slots_written())

    def last(self, x: torch.Tensor) -> torch.Tensor:
        return self.segments.last(x)

    def table(self, width: int, *, padded: bool, more: int = 0) -> KvTable:
        """The sequences with room for so many tokens each, for stages whose inputs are tensors.

        more: sequences that are no request's, of a token each, which is kept in the last slot.
        """
        slot_of, lengths = self._slot_of(), self._lengths_now()
        if width > slot_of.shape[1]:
            slot_of = F.pad(slot_of, (0, width - slot_of.shape[1]))
        slot_of = slot_of[:, :width]
        if more:
            slot_of = F.pad(slot_of, (0, 0, 0, more), value=self.store.n_slots - 1)
            lengths = F.pad(lengths, (0, more), value=1)
        return self.store.table(slot_of, lengths, padded=padded)

    def _slot_of(self) -> torch.Tensor:
        if self.store.in_place:
            return self.store.places
        if self._slots is None:
            size, longest = self._sequences[0].block_size, max(sequence.longest for sequence in self._sequences)
            shape = (len(self._sequences), -(-longest // size) * size)
            self._slots = torch.zeros(shape, dtype=torch.int64, device=self.store.device)
            self._write_slots(self._slots)
        return self._slots

    def _write_slots(self, slot_of: torch.Tensor) -> None:
        """The slots of blocks that are new, a run of neighbours at a time, on the device: nothing is copied there."""
        for number, sequence in enumerate(self._sequences):
            blocks, size, first = sequence.blocks, sequence.block_size, self._n_blocks[number]
            while first < len(blocks):
                end = first + 1
                while end < len(blocks) and blocks[end] == blocks[end - 1] + 1:
                    end += 1
                start, n = blocks[first] * size, (end - first) * size
                torch.arange(start, start + n, out=slot_of[number, first * size : first * size + n])
                first = end
            self._n_blocks[number] = first

    def _lengths_now(self) -> torch.Tensor:
        if self._lengths is None:
            self._lengths = torch.empty(len(self._sequences), dtype=torch.int32, device=self.store.device)
            for number, length in enumerate(self.segments.lengths):
                self._lengths[number].fill_(length)
        return self._lengths

    def _slots_written(self) -> torch.Tensor:
        if self._written is None:
            segments, slot_of = self.segments, self._slot_of()
            parts = [
                slot_of[number, before : before + new]
                for number, (before, new) in enumerate(zip(segments.before, segments.new, strict=True))
            ]
            self._written = parts[0] if len(parts) == 1 else torch.cat(parts)
        return self._written
