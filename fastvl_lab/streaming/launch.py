"""The stream that decode steps are launched on, ahead of their results: CUDA's own, or one in play on a CPU."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from fastvl_lab.streaming.answer import Answer, Positions, no_wait


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
            logits = answer.decode(self._token, self._position(number))
        with span("sample"):
            self._token = answer.sample(logits)
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
        self._arrived.synchronize()
        return int(self._place)


class PlayedStream:
    """A CUDA stream in play, on a CPU: its caller does what another thread launches, in order, while that thread goes on.

    The caller plays the device, and not a thread made for it, because torch has a thread pool for every thread that computes, and
    two of them slow each other down. A step's work is on the device lane of the trace, its launch on the host's.
    """

    def __init__(self, answer: Answer, positions: Positions) -> None:
        self._answer, self._position = answer, positions(answer, self.wait)
        self._work: queue.SimpleQueue[_Work | None] = queue.SimpleQueue()
        self._token: Future[torch.Tensor] = Future()
        self._token.set_result(answer.first)
        self.first: Launched = _Made(self._token)

    def launch(self, number: int) -> Launched:
        with self._answer.tracer.span("decode"):
            before, position, made = self._token, self._position(number), Future[torch.Tensor]()
            self._work.put(_Work(made=made, step=lambda: self._step(before, position)))
            self._token = made
        return _Made(made)

    def wait(self) -> None:
        self._token.exception()

    def carry_out(self, launches: Callable[[], None]) -> None:
        launcher = threading.Thread(target=self._launch_all, args=(launches,), name="fastvl-launch", daemon=True)
        launcher.start()
        failure: BaseException | None = None
        work: _Work | None = None
        with self._answer.tracer.on_device():
            while True:
                try:
                    work = None
                    work = self._work.get()
                    if work is None:
                        break
                    if failure is None:
                        work.made.set_result(work.step())
                    else:
                        work.made.set_exception(failure)
                except BaseException as error:  # of the step, or an interruption: nothing is done after it, and nobody left waiting
                    failure = error
                    if work is not None and not work.made.done():
                        work.made.set_exception(failure)
        launcher.join()
        if failure is not None:
            raise failure

    def _launch_all(self, launches: Callable[[], None]) -> None:
        try:
            launches()
        finally:
            self._work.put(None)

    def _step(self, token: Future[torch.Tensor], position: torch.Tensor) -> torch.Tensor:
        answer, span, read = self._answer, self._answer.tracer.span, token.result()
        with span("decode"):
            logits = answer.decode(read, position)
        with span("sample"):
            return answer.sample(logits)


@dataclass(frozen=True, kw_only=True, eq=False)
class _Work:
    """A step that has been launched, and the token that it will have made."""

    made: Future[torch.Tensor]
    step: Callable[[], torch.Tensor]


class _Made:
    """A token of the played device."""

    def __init__(self, token: Future[torch.Tensor]) -> None:
        self._token = token

    def done(self) -> bool:
        return self._token.done()

    def read(self) -> int:
        return int(self._token.result())
