"""The queue before the engine: one request is served at a time, in order of arrival; the rest wait, within a bound."""

from __future__ import annotations

import asyncio
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from fastvl_lab.errors import FastvlError
from fastvl_lab.lab import Lab
from fastvl_lab.recipe import Recipe
from fastvl_lab.request import Chunk, Request
from fastvl_lab.run import Run
from fastvl_lab.serve.metrics import Metrics


class QueueFullError(FastvlError):
    """As many requests wait as may."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Finished:
    """A request's end: its run, whose clock began when it was queued."""

    run: Run


Event = Chunk | Finished | BaseException


class QueuedRequest:
    """One request that waits or is being served. `events` is filled as the engine makes them, and never holds it up."""

    def __init__(self, request: Request) -> None:
        self.request = request
        self.since = time.monotonic()
        self.stop = threading.Event()
        self.events: asyncio.Queue[Event] = asyncio.Queue()  # bounded by the answer's length
        self._loop = asyncio.get_running_loop()

    def send(self, event: Event) -> None:
        """From the thread that computes."""
        self._loop.call_soon_threadsafe(self.events.put_nowait, event)


class RequestQueue:
    """Requests for one recipe of a lab, and the thread that hands them to it, one after another.

    max_queue: how many may wait or be read. warm_up: requests to serve first.
    `failure` is why no later request can be served, if that is so.
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
        self._waiting: deque[QueuedRequest] = deque()
        self._reserved = 0  # places of requests that are still being read
        self._changed = threading.Condition()
        self._closed = False
        self.ready = threading.Event()
        self.failure: BaseException | None = None
        self._thread = threading.Thread(target=self._serve_all, name="fastvl-queue", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def close(self) -> None:
        """Serve what is queued, then end the thread."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        if self._thread.is_alive():
            self._thread.join()

    @contextmanager
    def place(self) -> Iterator[Callable[[QueuedRequest], None]]:
        """A place for a request that is still being read, and what puts it there; raises `QueueFullError` if there is none.

        So that nothing is read for which there is no room.
        """
        with self._changed:
            if len(self._waiting) + self._reserved >= self._max_queue:
                raise QueueFullError(f"{self._max_queue} requests wait already, the limit; try again later")
            self._reserved += 1
        taken = False

        def put(queued: QueuedRequest) -> None:
            nonlocal taken
            with self._changed:
                taken, self._reserved = True, self._reserved - 1
                self._waiting.append(queued)
                self._metrics.waiting.set(len(self._waiting))
                self._changed.notify()

        try:
            yield put
        finally:
            if not taken:
                with self._changed:
                    self._reserved -= 1

    def give_up(self, queued: QueuedRequest) -> None:
        """Nobody wants its answer any more: out of the queue, or, if it is being served, over at its next stage or step."""
        queued.stop.set()
        with self._changed:
            if queued in self._waiting:
                self._waiting.remove(queued)
                self._metrics.waiting.set(len(self._waiting))

    def _serve_all(self) -> None:
        try:
            if self._warm_up:
                self._lab.warm_up(self._recipe, self._warm_up, progress=False)
        except Exception as error:
            self.failure = error
        self.ready.set()
        while (queued := self._next()) is not None:
            with self._metrics.running.track_inprogress():
                queued.send(self._serve(queued))

    def _next(self) -> QueuedRequest | None:
        with self._changed:
            self._changed.wait_for(lambda: self._waiting or self._closed)
            queued = self._waiting.popleft() if self._waiting else None
            self._metrics.waiting.set(len(self._waiting))
            return queued

    def _serve(self, queued: QueuedRequest) -> Event:
        waited = time.monotonic() - queued.since
        try:
            run = self._lab.run(queued.request, self._recipe, on_chunk=queued.send, stop=queued.stop)
        except Exception as error:  # the server lives on, if the device does
            if _is_lasting(error):
                self.failure = error
            return error
        self._metrics.served(run, waited)
        return Finished(run=run.behind("queued", waited))


def _is_lasting(error: Exception) -> bool:
    """Whether CUDA reports what no later call in this process recovers from, such as an illegal access; want of memory passes."""
    text = str(error)
    lost = isinstance(error, torch.AcceleratorError) or "CUDA error" in text or "Error [CUDA]" in text  # the last is Triton's
    return lost and not isinstance(error, FastvlError) and "out of memory" not in text and "ALLOC_FAILED" not in text
