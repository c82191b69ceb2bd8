"""Several steps to a round: all of a round's steps are launched before the first of their tokens is read.

Threads stand where serving engines have coroutines. One launches: the caller, or on a CPU one of its own, while the caller plays
the device. A receiver reads tokens as the device finishes them, and asks for the next round before it waits for the last token of
this one. Behind a gate, a responder holds what was received until the gate opens.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable

from fastvl_lab.streaming.answer import Answer, Positions
from fastvl_lab.streaming.gate import CountingGate
from fastvl_lab.streaming.launch import Launched, NewStream, Stream


def in_rounds(
    answer: Answer,
    *,
    new_stream: NewStream,
    positions: Positions,
    steps_per_round: int,
    new_gate: Callable[[], CountingGate] | None,
) -> None:
    """Make the answer; it is complete, and nothing of it still runs, on return. Raises what any of the threads raised."""
    rounds = _Rounds(answer, new_stream(answer, positions), steps_per_round, new_gate and new_gate())
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
        whole, rest = divmod(answer.max_new_tokens - 1, steps_per_round)
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
                    self._emit([token for token, _ in tokens], tokens[-1][1])
        except BaseException as error:  # raised again by the caller
            self.errors.append(error)
            self.end()

    def _pass_on(self, token: int, last: bool) -> None:
        if self._gate is None:
            self._emit([token], last)
        else:
            self._received.put((token, last))

    def _emit(self, tokens: list[int], last: bool) -> None:
        with self._answer.tracer.span("emit"):
            self._answer.emitter.emit(tokens, last=last)

    def _raise(self) -> None:
        if self._gate is not None:
            self._gate.raise_()

    def _lower(self) -> None:
        if self._gate is not None:
            self._gate.lower()
