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
    """What is asked of torch.cuda, in order; its capture fails as CUDA's does, and leaves its stream the current one.

    peak: bytes that a run of the program holds at a time. pools: bytes of each pool; a capture's grows by `peak`.
    """

    def __init__(self) -> None:
        self.done: list[str] = []
        self.now, self.peak = Stream("main", self.done), 0
        self.pools: dict[tuple[int, int], int] = {}
        self._pools = itertools.count()

    def called(self, name: str) -> Callable[..., None]:
        return lambda *_: self.done.append(name)

    def new_pool(self) -> tuple[int, int]:
        return 1, next(self._pools)

    def snapshot(self, *, include_traces: bool) -> list[dict[str, object]]:
        assert not include_traces
        others = {"segment_pool_id": (0, 0), "total_size": 7, "allocated_size": 7}
        return [others] + [{"segment_pool_id": p, "total_size": n, "allocated_size": n // 2} for p, n in self.pools.items()]

    @contextlib.contextmanager
    def stream(self, stream: Stream) -> Iterator[None]:
        before, self.now = self.now, stream
        try:
            yield
        finally:
            self.now = before

    @contextlib.contextmanager
    def graph(self, _: object, *, pool: tuple[int, int], stream: Stream, capture_error_mode: str) -> Iterator[None]:
        assert capture_error_mode == "thread_local"
        before, self.now = self.now, stream
        self.done.append(f"capture into {pool[1]}")
        self.pools[pool] = max(self.pools.get(pool, 0), self.peak)
        yield
        self.now = before


class Graph:
    def __init__(self, done: list[str]) -> None:
        self._done = done

    def replay(self) -> None:
        self._done.append("replay")


@pytest.fixture
def played(monkeypatch: pytest.MonkeyPatch) -> Played:
    cuda = Played()
    stands_for = {
        "Stream": lambda device: Stream("aside", cuda.done),
        "current_stream": lambda device: cuda.now,
        "stream": cuda.stream,
        "synchronize": cuda.called("synchronize"),
        "empty_cache": cuda.called("empty_cache"),
        "memory_snapshot": cuda.snapshot,
        "reset_peak_memory_stats": lambda device: None,
        "memory_allocated": lambda device: 1000,
        "max_memory_allocated": lambda device: 1000 + cuda.peak,
        "graph_pool_handle": cuda.new_pool,
        "CUDAGraph": lambda: Graph(cuda.done),
        "graph": cuda.graph,
    }
    for name, stand_in in stands_for.items():
        monkeypatch.setattr(torch.cuda, name, stand_in)
    monkeypatch.setattr(torch._C, "_cuda_clearCublasWorkspaces", cuda.called("clear"), raising=False)
    return cuda


def _one() -> tuple[torch.Tensor, ...]:
    return (torch.ones(1),)


def test_a_capture_collects_no_garbage_and_has_its_cublas_workspace_in_its_pool(played: Played) -> None:
    recorder, seen = CudaRecorder(torch.device("cuda")), []

    def program() -> tuple[torch.Tensor, ...]:
        seen.append((played.now.name, gc.isenabled()))
        return _one()

    played.peak = 100
    recording = recorder.record(program, 2**30)
    assert recording is not None
    assert seen == [("aside", True), ("aside", True), ("aside", False)]
    assert played.done[-5:] == ["aside waits for main", "main waits for aside", "clear", "capture into 0", "clear"]
    assert gc.isenabled()
    assert recorder.n_bytes == 100
    recording.replay()
    assert played.done[-1] == "replay"


def test_after_a_capture_that_failed_all_is_as_before_and_the_next_has_a_pool_of_its_own(played: Played) -> None:
    """What the failed one has left in a pool that others are in is counted still."""
    recorder, calls = CudaRecorder(torch.device("cuda")), []
    played.peak = 100
    first = recorder.record(_one, 2**30)

    def fails() -> tuple[torch.Tensor, ...]:
        calls.append(1)
        if len(calls) == 3:
            raise ZeroDivisionError("in a capture")
        return _one()

    played.peak = 300
    with pytest.raises(ZeroDivisionError, match="in a capture"):
        recorder.record(fails, 2**30)
    assert played.now.name == "main"
    assert played.done[-1] == "clear"
    assert gc.isenabled()
    assert recorder.n_bytes == 300
    second = recorder.record(_one, 2**30)
    assert "capture into 1" in played.done
    assert recorder.n_bytes == 600
    played.pools.clear()  # nobody is in them any more
    recorder.forget()
    assert recorder.n_bytes == 0
    third = recorder.record(_one, 2**30)
    assert "capture into 2" in played.done
    assert None not in (first, second, third)


@pytest.mark.parametrize(("peak", "room"), [(100 * 2**20, 100 * 2**20), (2**30, 2**20), (0, 50 * 2**20)])
def test_what_has_no_room_is_not_captured_and_takes_nothing(played: Played, peak: int, room: int) -> None:
    recorder, runs = CudaRecorder(torch.device("cuda")), []
    played.peak = peak

    def program() -> tuple[torch.Tensor, ...]:
        runs.append(1)
        return _one()

    assert recorder.record(program, room) is None
    assert len(runs) == 2
    assert recorder.n_bytes == 0
    assert not [name for name in played.done if name.startswith("capture")]
    kept = recorder.record(program, 2 * peak + 2**27)
    assert kept is not None
    assert recorder.record(program, peak - 1) is None
    assert len(runs) == 5  # a pool that is larger than the room needs no trial


def test_a_pool_whose_graphs_are_all_gone_is_not_recorded_into(played: Played) -> None:
    recorder = CudaRecorder(torch.device("cuda"))
    for number in range(3):
        recording = recorder.record(_one, 2**30)
        assert f"capture into {number}" in played.done
        del recording
    kept = [recorder.record(_one, 2**30) for _ in range(2)]
    assert played.done.count("capture into 3") == len(kept)
    assert "capture into 4" not in played.done


def test_a_torch_without_a_call_to_clear_cublas_workspaces_captures_without_it(
    played: Played, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(torch._C, "_cuda_clearCublasWorkspaces")
    assert CudaRecorder(torch.device("cuda")).record(_one, 2**30) is not None
    assert "clear" not in played.done
