"""The bar to beat: chosen from a list, and started, where that is needed, beside everything else."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from fastvl_lab import EndpointError, RequestCancelledError, workbench
from fastvl_lab.engine import EngineLike
from fastvl_lab.lab import Lab
from fastvl_lab.measure.recipes import STOCK
from fastvl_lab.view.workbench import Workbench, rivals

pytest.importorskip("anywidget")
pytestmark = pytest.mark.usefixtures("quick_panels")


class Starter:
    """A server that starts when it is let, or fails; the engine behind it is the baseline, so that no other is needed."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.begun, self.ready, self.fails, self.stopped, self.starts = threading.Event(), threading.Event(), False, False, 0
        monkeypatch.setattr(rivals, "must_start", lambda rival: rival == "baseline")
        monkeypatch.setattr(rivals, "start", self.start)

    def start(self, lab: Lab, rival: EngineLike, tell: Callable[[str], object], stop: threading.Event) -> None:
        self.starts += 1
        self.begun.set()
        for second in range(2000):
            tell(f"{rival} starts, {second} s")
            if self.fails:
                raise EndpointError(f"{rival} ended with exit code 1 before it was ready: no such model")
            if stop.is_set():
                self.stopped = True
                raise RequestCancelledError("given up")
            if self.ready.wait(0.02):
                return


@pytest.fixture
def starter(monkeypatch: pytest.MonkeyPatch) -> Iterator[Starter]:
    made = Starter(monkeypatch)
    yield made
    made.ready.set()


@pytest.fixture
def bench(starter: Starter) -> Iterator[Workbench]:
    made = workbench("tiny-qwen2.5-vl", "coffee", image_size=(56, 56), max_new_tokens=2, repeats=1, device="cpu")
    assert made.wait(60)
    yield made
    made.close()


def until(holds: Callable[[], bool], seconds: float = 20) -> None:
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end
        time.sleep(0.02)


def test_the_list_says_what_keeps_an_engine_out(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "sglang").touch(mode=0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("FASTVL_LAB_VLLM", str(tmp_path / "none"))
    for variable in ("FASTVL_LAB_SGLANG", "FASTVL_LAB_LMDEPLOY"):
        monkeypatch.delenv(variable, raising=False)
    known = {rival.text: rival for rival in rivals.known_rivals()}
    assert list(known)[:3] == [STOCK, "baseline", "fastest"]
    assert set(known) == {STOCK, "baseline", "fastest", "vllm", "sglang", "lmdeploy"}
    assert all(known[text].unmet is None for text in (STOCK, "baseline", "fastest"))
    assert "none', which is no program" in str(known["vllm"].unmet)
    assert "no program lmdeploy on the PATH; set FASTVL_LAB_LMDEPLOY" in str(known["lmdeploy"].unmet)


def test_an_engine_that_is_found_here_starts_and_is_measured(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The engine is a stub that says what it wants, so its own tokens are wrong."""
    stub = Path(__file__).parents[1] / "processes" / "stub_engine.py"
    program = tmp_path / "vllm"
    program.write_text(f'#!/bin/sh\nexec {sys.executable} -S {stub} "$@"\n')
    program.chmod(0o755)
    monkeypatch.setenv("FASTVL_LAB_VLLM", str(program))
    bench = workbench("tiny-qwen2.5-vl", "coffee", image_size=(56, 56), max_new_tokens=2, repeats=1, device="cpu")
    assert bench.wait(60)
    assert {rival["text"]: rival["unmet"] for rival in bench.widget.choices["rivals"]}["vllm"] is None
    bench.ask(rival="vllm")
    assert bench.wait(60)
    assert bench.widget.live["error"] == ""
    comparison = bench.history[-1].comparison
    assert comparison is not None
    assert comparison.reference == "vllm"
    monkeypatch.setenv("STUB_FAILS", "argument")
    bench.ask(rival="vllm, graphs=off")  # another server
    assert bench.wait(60)
    until(lambda: "unrecognized arguments: --warp" in bench.widget.live["error"])
    assert bench.widget.asked["rival"] == STOCK
    bench.close()


def test_recipes_run_while_a_bar_to_beat_starts_and_the_newest_is_measured_once_it_is_ready(
    bench: Workbench, starter: Starter
) -> None:
    bench.ask(rival="baseline")
    assert starter.begun.wait(20)
    until(lambda: str(bench.widget.live["starting"]).startswith("baseline starts"))
    bench.controls["vit.patch_embed"].value = "linear"
    bench.controls["vit.positions"].value = "cached"
    until(lambda: len(bench.history) >= 3 and bench.widget.live["state"] == "idle")
    assert bench.history[-1].recipe == bench.recipe  # answered, and not compared yet
    assert bench.history[-1].comparison is None
    assert not bench.wait(0.1)  # something that was asked for is still to come
    starter.ready.set()
    assert bench.wait(60)
    assert starter.starts == 1
    comparison = bench.history[-1].comparison
    assert comparison is not None
    assert comparison.reference == "baseline"
    assert bench.widget.live["starting"] == ""
    measured = len(bench.history)
    bench.controls["vit.rope"].value = "halves"
    assert bench.wait(60)
    assert (len(bench.history), starter.starts) == (measured + 1, 1)  # it runs already
    assert bench.history[-1].comparison is not None


def test_a_start_that_fails_is_a_sentence_and_transformers_is_the_bar_again(bench: Workbench, starter: Starter) -> None:
    starter.fails = True
    bench.ask(rival="baseline")
    assert bench.wait(60)
    until(lambda: "ended with exit code 1" in bench.widget.live["error"])
    assert bench.widget.live["error"] == "baseline ended with exit code 1 before it was ready: no such model"
    assert bench.widget.asked["rival"] == STOCK
    assert bench.wait(60)
    comparison = bench.history[-1].comparison
    assert comparison is not None
    assert comparison.reference == STOCK
    assert bench.widget.live["starting"] == ""


@pytest.mark.parametrize("give_up", [lambda bench: bench.stop(), lambda bench: bench.ask(rival=STOCK)], ids=["stop", "another"])
def test_a_start_is_given_up_by_stop_and_by_another_bar_to_beat(
    bench: Workbench, starter: Starter, give_up: Callable[[Workbench], None]
) -> None:
    bench.ask(rival="baseline")
    assert starter.begun.wait(20)
    give_up(bench)
    until(lambda: starter.stopped)
    assert bench.wait(60)
    until(lambda: bench.widget.live["starting"] == "")
    assert bench.widget.live["error"] == ""
    bench.ask(rival="baseline")  # and starts anew
    until(lambda: starter.starts == 2)
    starter.ready.set()
    assert bench.wait(60)
    comparison = bench.history[-1].comparison
    assert comparison is not None
    assert comparison.reference == "baseline"
