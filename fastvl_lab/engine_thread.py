"""The one thread of a process that computes on a device, whoever asks: what torch and cuDNN keep by thread is built once.

OpenMP keeps a pool of threads for each thread that computes, and lets none of them wait awake once they are more than the cores;
cuDNN keeps the plans of its attention by thread. So all labs of a device share a thread, and one request at a time is served.
"""

from __future__ import annotations

import atexit
import contextvars
import ctypes
import queue
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, Generic, TypeVar, cast

import torch

from fastvl_lab.errors import RequestError, TimeLimitError

T = TypeVar("T")

# A thread belongs to the process, as torch's pools of threads do; it ends with the last lab that holds it.
_THREADS: weakref.WeakValueDictionary[str, EngineThread] = weakref.WeakValueDictionary()
_MAKING = threading.Lock()

# Seconds after which a waiting caller looks up: a signal that another thread was given does not wake it.
_LOOK_UP = 0.1

# Seconds that interrupted work has to come back to Python.
GRACE = 10.0

# Seconds for which a process that ends waits for work that nobody waits for.
_LEAVING = 5.0


class Job(Generic[T]):
    """Work that has been handed to an engine thread, and what became of it.

    It runs in the context of who asked (so that what it prints appears in the notebook cell that asked) and with as many threads of
    torch's as that thread would compute with.
    """

    def __init__(self, work: Callable[[], T]) -> None:
        self._work: Callable[[], Any] = work
        self._context, self._n_threads = contextvars.copy_context(), torch.get_num_threads()
        self._changing = threading.Lock()
        self._thread: int | None = None  # while it runs
        self._began: float | None = None
        self._given_up = False
        self._done = threading.Event()
        self._value: Any = None
        self._error: BaseException | None = None

    def run(self) -> None:
        """Do the work, on the engine thread."""
        try:
            with self._changing:
                if self._given_up:
                    return
                self._thread, self._began = threading.get_ident(), time.perf_counter()
            try:
                if torch.get_num_threads() != self._n_threads:
                    torch.set_num_threads(self._n_threads)
                self._value = self._context.run(self._work)
            finally:
                with self._changing:
                    _raise_in(self._thread, None)  # an interruption that came too late
                    self._thread = None
        except BaseException as error:  # whose call it is will see it
            self._error = error
        finally:
            self._work, self._context = _nothing, contextvars.Context()
            self._done.set()

    def result(self, *, limit: float | None = None) -> T:
        """Wait for the end: the value, or the error; once, for the job keeps neither.

        An interruption interrupts the work too, and waits for its end. limit: seconds after which work that has begun is stopped
        at its next step of Python, and a `TimeLimitError` raised. No Python stops a call into a library that never returns: after
        `GRACE` more it is left behind, and the thread is `stuck`.
        """
        try:
            while not self._done.wait(_LOOK_UP):
                if limit is not None and (began := self._began) is not None and time.perf_counter() - began > limit:
                    raise TimeLimitError(f"it did not end within {limit:.3g} s")
        except TimeLimitError as error:
            self.interrupt()
            if not self._done.wait(GRACE):
                raise TimeLimitError(f"{error}, and {GRACE:g} s after its interruption it had not returned", stuck=True) from None
            raise
        except BaseException:
            self.interrupt()
            self._done.wait()
            raise
        (value, failure), (self._value, self._error) = (self._value, self._error), (None, None)
        try:
            if failure is not None:
                raise failure
            return cast(T, value)
        finally:
            del failure  # its traceback has this frame

    def wait(self) -> None:
        """Until it has ended, however."""
        self._done.wait()

    def interrupt(self) -> None:
        """Raise KeyboardInterrupt in the work at its next step of Python; work that has not begun never will."""
        if not self.cancel():
            with self._changing:
                if self._thread is not None:
                    _raise_in(self._thread, KeyboardInterrupt)

    def cancel(self) -> bool:
        """Whether it had not begun; then it never will."""
        with self._changing:
            if self._thread is None and not self._done.is_set():
                self._given_up = True
            return self._given_up


class EngineThread:
    """The thread of a device; it starts with the first work, and ends when nobody holds this object any more."""

    def __init__(self, name: str) -> None:
        self._jobs: queue.SimpleQueue[Job[Any] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=_serve, args=(self._jobs,), name=name, daemon=True)
        self._starting = threading.Lock()
        self._telling = threading.local()
        at_exit = partial(_leave, self._jobs, self._thread)
        atexit.register(at_exit)
        weakref.finalize(self, _let_end, self._jobs, at_exit).atexit = False

    @classmethod
    def of(cls, device: torch.device) -> EngineThread:
        """That of the device, made when it is first asked for."""
        device = of_caller(device)
        with _MAKING:
            thread = _THREADS.get(str(device))
            if thread is None:
                thread = _THREADS[str(device)] = cls(f"fastvl-engine-{device}")
            return thread

    @property
    def is_current(self) -> bool:
        """Whether the caller is on this thread."""
        return threading.current_thread() is self._thread

    @contextmanager
    def telling(self) -> Iterator[None]:
        """The calling thread, this one or another, tells somebody of the work under way here, which waits for it."""
        self._telling.now = True
        try:
            yield
        finally:
            self._telling.now = False

    def check_turn(self) -> None:
        """Raise `RequestError` on a thread that is `telling`: what it asked for would never have its turn."""
        if getattr(self._telling, "now", False):
            raise RequestError(
                "a request waits for its on_chunk, on_begin and on_stage, in which the lab serves no other; ask after it"
            )

    def submit(self, work: Callable[[], T]) -> Job[T]:
        """Have it done after all that was asked for before."""
        job = Job(work)
        with self._starting:
            if not self._thread.is_alive():
                self._thread.start()
            self._jobs.put(job)
        return job

    def call(self, work: Callable[[], T], *, limit: float | None = None) -> T:
        """Have it done, and wait for it; at once where the caller is on the thread already. limit: as `Job.result` has it.

        Raises what `check_turn` raises.
        """
        if self.is_current:
            return work()
        self.check_turn()
        return self.submit(work).result(limit=limit)


def of_caller(device: torch.device) -> torch.device:
    """The device; "cuda" is the card that is current for the caller, since each thread has one of its own, at first the first."""
    if device.type == "cuda" and device.index is None:
        return torch.device("cuda", torch.cuda.current_device())
    return device


def _let_end(jobs: queue.SimpleQueue[Job[Any] | None], at_exit: Callable[[], None]) -> None:
    jobs.put(None)
    atexit.unregister(at_exit)


def _leave(jobs: queue.SimpleQueue[Job[Any] | None], thread: threading.Thread) -> None:
    """Let a thread end before the interpreter does, which would end it within a call of torch's, and the process by an abort."""
    jobs.put(None)
    if thread.is_alive():
        thread.join(_LEAVING)


def _serve(jobs: queue.SimpleQueue[Job[Any] | None]) -> None:
    while True:
        try:
            job = jobs.get()
            if job is None:
                return
            job.run()
            del job  # it holds what it has returned
        except KeyboardInterrupt:  # meant for work that had just ended
            continue


def _raise_in(thread: int | None, error: type[BaseException] | None) -> None:
    """Have a thread raise an error at its next step of Python, or forget the one that it was to raise."""
    ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread or 0), ctypes.py_object(error) if error else None)


def _nothing() -> None:
    """In the place of work that has been done, so that nothing that it held is kept."""
