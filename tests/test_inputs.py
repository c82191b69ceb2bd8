"""Inputs of stages: taken apart and put together again, and told apart by all that is no tensor."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from fastvl_lab.inputs import Role, flatten, leaves, shape_of, tensors, unflatten


@dataclass(frozen=True, kw_only=True, eq=False)
class Inner:
    table: torch.Tensor | None = tensors(constant=True)
    fixed: tuple[int, ...]


@dataclass(frozen=True, kw_only=True, eq=False)
class Outer:
    rows: torch.Tensor = tensors(dim=0)
    inner: Inner = tensors()
    levels: tuple[torch.Tensor, ...] = tensors(dim=1)
    absent: Inner | None = tensors()


def _outer(n: int = 2, table: torch.Tensor | None = None, fixed: tuple[int, ...] = (1, 2), n_levels: int = 2) -> Outer:
    levels = tuple(torch.full((3, n), float(level)) for level in range(n_levels))
    return Outer(rows=torch.ones(n, 4), inner=Inner(table=table, fixed=fixed), levels=levels, absent=None)


def test_tensors_are_named_by_their_fields_and_have_the_innermost_role() -> None:
    outer = _outer(table=torch.zeros(5))
    found = {leaf.name: leaf.role for leaf in leaves(outer)}
    level = Role(dim=1)
    assert found == {"rows": Role(dim=0), "inner.table": Role(constant=True), "levels.0": level, "levels.1": level}
    assert shape_of(outer) == "rows 2x4, inner.table 5, levels.0 3x2, levels.1 3x2"


def test_inputs_are_put_together_with_other_tensors_as_they_were() -> None:
    outer = _outer(table=torch.zeros(5))
    found, rest = flatten(outer)
    assert [id(tensor) for tensor in found] == [id(leaf.tensor) for leaf in leaves(outer)]
    copies = [tensor.clone() for tensor in found]
    again = unflatten(copies, rest)
    assert isinstance(again, Outer)
    assert again.absent is None
    assert again.inner.fixed == (1, 2)
    assert [id(leaf.tensor) for leaf in leaves(again)] == [id(copy) for copy in copies]
    assert flatten(again)[1] == rest


def test_what_is_no_tensor_tells_programs_apart_and_what_is_in_one_does_not() -> None:
    table = torch.zeros(5)
    same = [_outer(), _outer(n=7), replace(_outer(), rows=torch.zeros(1, 1))]
    others = [_outer(table=table), _outer(fixed=(1, 3)), _outer(n_levels=1), replace(_outer(), absent=Inner(table=None, fixed=()))]
    assert len({flatten(outer)[1] for outer in same}) == 1
    assert len({flatten(outer)[1] for outer in [*same, *others]}) == 1 + len(others)
