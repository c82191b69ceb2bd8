"""Which rows of a packed forward belong to which sequence, and what of each sequence is in the cache already."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import TypeVar

import torch

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Segments:
    """The new tokens of one forward, known on the host.

    new: how many tokens of each sequence are in this forward, at least one. before: how many it had before.
    """

    new: tuple[int, ...]
    before: tuple[int, ...]

    @classmethod
    def of(cls, new: Sequence[int], before: Sequence[int]) -> Segments:
        assert len(new) == len(before)
        assert all(n > 0 for n in new)
        return cls(new=tuple(new), before=tuple(before))

    @property
    def starts(self) -> tuple[int, ...]:
        """The first row of each sequence, and the end of the last: `cu_seqlens`."""
        return (0, *accumulate(self.new))

    @property
    def lengths(self) -> tuple[int, ...]:
        """Tokens of each sequence once this forward has run."""
        return tuple(new + before for new, before in zip(self.new, self.before, strict=True))

    @property
    def last_rows(self) -> tuple[int, ...]:
        """The row of each sequence's last token."""
        return tuple(end - 1 for end in self.starts[1:])


def once_a_forward(build: Callable[[Segments, torch.device], T]) -> Callable[[Segments, torch.device], T]:
    """What `build` makes of a forward's segments, made in the first layer that asks and kept for the others."""
    kept: list[tuple[Segments, T]] = []

    def of(segments: Segments, device: torch.device) -> T:
        if not kept or kept[0][0] is not segments:
            kept[:] = [(segments, build(segments, device))]
        return kept[0][1]

    return of
