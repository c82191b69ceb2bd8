"""A few of many combinations, in which every two choices that go together still meet: most faults are of one choice, or of two."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from itertools import combinations
from typing import TypeVar

Row = TypeVar("Row", bound=Mapping[str, Hashable])


def covering(rows: Sequence[Row]) -> list[Row]:
    """Of rows, each a value by name, so many that every two values of a row are in one of them; found greedily, always the same."""
    pairs = [set(combinations(row.items(), 2)) for row in rows]
    left, chosen = set().union(*pairs), []
    while left:
        best = max(range(len(rows)), key=lambda number: len(pairs[number] & left))
        chosen.append(rows[best])
        left -= pairs[best]
    return chosen
