"""Engines that are not ours, measured the same way; each is imported when asked for."""

from __future__ import annotations

import importlib

from fastvl_lab.checkpoint import Checkpoint
from fastvl_lab.errors import RecipeError
from fastvl_lab.pipeline import Engine
from fastvl_lab.recipe import ORACLE_TOGGLES, Recipe

# Peer name -> the class that runs it.
_PEERS = {"transformers": ("fastvl_lab.peers.transformers", "TransformersPeer")}

PEERS = tuple(_PEERS)


def is_peer(text: object) -> bool:
    """Whether an engine's text names a peer, and not a recipe."""
    return isinstance(text, str) and text.partition(",")[0].strip() in PEERS


def parse(text: str) -> str:
    """A peer's text in its one spelling: its name, then changes of the toggles that decide on pixels.

    "transformers, preprocessor.resize=torch" is Transformers' model behind the lab's preprocessing. Raises `RecipeError`.
    """
    name, recipe = _read(text)
    for path in recipe.changes():
        if path not in ORACLE_TOGGLES:
            raise RecipeError(f"{text!r} changes {path}, which a peer does not have; the choices are {', '.join(ORACLE_TOGGLES)}")
    return ", ".join([name, *(f"{path}={value}" for path, value in recipe.changes().items())])


def bind(text: str, checkpoint: Checkpoint) -> Engine:
    """The peer of a text that `parse` has read, over a checkpoint's own weights."""
    name, recipe = _read(text)
    recipe.check(checkpoint.device)
    module, attribute = _PEERS[name]
    peer: Engine = getattr(importlib.import_module(module), attribute)(checkpoint, recipe.preprocessor)
    return peer


def _read(text: str) -> tuple[str, Recipe]:
    """The peer's name, and its changes as a recipe of which only the preprocessor counts."""
    name, comma, changes = text.partition(",")
    return name.strip(), Recipe.parse(f"baseline{comma}{changes}")
