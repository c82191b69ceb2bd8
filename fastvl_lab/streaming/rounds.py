"""Several steps to a round: all of a round's steps are launched before the first of their tokens is read.

Threads stand where serving engines have coroutines. One launches: the caller, or on a CPU one of its own, while the caller plays
the device. A receiver reads tokens as the device finishes them, and asks for the next round before it waits for the last token of
this one. Behind a gate, a responder holds what was received until the gate opens.
"""

from __future__ import annotations

import queue
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Any, Protocol

import torch

from fastvl_lab.streaming.answer import Answer, Positions, Steps, no_wait


class CountingGate:
    """Open while its count is zero.

    It is raised when a round is uploaded and half-way through a round's results, and lowered when a round's results begin and when
    all its steps have been launched: so it opens within a round if the host launches ahead of the device, and not before the end of
    the answer if the two go in lockstep (LMDeploy 0.9.0 to 0.11.1, lmdeploy/pytorch/engine; removed by its PR 4265).
    """

    def __init__(self) -> None:
        self._count = self._openings = 0
        self._stays_open = False
        self._changed = threading.Condition()

    def raise_(self) -> None:
        with self._changed:
            self._count += 1

    def lower(self) -> None:
        with self._changed:
            self._count -= 1
            if self._count <= 0:
                self._open()

    def stay_open(self) -> None:
        """Nothing is left to wait for: whoever raises it from now on holds nobody."""
        with self._changed:
            self._stays_open = True
            self._open()

    def wait(self) -> None:
        """Until it is open; to have been open for an instant is enough."""
        with self._changed:
            seen = self._openings
            self._changed.wait_for(lambda: self._count == 0 or self._stays_open or self._openings != seen)

    def _open(self) -> None:
        self._count = 0
        self._openings += 1
        self._changed.notify_all()


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


# A new stream for an answer's steps.
NewStream = Callable[[Steps, Positions], Stream]


class CudaStream:
    """The current CUDA stream; ids come to the host by copies that are launched with the steps."""

    def __init__(self, steps: Steps, positions: Positions) -> None:
        self._steps, self._position = steps, positions(steps, no_wait)
        self._cuda = torch.cuda.current_stream(steps.first.device)
        self._ids = torch.empty(steps.most, dtype=torch.int64, pin_memory=True)
        self._token = steps.first
        self.first: Launched = self._sent(0)

    def launch(self, number: int) -> Launched:
        steps, span = self._steps, self._steps.tracer.span
        with span("decode"):
            step = steps.decode(self._token, self._position(number))
        with span("sample"):
            self._token = steps.sample(step)
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

    def __init__(self, steps: Steps, positions: Positions) -> None:
        self._steps, self._position = steps, positions(steps, self.wait)
        self._work: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._failure: BaseException | None = None
        self._last = _Made()
        self._last.make(steps.first)
        self._under_way: deque[_Made] = deque()
        self.first: Launched = self._last

    def launch(self, number: int) -> Launched:
        with self._steps.tracer.span("decode"):
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
            with self._steps.tracer.on_device():
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
        steps, span, token = self._steps, self._steps.tracer.span, before.token()
        with span("decode"):
            step = steps.decode(token, position)
        with span("sample"):
            return steps.sample(step)


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


def in_rounds(
    steps: Steps,
    answer: Answer,
    *,
    new_stream: NewStream,
    positions: Positions,
    steps_per_round: int,
    new_gate: Callable[[], CountingGate] | None,
) -> None:
    """Make the answer; it is complete, and nothing of it still runs, on return. Raises what any of the threads raised."""
    rounds = _Rounds(answer, new_stream(steps, positions), steps_per_round, new_gate and new_gate())
    threads = [threading.Thread(target=rounds.receive, name="fastvl-receive", daemon=True)]
    if new_gate is not None:
        threads.append(threading.Thread(target=rounds.respond, name="fastvl-respond", daemon=True))
    try:
        for thread in threads:
            thread.start()
        rounds.stream.carry_out(rounds.launch)
        for thread in threads:
            thread.join()
    finally:
        rounds.end()
        for thread in threads:
            if thread.is_alive():  # one whose start was interrupted may only come to life now, and finds the rounds ended
                thread.join()
    if rounds.errors:
        raise rounds.errors[0]


class _Rounds:
    """What the threads of one answer share."""

    def __init__(self, answer: Answer, stream: Stream, steps_per_round: int, gate: CountingGate | None) -> None:
        self._answer, self.stream, self._gate = answer, stream, gate
        whole, rest = divmod(answer.most - 1, steps_per_round)
        self._sizes = [steps_per_round] * whole + [rest] * (rest > 0)
        self.errors: list[BaseException] = []
        self._over = threading.Event()
        self._progress = threading.Condition()
        self._n_taken = 0
        self._asked, self._uploaded = threading.Semaphore(0), threading.Semaphore(1)  # the first round is, from the start
        self._launched: queue.SimpleQueue[Launched | None] = queue.SimpleQueue()
        self._received: queue.SimpleQueue[tuple[int, bool] | None] = queue.SimpleQueue()
        self._launched.put(stream.first)
        if self._sizes:
            self._raise()  # the first round is uploaded while the device is at the prefill

    def end(self) -> None:
        """Wake every thread that waits for another; nothing more is launched."""
        self._over.set()
        with self._progress:
            self._progress.notify_all()
        self._asked.release()
        self._uploaded.release()
        self._launched.put(None)
        self._received.put(None)
        if self._gate is not None:
            self._gate.stay_open()

    def launch(self) -> None:
        """Launch each round of decode steps once it is asked for; the first is, from the start."""
        number = 0
        try:
            for later, size in enumerate(self._sizes):
                if later:
                    self._asked.acquire()
                    self._raise()  # the round is uploaded
                    self._uploaded.release()
                launched: list[Launched] = []
                for _ in range(size):
                    if self._over.is_set():
                        return
                    if launched:
                        self._launched.put(launched[-1])
                    launched.append(self.stream.launch(number))
                    number += 1
                # In an engine's event loop the results that are there are taken before the last step is launched, and the round
                # is said to be launched before that step's own is looked for.
                self._wait_for_taken(number - size + 1 + sum(token.done() for token in launched[:-1]))
                self._lower()
                self._launched.put(launched[-1])
        except BaseException as error:  # raised again by the caller
            self.errors.append(error)
            self.end()

    def receive(self) -> None:
        """Read every token in order, and pass it on."""
        try:
            self._receive()
        except BaseException as error:  # raised again by the caller
            self.errors.append(error)
        finally:
            self.end()

    def _receive(self) -> None:
        for later, size in enumerate((1, *self._sizes)):  # the prefill is a round of one step
            for number in range(size):
                if number == size - 1 and 0 < later < len(self._sizes):
                    self._asked.release()
                launched = self._launched.get()
                if launched is None:
                    return
                token = launched.read()
                last = self._answer.take(token)
                self._pass_on(token, last)
                if last:
                    return
                if number == size // 2:
                    self._raise()
                self._note_taken()
            if self._gate is not None:
                self._uploaded.acquire()
            self._lower()  # the next round's results begin

    def _note_taken(self) -> None:
        with self._progress:
            self._n_taken += 1
            self._progress.notify_all()

    def _wait_for_taken(self, n_tokens: int) -> None:
        """Until the receiver has taken so many; nobody is waited for where no gate depends on the order."""
        if self._gate is not None:
            with self._progress:
                self._progress.wait_for(lambda: self._n_taken >= n_tokens or self._over.is_set())

    def respond(self) -> None:
        """Send what was received, all of it at once, whenever the gate opens."""
        assert self._gate is not None
        try:
            more = True
            while more:
                waiting = [self._received.get()]
                while not self._received.empty():
                    waiting.append(self._received.get())
                self._gate.wait()
                tokens = [item for item in waiting if item is not None]
                more = len(tokens) == len(waiting)  # None comes when nothing more will
                if tokens:
                    self._answer.emit([token for token, _ in tokens], last=tokens[-1][1])
        except BaseException as error:  # raised again by the caller
            self.errors.append(error)
            self.end()

    def _pass_on(self, token: int, last: bool) -> None:
        if self._gate is None:
            self._answer.emit([token], last=last)
        else:
            self._received.put((token, last))

    def _raise(self) -> None:
        if self._gate is not None:
            self._gate.raise_()

    def _lower(self) -> None:
        if self._gate is not None:
            self._gate.lower()
