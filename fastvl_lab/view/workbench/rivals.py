"""What a recipe can be held against: Transformers, the presets, and engines that are found here, with what keeps the others out."""

from __future__ import annotations

import threading
from collections.abc import Callable

from fastvl_lab.engine import EngineLike
from fastvl_lab.lab import Lab
from fastvl_lab.measure.recipes import STOCK
from fastvl_lab.recipe import PRESETS
from fastvl_lab.view.workbench.messages import Rival


def known_rivals() -> tuple[Rival, ...]:
    """Every bar to beat that has a name; any other engine is chosen by its text."""
    return (
        Rival(text=STOCK, about="Transformers on the same weights"),
        *(Rival(text=preset, about=f"the lab's preset {preset}") for preset in PRESETS),
    )


def must_start(rival: EngineLike) -> bool:
    """Whether a server must be started for it, which may take minutes."""
    return False


def start(lab: Lab, rival: EngineLike, tell: Callable[[str], object], stop: threading.Event) -> None:
    """Start its server, and wait until it is ready; runs beside what the lab computes. tell: given a line now and then.

    Raises `EndpointError` for one that does not start, and `RequestCancelledError` once `stop` is set.
    """
    raise AssertionError(f"{rival} needs no start")
