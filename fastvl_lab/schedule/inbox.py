"""Where requests arrive while others are served."""

from __future__ import annotations

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

    number: by which steps name it. deliver: given its text. begin: called when it is admitted; end: given what became of it, once;
    all of them on the thread that serves.
    """

    number: int
    request: Request
    tracer: Tracer
    deliver: Deliver
    end: Callable[[Outcome | Exception], object]
    begin: Callable[[], object] = lambda: None
    since_ns: int = field(default_factory=time.perf_counter_ns)


class Inbox:
    """Jobs in order of arrival, from any threads to the one that serves; closed, when no more will come."""

    def __init__(self) -> None:
        self._jobs: list[Job] = []
        self._closed = False
        self._changed = threading.Condition()

    def put(self, job: Job) -> None:
        with self._changed:
            self._jobs.append(job)
            self._changed.notify_all()

    def __len__(self) -> int:
        """How many nobody has taken yet."""
        return len(self._jobs)

    def drop(self, request: Request) -> None:
        """Forget the jobs of a request that nobody has taken yet: their ends are never told."""
        with self._changed:
            self._jobs = [job for job in self._jobs if job.request is not request]

    def close(self) -> None:
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def take(self, *, wait: bool, most: int | None = None) -> list[Job]:
        """All that have arrived, or the first of them; where it is to wait, at least one, or none where no more will come."""
        with self._changed:
            if wait:
                self._changed.wait_for(lambda: self._jobs or self._closed)
            taken = self._jobs[:most]
            del self._jobs[:most]
            return taken

    def wait_for(self, done: Callable[[], bool]) -> None:
        """Wait until somebody is there, or it is done; whoever does it has this `look_up`."""
        with self._changed:
            self._changed.wait_for(lambda: self._jobs or done())

    def look_up(self) -> None:
        """Who waits looks again."""
        with self._changed:
            self._changed.notify_all()

    def is_over(self) -> bool:
        """Wait until somebody is there, or no more will come: whether it is that."""
        with self._changed:
            self._changed.wait_for(lambda: self._jobs or self._closed)
            return not self._jobs
