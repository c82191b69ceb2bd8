"""Where requests arrive while others are served."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from fastvl_lab.outcome import Outcome
from fastvl_lab.request import Request
from fastvl_lab.streaming.text import Deliver
from fastvl_lab.trace import Tracer


@dataclass(frozen=True, kw_only=True, eq=False)
class Job:
    """A request that was handed in, whose clock runs since `since_ns` (`time.perf_counter_ns`).

    number: by which steps name it. deliver: given its text. end: given what became of it, once, on the thread that serves.
    """

    number: int
    request: Request
    tracer: Tracer
    deliver: Deliver
    end: Callable[[Outcome | Exception], object]
    since_ns: int = field(default_factory=time.perf_counter_ns)


class Inbox:
    """Jobs in order of arrival, from any threads to the one that serves; closed, when no more will come."""

    def __init__(self) -> None:
        self._jobs: queue.SimpleQueue[Job | None] = queue.SimpleQueue()
        self._closed = threading.Event()

    def put(self, job: Job) -> None:
        self._jobs.put(job)

    def close(self) -> None:
        self._closed.set()
        self._jobs.put(None)

    def take(self, *, wait: bool) -> list[Job]:
        """All that have arrived; where it is to wait, at least one, or none where no more will come."""
        taken: list[Job] = []
        while True:
            try:
                job = self._jobs.get(block=wait and not taken and not self._closed.is_set())
            except queue.Empty:
                return taken
            if job is not None:
                taken.append(job)
            elif wait and not taken:
                return taken

    @property
    def is_closed(self) -> bool:
        """Whether no more will come; some may still be there."""
        return self._closed.is_set()
