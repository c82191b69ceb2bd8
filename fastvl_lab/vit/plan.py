"""Everything the lean tower computes from grids alone, made once a request or kept between requests."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass

import torch

from fastvl_lab.inputs import leaves, tensors
from fastvl_lab.request import Grid
from fastvl_lab.vit.attention import Prepared

MAX_ENTRIES = 64
MAX_BYTES = 128 * 2**20


@dataclass(frozen=True, kw_only=True, eq=False)
class Plan:
    """What one forward needs to know of its grids, on the tower's device.

    order: int64 [n_patches], the patches in the tower's order, and rank: int64 [n_visual], where visual tokens have gone; both None
    where nothing moves. cos, sin: float32 [n_patches, head_dim / 2] in that order. learned: [n_patches, hidden], the positions to
    add, or None. windows, frames: what the attention made of the segments, for windowed and full blocks.
    """

    order: torch.Tensor | None = tensors(dim=0, constant=True)
    rank: torch.Tensor | None = tensors(dim=0, constant=True)
    cos: torch.Tensor = tensors(dim=0, constant=True)
    sin: torch.Tensor = tensors(dim=0, constant=True)
    learned: torch.Tensor | None = tensors(dim=0, constant=True)
    windows: Prepared = tensors()
    frames: Prepared = tensors()

    @property
    def n_bytes(self) -> int:
        return sum(leaf.tensor.nbytes for leaf in leaves(self))


# The grids of a request, and how many patches the plan is for (`lean.build_plan`).
Build = Callable[[Sequence[Grid], int | None], Plan]
Planner = Callable[[Sequence[Grid], int | None], tuple[Plan, bool]]


def recomputed(build: Build) -> Planner:
    """A new plan for every request."""
    return lambda grids, n_patches: (build(grids, n_patches), False)


class PlanCache:
    """The latest plans by the grids of a request, bounded in number and bytes; the one unused for longest goes first.

    A request's images are known together, in their order. One thread at a time, as a `Lab` runs them.
    """

    def __init__(self, build: Build, *, max_entries: int = MAX_ENTRIES, max_bytes: int = MAX_BYTES) -> None:
        self._build, self._max_entries, self._max_bytes = build, max_entries, max_bytes
        self._plans: OrderedDict[Hashable, Plan] = OrderedDict()
        self._bytes = 0

    def __call__(self, grids: Sequence[Grid], n_patches: int | None = None) -> tuple[Plan, bool]:
        """The plan, and whether it was there already."""
        key = (n_patches, *grids)
        if key in self._plans:
            self._plans.move_to_end(key)
            return self._plans[key], True
        plan = self._build(grids, n_patches)
        if plan.n_bytes > self._max_bytes:  # it would push out all others, and then itself
            return plan, False
        self._plans[key] = plan
        self._bytes += plan.n_bytes
        while len(self._plans) > self._max_entries or self._bytes > self._max_bytes:
            _, oldest = self._plans.popitem(last=False)
            self._bytes -= oldest.n_bytes
        return plan, False
