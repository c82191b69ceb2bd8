"""Continuous batching: requests join and leave between steps, and every answer under way shares a decode step."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial

import torch

from fastvl_lab.cache import together
from fastvl_lab.cache.concat import ConcatKv
from fastvl_lab.cache.slotted import SlottedKv
from fastvl_lab.decoder.steps import sample
from fastvl_lab.outcome import Outcome
from fastvl_lab.schedule.in_flight import Bound, InFlight
from fastvl_lab.schedule.inbox import Inbox, Job
from fastvl_lab.schedule.policy import Policy, pieces
from fastvl_lab.streaming.answer import Forced
from fastvl_lab.trace import Anchor, Tracer

# Threads that unpack images of requests that wait; more would take cores from what the device's host does.
_UNPACKING = 2


@dataclass(frozen=True, kw_only=True)
class Step:
    """What a step did, and when (`time.perf_counter_ns`), by the numbers of jobs.

    admitted: whose images and prompt it took in, and patches that went through the tower; prefilled: tokens of whose prompt;
    decoded: whose answers it made longer; waiting: how many requests were not admitted yet.
    """

    start_ns: int
    end_ns: int
    admitted: tuple[tuple[int, int], ...] = ()
    prefilled: tuple[tuple[int, int], ...] = ()
    decoded: tuple[int, ...] = ()
    waiting: int = 0


def one_at_a_time(run: Callable[[Job], Outcome], device: torch.device, inbox: Inbox, *, lingers: bool) -> list[Step]:
    """Serve each job to its end, in the order in which they come, until the inbox is closed, or empty where nothing `lingers`."""
    steps, waiting = [], inbox.take(wait=lingers)
    while waiting:
        job, start_ns = waiting.pop(0), time.perf_counter_ns()
        try:
            job.tracer.start_at(job.since_ns, Anchor.now(device))
            job.tracer.fill("queued")
            job.begin()
            ended: Outcome | Exception = run(job)
        except Exception as error:
            ended = error
        job.end(ended)
        steps.append(Step(start_ns=start_ns, end_ns=time.perf_counter_ns(), admitted=((job.number, 0),), waiting=len(waiting)))
        waiting += inbox.take(wait=lingers and not waiting)
    return steps


def side_by_side(run: Callable[[Job], Outcome], inbox: Inbox, *, lingers: bool) -> list[Step]:
    """Hand each job on as it comes, on a thread of its own: a server elsewhere says who waits. Nobody sees its steps."""

    def ask(job: Job) -> None:
        job.tracer.start_at(job.since_ns, Anchor(job.since_ns, None))
        job.begin()
        try:
            ended: Outcome | Exception = run(job)
        except Exception as error:
            ended = error
        job.end(ended)

    asking: list[threading.Thread] = []
    while jobs := inbox.take(wait=lingers):
        for job in jobs:
            asking.append(threading.Thread(target=ask, args=(job,), name="fastvl-ask", daemon=True))
            asking[-1].start()
    for thread in asking:
        thread.join()
    return []


class Loop:
    """The requests of one recipe that are under way together, and the steps that serve them.

    unpacking: threads that unpack the images of requests that wait, if any (`unpackers`). forced: tokens that the answer of the
    only request is made to go on with.
    """

    def __init__(
        self, bound: Bound, policy: Policy, unpacking: ThreadPoolExecutor | None = None, forced: Forced | None = None
    ) -> None:
        self._bound, self._policy, self._forced = bound, policy, forced
        self._off, self._anchor = Tracer(bound.checkpoint.device, "off"), Anchor.now(bound.checkpoint.device)
        self._unpacking = unpacking
        self._opening: list[tuple[InFlight, Future[None]]] = []  # whose images are being unpacked
        self._waiting: list[InFlight] = []
        self._prefilling: list[InFlight] = []
        self._decoding: list[InFlight] = []
        self._kv: tuple[list[InFlight], ConcatKv | SlottedKv] | None = None  # of the last step
        self._turns = 0  # times that anything was done for a request
        self.steps: list[Step] = []

    def serve(self, inbox: Inbox, *, lingers: bool = True) -> None:
        """Serve what comes until the inbox is closed, or empty where nothing `lingers`, and every job has ended.

        An error ends the jobs that it is of, and no other.
        """
        try:
            while self._arrive(inbox, lingers):
                start_ns = time.perf_counter_ns()
                admitted, prefilled = self._prompts()
                decoded = self._decode()
                if admitted or prefilled or decoded:
                    step = Step(
                        start_ns=start_ns,
                        end_ns=time.perf_counter_ns(),
                        admitted=tuple(admitted),
                        prefilled=tuple(prefilled),
                        decoded=tuple(decoded),
                        waiting=len(self._waiting) + len(self._opening),
                    )
                    self.steps.append(step)
        finally:
            for _, opened in self._opening:
                opened.cancel()
            for flight in [*self._waiting, *self._prefilling, *self._decoding]:
                flight.close()

    def _arrive(self, inbox: Inbox, lingers: bool) -> bool:
        """Take in who has come and whose images are there; wait for somebody if nobody is there. Whether anybody is."""
        for flight in [*self._waiting, *self._prefilling]:
            self._turn(flight, None)
        busy = bool(self._waiting or self._prefilling or self._decoding)
        come = inbox.take(wait=lingers and not busy and not self._opening)
        for job in come:
            job.tracer.start_at(job.since_ns, self._anchor)
            flight = InFlight(job, self._bound)
            if self._unpacking is None:
                self._turn(flight, "queued", flight.open, then=self._waiting)
            else:
                self._opening.append((flight, self._unpacking.submit(_open_and_unpack, flight)))
        if self._opening and not busy:
            self._opening[0][1].exception()  # wait for it
        for flight, opened in [pair for pair in self._opening if pair[1].done()]:
            self._opening.remove((flight, opened))
            self._turn(flight, None, opened.result, then=self._waiting)
        return bool(busy or come or self._opening or self._waiting)

    def _prompts(self) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
        """Admit whom there is room for, and compute as much of prompts as a step may."""
        admitted: list[tuple[int, int]] = []
        prefilled: list[tuple[int, int]] = []
        n_decoding = len(self._decoding)
        while (left := self._policy.left(n_decoding, sum(n for _, n in prefilled))) is None or left > 0:
            for flight, n in pieces(self._prefilling, left):
                if self._turn(flight, "waiting", partial(flight.prefill, n)):
                    flight.note_captures()
                    prefilled.append((flight.job.number, n))
                    if flight.n_left == 0:
                        self._prefilling.remove(flight)
                        self._first_token(flight)
            if self._prefilling:  # the step is full
                break
            flight_or_none = self._admit()
            if flight_or_none is None:
                break
            admitted.append((flight_or_none.job.number, flight_or_none.n_patches))
        return admitted, prefilled

    def _admit(self) -> InFlight | None:
        """The next to begin, if there is one, and room for it."""
        while self._waiting and len(self._prefilling) + len(self._decoding) < self._policy.max_batch:
            flight = self._policy.next(self._waiting, time.perf_counter())
            if not flight.has_room() and (self._prefilling or self._decoding):
                return None  # somebody's end makes room
            self._waiting.remove(flight)
            flight.job.begin()
            if self._turn(flight, "queued", partial(_admit_and_encode, flight), then=self._prefilling):
                return flight
        return None

    def _first_token(self, flight: InFlight) -> None:
        def read() -> None:
            with flight.tracer.span("sample"):
                token = int(flight.token)  # the host waits for the device
            if flight.take(token):
                self._end(flight)
            else:
                self._decoding.append(flight)

        self._turn(flight, None, read)

    def _decode(self) -> list[int]:
        """A decode step of every answer under way."""
        for flight in list(self._decoding):
            self._turn(flight, "waiting")
        flights = list(self._decoding)
        if not flights:
            return []
        tracer = flights[0].tracer if len(flights) == 1 else self._off
        try:
            with _all(flights, "decode"):
                kv = self._kv_of(flights)
                kv.extend([1] * len(flights))
                tokens, positions = map(_joined, zip(*(flight.next_input() for flight in flights), strict=True))
                step = partial(self._bound.stages.decode, kv=kv, tracer=tracer)
                made = (step if self._forced is None else self._forced.steps(step))(tokens, positions)
            with _all(flights, "sample"):
                token = sample(made.logits, self._bound.decoder) if made.token is None else made.token
                ids = token.tolist()  # the host waits for the device
        except Exception as error:
            for flight in flights:
                self._fail(flight, error)
            return []
        flights[0].note_captures()
        for row, flight in enumerate(flights):
            flight.token = token[row : row + 1]
            self._turn(flight, None, partial(self._take, flight, ids[row]))
        for flight in flights:
            flight.seen = self._turns  # of a step that they share, nobody waits for another
        return [flight.job.number for flight in flights]

    def _take(self, flight: InFlight, token: int) -> None:
        if flight.take(token):
            self._decoding.remove(flight)
            self._end(flight)

    def _kv_of(self, flights: list[InFlight]) -> ConcatKv | SlottedKv:
        """The cache of a step's sequences: that of the step before, where they are the same."""
        if len(flights) == 1:
            return flights[0].place.kv
        if self._kv is None or self._kv[0] != flights:
            self._kv = flights, together([flight.place.sequence for flight in flights])
        return self._kv[1]

    def _turn(
        self,
        flight: InFlight,
        waited: str | None,
        work: Callable[[], object] | None = None,
        then: list[InFlight] | None = None,
    ) -> bool:
        """Do something for a request that is still wanted, and note that it waited before, where others were served meanwhile.

        What goes wrong ends that request alone. Whether it did not.
        """
        try:
            flight.tracer.check()
            if waited == "queued" or (waited is not None and flight.seen < self._turns):
                flight.tracer.fill(waited)
            if work is not None:
                work()
                self._turns += 1
        except Exception as error:
            self._fail(flight, error)
            return False
        flight.seen = self._turns
        if then is not None:
            then.append(flight)
        return True

    def _end(self, flight: InFlight) -> None:
        try:
            ended: Outcome | Exception = flight.outcome()
        finally:
            flight.close()
        flight.job.end(ended)

    def _fail(self, flight: InFlight, error: Exception) -> None:
        for group in (self._waiting, self._prefilling, self._decoding):
            if flight in group:
                group.remove(flight)
        flight.close()
        flight.job.end(error)


def _admit_and_encode(flight: InFlight) -> None:
    flight.admit()
    flight.encode()
    flight.note_captures()


def _open_and_unpack(flight: InFlight) -> None:
    with torch.inference_mode():
        flight.tracer.fill("queued")
        flight.open()
        flight.unpack()


def unpackers(n_threads: int = _UNPACKING) -> ThreadPoolExecutor:
    """Threads that compute with one of OpenMP's each; torch would have new threads of anybody's do so too, unless told again."""
    n, ready = torch.get_num_threads(), threading.Barrier(n_threads + 1)

    def alone() -> None:
        torch.set_num_threads(1)
        ready.wait()

    pool = ThreadPoolExecutor(n_threads, thread_name_prefix="fastvl-unpack", initializer=alone)
    for _ in range(n_threads):
        pool.submit(int)
    ready.wait()
    torch.set_num_threads(n)
    return pool


def _all(flights: Iterable[InFlight], name: str) -> ExitStack:
    """A stage that several requests share."""
    stack = ExitStack()
    for flight in flights:
        stack.enter_context(flight.tracer.shared_span(name))
    return stack


def _joined(parts: Sequence[torch.Tensor]) -> torch.Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(list(parts))
