"""Many requests at once: what is counted of them, and when they arrive."""

from __future__ import annotations

import dataclasses
import gc
import json
import math
import threading
import time
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from fastvl_lab import FastvlError, Lab, Request, RequestCancelledError, RequestError, Sampling, load, photo
from fastvl_lab.capture import Stages
from fastvl_lab.measure.load import Load, findings, quantile_interval, varied
from fastvl_lab.outcome import Outcome
from fastvl_lab.preprocessor.decode_image import rgb_of
from fastvl_lab.run import Run
from fastvl_lab.schedule.inbox import Job
from fastvl_lab.schedule.loop import side_by_side

TOGETHER = "fastest, cache.kv=paged, schedule.batching=continuous"
TEXT = Request(prompt="What is this?", max_new_tokens=5, ignore_eos=True)


@pytest.fixture(scope="module")
def tiny(labs: dict[str, Lab]) -> Lab:
    return labs["tiny-qwen2.5-vl"]


@pytest.mark.parametrize(
    "engine", ["transformers", "fastest", TOGETHER, *(f"{TOGETHER}, schedule.vision={x}" for x in ("ahead", "batched"))]
)
def test_each_request_has_a_run_of_its_own_with_the_tokens_that_it_has_alone(tiny: Lab, engine: str) -> None:
    request = Request(images=[photo("coffee", (84, 56))], prompt="Hi", max_new_tokens=6, ignore_eos=True)
    made = load(tiny, request, engine, concurrency=3, n=5)
    assert made.engine == engine
    assert made.how == "3 at once"
    assert not made.failures
    for number, run in enumerate(made.finished):
        assert run.tokens == tiny.run(varied(request, number), "fastest").tokens, number
        assert run.trace.stages()["queued"] > 0
        assert run.logits.untyped_storage().nbytes() == 0
        assert sum(run.trace.stages().values()) + run.trace.unaccounted_ns == run.trace.first_chunk_ns
    assert made.tokens_per_second == pytest.approx(5 * 6 / made.seconds)
    # Three are there at the start, the fourth comes when one of them has ended.
    ends = [begun + run.chunks[-1].time for begun, run in zip(made.begun, made.finished, strict=True)]
    assert made.begun[2] < 0.05
    assert made.begun[3] >= min(ends[:3])
    assert made.seconds == pytest.approx(max(ends), abs=0.05)
    shared = [step for step in made.steps if len(step.decoded) > 1]
    assert bool(shared) == ("continuous" in engine)


def test_a_seed_makes_the_same_text_alone_and_under_load(tiny: Lab) -> None:
    sampling = Sampling(temperature=0.9, top_p=0.95, seed=11)
    request = Request(images=[photo("coffee", (84, 56))], prompt="Hi", max_new_tokens=6, ignore_eos=True, sampling=sampling)
    made = load(tiny, request, TOGETHER, concurrency=3, n=4)
    assert [run.text for run in made.finished] == [tiny.run(varied(request, n), "fastest").text for n in range(4)]
    assert max(len(step.decoded) for step in made.steps) == 3
    greedy = dataclasses.replace(request, sampling=Sampling())
    assert made.finished[0].tokens != tiny.run(greedy, "fastest").tokens


def test_pictures_differ_from_request_to_request(tiny: Lab) -> None:
    request = Request(images=[photo("coffee", (84, 56))], prompt="Hi")
    pictures = [np.asarray(rgb_of(varied(request, number).image_inputs[0])) for number in range(4)]
    assert all(picture.shape == pictures[0].shape for picture in pictures)
    assert all((one != other).mean() > 0.5 for n, one in enumerate(pictures) for other in pictures[:n])
    assert varied(request, 0) is request
    reused = load(tiny, request, TOGETHER.replace("cache.kv=paged", "cache.kv=paged, cache.image_reuse=on"), concurrency=2, n=4)
    assert all(run.kind != "cache_hit" for run in reused.finished), "also not what warmed it up"
    small = Request(images=[photo("coffee", (28, 28))], prompt="Hi")
    assert len({varied(small, number).image_inputs[0].data for number in range(60)}) == 60, "however many there are"


def test_arrivals_are_at_random_by_the_seed_or_as_recorded(tiny: Lab) -> None:
    drawn = [load(tiny, TEXT, TOGETHER, rate=200, n=12, seed=seed) for seed in (0, 0, 1)]
    planned = [np.diff(one.begun) for one in drawn]
    assert all(len(gaps) == 11 and (gaps >= 0).all() for gaps in planned)
    assert np.abs(planned[0] - planned[1]).max() < 0.1  # the same, but for when threads woke
    assert drawn[0].how == "200 a second"
    recorded = load(tiny, TEXT, TOGETHER, arrivals=[0.0, 0.0, 0.8])
    assert len(recorded.runs) == 3
    assert recorded.begun[1] < 0.3 < recorded.begun[2] < 2.0


@pytest.fixture
def timed(run_of: Callable[..., Run]) -> Callable[[float, list[float], float], Run]:
    """Makes a run from its TTFT, the gaps after it and its time in the queue, all in seconds."""
    return lambda ttft, gaps, queued: run_of(("queued", 0, queued * 1e3), chunks=np.cumsum([ttft, *gaps]).tolist())


def test_what_is_counted(timed: Callable[..., Run]) -> None:
    runs = (timed(0.1, [0.01, 0.03], 0.02), None, timed(0.3, [0.02], 0.2))
    made = Load(engine="x", concurrency=2, begun=(0.0, 0.0, 0.1), runs=runs, failures={1: "no room"}, steps=(), seconds=2.0)
    assert made.tokens_per_second == 5 / 2
    assert made.requests_per_second == 1.0
    assert made.values("ttft") == [0.1, 0.3]
    assert made.values("gap") == pytest.approx([0.01, 0.03, 0.02])
    assert made.values("tpot") == pytest.approx([0.02, 0.02])
    assert made.values("queued") == pytest.approx([0.02, 0.2])
    assert made.values("end_to_end") == pytest.approx([0.14, 0.32])
    assert made.goodput(ttft=0.2) == 0.5
    assert made.goodput(tpot=0.01) == 0.0
    assert (made.goodput(end_to_end=0.2), made.goodput(end_to_end=0.4), made.goodput(end_to_end=0.4, ttft=0.05)) == (0.5, 1.0, 0.0)
    row = made.summary()
    assert (row["requests"], row["failed"], row["ttft_p50_ms"]) == (3, 1, pytest.approx(200))
    assert row["ttft_p99_ms_low"] is None, "two samples bound no percentile"
    assert "request 1 failed: no room" in repr(made)
    assert "p99 298.0 ms (too few for an interval of p50, p90, p99)" in repr(made)
    assert "cold" not in repr(made)
    cold = dataclasses.replace(made, runs=(*runs[:2], dataclasses.replace(runs[2], kind="cold")))
    assert "1 of 2 requests were cold, and are in these numbers" in repr(cold)
    with pytest.raises(RequestError, match="no 'latency' is measured of a load; the choices are ttft, tpot"):
        made.values("latency")  # type: ignore[arg-type]
    with pytest.raises(RequestError, match="percent is 101; it must be a number from 0 to 100"):
        made.percentile("ttft", 101)


def test_a_finding_calls_longer_only_what_is_shown_to_be(timed: Callable[..., Run]) -> None:
    def of(ttft: float, n: int = 10) -> Load:
        runs = tuple(timed(ttft + number / 1e3, [0.01], 0.0) for number in range(n))
        return Load(engine="x", begun=(0.0,) * n, runs=runs, failures={}, steps=(), seconds=ttft * 10)

    said = findings({"slow": of(0.2), "fast": of(0.1), "same": of(0.202), "few": of(0.1, 3)}, "slow")
    assert len(said) == 3
    assert said[0].startswith("fast makes 2.00 times the tokens a second of slow; its TTFT p50 is 104.5 ms [101.0, 108.0] against")
    assert said[0].endswith("204.5 ms [201.0, 208.0]: shorter, 0.51 times")
    assert said[1].endswith(": no difference is shown")
    assert "101.0 ms (too few for an interval)" in said[2]
    assert said[2].endswith("no difference is shown")


def test_an_interval_of_a_percentile_holds_it_as_often_as_it_says() -> None:
    rng = np.random.default_rng(0)
    for quantile, n in ((0.5, 30), (0.9, 60)):
        true = -math.log(1 - quantile)  # of an exponential distribution
        held = [
            low <= true <= high
            for _, low, high in (quantile_interval(rng.exponential(size=n).tolist(), quantile) for _ in range(400))
        ]
        assert 0.93 <= np.mean(held) <= 0.995, (quantile, np.mean(held))
    assert all(math.isnan(end) for end in quantile_interval([1.0] * 20, 0.99)[1:])
    for quantile, end in ((0.0, 1.0), (1.0, 9.0)):  # the least and the most that was seen, of which nobody knows more
        found = quantile_interval([9.0, 1.0, *[5.0] * 20], quantile)
        assert found.median == end
        assert all(map(math.isnan, found[1:]))
    median, low, high = quantile_interval(range(5_001), 0.5)  # as many as a load has gaps
    assert (median, 2500 - low, high - 2500) == (2500, pytest.approx(70, abs=2), pytest.approx(70, abs=2))


def test_it_is_written_and_read_back(tiny: Lab) -> None:
    made = load(tiny, TEXT, TOGETHER, concurrency=2, n=3)
    again = Load.from_record(json.loads(json.dumps(made.to_record())))
    assert again.summary() == made.summary()
    assert again.steps == made.steps
    assert [run.tokens for run in again.finished] == [run.tokens for run in made.finished]


def test_a_failure_is_a_row_and_not_the_end(tiny: Lab) -> None:
    bad = dataclasses.replace(TEXT, max_new_tokens=10**6)
    made = load(tiny, [TEXT, bad], TOGETHER, concurrency=2, n=4, warm_up=0)
    assert [run is None for run in made.runs] == [False, True, False, True]
    assert "together over session_len" in made.failures[1]
    with pytest.raises(FastvlError, match="no request of the load was served: the prompt has"):
        load(tiny, [bad], TOGETHER, concurrency=2, n=2, warm_up=0)


def test_a_load_can_be_stopped(tiny: Lab) -> None:
    stop, ended = threading.Event(), list[object]()

    def note(number: int, run: Run | Exception) -> None:
        ended.append(run)
        stop.set()

    made = load(tiny, TEXT, TOGETHER, concurrency=2, n=50, stop=stop, on_run=note)
    assert len(made.finished) <= 2
    assert all(isinstance(run, Run | RequestCancelledError) for run in ended)


@pytest.mark.parametrize("engine", ["fastest", TOGETHER, "elsewhere"])
def test_what_on_run_raises_ends_the_load_and_is_raised(tiny: Lab, monkeypatch: pytest.MonkeyPatch, engine: str) -> None:
    """Whatever thread it is called on; nobody is told of the requests that end with the load."""
    if engine == "elsewhere":
        monkeypatch.setattr(tiny, "serve", lambda _, inbox, on_step: side_by_side(_lost, inbox, lingers=True))
    told: list[int] = []

    def fails(number: int, run: Run | Exception) -> None:
        told.append(number)
        if len(told) == 1:
            raise ZeroDivisionError("of who asked")

    with pytest.raises(ZeroDivisionError, match="of who asked"):
        load(tiny, TEXT, "fastest" if engine == "elsewhere" else engine, concurrency=2, n=20, warm_up=0, on_run=fails)
    assert len(told) == 1


def _lost(job: Job) -> Outcome:
    raise RuntimeError("lost")


def test_a_request_that_failed_is_let_go_while_others_are_served(tiny: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its error's traceback would hold all that it had computed."""
    held: list[weakref.ref[torch.Tensor]] = []
    alive: list[bool] = []
    prefill = Stages.prefill

    def fails_first(self: Stages, hidden: torch.Tensor, *more: Any) -> torch.Tensor:
        if not held:
            held.append(weakref.ref(hidden))
            raise RuntimeError("lost")
        alive.append(held[0]() is not None)
        return prefill(self, hidden, *more)

    monkeypatch.setattr(Stages, "prefill", fails_first)
    for engine in ("fastest", TOGETHER):
        held.clear()
        gc.disable()
        try:
            made = load(tiny, TEXT, engine, concurrency=1, n=3, warm_up=0)
        finally:
            gc.enable()
        assert made.failures == {0: "RuntimeError: lost"}
    assert alive == [False] * 4


def test_what_interrupts_a_load_does_not_wait_for_requests_that_were_to_come(tiny: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Lab, "serve", interrupted)
    began = time.perf_counter()
    with pytest.raises(KeyboardInterrupt):
        load(tiny, TEXT, TOGETHER, arrivals=[0.0, 60.0], warm_up=0)
    assert time.perf_counter() - began < 30


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({}, "nothing says when requests arrive; give one of concurrency, rate, arrivals"),
        ({"concurrency": 2, "rate": 1.0}, "concurrency and rate say when"),
        ({"concurrency": 0}, "concurrency is 0; it must be a whole number of at least 1"),
        ({"rate": math.inf}, "rate is inf; it must be a finite number"),
        ({"rate": "fast"}, "rate is 'fast'; it must be a finite number"),
        ({"arrivals": [1.0, 0.5]}, "it must be seconds from 0 on, in order"),
        ({"arrivals": [0.0, math.nan]}, r"arrivals is \[0.0, nan\]; it must be seconds from 0 on, in order"),
        ({"arrivals": 3}, "arrivals is 3; it must be seconds"),
        ({"arrivals": np.array([-1.0, 2.0])}, "it must be seconds from 0 on"),
        ({"arrivals": [0.0], "n": 2}, "n is 2, and arrivals has 1"),
        ({"concurrency": 1, "warm_up": -1}, "warm_up is -1"),
    ],
)
def test_what_makes_no_load_is_refused_in_a_sentence(tiny: Lab, given: dict[str, Any], said: str) -> None:
    with pytest.raises(RequestError, match=said):
        load(tiny, TEXT, TOGETHER, **given)
    for none, what in ((None, "NoneType"), ([TEXT, "x"], "str"), ("x", "str")):
        with pytest.raises(RequestError, match=f"the request is a {what}; give a fastvl_lab.Request"):
            load(tiny, none, TOGETHER, concurrency=1)  # type: ignore[arg-type]
