"""Slot 4: the KV cache, what attention keeps between steps."""

from __future__ import annotations

import torch

from fastvl_lab.recipe import Cache


class ConcatCache:
    """Keys and values per layer, grown by concatenation; every step copies all that came before."""

    def __init__(self, n_layers: int) -> None:
        self._keys: list[torch.Tensor | None] = [None] * n_layers
        self._values: list[torch.Tensor | None] = [None] * n_layers

    def append(self, layer: int, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Add k, v [n, n_kv_heads, head_dim] to a layer; returns all of its keys and values so far."""
        for store, new in ((self._keys, k), (self._values, v)):
            old = store[layer]
            store[layer] = new if old is None else torch.cat([old, new])
        keys, values = self._keys[layer], self._values[layer]
        assert keys is not None
        assert values is not None
        return keys, values


def new_cache(slot: Cache, n_layers: int) -> ConcatCache:
    """An empty cache for one request."""
    return {"concat": ConcatCache}[slot.kv](n_layers)
