"""Ways to run a stage's program: as it is, or what somebody else made of it once."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from fastvl_lab.trace import Tracer

# (a dataclass as `fastvl_lab.inputs` knows them, and what times layers: by default nothing) -> tensors. On the same inputs it does
# the same, however often it is called.
Program = Callable[..., tuple[torch.Tensor, ...]]


@dataclass(frozen=True, kw_only=True)
class Capture:
    """One program made for a stage, and what it cost.

    stage: "vit", "prefill", "decode" or "first_token". how: "compile" or "graph". shape: the sizes of its inputs, in words.
    seconds: from the decision to make it until it could be used. n_bytes: of the device, held as long as it is kept; 0 for compiled
    code. uses: how often it had run when this was said.
    """

    stage: str
    how: str
    shape: str
    seconds: float
    n_bytes: int
    uses: int = 0


class Execute(Protocol):
    """Runs one stage's program; `captures` are those that it has made and not given up, `fresh` those not yet reported."""

    fresh: list[Capture]

    @property
    def captures(self) -> tuple[Capture, ...]: ...

    def __call__(self, inputs: Any, tracer: Tracer) -> tuple[torch.Tensor, ...]: ...


class Eager:
    """The program itself."""

    def __init__(self, stage: str, program: Program) -> None:
        self._program = program
        self.fresh: list[Capture] = []

    @property
    def captures(self) -> tuple[Capture, ...]:
        return ()

    def __call__(self, inputs: Any, tracer: Tracer) -> tuple[torch.Tensor, ...]:
        return self._program(inputs, tracer.inner)
