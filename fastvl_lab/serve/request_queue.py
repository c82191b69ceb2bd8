"""The queue before the engine: so many may wait, and the recipe's schedule says who is served with whom."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

from fastvl_lab.errors import FastvlError
from fastvl_lab.lab import Lab, is_lasting
from fastvl_lab.recipe import Recipe
from fastvl_lab.request import Chunk, Request
from fastvl_lab.run import Run
from fastvl_lab.schedule.inbox import Inbox
from fastvl_lab.serve.metrics import Metrics


class QueueFullError(FastvlError):
    """As many requests wait, or as many of their bytes are held, as may."""


class HeldBytes:
    """The bytes of the requests that a server holds, of which there are so many at most; of one thread."""

    def __init__(self, most: int) -> None:
        self.most, self.n = most, 0

    def share(self) -> Share:
        """One request's, of none yet."""
        return Share(self)


class Share:
    """The bytes of one request among those that are held."""

    def __init__(self, held: HeldBytes) -> None:
        self._held, self._n = held, 0

    def take(self, n: int) -> None:
        """Hold so many more; raises `QueueFullError` where there is no room for them."""
        held = self._held
        if held.n + n > held.most:
            raise QueueFullError(f"the requests under way have {held.n} bytes, and {held.most} are the limit; try again later")
        held.n, self._n = held.n + n, self._n + n

    def give_back(self) -> None:
        self._held.n, self._n = self._held.n - self._n, 0


@dataclass(frozen=True, kw_only=True, eq=False)
class Finished:
    """A request's end: its run, whose clock began when its body was there."""

    run: Run


Event = Chunk | Finished | BaseException


# What becomes of requests, each with the number of its own; bounded by the lengths of their answers.
Events = asyncio.Queue[tuple[int, Event]]


class QueuedRequest:
    """One request that waits or is being served. `events` is filled as the engine makes them, and never holds it up.

    number, events: where a client's one request is several here (`n`), its place among them, and the queue that they share.
    since_ns: when its body was there, from when its time is counted (`time.perf_counter_ns`); by default now.
    """

    def __init__(self, request: Request, number: int = 0, events: Events | None = None, since_ns: int | None = None) -> None:
        self.request, self.number, self.since_ns = request, number, since_ns
        self.stop = threading.Event()
        self.events: Events = asyncio.Queue() if events is None else events
        self._loop = asyncio.get_running_loop()

    def send(self, event: Event) -> None:
        """From the thread that computes."""
        self._loop.call_soon_threadsafe(self.events.put_nowait, (self.number, event))


class RequestQueue:
    """Requests for one recipe of a lab, and the thread that has it serve them as they come.

    max_queue: how many may wait or be read. warm_up: requests to serve first, once decode steps are ready (`Lab.warm_up`).
    `failure`: of the warm-up, or what no later request recovers from, where there was such an error.
    """

    def __init__(
        self,
        lab: Lab,
        recipe: Recipe,
        metrics: Metrics,
        *,
        max_queue: int,
        warm_up: tuple[Request, ...],
    ) -> None:
        self._lab, self._recipe, self._metrics, self._max_queue, self._warm_up = lab, recipe, metrics, max_queue, warm_up
        self._inbox = Inbox()
        self._waiting: set[QueuedRequest] = set()
        self._running: set[QueuedRequest] = set()
        self._reserved = 0  # places of requests that are still being read
        self._changing = threading.Lock()
        self.ready = threading.Event()
        self.failure: BaseException | None = None
        self._thread = threading.Thread(target=self._serve_all, name="fastvl-queue", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def close(self) -> None:
        """Serve what is queued, then end the thread."""
        self._inbox.close()
        if self._thread.is_alive():
            self._thread.join()

    @contextmanager
    def place(self) -> Iterator[Callable[[QueuedRequest], None]]:
        """A place for a request that is still being read, and what puts it there; raises `QueueFullError` if there is none.

        So that nothing is read for which there is no room.
        """
        with self._changing:
            if len(self._waiting) + self._reserved >= self._max_queue:
                raise QueueFullError(f"{self._max_queue} requests wait already, the limit; try again later")
            self._reserved += 1
        taken = False

        def put(queued: QueuedRequest) -> None:
            nonlocal taken
            job = self._lab.job(
                queued.request,
                self._recipe,
                on_begin=partial(self._move, queued, self._running),
                on_chunk=queued.send,
                on_end=partial(self._end, queued),
                stop=queued.stop,
                since_ns=queued.since_ns,
            )
            with self._changing:
                taken, self._reserved = True, self._reserved - 1
            self._move(queued, self._waiting)
            self._inbox.put(job)

        try:
            yield put
        finally:
            if not taken:
                with self._changing:
                    self._reserved -= 1

    def give_up(self, queued: QueuedRequest) -> None:
        """Nobody wants its answer any more: it leaves the queue, or the engine at its next stage or step."""
        queued.stop.set()
        self._inbox.drop(queued.request)
        if queued in self._waiting:
            self._move(queued, None)

    def _serve_all(self) -> None:
        try:
            self._lab.warm_up(self._recipe, self._warm_up, progress=False)
        except Exception as error:
            self.failure = error
        self.ready.set()
        while not self._inbox.is_over():
            try:
                self._lab.serve(self._recipe, self._inbox, self._metrics.stepped, lingers=False)
            except Exception as error:  # of none of the requests: the recipe cannot be bound, or the loop has a fault
                self.failure = error
                for job in self._inbox.take(wait=False):
                    job.end(error)

    def _end(self, queued: QueuedRequest, run: Run | Exception) -> None:
        """The server lives on whatever a request ended with, if the device does."""
        self._move(queued, None)
        if isinstance(run, Exception):
            if is_lasting(run):
                self.failure = run
            queued.send(run)
        else:
            self._metrics.served(run)
            queued.send(Finished(run=run))

    def _move(self, queued: QueuedRequest, to: set[QueuedRequest] | None) -> None:
        """From those who wait or are served to others, or to none."""
        with self._changing:
            for group in (self._waiting, self._running):
                group.discard(queued)
            if to is not None:
                to.add(queued)
            self._metrics.waiting.set(len(self._waiting))
            self._metrics.running.set(len(self._running))
