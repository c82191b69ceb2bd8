"""Keys and values that grow by concatenation: every step copies all that came before."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from fastvl_lab.decoder.layers import Slots
from fastvl_lab.decoder.segments import Segments


class ConcatKv:
    """The KV cache of some sequences, a tensor a layer and sequence."""

    def __init__(self, n_layers: int, n_sequences: int = 1) -> None:
        self._keys: list[list[torch.Tensor | None]] = [[None] * n_sequences for _ in range(n_layers)]
        self._values: list[list[torch.Tensor | None]] = [[None] * n_sequences for _ in range(n_layers)]
        self.segments = Segments(new=(0,) * n_sequences, before=(0,) * n_sequences)
        self.made: dict[Any, Any] = {}
        self.visible = None  # all keys that `read` gives are the sequence's

    @property
    def n_bytes(self) -> int:
        """What the tensors take now."""
        stored = [x for side in (self._keys, self._values) for layer in side for x in layer if x is not None]
        return sum(x.numel() * x.element_size() for x in stored)

    def extend(self, new: Sequence[int]) -> None:
        """The next forward brings this many tokens of each sequence."""
        self.segments, self.made = Segments.of(new, self.segments.lengths), {}

    def write(self, layer: int, k: torch.Tensor, v: torch.Tensor) -> None:
        for stored, packed in ((self._keys[layer], k), (self._values[layer], v)):
            for number, part in enumerate(packed.split(self.segments.new)):
                old = stored[number]
                # The first part may be a view of a fused projection, all of which it would keep alive.
                stored[number] = part.clone(memory_format=torch.contiguous_format) if old is None else torch.cat([old, part])

    def read(self, layer: int, sequence: int) -> tuple[torch.Tensor, torch.Tensor]:
        keys, values = self._keys[layer][sequence], self._values[layer][sequence]
        assert keys is not None
        assert values is not None
        return keys, values

    def last(self, x: torch.Tensor) -> torch.Tensor:
        return self.segments.last(x)

    def slots(self, layer: int) -> Slots:
        raise AssertionError("a recipe whose kernels need slots has a cache with slots")
