"""Slot 5: how a stage is executed."""

from __future__ import annotations

from collections.abc import Callable
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")


def bind(option: str, stage: Callable[P, T]) -> Callable[P, T]:
    """The stage's function, executed as the option says: "eager" is the function itself."""
    return {"eager": stage}[option]
