"""CUDA graphs: the recorder of `graphs.py` on a GPU."""

from __future__ import annotations

from collections.abc import Callable

import torch

from fastvl_lab.capture.graphs import Recording


class CudaRecorder:
    """Records on a CUDA device, into one memory pool (`torch.cuda.graph_pool_handle`)."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
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
        current, aside = torch.cuda.current_stream(self._device), torch.cuda.Stream(self._device)
        aside.wait_stream(current)
        with torch.cuda.stream(aside):
            for _ in range(2):
                program()
        current.wait_stream(aside)
        torch.cuda.synchronize(self._device)
        torch.cuda.empty_cache()  # so that what the device holds more afterwards is the pool's
        before = torch.cuda.memory_reserved(self._device)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool, stream=aside):
            outputs = program()
        self._n_bytes += max(torch.cuda.memory_reserved(self._device) - before, 0)
        return Recording(replay=graph.replay, outputs=outputs)
