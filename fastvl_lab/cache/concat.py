"""Keys and values that grow by concatenation: every step copies all that came before."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Self

import torch

from fastvl_lab.decoder.layers import Slots
from fastvl_lab.decoder.segments import Segments


class ConcatSequence:
    """One sequence's keys and values, a tensor a layer each; `length` tokens, those of a forward under way included."""

    def __init__(self, n_layers: int) -> None:
        self.keys: list[torch.Tensor | None] = [None] * n_layers
        self.values: list[torch.Tensor | None] = [None] * n_layers
        self.length = 0

    @property
    def n_bytes(self) -> int:
        """What the tensors take now."""
        return sum(x.nbytes for x in (*self.keys, *self.values) if x is not None)

    def close(self) -> None:
        self.keys, self.values = [], []


class ConcatKv:
    """The KV cache of some sequences."""

    def __init__(self, sequences: Sequence[ConcatSequence]) -> None:
        self._sequences = sequences
        self.segments = Segments.before_any(sequences)
        self.made: dict[Any, Any] = {}
        self.visible = None  # all keys that `read` gives are the sequence's

    def extend(self, new: Sequence[int]) -> None:
        """The next forward brings this many tokens of each sequence."""
        self.segments, self.made = Segments.extending(self._sequences, new), {}

    def open(self, rows: int) -> Self:
        """A forward that is launched from Python has the cache as it is."""
        return self

    def write(self, layer: int, k: torch.Tensor, v: torch.Tensor) -> None:
        new = self.segments.new
        for sequence, k_part, v_part in zip(self._sequences, k.split(new), v.split(new), strict=True):
            for stored, part in ((sequence.keys, k_part), (sequence.values, v_part)):
                old = stored[layer]
                # The first part may be a view of a fused projection, all of which it would keep alive.
                stored[layer] = part.clone(memory_format=torch.contiguous_format) if old is None else torch.cat([old, part])

    def read(self, layer: int, sequence: int) -> tuple[torch.Tensor, torch.Tensor]:
        keys, values = self._sequences[sequence].keys[layer], self._sequences[sequence].values[layer]
        assert keys is not None
        assert values is not None
        return keys, values

    def last(self, x: torch.Tensor) -> torch.Tensor:
        return self.segments.last(x)

    def slots(self, layer: int) -> Slots:
        raise AssertionError("a recipe whose kernels need slots has a cache with slots")
