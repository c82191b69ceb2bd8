"""Stages recorded once and replayed: named static buffers, a graph for each size of them, and what all of it costs.

Which graph is used, what is copied into its buffers, and which graph goes when the room is needed is decided here, in plain code.
What records and replays is a `Recorder`: CUDA's is in `cuda_graphs.py`; tests have one that runs on a CPU.
"""

from __future__ import annotations

import time
import weakref
from collections import OrderedDict
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple, Protocol

import torch

from fastvl_lab.capture.execute import Capture, Program, Tensors, shape_of
from fastvl_lab.errors import CaptureError
from fastvl_lab.trace import Tracer


class Recording(NamedTuple):
    """A program recorded on its buffers: `replay` runs it, and leaves its results in `outputs`, the same tensors each time."""

    replay: Callable[[], None]
    outputs: tuple[torch.Tensor, ...]


class Recorder(Protocol):
    """Records programs of one device; all recordings share one pool of memory, since they run one after another."""

    @property
    def n_bytes(self) -> int:
        """Device memory that the pool holds."""

    def record(self, program: Callable[[], tuple[torch.Tensor, ...]]) -> Recording: ...

    def forget(self) -> None:
        """Give the pool's memory back; nothing that was recorded may be replayed any more."""


@dataclass(kw_only=True, eq=False)
class _Graph:
    """One recording, its input buffers, which constant tensors were copied into them last, and how often it was replayed."""

    capture: Capture
    buffers: dict[str, torch.Tensor]
    recording: Recording
    sources: dict[str, weakref.ref[torch.Tensor]] = field(default_factory=dict)
    uses: int = 0


class Key(NamedTuple):
    """What makes a graph the right one: whose it is, what its program depends on, and the sizes of its inputs."""

    owner: object
    rest: Hashable
    sizes: Hashable


class GraphStore:
    """All graphs of a lab within a budget of memory and number; the one unused for longest goes first.

    Memory that a graph leaves in the pool is used again by the next, but is not given back one by one: when the pool as a whole is
    over `max_bytes`, all graphs go with it, and those that are needed are recorded anew. Raises `CaptureError` where a single graph
    is over the budget.
    """

    def __init__(self, recorder: Recorder, *, max_bytes: int, max_graphs: int) -> None:
        self._recorder, self.max_bytes, self.max_graphs = recorder, max_bytes, max_graphs
        self._graphs: OrderedDict[Key, _Graph] = OrderedDict()

    def __len__(self) -> int:
        return len(self._graphs)

    @property
    def n_bytes(self) -> int:
        """What the pool takes, and the input buffers, which are outside of it."""
        return self._recorder.n_bytes + sum(_n_bytes(graph.buffers) for graph in self._graphs.values())

    def captures(self, owner: object) -> tuple[Capture, ...]:
        """The graphs of one owner, the one unused for longest first."""
        return tuple(replace(graph.capture, uses=graph.uses) for key, graph in self._graphs.items() if key.owner is owner)

    def find(self, key: Key) -> _Graph | None:
        """The graph of that key, which is now the one used last; or None."""
        graph = self._graphs.get(key)
        if graph is not None:
            self._graphs.move_to_end(key)
        return graph

    def record(self, key: Key, stage: str, program: Program, tensors: Tensors, rest: Any) -> _Graph:
        """Record the program on buffers of these tensors' sizes; what it writes elsewhere it writes while it is recorded, too."""
        started, shape = time.perf_counter(), shape_of(tensors)
        while len(self._graphs) >= self.max_graphs:
            self._graphs.popitem(last=False)
        before = self.n_bytes
        buffers, recording = self._recorded(program, tensors, rest)
        if self.n_bytes + _n_bytes(buffers) > self.max_bytes and self._graphs:
            del buffers, recording  # which would keep memory of the pool that goes
            self.forget()
            before = self.n_bytes
            buffers, recording = self._recorded(program, tensors, rest)
        n_bytes = self.n_bytes + _n_bytes(buffers) - before
        if self.n_bytes + _n_bytes(buffers) > self.max_bytes:
            self.forget()
            raise CaptureError(
                f"one graph of {stage} ({shape}) takes {n_bytes} bytes, and graph_budget is {self.max_bytes}; set a larger "
                f"graph_budget, or choose another way to execute {stage}"
            )
        seconds = time.perf_counter() - started
        capture = Capture(stage=stage, how="graph", shape=shape, seconds=seconds, n_bytes=n_bytes)
        graph = self._graphs[key] = _Graph(capture=capture, buffers=buffers, recording=recording)
        return graph

    def _recorded(self, program: Program, tensors: Tensors, rest: Any) -> tuple[dict[str, torch.Tensor], Recording]:
        buffers = {name: tensor.clone() for name, tensor in tensors.items()}
        return buffers, self._recorder.record(lambda: program(buffers, rest))

    def forget(self) -> None:
        """Give all graphs up."""
        self._graphs.clear()
        self._recorder.forget()


def _n_bytes(buffers: Tensors) -> int:
    return sum(tensor.nbytes for tensor in buffers.values())


class Graphs:
    """One stage's program, recorded once for each size of its inputs, and replayed.

    constant: the names of inputs whose tensors never change once they are made, so that the same tensor is not copied again. What
    is returned is a copy: the graph's own outputs are overwritten by its next replay.
    """

    def __init__(self, stage: str, program: Program, store: GraphStore, constant: Callable[[str], bool]) -> None:
        self._stage, self._program, self._store, self._constant = stage, program, store, constant
        self._owner = object()  # in place of this one, which holds the store: graphs go at once with the last who can use them
        self.fresh: list[Capture] = []

    @property
    def captures(self) -> tuple[Capture, ...]:
        return self._store.captures(self._owner)

    def __call__(self, tensors: Tensors, rest: Hashable, tracer: Tracer) -> tuple[torch.Tensor, ...]:
        sizes = tuple((name, tensor.shape, tensor.dtype) for name, tensor in tensors.items())
        key = Key(owner=self._owner, rest=rest, sizes=sizes)
        graph = self._store.find(key)
        if graph is None:
            with tracer.span(f"{self._stage}.capture"):
                graph = self._store.record(key, self._stage, self._program, tensors, rest)
            self.fresh.append(graph.capture)
            tracer.count(f"{self._stage}: graphs captured")
        for name, tensor in tensors.items():
            if name not in graph.sources or graph.sources[name]() is not tensor:
                graph.buffers[name].copy_(tensor)
                if self._constant(name):
                    graph.sources[name] = weakref.ref(tensor)
        graph.recording.replay()
        graph.uses += 1
        return tuple(output.clone() for output in graph.recording.outputs)
