"""Which rows of a packed forward belong to which sequence, and what of each sequence is in the cache already."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Protocol

import torch


class Growing(Protocol):
    """What a cache keeps of a sequence; length: its tokens."""

    length: int


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

    @classmethod
    def before_any(cls, sequences: Sequence[Growing]) -> Segments:
        """Those of no forward yet."""
        return cls(new=(0,) * len(sequences), before=tuple(sequence.length for sequence in sequences))

    @classmethod
    def extending(cls, sequences: Sequence[Growing], new: Sequence[int]) -> Segments:
        """The sequences have so many tokens more."""
        segments = cls.of(new, [sequence.length for sequence in sequences])
        for sequence, n in zip(sequences, new, strict=True):
            sequence.length += n
        return segments

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

    def last(self, x: torch.Tensor) -> torch.Tensor:
        """The rows of x [n, ...] that are the sequences' last tokens, by slices: their numbers are known on the host."""
        rows = self.last_rows
        if len(rows) == len(x):
            return x
        return x[rows[0] : rows[0] + 1] if len(rows) == 1 else torch.stack([x[row] for row in rows])
