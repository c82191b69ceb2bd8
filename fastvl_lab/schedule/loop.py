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
from fastvl_lab.cache.images import split
from fastvl_lab.cache.slotted import SlottedKv
from fastvl_lab.decoder.steps import Step as Made, likeliest
from fastvl_lab.outcome import Outcome
from fastvl_lab.request import Pixels, VisionTokens
from fastvl_lab.schedule.in_flight import Bound, InFlight
from fastvl_lab.schedule.inbox import Inbox, Job
from fastvl_lab.schedule.policy import Policy, gives_way, pieces
from fastvl_lab.streaming.answer import Forced
from fastvl_lab.trace import Anchor, Tracer, shared_span

# Threads that unpack images of requests that wait; more would take cores from what the device's host does.
_UNPACKING = 2

# Seconds for which a mark in the device's work serves requests that arrive; CUDA tells the time since one in float32 milliseconds,
# which are exact to 8 µs for so long.
_ANCHORED = 60


@dataclass(frozen=True, kw_only=True)
class Step:
    """What a step did, and when (`time.perf_counter_ns`), by the numbers of jobs.

    admitted: whose images and prompt it took in; encoded: patches of whose images went through the tower, where some of its blocks
    count as that share of the patches; prefilled: tokens of whose prompt; decoded: whose answers it made longer; preempted: who
    gave way, for want of cache blocks, and is to be admitted again; waiting: how many requests were not admitted yet, or not again.
    """

    start_ns: int
    end_ns: int
    admitted: tuple[int, ...] = ()
    encoded: tuple[tuple[int, int], ...] = ()
    prefilled: tuple[tuple[int, int], ...] = ()
    decoded: tuple[int, ...] = ()
    preempted: tuple[int, ...] = ()
    waiting: int = 0


# Given each step as it ends.
OnStep = Callable[[Step], object]


def one_at_a_time(run: Callable[[Job], Outcome], device: torch.device, inbox: Inbox, on_step: OnStep, *, lingers: bool) -> None:
    """Serve each job to its end, in the order in which they come, until the inbox is closed, or empty where nothing `lingers`.

    An error ends the job that it is of; what its `end` or `on_step` raises ends all, and is raised.
    """

    def serve(job: Job) -> Outcome:
        job.tracer.start_at(job.since_ns, Anchor.now(device))
        job.tracer.fill("queued")
        job.begin()
        return run(job)

    while taken := inbox.take(wait=lingers, most=1):  # the others stay, where who gives one up finds it
        (job,), start_ns = taken, time.perf_counter_ns()
        try:
            job.end(_made_of(serve, job))
            on_step(Step(start_ns=start_ns, end_ns=time.perf_counter_ns(), admitted=(job.number,), waiting=len(inbox)))
        except Exception as error:
            for other in inbox.take(wait=False):
                other.end(error)
            raise
        del taken, job  # not held while the next is waited for


def side_by_side(run: Callable[[Job], Outcome], inbox: Inbox, *, lingers: bool) -> None:
    """Hand each job on as it comes, on a thread of its own: a server elsewhere says who waits. Nobody sees its steps."""

    def ask(job: Job) -> Outcome:
        job.tracer.start_at(job.since_ns, Anchor(job.since_ns, None))
        job.begin()
        return run(job)

    asking: list[threading.Thread] = []
    while jobs := inbox.take(wait=lingers):
        asking = [thread for thread in asking if thread.is_alive()]
        for job in jobs:
            asking.append(threading.Thread(target=lambda job=job: job.end(_made_of(ask, job)), name="fastvl-ask", daemon=True))
            asking[-1].start()
    for thread in asking:
        thread.join()


def _made_of(serve: Callable[[Job], Outcome], job: Job) -> Outcome | Exception:
    """What a job ends with. No variable of a loop keeps it, which would hold an error's frames while the next job is served."""
    try:
        return serve(job)
    except Exception as error:
        return error


class Loop:
    """The requests of one recipe that are under way together, and the steps that serve them.

    threads: they open requests, and unpack the images of those that wait, if any (`unpackers`); no more than may be under way wait
    unpacked, since their patches take memory of the device. forced: tokens with which the answer of the only request goes on.
    on_step: given each step as it ends; by default they are kept in `steps`.
    """

    def __init__(
        self,
        bound: Bound,
        policy: Policy,
        threads: ThreadPoolExecutor | None = None,
        forced: Forced | None = None,
        on_step: OnStep | None = None,
    ) -> None:
        self._bound, self._policy, self._forced = bound, policy, forced
        self._off, self._anchor = Tracer(bound.checkpoint.device, "off"), Anchor.now(bound.checkpoint.device)
        self._threads = threads
        self._on_threads: dict[InFlight, Future[None]] = {}  # which are opened there, or unpacked
        self._packed: list[InFlight] = []  # whose images are to be unpacked
        self._waiting: list[InFlight] = []
        self._prefilling: list[InFlight] = []
        self._decoding: list[InFlight] = []
        self._kv: tuple[list[InFlight], ConcatKv | SlottedKv] | None = None  # of the last step
        self._turns = 0  # times that anything was done for a request
        self._n_admitted = 0
        self.steps: list[Step] = []
        self._on_step: OnStep = self.steps.append if on_step is None else on_step

    def serve(self, inbox: Inbox, *, lingers: bool = True) -> None:
        """Serve what comes until the inbox is closed, or empty where nothing `lingers`, and every job has ended.

        An error ends the jobs that it is of, and no other; a fault of the loop's own ends all, and is raised.
        """
        try:
            while self._arrive(inbox, lingers):
                start_ns = time.perf_counter_ns()
                admitted, encoded, prefilled = self._prompts()
                preempted = self._make_room()
                decoded = self._decode()
                if admitted or encoded or prefilled or preempted or decoded:
                    step = Step(
                        start_ns=start_ns,
                        end_ns=time.perf_counter_ns(),
                        admitted=tuple(admitted),
                        encoded=tuple(encoded),
                        prefilled=tuple(prefilled),
                        decoded=tuple(decoded),
                        preempted=tuple(preempted),
                        waiting=len(self._on_threads) + len(self._packed) + len(self._waiting),
                    )
                    self._on_step(step)
        except Exception as error:
            for flight in [*self._on_threads, *self._here()]:
                self._fail(flight, error)
            raise
        finally:
            for done in self._on_threads.values():
                done.cancel()
            for flight in self._here():
                flight.close()

    def _here(self) -> list[InFlight]:
        """The requests that no thread is at."""
        return [*self._packed, *self._waiting, *self._prefilling, *self._decoding]

    def _arrive(self, inbox: Inbox, lingers: bool) -> bool:
        """Take in who has come and whose images are there; wait for somebody if nobody is there. Whether anybody is."""
        for flight in self._here():
            self._turn(flight, None)  # who is not wanted any more leaves
        busy = bool(self._waiting or self._prefilling or self._decoding)
        if self._on_threads and not busy:
            inbox.wait_for(lambda: any(done.done() for done in self._on_threads.values()))
        come = inbox.take(wait=lingers and not busy and not self._on_threads)
        if come and time.perf_counter_ns() - self._anchor.ns > _ANCHORED * 1e9:
            self._anchor = Anchor.now(self._bound.checkpoint.device)
        for job in come:
            job.tracer.start_at(job.since_ns, self._anchor)
            flight = InFlight(job, self._bound)
            if self._threads is None:
                self._turn(flight, "queued", flight.open, then=self._waiting)
            else:  # both at once where it may: each look of this loop comes a step later
                at_once = not self._packed and self._may_unpack()
                self._hand_over(self._threads, flight, flight.open_and_unpack if at_once else flight.open, inbox)
        for flight in [flight for flight, done in self._on_threads.items() if done.done()]:
            done = self._on_threads.pop(flight)
            self._turn(flight, None, done.result, then=self._waiting if flight.is_unpacked else self._packed)
        self._unpack_ahead(inbox)
        return bool(busy or come or self._on_threads or self._waiting)

    def _hand_over(self, threads: ThreadPoolExecutor, flight: InFlight, work: Callable[[], None], inbox: Inbox) -> None:
        """Have work for a request done on a thread; a loop that waits looks up when it is done."""
        self._on_threads[flight] = threads.submit(_beside, flight, work)
        self._on_threads[flight].add_done_callback(lambda _: inbox.look_up())

    def _may_unpack(self) -> bool:
        return len(self._on_threads) + sum(one.pixels is not None for one in self._waiting) < self._policy.max_batch

    def _unpack_ahead(self, inbox: Inbox) -> None:
        while self._packed and self._may_unpack():
            assert self._threads is not None
            self._packed.remove(flight := self._policy.next(self._packed, time.perf_counter()))
            self._hand_over(self._threads, flight, flight.unpack, inbox)

    def _prompts(self) -> tuple[list[int], list[tuple[int, int]], list[tuple[int, int]]]:
        """Admit whom there is room for, and compute as much of images and prompts as a step may."""
        admitted: list[int] = []
        encoded: list[tuple[int, int]] = []
        prefilled: list[tuple[int, int]] = []
        n_decoding, n_taken = len(self._decoding), 0
        while (left := self._policy.left(n_decoding, n_taken)) is None or left > 0:
            for flight, n in pieces(self._prefilling, left):
                n_taken += n
                if flight.is_in_tower:
                    self._turn(flight, "waiting", partial(_encode_part, flight, n, encoded))
                elif self._turn(flight, "waiting", partial(flight.prefill, n)):
                    flight.note_captures()
                    prefilled.append((flight.job.number, n))
                    if flight.n_left == 0:
                        self._first_token(flight)
            if self._prefilling:  # the step is full, or what a tower has left of it is its prompt's
                continue
            come = self._admit(self._policy.left(n_decoding, n_taken))
            if not come:
                break
            admitted += [flight.job.number for flight in come]
            if not self._policy.stops_in_tower:
                encoded += [(flight.job.number, flight.n_patches) for flight in come if flight.n_patches > 0]
        return admitted, encoded, prefilled

    def _admit(self, left: int | None) -> list[InFlight]:
        """The next to begin, if there is one, and room for it; where images are packed, as many as fill the rest of the step."""
        come: list[InFlight] = []
        to_encode: list[InFlight] = []
        most = self._policy.max_batch if self._policy.packs_images else 1
        while len(come) < most and self._waiting and (n := len(self._prefilling) + len(self._decoding)) < self._policy.max_batch:
            if left is not None and sum(flight.n_left for flight in come) >= left:
                break
            flight = self._policy.next(self._waiting, time.perf_counter())
            if n > 0 and not flight.has_room(beside=n):
                break  # somebody's end makes room
            self._waiting.remove(flight)
            if self._begin(flight):
                if any(flight.place.would_find(other.place) for other in to_encode):
                    self._encode(to_encode)
                    to_encode.clear()
                    self._turn(flight, "waiting", flight.look_again)
                come.append(flight)
                to_encode.append(flight)
        self._encode(to_encode)
        return [flight for flight in come if flight in self._prefilling]

    def _begin(self, flight: InFlight) -> bool:
        """Admit a request, or one that gave way again; whether nothing went wrong."""
        waited = "waiting"
        if flight.number_admitted is None:
            flight.number_admitted, waited = self._n_admitted, "queued"
            self._n_admitted += 1
            flight.job.begin()
        return self._turn(flight, waited, flight.admit, then=self._prefilling)

    def _encode(self, flights: Sequence[InFlight]) -> None:
        """Images to visual tokens, of several requests in one call, and these into the prompts; or by parts later."""
        if self._policy.stops_in_tower:
            for flight in flights:
                self._turn(flight, "waiting", flight.enter_tower)
            return
        made = self._encode_packed([flight for flight in flights if flight.pixels is not None and self._turn(flight, "waiting")])
        for flight in flights:
            if flight in self._prefilling and self._turn(flight, "waiting", partial(flight.encode, made.get(flight))):
                flight.note_captures()

    def _encode_packed(self, flights: Sequence[InFlight]) -> dict[InFlight, VisionTokens]:
        """What the tower makes of the images of several requests; one alone is left to itself."""
        pixels = [flight.pixels for flight in flights if flight.pixels is not None]
        if len(pixels) < 2:
            return {}
        try:
            with _all(flights, "vit"):
                made = self._bound.stages.encode(_packed(pixels), self._off)
        except Exception as error:
            for flight in flights:
                self._fail(flight, error)
            return {}
        self._turns += 1
        for flight in flights:
            flight.seen = self._turns
        flights[0].note_captures()
        return dict(zip(flights, split(made, [sum(shape.visual_tokens for shape in one.shapes) for one in pixels]), strict=True))

    def _first_token(self, flight: InFlight) -> None:
        def read() -> int:
            with flight.tracer.span("sample"):
                return int(flight.token)  # the host waits for the device

        self._prefilling.remove(flight)
        self._decoding.append(flight)
        self._take(flight, read)

    def _make_room(self) -> list[int]:
        """Have blocks for a decode step of every answer under way: who was admitted last gives way until there are."""
        preempted = []
        while not self._bound.cache.has_room_for_step([flight.place for flight in self._decoding]):
            flight = gives_way([*self._prefilling, *self._decoding])
            (self._prefilling if flight in self._prefilling else self._decoding).remove(flight)
            flight.give_way()
            self._waiting.append(flight)
            self._kv = None
            preempted.append(flight.job.number)
        return preempted

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
                token, failed = self._chosen(flights, made)
                ids = token.tolist()  # the host waits for the device
        except Exception as error:
            for flight in flights:
                self._fail(flight, error)
            return []
        flights[0].note_captures()
        for row, flight in enumerate(flights):
            if flight in failed:
                self._fail(flight, failed[flight])
                continue
            flight.token = token[row : row + 1]
            self._take(flight, partial(int, ids[row]))
        for flight in flights:
            flight.seen = self._turns  # of a step that they share, nobody waits for another
        return [flight.job.number for flight in flights]

    def _chosen(self, flights: Sequence[InFlight], made: Made) -> tuple[torch.Tensor, dict[InFlight, Exception]]:
        """The next token of each, int64 [B] on the device: the likeliest all at once, or each row by its own request.

        Then what went wrong for those of which some other token stands in the place of theirs.
        """
        if not any(flight.has_sampler for flight in flights):
            return likeliest(made, self._bound.decoder), {}
        chosen: list[torch.Tensor] = []
        failed: dict[InFlight, Exception] = {}
        for number, flight in enumerate(flights):
            row = slice(number, number + 1)
            step = Made(made.logits[row], None if made.token is None else made.token[row])
            try:
                chosen.append(flight.choose(step))
            except Exception as error:
                failed[flight] = error
                chosen.append(flight.token)
        return _joined(chosen), failed

    def _take(self, flight: InFlight, read: Callable[[], int]) -> None:
        """The next token of an answer, in a turn of its request. Who is told of its end may fail by no fault of the request's."""
        ended: list[Outcome] = []

        def take() -> None:
            if flight.take(read()):
                ended.append(flight.outcome())

        if self._turn(flight, None, take) and ended:
            self._leave(flight)
            flight.job.end(ended[0])

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
        if work is not None or waited is not None:
            flight.seen = self._turns
        if then is not None:
            then.append(flight)
        return True

    def _fail(self, flight: InFlight, error: Exception) -> None:
        flight.note_captures()  # which are of nobody else
        self._leave(flight)
        flight.job.end(error)

    def _leave(self, flight: InFlight) -> None:
        for group in (self._packed, self._waiting, self._prefilling, self._decoding):
            if flight in group:
                group.remove(flight)
        flight.close()
        self._kv = None  # which may hold it


def _encode_part(flight: InFlight, n: int, encoded: list[tuple[int, int]]) -> None:
    encoded.append((flight.job.number, flight.encode_part(n)))


def _beside(flight: InFlight, work: Callable[[], None]) -> None:
    with torch.inference_mode():
        flight.tracer.fill("queued")
        work()


def unpackers(device: torch.device, n_threads: int = _UNPACKING) -> ThreadPoolExecutor:
    """Threads that compute with one of OpenMP's each; torch would have new threads of anybody's do so too, unless told again.

    The device is their current one, where Triton launches its kernels: each thread has one of its own.
    """
    n, ready = torch.get_num_threads(), threading.Barrier(n_threads + 1)

    def alone() -> None:
        torch.set_num_threads(1)
        ready.wait()
        if device.type == "cuda":
            torch.cuda.set_device(device)

    pool = ThreadPoolExecutor(n_threads, thread_name_prefix="fastvl-unpack", initializer=alone)
    for _ in range(n_threads):
        pool.submit(int)
    ready.wait()
    torch.set_num_threads(n)
    return pool


def _all(flights: Iterable[InFlight], name: str) -> ExitStack:
    """A stage that several requests share."""
    return shared_span([flight.tracer for flight in flights], name)


def _packed(pixels: Sequence[Pixels]) -> Pixels:
    """The images of several requests as those of one."""
    return Pixels(patches=torch.cat([one.patches for one in pixels]), shapes=tuple(shape for one in pixels for shape in one.shapes))


def _joined(parts: Sequence[torch.Tensor]) -> torch.Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(list(parts))
