"""Engines that are not ours, measured the same way; each is imported when asked for."""

from __future__ import annotations

import importlib

from fastvl_lab.checkpoint import Checkpoint
from fastvl_lab.pipeline import Engine

# Peer name -> the class that runs it.
_PEERS = {"transformers": ("fastvl_lab.peers.transformers", "TransformersPeer")}

PEERS = tuple(_PEERS)


def bind(name: str, checkpoint: Checkpoint) -> Engine:
    """The peer of that name over a checkpoint's own weights; `name` is one of `PEERS`."""
    module, attribute = _PEERS[name]
    peer: Engine = getattr(importlib.import_module(module), attribute)(checkpoint)
    return peer
