"""Who is admitted next, and how many tokens of whose prompt a step computes: decisions over numbers, without a model.

Iteration-level scheduling is Orca's (OSDI 2022); pieces of prompts beside decode rows are Sarathi-Serve's (arXiv 2403.02310).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol, TypeVar

from fastvl_lab.catalogue import Schedule

Order = Literal["fifo", "shortest_first"]

# Tokens that a prompt counts less for each second that its request has waited, so that a long one has its turn.
_AGEING = 1_000


class Waits(Protocol):
    """A request that waits: the length of its prompt, and since when (seconds)."""

    @property
    def n_prompt(self) -> int: ...

    @property
    def since(self) -> float: ...


class Prefills(Protocol):
    """A request whose prompt is being computed, and how many tokens of it are left."""

    @property
    def n_left(self) -> int: ...


W = TypeVar("W", bound=Waits)
P = TypeVar("P", bound=Prefills)


@dataclass(frozen=True, kw_only=True)
class Policy:
    """The slot's toggles as a step reads them; budget: tokens of a step, None where prompts are computed whole."""

    max_batch: int
    budget: int | None
    order: Order

    @classmethod
    def of(cls, slot: Schedule) -> Policy:
        assert isinstance(slot.max_batch, int)
        assert isinstance(slot.budget, int)
        orders: dict[str, Order] = {"fifo": "fifo", "shortest_first": "shortest_first"}
        budget = {"whole": None, "chunked": slot.budget}[slot.prefill]
        return cls(max_batch=slot.max_batch, budget=budget, order=orders[slot.order])

    def next(self, waiting: Sequence[W], now: float) -> W:
        """Whom of those who wait to admit, in the order in which they came; now: seconds."""
        if self.order == "fifo":
            return waiting[0]
        return min(waiting, key=lambda one: one.n_prompt - _AGEING * (now - one.since))

    def left(self, n_decoding: int, n_taken: int) -> int | None:
        """Tokens of prompts that a step may still compute beside so many decode rows; None for any number.

        A step that is full of decode rows computes one: prompts go on, if slowly.
        """
        return None if self.budget is None else max(self.budget - n_decoding, 1) - n_taken


def pieces(prefilling: Sequence[P], left: int | None) -> list[tuple[P, int]]:
    """Which requests' prompts a step computes, and how many tokens of each: those admitted first, to their end if there is room."""
    found: list[tuple[P, int]] = []
    for one in prefilling:
        n = one.n_left if left is None else min(one.n_left, left)
        if n > 0:
            found.append((one, n))
            left = None if left is None else left - n
    return found
