"""What a recipe can be held against: Transformers, the presets, and engines that are found here, with what keeps the others out."""

from __future__ import annotations

import threading
from collections.abc import Callable

from fastvl_lab.engine import EngineLike, find, peers
from fastvl_lab.lab import Lab
from fastvl_lab.measure.recipes import STOCK
from fastvl_lab.recipe import PRESETS
from fastvl_lab.view.workbench.messages import Rival


def known_rivals() -> tuple[Rival, ...]:
    """Every bar to beat that has a name; any other engine is chosen by its text, such as an address."""
    named = [peer for peer in peers() if peer.word != STOCK and peer.word.isidentifier()]  # not addresses
    return (
        Rival(text=STOCK, about="Transformers on the same weights"),
        *(Rival(text=preset, about=f"the lab's preset {preset}") for preset in PRESETS),
        *(Rival(text=peer.word, about=f"{peer.does} {peer.version or ''}".rstrip(), unmet=peer.missing or None) for peer in named),
    )


def must_start(rival: EngineLike) -> bool:
    """Whether a server must be started for it, which may take minutes."""
    return find(rival).started


def start(lab: Lab, rival: EngineLike, tell: Callable[[str], object], stop: threading.Event) -> None:
    """Start its server, which the lab keeps, and wait until it is ready, beside what the lab computes. tell: given lines.

    Raises `EndpointError` for one that does not start, and `RequestCancelledError` once `stop` is set.
    """
    lab.start(rival, tell=tell, stop=stop)
