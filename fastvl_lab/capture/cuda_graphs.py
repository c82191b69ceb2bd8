"""CUDA graphs: the recorder of `graphs.py` on a GPU."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from fastvl_lab.capture.graphs import Recording


class CudaRecorder:
    """Records on a CUDA device, on one stream and into one memory pool: torch gives memory again only on the stream it was of."""

    def __init__(self, device: torch.device) -> None:
        self._device, self._aside = device, torch.cuda.Stream(device)
        self.forget()

    def forget(self) -> None:
        self._pool = torch.cuda.graph_pool_handle()
        self._n_bytes = 0
        torch.cuda.synchronize(self._device)  # what runs still must not lose its memory
        torch.cuda.empty_cache()

    @property
    def n_bytes(self) -> int:
        return self._n_bytes

    def record(self, program: Callable[[], tuple[torch.Tensor, ...]]) -> Recording:
        """Run the program twice on a stream of its own, where kernels are built and libraries take their memory, then record it."""
        current, aside = torch.cuda.current_stream(self._device), self._aside
        aside.wait_stream(current)
        with torch.cuda.stream(aside):
            for _ in range(2):
                program()
        current.wait_stream(aside)
        torch.cuda.synchronize(self._device)
        # A capture that fails leaves its stream the current one; the outer `with` puts that right.
        with torch.cuda.stream(current), _no_collection(), _cublas_in_the_pool():
            torch.cuda.empty_cache()  # so that what the device holds more afterwards is the pool's
            before = torch.cuda.memory_reserved(self._device)
            graph = torch.cuda.CUDAGraph()
            try:
                # Thread-local: what other threads ask of the device meanwhile, such as a receiver's wait, is no part of it.
                with torch.cuda.graph(graph, pool=self._pool, stream=aside, capture_error_mode="thread_local"):
                    outputs = program()
            except BaseException:
                self._pool = torch.cuda.graph_pool_handle()  # torch refuses a pool whose only graph has failed
                raise
            self._n_bytes += max(torch.cuda.memory_reserved(self._device) - before, 0)
        return Recording(replay=graph.replay, outputs=outputs)


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
    """
    torch._C._cuda_clearCublasWorkspaces()
    try:
        yield
    finally:
        torch._C._cuda_clearCublasWorkspaces()
