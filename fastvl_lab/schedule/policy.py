"""Who is admitted next, and how many tokens of whose prompt a step computes: decisions over numbers, without a model.

Iteration-level scheduling is Orca's (OSDI 2022); pieces of prompts beside decode rows are Sarathi-Serve's (arXiv 2403.02310). Who
gives way and is computed again, and when, is as in vLLM V1 (vllm/v1/core/sched/scheduler.py): last admitted, first to give way.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol, TypeVar

from fastvl_lab.catalogue import Schedule

Order = Literal["fifo", "shortest_first"]

# Tokens that a prompt counts less for each second that its request has waited, so that a long one has its turn.
_AGEING = 1_000


class Admitted(Protocol):
    """A request that was admitted at some time, as the how manieth; None if it never was."""

    @property
    def number_admitted(self) -> int | None: ...


class Waits(Admitted, Protocol):
    """A request that waits: the length of its prompt, and since when (seconds)."""

    @property
    def n_prompt(self) -> int: ...

    @property
    def since(self) -> float: ...


class Prefills(Protocol):
    """A request that is being computed up to its first token, and how many tokens are left, of its images or then of its prompt."""

    @property
    def n_left(self) -> int: ...


A = TypeVar("A", bound=Admitted)
W = TypeVar("W", bound=Waits)
P = TypeVar("P", bound=Prefills)


@dataclass(frozen=True, kw_only=True)
class Policy:
    """The slot's toggles as a step reads them.

    budget: tokens of a step, None where prompts are computed whole. packs_images: whether images of requests that are admitted in
    one step go through the vision tower in one call. stops_in_tower: whether the tower's blocks count against the budget, so that a
    step may end between two of them.
    """

    max_batch: int
    budget: int | None
    order: Order
    packs_images: bool = False
    stops_in_tower: bool = False

    @classmethod
    def of(cls, slot: Schedule) -> Policy:
        assert isinstance(slot.max_batch, int)
        assert isinstance(slot.budget, int)
        orders: dict[str, Order] = {"fifo": "fifo", "shortest_first": "shortest_first"}
        budget = {"whole": None, "chunked": slot.budget}[slot.prefill]
        packs_images = {"inline": False, "ahead": False, "batched": True}[slot.vision]
        return cls(
            max_batch=slot.max_batch,
            budget=budget,
            order=orders[slot.order],
            packs_images=packs_images,
            stops_in_tower={"whole": False, "by_blocks": True}[slot.tower],
        )

    def next(self, waiting: Sequence[W], now: float) -> W:
        """Whom of those who wait, in the order in which they came, to admit; now: seconds. Who gave way is before all others."""
        gave_way = [one for one in waiting if one.number_admitted is not None]
        if gave_way:
            return min(gave_way, key=_age)
        if self.order == "fifo":
            return waiting[0]
        return min(waiting, key=lambda one: one.n_prompt - _AGEING * (now - one.since))

    def left(self, n_decoding: int, n_taken: int) -> int | None:
        """Tokens of prompts that a step may still compute beside so many decode rows; None for any number.

        A step that is full of decode rows computes one: prompts go on, if slowly.
        """
        return None if self.budget is None else max(self.budget - n_decoding, 1) - n_taken


def gives_way(under_way: Sequence[A]) -> A:
    """Who is to be computed again later, where blocks run out: whoever was admitted last. So the first always comes to its end."""
    return max(under_way, key=_age)


def _age(one: Admitted) -> int:
    assert one.number_admitted is not None, "it was never admitted"
    return one.number_admitted


def pieces(prefilling: Sequence[P], left: int | None) -> list[tuple[P, int]]:
    """Which requests a step computes, and how many tokens of each: those admitted first, to their end if there is room."""
    found: list[tuple[P, int]] = []
    for one in prefilling:
        n = one.n_left if left is None else min(one.n_left, left)
        if n > 0:
            found.append((one, n))
            left = None if left is None else left - n
    return found
