"""torch.compile of a stage as a whole, for any size of its inputs; what was compiled is counted, and never a part left out."""

from __future__ import annotations

import time
import types
import uuid
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, cast

import torch

from fastvl_lab.capture.compile_cache import may_be_damaged, without_cache
from fastvl_lab.capture.execute import Capture, Program
from fastvl_lab.errors import CaptureError, sentence
from fastvl_lab.inputs import leaves, shape_of
from fastvl_lab.trace import Tracer


class Compiled:
    """One stage's program by torch.compile, with dynamic shapes: a new size is no reason to compile again.

    torch compiles again nevertheless what it must take for another program, as where a size is 1 or an input is absent; the tracer
    counts it, and the run is a cold one. Raises `CaptureError` where nothing can be compiled.
    """

    def __init__(self, stage: str, program: Program) -> None:
        self._stage = stage
        self._plain: Program | None = program  # until it has run once
        self._captures: list[Capture] = []
        self._uses: list[int] = []  # of each of them
        self.fresh: list[Capture] = []
        # Of the call that is under way, for `_compile`.
        self._tracer, self._started = Tracer(torch.device("cpu"), "off"), 0.0
        self._inputs: Any = None
        # torch counts recompiles by code object, giving up at 8, and takes by name what varied in one for varying in all: each
        # recipe's stage has a code object, and a name, of its own.
        own = types.FunctionType(
            program.__code__.replace(co_name=f"{stage}_{uuid.uuid4().hex}"),
            program.__globals__,
            program.__name__,
            program.__defaults__,
            program.__closure__,
        )
        self._program = torch.compile(own, backend=self._compile, fullgraph=True)

    @property
    def captures(self) -> tuple[Capture, ...]:
        return tuple(replace(capture, uses=uses) for capture, uses in zip(self._captures, self._uses, strict=True))

    def __call__(self, inputs: Any, tracer: Tracer) -> tuple[torch.Tensor, ...]:
        self._tracer, self._started, self._inputs = tracer, time.perf_counter(), inputs
        if self._plain is not None:  # kernels measure their launch settings where they are called as they are
            self._plain(inputs)
            self._plain = None
        for leaf in leaves(inputs):
            if leaf.role.dim is not None:
                torch._dynamo.maybe_mark_dynamic(leaf.tensor, leaf.role.dim)
        try:
            out: tuple[torch.Tensor, ...] = self._program(inputs)
        except torch._dynamo.exc.TorchDynamoException as error:
            raise CaptureError(
                f"capture.{self._stage}=compile: torch.compile cannot compile this stage here ({sentence(error)}); "
                f"choose 'eager', or other options inside the stage"
            ) from error
        return out

    def _compile(self, graph: torch.fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        """Called by torch for every program that it has not got yet, while a call waits for it."""
        from torch._inductor.compile_fx import compile_fx  # seconds to import

        def compiled() -> Callable[..., Any]:
            return cast(Callable[..., Any], compile_fx(graph, list(inputs)))

        with self._tracer.span(f"{self._stage}.compile"):
            try:
                program = compiled()
            except Exception:
                if not may_be_damaged():
                    raise
                program = without_cache(compiled)
        seconds, number = time.perf_counter() - self._started, len(self._captures)
        capture = Capture(stage=self._stage, how="compile", shape=shape_of(self._inputs), seconds=seconds, n_bytes=0)
        self._captures.append(capture)
        self._uses.append(0)
        self.fresh.append(capture)
        self._tracer.count(f"{self._stage}: compilations")

        def counted(*inputs: Any) -> Any:
            self._uses[number] += 1
            return program(*inputs)

        return counted
