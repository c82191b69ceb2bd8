"""What compiled and captured stages take: frozen dataclasses of tensors, whose fields say what of them may vary.

A field without a role is known on the host and decides which program it is. Fields with one hold a tensor, a tuple of them, such a
dataclass, or None. torch.utils._pytree takes dataclasses apart too, in seven times the time, and a captured decode step
does it each time.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass, field, fields
from functools import cache
from typing import Any, NamedTuple, cast

import torch


@dataclass(frozen=True, kw_only=True)
class Role:
    """What holds of a field's tensors.

    dim: the dimension whose size varies from call to call. constant: never changed once made, so that the same tensor has the same
    content. implied: the sizes alone say what is in them.
    """

    dim: int | None = None
    constant: bool = False
    implied: bool = False


def tensors(*, dim: int | None = None, constant: bool = False, implied: bool = False) -> Any:
    """A field of tensors with that role."""
    return field(metadata={"role": Role(dim=dim, constant=constant, implied=implied)})


class Leaf(NamedTuple):
    """One tensor of some inputs: its fields' names, joined by dots; what the innermost says of it; and itself."""

    name: str
    role: Role
    tensor: torch.Tensor


class Node(NamedTuple):
    """A dataclass without its tensors: the value of each field, or what is left of it."""

    kind: type
    parts: tuple[Hashable, ...]


@cache
def _roles(kind: Hashable) -> tuple[tuple[str, Role | None], ...]:
    return tuple((each.name, each.metadata.get("role")) for each in fields(kind))  # type: ignore[arg-type]


def leaves(inputs: Any, name: str = "", role: Role | None = None) -> Iterator[Leaf]:
    """All tensors, in order."""
    if isinstance(inputs, torch.Tensor):
        assert role is not None
        yield Leaf(name, role, inputs)
    elif isinstance(inputs, tuple):
        for number, part in enumerate(inputs):
            yield from leaves(part, f"{name}.{number}", role)
    elif inputs is not None:
        for part, own in _roles(cast(Hashable, type(inputs))):
            if own is not None:
                yield from leaves(getattr(inputs, part), f"{name}.{part}" if name else part, own)


def flatten(inputs: Any) -> tuple[list[torch.Tensor], Hashable]:
    """The tensors in the order of `leaves`, and all that is not in them, by which programs can be told apart."""
    found: list[torch.Tensor] = []
    return found, _without_tensors(inputs, found)


def _without_tensors(inputs: Any, found: list[torch.Tensor]) -> Hashable:
    if isinstance(inputs, torch.Tensor):
        found.append(inputs)
        return torch.Tensor
    if inputs is None:
        return None
    if isinstance(inputs, tuple):
        return tuple([_without_tensors(part, found) for part in inputs])
    kind: Any = type(inputs)
    parts = [
        getattr(inputs, name) if role is None else _without_tensors(getattr(inputs, name), found) for name, role in _roles(kind)
    ]
    return Node(kind, tuple(parts))


def unflatten(found: Sequence[torch.Tensor], rest: Hashable) -> Any:
    """What `flatten` took apart, with these tensors in it."""
    return _with_tensors(iter(found), rest)


def _with_tensors(found: Iterator[torch.Tensor], rest: Any) -> Any:
    if rest is torch.Tensor:
        return next(found)
    if isinstance(rest, Node):
        named = zip(_roles(rest.kind), rest.parts, strict=True)
        return rest.kind(**{name: part if role is None else _with_tensors(found, part) for (name, role), part in named})
    return None if rest is None else tuple([_with_tensors(found, part) for part in rest])


def shape_of(inputs: Any) -> str:
    """The sizes of the tensors in words: "patches 192x588, hidden 64x64"."""
    return ", ".join(f"{leaf.name} {'x'.join(map(str, leaf.tensor.shape))}" for leaf in leaves(inputs))
