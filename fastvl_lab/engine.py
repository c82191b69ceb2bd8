"""What can answer a request, by name: recipes, and the peers that the files of `peers/` register.

A text's first word says who reads it: "baseline" and "fastest" begin a recipe, "transformers" or "http://" a peer. A peer's file
decorates the function that reads its texts with `@engine(word)`; it is imported when a text is first found to be no recipe.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache, partial
from typing import Protocol

import torch

from fastvl_lab import peers
from fastvl_lab.cache.memory import Memory
from fastvl_lab.capture.graphs import GraphStore
from fastvl_lab.catalogue import ImageBackend
from fastvl_lab.checkpoint import Checkpoint
from fastvl_lab.errors import RecipeError
from fastvl_lab.pipeline import Outcome, Pipeline
from fastvl_lab.recipe import PRESETS, Recipe
from fastvl_lab.request import Request
from fastvl_lab.streaming.text import Deliver
from fastvl_lab.trace import Tracer


class BoundEngine(Protocol):
    """An engine over a checkpoint: a request in, text out through `deliver`."""

    def run(self, request: Request, tracer: Tracer, deliver: Deliver) -> Outcome: ...

    def logits_along(self, request: Request, tokens: torch.Tensor) -> torch.Tensor: ...


@dataclass(frozen=True, kw_only=True)
class Engine:
    """What can answer a request; engines of one name are equal.

    name: a text that `find` reads as this engine where no device is given. bind: makes it run over a checkpoint, within a lab's
    memory and CUDA graphs; raises `FastvlError`s. recipe: the lab's own recipe, None for a peer. remote: it computes behind an
    address, and shows neither pixels nor logits. held_against: the peer that a peer is checked by, itself where it is None.
    """

    name: str
    bind: Callable[[Checkpoint, Memory, GraphStore | None], BoundEngine] = field(compare=False, repr=False)
    recipe: Recipe | None = field(default=None, compare=False, repr=False)
    remote: bool = field(default=False, compare=False, repr=False)
    held_against: str | None = field(default=None, compare=False, repr=False)

    def __str__(self) -> str:
        return self.name

    @property
    def exact(self) -> bool:
        """Whether it promises its oracle's tokens."""
        return self.recipe is None or self.recipe.exact

    def oracle(self, image_backend: ImageBackend) -> str:
        """The name of the engine that it is held against; image_backend: that of Transformers here."""
        return self.recipe.oracle(image_backend) if self.recipe else self.held_against or self.name

    def within(self, image_backend: ImageBackend) -> int | None:
        """How many levels of 255 its pixels may be from the stock ones; None where it promises nothing of the kind."""
        return self.recipe.within(image_backend) if self.recipe else None

    def text(self, device: torch.device) -> str:
        """The shortest text that `find` reads as this engine on the device."""
        return self.recipe.text(device) if self.recipe else self.name


# Whatever `find` finds an engine by: itself, a recipe, or a text.
EngineLike = Engine | Recipe | str

# A function that reads the texts of a peer, and raises `RecipeError`.
Read = Callable[[str], Engine]


@dataclass(frozen=True, kw_only=True)
class _Peer:
    said: str
    read: Read


_PEERS: dict[str, _Peer] = {}


def engine(*words: str, said: str | None = None) -> Callable[[Read], Read]:
    """Register who reads the texts whose first word, or scheme such as "http://", is one of `words`.

    said: what errors call such a text, by default the word.
    """

    def register(read: Read) -> Read:
        _PEERS.update({word: _Peer(said=said or word, read=read) for word in words})
        return read

    return register


def find(given: EngineLike, device: torch.device | str | None = None) -> Engine:
    """The engine that is given as itself, as its recipe, or as a text, which is read for the device (`Recipe.parse`).

    Raises `RecipeError` naming the choices.
    """
    if isinstance(given, Engine):
        return given
    if isinstance(given, Recipe):
        return _of_recipe(given)
    word = _word(str(given))
    if word not in PRESETS and (peer := _peers().get(word)) is not None:
        return peer.read(given)
    try:
        return _of_recipe(Recipe.parse(given, device))
    except RecipeError as error:
        if word in PRESETS:
            raise
        names = sorted({peer.said for peer in _peers().values()}, key=len)
        raise RecipeError(f"{error}; or a peer: {', '.join(names)}") from None


def find_recipe(given: EngineLike, device: torch.device | str | None = None) -> Recipe:
    """As `find`, where nothing but a recipe will do."""
    if isinstance(given, str) and _word(given) not in _peers():
        return Recipe.parse(given, device)
    recipe = find(given, device).recipe
    if recipe is None:
        raise RecipeError(f"{str(given)!r} is a peer, which has no toggles; give a recipe")
    return recipe


def _of_recipe(recipe: Recipe) -> Engine:
    return Engine(name=str(recipe), bind=partial(_pipeline, recipe), recipe=recipe)


def _pipeline(recipe: Recipe, checkpoint: Checkpoint, memory: Memory, graphs: GraphStore | None) -> Pipeline:
    return Pipeline(checkpoint, recipe, memory, graphs)


def _word(text: str) -> str:
    head, scheme, _ = text.partition(",")[0].strip().partition("://")
    return head + scheme


@cache
def _peers() -> dict[str, _Peer]:
    """Who is registered, once every file of `peers/` has been imported."""
    for module in pkgutil.iter_modules(peers.__path__, f"{peers.__name__}."):
        importlib.import_module(module.name)
    return _PEERS
