"""The stream that decode steps are launched on, ahead of their results: CUDA's own, or one in play on a CPU."""

from __future__ import annotations

import queue
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Any, Protocol

import torch

from fastvl_lab.streaming.answer import Answer, Positions, no_wait

# How long a thread asks for a token before it sleeps: about as long as the system takes to wake it.
_ASKS_FOR = 50e-6


class Launched(Protocol):
    """A token that the device makes, or has made."""

    def done(self) -> bool:
        """Whether it is there, or its step has failed."""

    def read(self) -> int:
        """Its id, once it is there; raises what its step raised."""


class Stream(Protocol):
    """Where one answer's steps are launched, in order. `first` is the answer's first token, which was launched before."""

    first: Launched

    def launch(self, number: int) -> Launched:
        """The step that reads token `number` of the answer and makes the next; returns before its work is done."""

    def carry_out(self, launches: Callable[[], None]) -> None:
        """Do what the function launches; on return it has returned, and all that it launched is done or has failed."""


# A new stream for an answer.
NewStream = Callable[[Answer, Positions], Stream]


class CudaStream:
    """The current CUDA stream; ids come to the host by copies that are launched with the steps."""

    def __init__(self, answer: Answer, positions: Positions) -> None:
        self._answer, self._position = answer, positions(answer, no_wait)
        self._cuda = torch.cuda.current_stream(answer.first.device)
        self._ids = torch.empty(answer.max_new_tokens, dtype=torch.int64, pin_memory=True)
        self._token = answer.first
        self.first: Launched = self._sent(0)

    def launch(self, number: int) -> Launched:
        answer, span = self._answer, self._answer.tracer.span
        with span("decode"):
            step = answer.decode(self._token, self._position(number))
        with span("sample"):
            self._token = answer.sample(step)
            return self._sent(number + 1)

    def carry_out(self, launches: Callable[[], None]) -> None:
        try:
            launches()
        finally:
            self._cuda.synchronize()

    def _sent(self, number: int) -> _Sent:
        place = self._ids[number : number + 1]
        place.copy_(self._token, non_blocking=True)
        arrived = torch.cuda.Event(blocking=True)
        arrived.record(self._cuda)
        return _Sent(place, arrived)


class _Sent:
    """An id on its way to the host."""

    def __init__(self, place: torch.Tensor, arrived: Any) -> None:
        self._place, self._arrived = place, arrived

    def done(self) -> bool:
        arrived: bool = self._arrived.query()
        return arrived

    def read(self) -> int:
        asked_until = time.perf_counter() + _ASKS_FOR
        while not self.done():
            if time.perf_counter() > asked_until:
                self._arrived.synchronize()
                break
        return int(self._place)


class PlayedStream:
    """A CUDA stream in play, on a CPU: its caller does what another thread launches, in order, while that thread goes on.

    The caller plays the device, and not a thread made for it, because torch has a thread pool for every thread that computes, and
    two of them slow each other down. A step's work is on the device lane of the trace, its launch on the host's.
    """

    def __init__(self, answer: Answer, positions: Positions) -> None:
        self._answer, self._position = answer, positions(answer, self.wait)
        self._work: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._failure: BaseException | None = None
        self._last = _Made()
        self._last.make(answer.first)
        self._under_way: deque[_Made] = deque()
        self.first: Launched = self._last

    def launch(self, number: int) -> Launched:
        with self._answer.tracer.span("decode"):
            before, position, made = self._last, self._position(number), _Made()
            self._last = made
            self._under_way.append(made)
            if self._failure is not None:  # looked at after `made` can be found, and set before it is looked for
                made.fail(self._failure)
            self._work.put(lambda: made.make(self._step(before, position)))
        return made

    def wait(self) -> None:
        self._last.wait()

    def carry_out(self, launches: Callable[[], None]) -> None:
        launcher = threading.Thread(target=self._launch_all, args=(launches,), name="fastvl-launch", daemon=True)
        try:
            launcher.start()
            with self._answer.tracer.on_device():
                while (work := self._work.get()) is not None:
                    work()
                    self._under_way.popleft()
        except BaseException as error:  # of a step, or an interruption at any place
            self._failure = error
            for made in list(self._under_way):  # nobody is left waiting
                made.fail(error)
            raise
        finally:
            if launcher.is_alive():
                launcher.join()

    def _launch_all(self, launches: Callable[[], None]) -> None:
        try:
            launches()
        finally:
            self._work.put(None)

    def _step(self, before: _Made, position: torch.Tensor) -> torch.Tensor:
        answer, span, token = self._answer, self._answer.tracer.span, before.token()
        with span("decode"):
            step = answer.decode(token, position)
        with span("sample"):
            return answer.sample(step)


class _Made:
    """A token that the played device makes. Failing may be said of any, and again: what has been made stays made."""

    def __init__(self) -> None:
        self._there = threading.Event()
        self._token: torch.Tensor | None = None
        self._failure: BaseException | None = None

    def make(self, token: torch.Tensor) -> None:
        self._token = token
        self._there.set()

    def fail(self, failure: BaseException) -> None:
        self._failure = failure
        self._there.set()

    def done(self) -> bool:
        return self._there.is_set()

    def wait(self) -> None:
        self._there.wait()

    def token(self) -> torch.Tensor:
        """int64 [1], once it is there."""
        self.wait()
        if self._token is None:
            assert self._failure is not None
            raise self._failure
        return self._token

    def read(self) -> int:
        return int(self.token())
