"""Stages recorded once and replayed: static buffers, a graph for each size of them, and what all of it costs.

Which graph is used, what is copied into its buffers, and what there is no room for is decided here, in plain code. What records and
replays is a `Recorder`: CUDA's is in `cuda_graphs.py`; tests have one that runs on a CPU.
"""

from __future__ import annotations

import time
import weakref
from collections import OrderedDict
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple, Protocol

import torch

from fastvl_lab.capture.execute import Capture, Program
from fastvl_lab.inputs import Role, flatten, leaves, shape_of, unflatten
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

    def record(self, program: Callable[[], tuple[torch.Tensor, ...]], room: int) -> Recording | None:
        """The program recorded; or None, and the pool as it was, where that would make it hold more than `room` bytes."""

    def forget(self) -> None:
        """Give the pool's memory back; nothing that was recorded may be replayed any more."""


@dataclass(kw_only=True, eq=False)
class _Graph:
    """One recording, its input buffers, which constant tensors were copied into them last, and how often it was replayed."""

    capture: Capture
    buffers: list[torch.Tensor]
    roles: list[Role]
    recording: Recording
    sources: dict[int, weakref.ref[torch.Tensor]] = field(default_factory=dict)
    uses: int = 0

    def fill(self, tensors: list[torch.Tensor]) -> None:
        """Copy the inputs, but for those that the buffers hold already."""
        for number, (tensor, role) in enumerate(zip(tensors, self.roles, strict=True)):
            source = self.sources.get(number)
            if role.implied or (source is not None and source() is tensor):
                continue
            self.buffers[number].copy_(tensor)
            if role.constant:
                self.sources[number] = weakref.ref(tensor)


class Key(NamedTuple):
    """What makes a graph the right one: whose it is, what its program depends on, and the sizes of its inputs."""

    owner: object
    rest: Hashable
    sizes: Hashable


class GraphStore:
    """All graphs of a lab within a budget of memory and number.

    What there is no memory for is not recorded, and throws no other out: memory that a graph leaves in the pool is used again by
    the next, but is not given back one by one. Of more than `max_graphs` the one unused for longest goes.
    """

    def __init__(self, recorder: Recorder, *, max_bytes: int, max_graphs: int) -> None:
        self._recorder, self.max_bytes, self.max_graphs = recorder, max_bytes, max_graphs
        self._graphs: OrderedDict[Key, _Graph] = OrderedDict()
        self._refused: OrderedDict[Key, None] = OrderedDict()  # and not asked for again until something goes

    def __len__(self) -> int:
        return len(self._graphs)

    @property
    def n_bytes(self) -> int:
        """What the pool takes, and the input buffers, which are outside of it."""
        return self._recorder.n_bytes + self._buffer_bytes

    @property
    def _buffer_bytes(self) -> int:
        return sum(_n_bytes(graph.buffers) for graph in self._graphs.values())

    def captures(self, owner: object) -> tuple[Capture, ...]:
        """The graphs of one owner, the one unused for longest first; from any thread."""
        # A list of keys is made in one step of Python's, between two of which another thread may use or lose a graph.
        found = [self._graphs.get(key) for key in [*self._graphs] if key.owner is owner]
        return tuple(replace(graph.capture, uses=graph.uses) for graph in found if graph is not None)

    def find(self, key: Key) -> _Graph | None:
        """The graph of that key, which is now the one used last; or None."""
        graph = self._graphs.get(key)
        if graph is not None:
            self._graphs.move_to_end(key)
        return graph

    def has_refused(self, key: Key) -> bool:
        """Whether there was no room for a graph of that key, and nothing has gone since."""
        return key in self._refused

    def record(self, key: Key, stage: str, program: Program, inputs: Any) -> _Graph | None:
        """Record the program on buffers of these inputs' sizes; None where the budget has no room for it.

        What it writes elsewhere it writes while it is recorded, too.
        """
        started, before = time.perf_counter(), self.n_bytes
        given = list(leaves(inputs))
        buffers = [leaf.tensor.clone() for leaf in given]
        room = self.max_bytes - self._buffer_bytes - _n_bytes(buffers)
        recording = self._recorder.record(lambda: program(unflatten(buffers, key.rest)), room)
        if recording is None:
            self._refused[key] = None
            if len(self._refused) > self.max_graphs:
                self._refused.popitem(last=False)
            return None
        n_bytes, seconds = self.n_bytes + _n_bytes(buffers) - before, time.perf_counter() - started
        capture = Capture(stage=stage, how="graph", shape=shape_of(inputs), seconds=seconds, n_bytes=n_bytes)
        graph = self._graphs[key] = _Graph(
            capture=capture, buffers=buffers, roles=[leaf.role for leaf in given], recording=recording
        )
        while len(self._graphs) > self.max_graphs:
            self._graphs.popitem(last=False)
            self._refused.clear()
        return graph

    def drop(self, owner: object) -> None:
        """Give up the graphs of an owner that is gone."""
        for key in [key for key in self._graphs if key.owner is owner]:
            del self._graphs[key]
        self._refused.clear()

    def forget(self) -> None:
        """Give all graphs up."""
        self._graphs.clear()
        self._refused.clear()
        self._recorder.forget()


def _n_bytes(buffers: list[torch.Tensor]) -> int:
    return sum(tensor.nbytes for tensor in buffers)


class Graphs:
    """One stage's program, recorded once for each size of its inputs, and replayed.

    What the fields of its inputs say spares copies (`inputs.Role`). What is returned is a copy, since the graph's own outputs are
    overwritten by its next replay; but for the first `lent` outputs, which are those themselves.
    """

    def __init__(self, stage: str, program: Program, store: GraphStore, *, lent: int = 0) -> None:
        self._stage, self._program, self._store, self._lent = stage, program, store, lent
        self._owner = owner = object()  # in place of this one, which holds the store: graphs go at once with who can use them
        weakref.finalize(self, store.drop, owner).atexit = False
        self.fresh: list[Capture] = []

    @property
    def captures(self) -> tuple[Capture, ...]:
        return self._store.captures(self._owner)

    @property
    def most(self) -> int:
        """How many graphs may be kept, of all stages together."""
        return self._store.max_graphs

    def __call__(self, inputs: Any, tracer: Tracer) -> tuple[torch.Tensor, ...]:
        tensors, rest = flatten(inputs)
        key = Key(owner=self._owner, rest=rest, sizes=tuple([(tensor.shape, tensor.dtype) for tensor in tensors]))
        graph = self._store.find(key) or self._recorded(key, inputs, tracer)
        if graph is None:
            tracer.count(f"{self._stage}: over graph_budget, run eager")
            return self._program(inputs)
        graph.fill(tensors)
        graph.recording.replay()
        graph.uses += 1
        outputs = graph.recording.outputs
        return (*outputs[: self._lent], *(output.clone() for output in outputs[self._lent :]))

    def _recorded(self, key: Key, inputs: Any, tracer: Tracer) -> _Graph | None:
        """A new graph, which the run is cold for; or None where there is no room for it."""
        if self._store.has_refused(key):
            return None
        with tracer.span(f"{self._stage}.capture"):
            graph = self._store.record(key, self._stage, self._program, inputs)
        if graph is not None:
            self.fresh.append(graph.capture)
            tracer.count(f"{self._stage}: graphs captured")
        return graph
