"""The thread that computes: one a device, whoever asks; what it is given runs as if the caller ran it, and may be interrupted."""

from __future__ import annotations

import contextvars
import gc
import signal
import subprocess
import sys
import threading
import time
import weakref

import pytest
import torch

from fastvl_lab import Lab, Request
from fastvl_lab.engine_thread import EngineThread
from fastvl_lab.errors import TimeLimitError


@pytest.fixture
def thread() -> EngineThread:
    return EngineThread("fastvl-engine-test")


def test_all_of_a_device_share_a_thread_which_ends_with_the_last_of_them() -> None:
    device = torch.device("meta")  # no lab is on it
    first, second = EngineThread.of(device), EngineThread.of(torch.device("meta"))
    assert first is second
    ran_on = first.call(threading.current_thread)
    assert ran_on is second.call(threading.current_thread)
    assert ran_on is not threading.current_thread()
    del first, second
    gc.collect()
    ran_on.join(5)
    assert not ran_on.is_alive()
    assert EngineThread.of(device).call(threading.current_thread) is not ran_on


def test_errors_and_values_come_back(thread: EngineThread) -> None:
    assert thread.call(lambda: 7) == 7
    with pytest.raises(KeyError, match="lost"):
        thread.call(lambda: {}["lost"])
    assert thread.call(lambda: 8) == 8


def test_work_asked_for_on_the_thread_is_done_at_once(thread: EngineThread) -> None:
    assert thread.call(lambda: thread.call(lambda: thread.is_current))
    assert not thread.is_current


def test_work_runs_in_the_context_and_with_the_threads_of_who_asks(thread: EngineThread) -> None:
    cell = contextvars.ContextVar("cell", default="none")
    cell.set("this one")
    assert thread.call(cell.get) == "this one"
    before = torch.get_num_threads()
    try:
        for n in (1, 2):
            torch.set_num_threads(n)
            assert thread.call(torch.get_num_threads) == n
    finally:
        torch.set_num_threads(before)


def test_an_interruption_ends_the_work_and_not_the_thread(thread: EngineThread, keyboard: None) -> None:
    ended: list[str] = []

    def endless() -> None:
        try:
            while True:
                time.sleep(0.001)
        finally:
            time.sleep(0.05)
            ended.append("cleaned up")

    for number in range(3):
        threading.Timer(0.05, lambda: signal.raise_signal(signal.SIGINT)).start()
        with pytest.raises(KeyboardInterrupt):
            thread.call(endless)
        assert len(ended) == number + 1  # on return nothing of it runs
        assert thread.call(lambda: "alive") == "alive"


def test_an_interruption_while_the_thread_starts_leaves_it_ready(thread: EngineThread, monkeypatch: pytest.MonkeyPatch) -> None:
    start, done = threading.Thread.start, []

    def is_interrupted(starting: threading.Thread) -> None:
        start(starting)
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(threading.Thread, "start", is_interrupted)
        with pytest.raises(KeyboardInterrupt):
            thread.call(lambda: done.append("never asked for"))
    assert thread.call(lambda: 7) == 7
    assert done == []


def test_work_that_is_given_up_before_its_turn_is_not_done(thread: EngineThread, keyboard: None) -> None:
    begun, go, done = threading.Event(), threading.Event(), []

    def busy() -> None:
        begun.set()
        go.wait()

    thread.submit(busy)
    begun.wait()
    waiting = thread.submit(lambda: done.append(1))
    threading.Timer(0.05, lambda: signal.raise_signal(signal.SIGINT)).start()
    threading.Timer(0.2, go.set).start()
    with pytest.raises(KeyboardInterrupt):
        waiting.result()
    assert thread.call(lambda: done) == []


def test_nothing_of_finished_work_is_kept(thread: EngineThread) -> None:
    class Large:
        pass

    job = thread.submit(Large)
    seen = weakref.ref(job.result())  # the thread may still be on its way from this job to the next
    gc.collect()
    assert seen() is None


def test_nothing_of_work_that_failed_is_kept(thread: EngineThread) -> None:
    class Large:
        pass

    seen: list[weakref.ref[Large]] = []

    def fails() -> None:
        large = Large()
        seen.append(weakref.ref(large))
        raise ValueError("it failed")

    job = thread.submit(fails)
    with pytest.raises(ValueError, match="it failed"):
        job.result()
    gc.collect()
    assert seen[0]() is None


def test_requests_of_run_and_stream_are_computed_on_one_thread(labs: dict[str, Lab], picture: bytes) -> None:
    """Whoever asks: torch's pools and cuDNN's plans are kept by thread."""
    lab, threads = labs["tiny-qwen2.5-vl"], []
    request = Request(images=[picture], prompt="Where?", max_new_tokens=3, ignore_eos=True)
    head = lab.checkpoint.model.lm_head
    handle = head.register_forward_hook(lambda *_: threads.append(threading.get_ident()))
    try:
        lab.run(request, "transformers")
        list(lab.stream(request, "transformers"))
        other = threading.Thread(target=lambda: lab.run(request, "transformers"))
        other.start()
        other.join()
    finally:
        handle.remove()
    assert len(threads) == 9
    assert len(set(threads)) == 1
    assert threads[0] != threading.get_ident()


def test_work_over_its_limit_is_interrupted_and_the_thread_goes_on(thread: EngineThread) -> None:
    def endless() -> None:
        while True:
            time.sleep(0.01)

    with pytest.raises(TimeLimitError, match=r"did not end within 0\.3 s") as raised:
        thread.call(endless, limit=0.3)
    assert not raised.value.stuck
    assert thread.call(lambda: 5, limit=1) == 5


def test_a_limit_counts_from_when_the_work_begins(thread: EngineThread) -> None:
    before = thread.submit(lambda: time.sleep(0.6))
    assert thread.call(lambda: 5, limit=0.3) == 5
    before.result()


def test_a_call_that_never_comes_back_leaves_its_thread_stuck(thread: EngineThread, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastvl_lab.engine_thread.GRACE", 0.2)
    with pytest.raises(TimeLimitError, match="after its interruption") as raised:
        thread.call(lambda: time.sleep(2), limit=0.1)
    assert raised.value.stuck


LEFT = """
import torch
from fastvl_lab.engine_thread import EngineThread

thread = EngineThread.of(torch.device("cpu"))
ones = torch.ones(500, 500)
thread.submit(lambda: ([ones @ ones for _ in range(200)], print("done", flush=True)))
thread.submit(lambda: print("and after it", flush=True))
"""


def test_a_process_ends_after_the_work_that_nobody_waits_for() -> None:
    """Else the interpreter ends the thread within a product, and the process by an abort."""
    ended = subprocess.run([sys.executable, "-c", LEFT], capture_output=True, text=True, timeout=120, check=False)
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, "done\nand after it\n", "")
