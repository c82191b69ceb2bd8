"""The recorder's order of doings around a capture, with torch.cuda in play; tests/gpu has the captures themselves."""

from __future__ import annotations

import contextlib
import gc
import itertools
from collections.abc import Callable, Iterator

import pytest
import torch

from fastvl_lab.capture.cuda_graphs import CudaRecorder


class Stream:
    def __init__(self, name: str, done: list[str]) -> None:
        self.name, self._done = name, done

    def wait_stream(self, other: Stream) -> None:
        self._done.append(f"{self.name} waits for {other.name}")


class Played:
    """What is asked of torch.cuda, in order; its capture fails as CUDA's does, and leaves its stream the current one."""

    def __init__(self) -> None:
        self.done: list[str] = []
        self.now, self.reserved = Stream("main", self.done), 0
        self._pools = itertools.count()

    def called(self, name: str) -> Callable[..., None]:
        return lambda *_: self.done.append(name)

    def new_pool(self) -> int:
        return next(self._pools)

    @contextlib.contextmanager
    def stream(self, stream: Stream) -> Iterator[None]:
        before, self.now = self.now, stream
        try:
            yield
        finally:
            self.now = before

    @contextlib.contextmanager
    def graph(self, _: object, *, pool: int, stream: Stream, capture_error_mode: str) -> Iterator[None]:
        assert capture_error_mode == "thread_local"
        before, self.now = self.now, stream
        self.done.append(f"capture into {pool}")
        yield
        self.now = before

    def replay(self) -> None:
        self.done.append("replay")


@pytest.fixture
def played(monkeypatch: pytest.MonkeyPatch) -> Played:
    cuda = Played()
    stands_for = {
        "Stream": lambda device: Stream("aside", cuda.done),
        "current_stream": lambda device: cuda.now,
        "stream": cuda.stream,
        "synchronize": cuda.called("synchronize"),
        "empty_cache": cuda.called("empty_cache"),
        "memory_reserved": lambda device: cuda.reserved,
        "graph_pool_handle": cuda.new_pool,
        "CUDAGraph": lambda: cuda,
        "graph": cuda.graph,
    }
    for name, stand_in in stands_for.items():
        monkeypatch.setattr(torch.cuda, name, stand_in)
    monkeypatch.setattr(torch._C, "_cuda_clearCublasWorkspaces", cuda.called("clear"), raising=False)
    return cuda


def test_a_capture_collects_no_garbage_and_has_its_cublas_workspace_in_its_pool(played: Played) -> None:
    recorder, seen = CudaRecorder(torch.device("cuda")), []

    def program() -> tuple[torch.Tensor, ...]:
        seen.append((played.now.name, gc.isenabled()))
        played.reserved += 100 * (len(seen) == 3)
        return (torch.ones(1),)

    played.done.clear()
    recording = recorder.record(program)
    assert seen == [("aside", True), ("aside", True), ("aside", False)]
    assert played.done == [
        "aside waits for main",
        "main waits for aside",
        "synchronize",
        "clear",
        "empty_cache",
        "capture into 0",
        "clear",
    ]
    assert gc.isenabled()
    assert recorder.n_bytes == 100
    recording.replay()
    assert played.done[-1] == "replay"


def test_after_a_capture_that_failed_all_is_as_before_and_the_next_has_a_pool_of_its_own(played: Played) -> None:
    recorder, calls = CudaRecorder(torch.device("cuda")), []

    def fails() -> tuple[torch.Tensor, ...]:
        calls.append(1)
        if len(calls) == 3:
            raise ZeroDivisionError("in a capture")
        return (torch.ones(1),)

    with pytest.raises(ZeroDivisionError, match="in a capture"):
        recorder.record(fails)
    assert played.now.name == "main"
    assert played.done[-1] == "clear"
    assert gc.isenabled()
    recorder.record(lambda: (torch.ones(1),))
    assert "capture into 1" in played.done
    recorder.forget()
    recorder.record(lambda: (torch.ones(1),))
    assert "capture into 2" in played.done
