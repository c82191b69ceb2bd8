"""A load is drawn as it was measured: its requests over time, whom each waited for, and its distributions."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from fastvl_lab import Lab, Load, Request, RequestError, Run, load, photo, view
from fastvl_lab.schedule.loop import Step
from fastvl_lab.view import style
from fastvl_lab.view.__main__ import main

MS = 1_000_000
CONTINUOUS = "fastest, cache.kv=paged, schedule.batching=continuous"


@pytest.fixture(scope="module")
def small(labs: dict[str, Lab]) -> Load:
    request = Request(images=[photo("coffee", (56, 56))], prompt="Hi", max_new_tokens=3, ignore_eos=True, min_pixels=3136)
    return load(labs["tiny-qwen2.5-vl"], request, CONTINUOUS, concurrency=3, n=4, warm_up=0)


def _load(*runs: Run | None, steps: Sequence[Step] = (), **changes: object) -> Load:
    made = Load(
        engine="x",
        begun=(0.0,) * len(runs),
        runs=runs,
        failures={number: "no <room>" for number, run in enumerate(runs) if run is None},
        steps=tuple(steps),
        seconds=1.0,
        concurrency=2,
    )
    return dataclasses.replace(made, **changes)  # type: ignore[arg-type]


def test_every_bar_is_a_span_at_its_place_and_every_first_chunk_is_marked(small: Load) -> None:
    figure = view.load_timeline(small)
    rows = {trace.name: trace for trace in figure.data if trace.name}
    drawn = {
        (row, stage, round(start, 6), round(length, 6))
        for stage, trace in rows.items()
        if trace.type == "bar"
        for row, start, length in zip(trace.y, trace.base, trace.x, strict=True)
    }
    spans = {
        (f"request {number}", span.name, round(begun * 1e3 + span.start_ns / 1e6, 6), round(span.duration_ns / 1e6, 6))
        for number, (begun, run) in enumerate(zip(small.begun, small.finished, strict=True))
        for span in run.trace.spans
    }
    assert drawn == spans
    assert len(rows) == 1 + len({span.name for run in small.finished for span in run.trace.spans}), "a trace a stage"
    first = [(begun + run.ttft) * 1e3 for begun, run in zip(small.begun, small.finished, strict=True)]
    assert list(rows["first text"].x) == pytest.approx(first)
    assert figure.layout.xaxis.range[1] > small.seconds * 1e3
    assert {rows[wait].marker.color for wait in ("queued", "waiting")} == {
        style.STAGE_COLOURS["queued"],
        style.STAGE_COLOURS["waiting"],
    }


def test_the_lane_below_is_what_each_step_computed(small: Load) -> None:
    tokens, rows, patches = (trace for trace in view.load_timeline(small).data if trace.xaxis != "x")
    assert list(tokens.y) == [sum(n for _, n in step.prefilled) for step in small.steps]
    assert list(rows.y) == [len(step.decoded) for step in small.steps]
    assert list(patches.y) == [sum(n for _, n in step.encoded) for step in small.steps]
    assert sum(rows.y) == sum(len(run.tokens) - 1 for run in small.finished)
    assert sum(tokens.y) == sum(run.n_prompt for run in small.finished)
    for trace in (tokens, rows, patches):
        assert list(trace.x) == [step.start_ns / 1e6 for step in small.steps]
        assert list(trace.width) == [(step.end_ns - step.start_ns) / 1e6 for step in small.steps]


def test_a_wait_names_the_steps_it_waited_for_and_what_they_did_for_others(run_of: Callable[..., Run]) -> None:
    runs = (
        run_of(("prefill", 0, 10), ("waiting", 10, 40), ("decode", 40, 50), ("waiting", 50, 60), ("decode", 60, 70)),
        run_of(("queued", 0, 11), ("vit", 11, 20), ("prefill", 20, 30), ("waiting", 30, 40), ("decode", 40, 50)),
        run_of(("queued", 0, 31), ("vit", 31, 35), ("prefill", 35, 39), ("decode", 40, 50), ("decode", 60, 70)),
        None,
    )
    steps = (
        Step(
            start_ns=0,
            end_ns=50 * MS,
            admitted=(0, 1, 2),
            encoded=((1, 1600), (2, 4)),
            prefilled=((0, 9), (1, 400), (2, 7)),
            decoded=(0, 1, 2),
            waiting=1,
        ),
        Step(start_ns=59 * MS, end_ns=70 * MS, decoded=(0, 2), preempted=(1,)),
    )
    figure = view.load_timeline(_load(*runs, steps=steps))
    waits = {
        (row, start): data[3].removeprefix("<br>")
        for trace in figure.data
        if trace.name in ("queued", "waiting")
        for row, start, data in zip(trace.y, trace.base, trace.customdata, strict=True)
    }
    assert waits == {
        ("request 0", 10): "step 0: prompts of requests 1, 2, 407 prompt tokens, 1,604 patches",
        ("request 0", 50): "meanwhile requests were taken in or tokens sent",
        ("request 1", 0): "step 0: prompts of request 0, 9 prompt tokens",
        ("request 1", 30): "step 0: prompts of request 2, 7 prompt tokens, 4 patches",
        ("request 2", 0): "step 0: prompts of requests 0, 1, 409 prompt tokens, 1,600 patches",
    }
    told = next(trace for trace in figure.data if trace.xaxis == "x2").customdata[0][0]
    assert told == "step 0: prompts of requests 0, 1, 2, 416 prompt tokens, 1,604 patches, 3 decode rows; 1 not admitted yet"
    told = next(trace for trace in figure.data if trace.xaxis == "x2").customdata[1][0]
    assert told == "step 1: 2 decode rows, request 1 gave way; 0 not admitted yet"
    failed = next(trace for trace in figure.data if trace.name == "failed")
    assert (list(failed.y), list(failed.customdata)) == (["request 3"], ["no &lt;room&gt;"])


def test_one_at_a_time_a_wait_names_the_requests_before_it_and_there_is_no_lane(run_of: Callable[..., Run]) -> None:
    runs = (run_of(("vit", 0, 10)), run_of(("queued", 0, 10), ("vit", 10, 20)), run_of(("queued", 0, 20), ("vit", 20, 30)))
    steps = [Step(start_ns=10 * n * MS, end_ns=10 * (n + 1) * MS, admitted=(n,)) for n in range(3)]
    figure = view.load_timeline(_load(*runs, steps=steps))
    assert [data[3] for data in figure.data[0].customdata] == [
        "<br>step 0: all of request 0",
        "<br>steps 0 to 1: all of requests 0, 1",
    ]
    assert {trace.xaxis for trace in figure.data} == {"x"}
    assert {trace.xaxis for trace in view.load_timeline(_load(*runs)).data} == {"x"}, "an endpoint does not tell its steps"


def test_two_hundred_requests_stay_readable_and_light(run_of: Callable[..., Run]) -> None:
    """Bars are thin, and spans under a pixel are joined: no time is lost by it."""
    answer = [(name, 10 * n + at, 10 * n + end) for n in range(30) for name, at, end in (("decode", 0, 9), ("sample", 9, 10))]
    few, many = _load(*[run_of(*answer)] * 20, seconds=30.0), _load(*[run_of(*answer)] * 200, seconds=30.0)
    exact, joined = view.load_timeline(few), view.load_timeline(many)
    assert sum(len(trace.x) for trace in exact.data if trace.type == "bar") == 20 * 60
    bars = [trace for trace in joined.data if trace.type == "bar"]
    assert [trace.name for trace in bars] == ["decode"], "it has most of each pixel"
    assert sum(len(trace.x) for trace in bars) == 200 * 15
    assert sum(sum(trace.x) for trace in bars) == pytest.approx(200 * 300)
    assert bars[0].customdata[0][3] == "<br>4 short spans"
    assert joined.layout.height < 900


def test_curves_rise_by_a_share_at_every_value(small: Load, run_of: Callable[..., Run]) -> None:
    other = _load(run_of(chunks=(0.02, 0.03, 0.07)), None, run_of(chunks=(0.01, 0.02)))
    figure = view.load_curves({"small": small, "<other>": other})
    assert [trace.name for trace in figure.data] == ["small", "&lt;other&gt; (1 of 3 failed)"]
    assert list(figure.data[0].x)[1:] == sorted(value * 1e3 for value in small.values("ttft"))
    assert list(figure.data[0].y) == [0, 0.25, 0.5, 0.75, 1]
    assert list(figure.data[1].x) == [10, 10, 20]
    gaps = view.load_curves({"other": other}, of="gap")
    assert list(gaps.data[0].x) == pytest.approx([10, 10, 10, 40])
    assert gaps.layout.yaxis.title.text == "share of chunks"


def test_percentiles_and_answers_stand_against_what_arrives(run_of: Callable[..., Run]) -> None:
    at = {
        rate: _load(*[run_of(chunks=(0.01 * rate * (1 + n / 10),)) for n in range(10)], concurrency=None, rate=rate)
        for rate in (1.0, 2.0)
    }
    figure = view.load_rates({"one": list(at.values()), "two": [at[2.0]]})
    lines = {trace.name: trace for trace in figure.data if trace.xaxis == "x"}
    assert list(lines) == ["one, p50", "one, p90", "two, p50", "two, p90"]
    assert list(lines["one, p50"].x) == [1, 2]
    for percent in (50, 90):
        found = [load.percentile("ttft", percent) for load in at.values()]
        assert list(lines[f"one, p{percent}"].y) == [one.median * 1e3 for one in found if one]
    half = at[1.0].percentile("ttft", 50)
    assert half is not None
    assert lines["one, p50"].error_y.array[0] == pytest.approx((half.high - half.median) * 1e3)
    assert lines["one, p90"].error_y.array[0] == 0, "ten samples bound no p90"
    answered = [trace for trace in figure.data if trace.xaxis == "x2"]
    assert [list(trace.y) for trace in answered] == [[10, 10], [10], [0, 2]]
    closed = view.load_rates({"one": [_load(run_of(), concurrency=n) for n in (1, 4)]})
    assert list(closed.data[0].x) == [1, 4]
    assert closed.layout.xaxis.title.text == "requests at once"
    assert len(closed.data) == 3, "answers to so many at once lie on no diagonal"
    with pytest.raises(RequestError, match="not 1 a second and 2 at once"):
        view.load_rates({"one": [at[1.0], _load(run_of())]})


def test_the_table_says_what_there_is_to_say(small: Load, run_of: Callable[..., Run]) -> None:
    frame = view.load_frame({"continuous": small})
    assert list(frame["engine"]) == ["continuous"]
    assert list(frame["arrivals"]) == ["3 at once"]
    assert frame["tokens/s"][0] == f"{small.tokens_per_second:.1f}"
    ttft = small.percentile("ttft", 50)
    assert ttft is not None
    assert frame["TTFT p50 ms"][0] == f"{ttft.median * 1e3:.1f}", "four requests bound no median"
    assert "failed" not in frame
    mixed = view.load_frame({"continuous": small, "other": _load(run_of(), None)})
    assert list(mixed["failed"]) == ["–", 1]
    assert list(mixed["TPOT p50 ms"])[1] == "–"


def test_percentiles_of_loads_stand_under_one_another(small: Load, run_of: Callable[..., Run]) -> None:
    many = _load(*[run_of(chunks=(0.01 * n, 0.02 * n)) for n in range(1, 41)])
    frame = view.load_percentile_frame({"small": small, "many": many})
    assert list(frame.columns) == ["ms (95% CI)", "of", "p50", "p90", "p99"]
    assert list(frame["of"]) == ["small", "many"] * 4
    assert list(frame["ms (95% CI)"]) == ["TTFT", "", "TPOT", "", "time until admitted", "", "time between chunks", ""]
    found = many.percentile("ttft", 50)
    assert found is not None
    assert frame["p50"][1] == f"{found.median * 1e3:.0f} [{found.low * 1e3:.0f}, {found.high * 1e3:.0f}]"
    assert frame["p99"][1] == "396", "forty requests bound no p99"
    assert frame["p50"][5] == "–", "nobody says when these were admitted"


def test_loads_are_drawn_on_one_scale_and_in_a_room(run_of: Callable[..., Run]) -> None:
    made = _load(*[run_of(("vit", 0, 10))] * 40)
    wide, low = view.load_timeline(made), view.load_timeline(made, title="x", until=3.0, pixels=200)
    assert low.layout.xaxis.range == (0, 3000)
    assert low.layout.title.text == "x"
    assert wide.layout.height - low.layout.height == 40 * (17 - 5) - 25


def test_a_load_shows_itself_over_time(small: Load) -> None:
    bundle = small._repr_mimebundle_()
    assert bundle["text/plain"] == repr(small)
    shown = bundle["application/vnd.plotly.v1+json"]
    assert len(shown["data"]) == len(view.load_timeline(small).data)
    json.dumps(bundle)


def test_the_table_of_a_sweep_under_load_is_printed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    times = {f"{of}_p{percent}_ms": 10.0 * percent for of in ("ttft", "tpot") for percent in (50, 90, 99)}
    rates = {"tokens_per_second": 12.5, "tokens_per_second_low": None, "tokens_per_second_high": None, "requests_per_second": 3.0}
    row = {"checkpoint": "tiny-qwen3-vl", "image": "96×64", "load": "8 at once", "engine": "baseline", "parity_says": "yes"}
    row |= {"requests": 32, "failed": 0, "rounds": 3, "disturbed_rounds": 0}
    result = {"points": [], "errors": [], "environment": {"device": "CPU"}, "loads": [row | times | rates]}
    (tmp_path / "result.json").write_text(json.dumps(result))
    main([str(tmp_path)])
    printed = capsys.readouterr().out
    for said in ("device CPU", "8 at once", "12.5", "500.0 / 900.0 / 990.0"):
        assert said in printed
