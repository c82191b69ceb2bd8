"""Keys and values in slots of a tensor that is allocated once: of a session as a whole, or block by block."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F

from fastvl_lab.checkpoint import Checkpoint
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

    def allocate(self, n_slots: int) -> KvStore:
        """Room for that many tokens and one more, all zero.

        The last slot is no sequence's. What was never written must be finite: a padded stage reads it, with weight zero.
        """
        shape = (n_slots + 1, self.n_kv_heads, self.head_dim)

        def zeros() -> torch.Tensor:
            return torch.zeros(shape, dtype=self.dtype, device=self.device)

        return KvStore(layers=tuple((zeros(), zeros()) for _ in range(self.n_layers)))


@dataclass(frozen=True, kw_only=True, eq=False)
class KvStore:
    """Slots for keys and values: a pair of tensors a layer, [n_slots, n_kv_heads, D] each.

    Each is a tensor of its own: torch.compile takes views of one tensor that are written to for one thing to write.
    """

    layers: tuple[tuple[torch.Tensor, torch.Tensor], ...]

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

    def copy_slots(self, source: int, target: int, n: int) -> None:
        """Copy n slots, from one on, to others, in every layer: one call, since each layer's is small."""
        sides = [side for pair in self.layers for side in pair]
        torch._foreach_copy_([side[target : target + n] for side in sides], [side[source : source + n] for side in sides])


class SlottedKv:
    """The KV cache of some sequences whose blocks somebody else gives out.

    store: as `KvShape.allocate` makes it. longest: how many tokens a sequence may come to have. `add_blocks` says where a sequence
    goes on; `reused` how many of its tokens are there already. in_place: whether there is one sequence, token i of it in slot i.
    """

    def __init__(
        self, store: KvStore, *, block_size: int, longest: int, reused: Sequence[int] = (0,), in_place: bool = False
    ) -> None:
        self._store, self._block_size, self._longest = store, block_size, longest
        self.layers = store.layers
        n_sequences = len(reused)
        self._blocks: list[list[int]] = [[] for _ in range(n_sequences)]
        self._in_one_piece = [True] * n_sequences
        self.segments = Segments(new=(0,) * n_sequences, before=tuple(reused))
        self.made: dict[Any, Any] = {}
        self.visible = None  # all keys that `read` gives are the sequence's
        # int64 [B, longest]; made when it is first asked for, where it is not the store's own.
        self._slots, self._own_slots = store.places if in_place else None, not in_place
        self._lengths: torch.Tensor | None = None
        self._written: torch.Tensor | None = None

    @property
    def n_bytes(self) -> int:
        """What the sequences' blocks take, filled or not; a block that several share is counted once."""
        n_blocks = len({block for blocks in self._blocks for block in blocks})
        return n_blocks * self._block_size * (self.store_bytes // self._store.n_slots)

    @property
    def store_bytes(self) -> int:
        """What the whole store takes."""
        return self._store.nbytes

    def add_blocks(self, sequence: int, blocks: Sequence[int]) -> None:
        """The sequence goes on in these blocks of the store."""
        mine = self._blocks[sequence]
        before = len(mine)
        mine.extend(blocks)
        if any(block != previous + 1 for previous, block in zip(mine[max(before - 1, 0) :], mine[max(before, 1) :], strict=False)):
            self._in_one_piece[sequence] = False
        if self._own_slots and self._slots is not None:
            self._write_slots(sequence, before)

    def copy_tokens(self, source: int, target: int, n: int) -> None:
        """Copy the first tokens of one block into another, in every layer."""
        self._store.copy_slots(source * self._block_size, target * self._block_size, n)

    def _slot_of(self) -> torch.Tensor:
        if self._slots is None:
            width = -(-self._longest // self._block_size) * self._block_size
            self._slots = torch.zeros((len(self._blocks), width), dtype=torch.int64, device=self._store.device)
            for sequence in range(len(self._blocks)):
                self._write_slots(sequence, 0)
        return self._slots

    def _write_slots(self, sequence: int, first: int) -> None:
        """The slots of a sequence's blocks from one on, a run of neighbours at a time, on the device: nothing is copied there."""
        assert self._slots is not None
        blocks, size = self._blocks[sequence], self._block_size
        while first < len(blocks):
            end = first + 1
            while end < len(blocks) and blocks[end] == blocks[end - 1] + 1:
                end += 1
            start, n = blocks[first] * size, (end - first) * size
            torch.arange(start, start + n, out=self._slots[sequence, first * size : first * size + n])
            first = end

    def extend(self, new: Sequence[int]) -> None:
        """The next forward brings this many tokens of each sequence, for which there are blocks."""
        self.segments, self.made = Segments.of(new, self.segments.lengths), {}
        held = [len(blocks) * self._block_size for blocks in self._blocks]
        assert all(length <= n for length, n in zip(self.segments.lengths, held, strict=True)), "more tokens than slots"
        self._written = None
        if self._lengths is not None:
            if set(new) == {1}:
                self._lengths.add_(1)
            else:
                self._lengths = None

    def write(self, layer: int, k: torch.Tensor, v: torch.Tensor) -> None:
        keys, values = self.layers[layer]
        if len(self._blocks) == 1 and self._in_one_piece[0]:
            start = self._blocks[0][0] * self._block_size + self.segments.before[0]
            keys[start : start + len(k)] = k
            values[start : start + len(v)] = v
        else:
            written = self._slots_written()
            keys.index_copy_(0, written, k)
            values.index_copy_(0, written, v)

    def read(self, layer: int, sequence: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Views where the sequence lies in one piece, else a copy."""
        keys, values = self.layers[layer]
        length = self.segments.lengths[sequence]
        if self._in_one_piece[sequence]:
            start = self._blocks[sequence][0] * self._block_size
            return keys[start : start + length], values[start : start + length]
        slots = self._slot_of()[sequence, :length]
        return keys.index_select(0, slots), values.index_select(0, slots)

    def slots(self, layer: int) -> Slots:
        keys, values = self.layers[layer]
        return Slots(keys=keys, values=values, slot_of=self._slot_of(), lengths=self._lengths_now(), written=self._slots_written())

    def last(self, x: torch.Tensor) -> torch.Tensor:
        return self.segments.last(x)

    def table(self, width: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Of a single sequence: int64 [1, width], the slots of its tokens and then any; and int32 [1], its length."""
        slot_of = self._slot_of()
        if width > slot_of.shape[1]:
            slot_of = F.pad(slot_of, (0, width - slot_of.shape[1]))
        return slot_of[:, :width], self._lengths_now()

    def _lengths_now(self) -> torch.Tensor:
        if self._lengths is None:
            self._lengths = torch.empty(len(self._blocks), dtype=torch.int32, device=self._store.device)
            for number, length in enumerate(self.segments.lengths):
                self._lengths[number].fill_(length)
        return self._lengths

    def _slots_written(self) -> torch.Tensor:
        if self._written is None:
            segments = self.segments
            slot_of = self._slot_of()
            parts = [
                slot_of[number, before : before + new]
                for number, (before, new) in enumerate(zip(segments.before, segments.new, strict=True))
            ]
            self._written = parts[0] if len(parts) == 1 else torch.cat(parts)
        return self._written
