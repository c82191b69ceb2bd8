"""CUDA graphs: the recorder of `graphs.py` on a GPU."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from fastvl_lab.capture.graphs import Recording

# What a capture may take beside an eighth more than its program needs: cuBLAS's workspace, which on Hopper is 32 MiB, and what is
# left of the allocator's segments, of which the large ones are 20 MiB.
_BESIDE = 64 * 2**20


class CudaRecorder:
    """Records on a CUDA device, on one stream and into one memory pool: torch gives memory again only on the stream it was of."""

    def __init__(self, device: torch.device) -> None:
        self._device, self._aside = device, torch.cuda.Stream(device)
        self._pools: list[Any] = []  # the one to record into last; before it, those that graphs may still be in
        self._alive: weakref.WeakSet[torch.cuda.CUDAGraph] = weakref.WeakSet()  # of that pool
        self._n_bytes = 0

    def forget(self) -> None:
        torch.cuda.synchronize(self._device)  # what runs still must not lose its memory
        torch.cuda.empty_cache()
        self._alive = weakref.WeakSet()
        self._counted()

    @property
    def n_bytes(self) -> int:
        return self._n_bytes

    def record(self, program: Callable[[], tuple[torch.Tensor, ...]], room: int) -> Recording | None:
        """Run the program twice on a stream of its own, where kernels are built and libraries take their memory, then record it.

        The second run says how much memory the program needs at a time; where the pool has no room for it, nothing is recorded.
        """
        if not self._alive:  # torch refuses a pool whose graphs are all gone
            self.forget()
            self._pools.append(torch.cuda.graph_pool_handle())
        if self._n_bytes > room:
            return None
        current, aside = torch.cuda.current_stream(self._device), self._aside
        aside.wait_stream(current)
        with torch.cuda.stream(aside):
            program()
            needed = self._needed(program)
        current.wait_stream(aside)
        held, in_use = self._counted()
        if max(held, in_use + needed + needed // 8 + _BESIDE) > room:
            return None
        # A capture that fails leaves its stream the current one; the outer `with` puts that right.
        with torch.cuda.stream(current), _no_collection(), _cublas_in_the_pool():
            graph = torch.cuda.CUDAGraph()
            try:
                # Thread-local: what other threads ask of the device meanwhile, such as a receiver's wait, is no part of it.
                with torch.cuda.graph(graph, pool=self._pools[-1], stream=aside, capture_error_mode="thread_local"):
                    outputs = program()
            except BaseException:
                self._alive = weakref.WeakSet()  # torch refuses a pool whose only graph has failed, too
                raise
            finally:
                self._counted()
        self._alive.add(graph)
        return Recording(replay=graph.replay, outputs=outputs)

    def _needed(self, program: Callable[[], tuple[torch.Tensor, ...]]) -> int:
        """The most bytes that the program holds at a time, its results included."""
        torch.cuda.reset_peak_memory_stats(self._device)
        before = torch.cuda.memory_allocated(self._device)
        program()
        return torch.cuda.max_memory_allocated(self._device) - before

    def _counted(self) -> tuple[int, int]:
        """What the device has given to the pools, and what of it tensors are in; pools that hold nothing any more are forgotten."""
        segments: dict[Any, list[Any]] = {pool: [] for pool in self._pools}
        for segment in torch.cuda.memory_snapshot(include_traces=False):
            segments.get(tuple(segment["segment_pool_id"]), []).append(segment)
        self._pools = [pool for pool in self._pools[:-1] if segments[pool]] + self._pools[-1:]
        held, in_use = (sum(s[size] for of in segments.values() for s in of) for size in ("total_size", "allocated_size"))
        self._n_bytes = held
        return held, in_use


@contextmanager
def _no_collection() -> Iterator[None]:
    """Without garbage collection: a graph of old that it destroys would spoil the capture."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


@contextmanager
def _cublas_in_the_pool() -> Iterator[None]:
    """Make cuBLAS take a workspace within, which then lives in the graphs' pool, and one anew afterwards.

    A workspace from outside, whose address is in the graph, would go with another graph of the same stream (PyTorch issue 193402).
    torch has no public call for it.
    """
    clear: Callable[[], None] = getattr(torch._C, "_cuda_clearCublasWorkspaces", lambda: None)
    clear()
    try:
        yield
    finally:
        clear()
