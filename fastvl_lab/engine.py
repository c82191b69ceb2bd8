"""What can answer a request, by name: recipes, and the peers that the files of `peer/` register.

A text's first word says who reads it: "baseline" and "fastest" begin a recipe, "transformers" or "http://" a peer. A peer's file
decorates the function that reads its texts with `@engine(word)`; it is imported when a text is first found to be no recipe.
"""

from __future__ import annotations

import html
import importlib
import pkgutil
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache, partial
from typing import Any, Protocol, runtime_checkable

import torch

from fastvl_lab import peer as files, shown
from fastvl_lab.cache.memory import Memory
from fastvl_lab.capture.graphs import GraphStore
from fastvl_lab.catalogue import ImageBackend
from fastvl_lab.checkpoint import Checkpoint
from fastvl_lab.errors import RecipeError
from fastvl_lab.grammars import Grammars
from fastvl_lab.pipeline import Outcome, Pipeline
from fastvl_lab.processes.server import Servers, Tell
from fastvl_lab.recipe import PRESETS, Recipe
from fastvl_lab.request import Request
from fastvl_lab.streaming.text import Deliver
from fastvl_lab.trace import Tracer


class BoundEngine(Protocol):
    """An engine over a checkpoint: a request in, text out through `deliver`."""

    def run(self, request: Request, tracer: Tracer, deliver: Deliver) -> Outcome: ...

    def logits_along(self, request: Request, tokens: torch.Tensor) -> torch.Tensor: ...


@runtime_checkable
class StartedEngine(BoundEngine, Protocol):
    """One whose server the lab has started: whether it still runs, and the ids of its processes."""

    @property
    def alive(self) -> bool: ...

    def processes(self) -> tuple[int, ...]: ...


@dataclass(frozen=True, kw_only=True)
class Place:
    """What a lab gives an engine to run over.

    graphs: None off CUDA. grammars: made before; None: an engine makes its own. servers: where those stay that the engine starts;
    None: it can start none. tell: given a line now and then while a server starts. stop: gives the start up.
    """

    checkpoint: Checkpoint
    memory: Memory
    graphs: GraphStore | None = None
    grammars: Grammars | None = None
    servers: Servers | None = None
    tell: Tell | None = None
    stop: threading.Event | None = None


@dataclass(frozen=True, kw_only=True)
class Engine:
    """What can answer a request; engines of one name are equal.

    name: a text that `find` reads as this engine where no device is given. bind: makes it run over what a lab has; raises
    `FastvlError`s. recipe: the lab's own recipe, None for a peer. remote: it computes behind an address, and shows neither pixels
    nor logits. started: the lab starts the server that is behind it, on this machine. held_against: the peer that a peer is checked
    by, itself where it is None.
    """

    name: str
    bind: Callable[[Place], BoundEngine] = field(compare=False, repr=False)
    recipe: Recipe | None = field(default=None, compare=False, repr=False)
    remote: bool = field(default=False, compare=False, repr=False)
    started: bool = field(default=False, compare=False, repr=False)
    held_against: str | None = field(default=None, compare=False, repr=False)

    def __str__(self) -> str:
        return self.name

    @property
    def elsewhere(self) -> bool:
        """Whether it computes on a machine, in a dtype and at times that the lab knows nothing of."""
        return self.remote and not self.started

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

    def text(self, device: torch.device, *, fastest: Recipe | None = None) -> str:
        """The shortest text that `find` reads as this engine on the device; fastest: as `Recipe.parse` has it."""
        return self.recipe.text(device, fastest=fastest) if self.recipe else self.name


# Whatever `find` finds an engine by: itself, a recipe, or a text.
EngineLike = Engine | Recipe | str

# A function that reads the texts of a peer, and raises `RecipeError`.
Read = Callable[[str], Engine]


@dataclass(frozen=True, kw_only=True)
class PeerOption:
    """An option of a peer's text: its values, of which the first is the default, or none for a whole number; what it does."""

    name: str
    values: tuple[str, ...]
    does: str

    def __str__(self) -> str:
        return f"{self.name}={'|'.join(self.values) or 'N'}: {self.does}"


@dataclass(frozen=True, kw_only=True)
class PeerInfo:
    """A peer as it is found here: the first word of its texts, and what keeps it from running, "" where nothing does."""

    word: str
    does: str
    missing: str = ""
    version: str | None = None
    options: tuple[PeerOption, ...] = ()


class Peers(tuple[PeerInfo, ...]):
    """The peers of this machine; shows itself as a table."""

    def __repr__(self) -> str:
        lines = []
        for peer in self:
            lines.append(f"{peer.word:<12} {peer.version or '':<12} {peer.missing or 'runs here'}")
            lines += [f"{'':<25} {option}" for option in peer.options]
        return "\n".join(lines)

    def frame(self) -> Any:
        """A row a peer, as a pandas DataFrame; raises `MissingExtraError` without pandas."""
        return shown.frame(self)

    def _repr_html_(self) -> str:
        cells = ((peer.word, peer.version or "", peer.missing or "runs here", "\n".join(map(str, peer.options))) for peer in self)
        rows = ("".join(f"<td>{html.escape(cell).replace(chr(10), '<br>')}</td>" for cell in row) for row in cells)
        return "<table>" + "".join(f"<tr style='text-align:left; vertical-align:top'>{row}</tr>" for row in rows) + "</table>"


@dataclass(frozen=True, kw_only=True)
class _Peer:
    said: str
    read: Read
    about: Callable[[], PeerInfo]


_PEERS: dict[str, _Peer] = {}


def engine(*words: str, said: str | None = None, about: Callable[[], PeerInfo] | None = None) -> Callable[[Read], Read]:
    """Register who reads the texts whose first word, or scheme such as "http://", is one of `words`.

    said: what errors call such a text, by default the word. about: what `peers` says of it, by default its function's first line.
    """

    def register(read: Read) -> Read:
        called = said or words[0]
        does = (read.__doc__ or "").strip().partition("\n")[0]
        peer = _Peer(said=called, read=read, about=about or (lambda: PeerInfo(word=called, does=does)))
        _PEERS.update(dict.fromkeys(words, peer))
        return read

    return register


def find(given: EngineLike, device: torch.device | str | None = None, *, fastest: Recipe | None = None) -> Engine:
    """The engine that is given as itself, as its recipe, or as a text, which is read for the device (`Recipe.parse`).

    fastest: what the text "fastest" means. Raises `RecipeError` naming the choices.
    """
    if isinstance(given, Engine):
        return given
    if isinstance(given, Recipe):
        return _of_recipe(given)
    word = _word(str(given))
    if word not in PRESETS and (peer := _peers().get(word)) is not None:
        return peer.read(given)
    try:
        return _of_recipe(Recipe.parse(given, device, fastest=fastest))
    except RecipeError as error:
        if word in PRESETS:
            raise
        names = sorted({peer.said for peer in _peers().values()}, key=lambda name: (len(name), name))
        raise RecipeError(f"{error}; or a peer: {', '.join(names)}") from None


def find_recipe(given: EngineLike, device: torch.device | str | None = None, *, fastest: Recipe | None = None) -> Recipe:
    """As `find`, where nothing but a recipe will do."""
    if isinstance(given, str) and _word(given) not in _peers():
        return Recipe.parse(given, device, fastest=fastest)
    recipe = find(given, device).recipe
    if recipe is None:
        raise RecipeError(f"{str(given)!r} is a peer, which has no toggles; give a recipe")
    return recipe


def peers() -> Peers:
    """Every peer by the word that its texts begin with: whether it can run here or what is missing, its version, its options.

    An engine that comes as a program is looked for on the PATH, or where its variable says, such as FASTVL_LAB_VLLM; it is not run.
    """
    about = {peer.said: peer for peer in _peers().values()}
    return Peers(peer.about() for peer in sorted(about.values(), key=lambda peer: (len(peer.said), peer.said)))


def _of_recipe(recipe: Recipe) -> Engine:
    return Engine(name=str(recipe), bind=partial(_pipeline, recipe), recipe=recipe)


def _pipeline(recipe: Recipe, place: Place) -> Pipeline:
    return Pipeline(place.checkpoint, recipe, place.memory, place.graphs, place.grammars)


def _word(text: str) -> str:
    head, scheme, _ = text.partition(",")[0].strip().partition("://")
    return head + scheme


@cache
def _peers() -> dict[str, _Peer]:
    """Who is registered, once every file of `peer/` has been imported."""
    for module in pkgutil.iter_modules(files.__path__, f"{files.__name__}."):
        importlib.import_module(module.name)
    return _PEERS
