"""An engine's own account is read from every documented form; what cannot be is dropped and said, and nothing is ever raised."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import os
import re
import signal
import subprocess
import time
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import pytest
from hypothesis import given, settings, strategies as st
from ports import free_port

from fastvl_lab import Lab, Request, Run, audit, load, view
from fastvl_lab.account import OF_WAIT, PARTS, REST, WAIT, Account, Part
from fastvl_lab.checkpoint import tiny
from fastvl_lab.measure.audit import Finding
from fastvl_lab.peer import accounts
from fastvl_lab.peer.accounts import Counted, in_answer, of_sglang, of_tensorrt_llm, of_vllm, read_page, told_between
from fastvl_lab.trace import Span, Trace
from fastvl_lab.view.report import run_html
from fastvl_lab.view.workbench.showing import series

Make = Callable[..., dict[str, Any]]

# Of one request, in seconds: from arrival to the queue, to being scheduled, to the first token, and to the end.
PREPROCESS, QUEUE, PREFILL, DECODE = 0.05, 0.01, 0.03, 0.02
TTFT = PREPROCESS + QUEUE + PREFILL

VLLM = {
    "time_to_first_token_ms": PREFILL * 1e3,
    "generation_time_ms": DECODE * 1e3,
    "queue_time_ms": QUEUE * 1e3,
    "mean_itl_ms": 2.5,
    "tokens_per_second": 40.0,
}
SGLANG = {
    "id": "1",
    "request_received_ts": 1e9,
    "api_server_dispatch_finish_ts": 1e9 + PREPROCESS,
    "queue_time": QUEUE,
    "forward_entry_time": 1e9 + PREPROCESS + QUEUE,
    "prefill_finished_time": 1e9 + TTFT,
    "first_token_latency": TTFT,
    "e2e_latency": TTFT + DECODE,
    "decode_throughput": None,
}
TENSORRT_LLM = {
    "request_id": 3,
    "perf_metrics": {
        "first_iter": 1,
        "timing_metrics": {
            "server_arrival_time": 7.0,
            "arrival_time": 7.0 + PREPROCESS,
            "first_scheduled_time": 7.0 + PREPROCESS + QUEUE,
            "first_token_time": 7.0 + TTFT,
            "last_token_time": 7.0 + TTFT + DECODE,
        },
    },
}
NAMES = {
    "vllm": ("time_to_first_token", "request_queue_time", "request_prefill_time", "e2e_request_latency"),
    "sglang": ("time_to_first_token", "queue_time", "per_stage_req_latency", "e2e_request_latency"),
    "lmdeploy": ("time_to_first_token", "request_queue_time", "request_prefill_time", "e2e_request_latency"),
}


def _page(owner: str, times: int, ttft: float = TTFT) -> str:
    """What an engine's /metrics says once `times` such requests have ended, among other figures."""
    stage = 'stage="prefill_forward",' if owner == "sglang" else ""
    lines = ["# HELP of all of them", "process_cpu_seconds_total 12.5", f'{owner}:num_requests_running{{engine="0"}} 0.0', ""]
    for name, value in zip(NAMES[owner], (ttft, QUEUE, PREFILL, ttft + DECODE), strict=True):
        series = f"{owner}:{name}_seconds"
        labels = f'{{model_name="m, \\"n\\"",{stage if name.startswith("per_stage") else ""}}}'
        lines += [f"# TYPE {series} histogram", f'{series}_bucket{{le="+Inf"}} {times}']
        lines += [f"{series}_count{labels} {float(times)}", f"{series}_sum{labels} {value * times!r}"]
    if owner == "sglang":
        other = 'sglang:per_stage_req_latency_seconds_{}{{stage="request_process"}} {}'
        lines += [other.format("count", 2 * times), other.format("sum", 9 * times)]
    return "\n".join(lines)


def _seconds(account: Account | None) -> dict[str, float]:
    assert account is not None
    return {part.name: part.seconds for part in account.parts}


WHOLE = {"preprocess": PREPROCESS, "queue": QUEUE, "prefill": PREFILL}


@pytest.mark.parametrize(
    ("account", "parts", "ttft", "begins"),
    [
        pytest.param(of_vllm(VLLM), {"queue": QUEUE, "prefill": PREFILL}, PREFILL, "scheduled", id="vLLM"),
        pytest.param(of_sglang(SGLANG), WHOLE, TTFT, "arrival", id="SGLang"),
        pytest.param(of_tensorrt_llm(json.dumps([TENSORRT_LLM]).encode()), WHOLE, TTFT, "arrival", id="TensorRT-LLM"),
        *(
            pytest.param(told_between(owner, before.encode(), _page(owner, 5).encode()), parts, TTFT, begins, id=f"{owner} counted")
            for owner, parts, begins in (
                ("vllm", WHOLE, "arrival"),
                ("sglang", WHOLE, "arrival"),
                ("lmdeploy", {"queue": QUEUE, "prefill": PREFILL}, "preprocessed"),
            )
            for before in (_page(owner, 4),)
        ),
        pytest.param(told_between("sglang", b"", _page("sglang", 1).encode()), WHOLE, TTFT, "arrival", id="the first of all"),
    ],
)
def test_each_engine_is_read_in_its_own_form(account: Account | None, parts: Mapping[str, float], ttft: float, begins: str) -> None:
    assert account is not None
    assert _seconds(account) == pytest.approx(parts, abs=1e-6)
    assert list(_seconds(account)) == list(parts)
    assert (account.ttft, account.begins, account.notes) == (pytest.approx(ttft, abs=1e-6), begins, ())
    assert account.source.partition("'")[0] in ("vLLM", "SGLang", "LMDeploy", "TensorRT-LLM")
    assert Account.from_record(json.loads(json.dumps(account.to_record()))) == account


def test_a_record_of_the_labs_own_server_is_read_stage_by_stage(lab: Lab, request_: Request) -> None:
    (run,) = load(lab, request_, "fastest", concurrency=1, n=1).finished  # as a server serves it
    account = in_answer({"choices": [], "fastvl_lab": {"kind": "warm", "run": json.loads(json.dumps(run.to_record()))}})
    assert account is not None
    parts, stages = _seconds(account), {name: ns / 1e9 for name, ns in run.trace.stages().items()}
    assert list(parts) == ["queue", "preprocess", "vit", "prefill"]
    assert parts["queue"] == stages["queued"] > 0
    assert parts["vit"] == stages["vit"]
    assert parts["prefill"] == pytest.approx(stages["merge"] + stages["prefill"] + stages["sample"])
    assert sum(parts.values()) == pytest.approx(sum(stages.values()) - stages["emit"], rel=1e-6)
    assert account.ttft == run.ttft


ABSURD = [None, True, "1", [], {}, -1.0, -1, math.nan, math.inf, -math.inf, 1e300, 10**400, 10**5000]


@pytest.mark.parametrize("value", ABSURD, ids=lambda value: type(value).__name__)
@pytest.mark.parametrize(
    ("read", "data", "name"),
    [(of_vllm, VLLM, "queue_time_ms"), (of_sglang, SGLANG, "queue_time"), (of_vllm, VLLM, "time_to_first_token_ms")],
)
def test_a_figure_that_cannot_be_is_dropped_and_said(
    read: Callable[..., Account | None], data: dict[str, Any], name: str, value: Any
) -> None:
    account = read(data | {name: value})
    assert account is not None
    lost = "queue" if name.startswith("queue") else "prefill"
    assert lost not in _seconds(account)
    assert len(_seconds(account)) == len(_seconds(read(data))) - 1
    assert [note.partition(" of ")[0] for note in account.notes] == ([] if value is None else [name])


@pytest.mark.parametrize("value", [0, *(value for value in ABSURD if value is not None)], ids=lambda value: type(value).__name__)
def test_an_instant_that_cannot_be_takes_its_two_spans_with_it(value: Any) -> None:
    request = json.loads(json.dumps(TENSORRT_LLM))
    request["perf_metrics"]["timing_metrics"]["first_scheduled_time"] = value
    with pytest.MonkeyPatch.context() as patch:  # also what JSON cannot carry
        patch.setattr(accounts.json, "loads", lambda body: [request])
        account = of_tensorrt_llm(b"")
    assert account is not None
    assert _seconds(account) == pytest.approx({"preprocess": PREPROCESS})
    assert account.ttft == pytest.approx(TTFT)
    assert account.notes


def test_of_what_several_requests_have_added_nothing_is_anybodys() -> None:
    account = told_between("vllm", _page("vllm", 4).encode(), _page("vllm", 6).encode())
    assert account is not None
    assert (account.parts, account.ttft, account.e2e) == ((), None, None)
    assert "TTFT was counted 2 times" in account.notes[0]
    restarted = told_between("vllm", _page("vllm", 4).encode(), _page("vllm", 1).encode())
    assert restarted is not None
    assert "-3 times" in restarted.notes[0]
    assert told_between("vllm", _page("vllm", 4).encode(), _page("vllm", 4).encode()) is None
    several = of_tensorrt_llm(json.dumps([TENSORRT_LLM] * 3).encode())
    assert several is not None
    assert several.notes == ("3 requests ended since it was last read",)
    assert [of_tensorrt_llm(body) for body in (b"", b"[]", b"{}", b"<html>", b"[" * 100_000)] == [None] * 5


def test_a_page_is_read_over_all_labels_but_a_stage() -> None:
    page = read_page(
        b'a_sum{x="1"} 2\na_sum{x="2",stage="s"} 4 1700000000\na_count 1e0\na_count{x="}"} 2\na_sum bad\n\xff\x00\nb 3'
    )
    assert page["a", "count", ""] == 3
    assert page["a", "sum", "s"] == 4
    assert math.isnan(page["a", "sum", ""])
    assert len(page) == 3


def _trace(*, wait: float = 0.1, upload: float = 0.002, whole: float = 0.2) -> Trace:
    ends = [round(seconds * 1e9) for seconds in (0.001, 0.001 + upload, 0.001 + upload + wait)]
    spans = [
        Span(name=name, lane="host", depth=0, start_ns=start, end_ns=end)
        for name, start, end in zip(("encode", "upload", WAIT), [0, *ends], ends, strict=False)
    ]
    return Trace(spans=tuple(spans), first_chunk_ns=ends[-1], end_ns=round(whole * 1e9))


def _told(**seconds: float) -> tuple[Part, ...]:
    return tuple(Part(name=name, seconds=seconds[name]) for name in PARTS if name in seconds)


def test_parts_end_with_the_wait_and_never_exceed_it() -> None:
    trace = _trace()
    wait = next(span for span in trace.spans if span.name == WAIT)
    spans = Account(source="s", parts=_told(preprocess=0.05, queue=0.0, prefill=0.03)).spans(trace)
    assert [span.name for span in spans] == [REST, *(f"{OF_WAIT}{name}" for name in ("preprocess", "queue", "prefill"))]
    assert [span.duration_ns / 1e9 for span in spans] == pytest.approx([0.02, 0.05, 0, 0.03])
    assert (spans[0].start_ns, spans[-1].end_ns) == (wait.start_ns, wait.end_ns)
    begun_early = Account(source="s", parts=_told(preprocess=0.0515, prefill=0.05)).spans(trace)
    assert [span.duration_ns / 1e9 for span in begun_early] == pytest.approx([0, 0.05, 0.05])
    for silent in (Account(source="s"), Account(source="s", ttft=0.05)):
        assert silent.spans(trace) == ()
    assert Account(source="s", parts=_told(queue=1e-3)).spans(dataclasses.replace(trace, spans=())) == ()


def test_what_is_longer_than_was_seen_from_outside_is_dropped() -> None:
    account = Account(source="s", parts=_told(queue=0.5, prefill=0.03), ttft=0.6, e2e=0.3).held_against(_trace())
    assert (_seconds(account), account.ttft, account.e2e) == ({"prefill": 0.03}, None, None)
    assert [note.partition(" of ")[0] for note in account.notes] == ["queue", "TTFT", "the whole request"]
    sum_of_all = Account(source="s", parts=_told(preprocess=0.06, prefill=0.06), ttft=0.05).held_against(_trace())
    assert (sum_of_all.parts, sum_of_all.ttft) == ((), 0.05)
    assert "the sum of its parts of 0.12 s is longer than the 0.103 s" in sum_of_all.notes[0]
    fitting = Account(source="s", parts=_told(prefill=0.05), ttft=0.1, e2e=0.2)
    assert fitting.held_against(_trace()) == fitting


_NAMES = sorted(
    {*VLLM, *SGLANG, "metrics", "meta_info", "fastvl_lab", "run", "trace", "spans", "first_chunk_ns", "end_ns", "choices"}
)
_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.sampled_from(["vit", "host", "queued", "", "1"]),
    lambda inner: st.lists(inner, max_size=5) | st.dictionaries(st.sampled_from(_NAMES), inner, max_size=5),
    max_leaves=20,
)


def _is_sound(account: Account | None, trace: Trace) -> None:
    if account is None:
        return
    held = account.held_against(trace)
    figures = [part.seconds for part in held.parts] + [value for value in (held.ttft, held.e2e) if value is not None]
    assert all(math.isfinite(value) and value >= 0 for value in figures)
    spans = held.spans(trace)
    assert all(span.duration_ns >= 0 for span in spans)
    if spans:
        assert sum(span.duration_ns for span in spans) == next(s.duration_ns for s in trace.spans if s.name == WAIT)
    assert Account.from_record(json.loads(json.dumps(held.to_record()))) == held
    assert "\n" not in str(held)


ROWS = st.tuples(st.sampled_from(["vit", "queued", "emit"]), st.just("host"), st.integers(0, 1), _JSON, _JSON)


@pytest.mark.parametrize("n", [100, pytest.param(300, marks=pytest.mark.nightly)])
def test_no_answer_is_unforeseen(n: int) -> None:
    @settings(max_examples=n, deadline=None)
    @given(st.dictionaries(st.sampled_from(_NAMES), _JSON, max_size=6), st.lists(ROWS, max_size=4))
    def check(value: dict[str, Any], rows: list[Any]) -> None:
        trace = _trace()
        record = {"trace": {"spans": [list(row) for row in rows], "first_chunk_ns": 10**8, "end_ns": value.get("end_ns")}}
        for event in (value, {"metrics": value}, {"choices": [{"meta_info": value}]}, {"fastvl_lab": {"run": record}}):
            _is_sound(in_answer(event), trace)
        body = json.dumps([{"perf_metrics": {"timing_metrics": value}}], default=str).encode()
        _is_sound(of_tensorrt_llm(body), trace)

    check()


@settings(max_examples=200, deadline=None)
@given(st.sampled_from(sorted(NAMES)), st.lists(st.floats() | st.sampled_from(["NaN", "+Inf", "x", ""]), min_size=8, max_size=8))
def test_no_page_is_unforeseen(owner: str, values: Sequence[Any]) -> None:
    numbers = iter(values)
    page = re.sub(r"(_sum|_count)(\{.*\}) \S+", lambda found: f"{found[1]}{found[2]} {next(numbers, 0)}", _page(owner, 1))
    for before, after in ((b"", page.encode()), (page.encode(), _page(owner, 2).encode())):
        _is_sound(told_between(owner, before, after), _trace())


def test_an_engine_is_asked_for_no_page_it_has_not() -> None:
    def never(path: str) -> bytes:
        raise AssertionError(path)

    for owner in ("", "someone", "fastvl_lab"):
        assert Counted(owner, never).account() is None
    asked: list[str] = []
    nothing = Counted("sglang", lambda path: asked.append(path))  # served without --enable-metrics
    assert [nothing.account(), nothing.account(), asked] == [None, None, ["/metrics"]]


def _looks(owner: str, pages: Sequence[str | None]) -> Counted:
    """What looks at these pages in turn."""
    left = iter(pages)
    return Counted(owner, lambda path: None if (page := next(left)) is None else page.encode())


def _one_ends(counted: Counted) -> Account | None:
    with counted.request():
        pass
    return counted.account()


def test_a_request_is_waited_for_until_it_is_counted() -> None:
    counted = _looks("vllm", [_page("vllm", n) for n in (1, 1, 1, 2)])
    assert _seconds(_one_ends(counted)) == pytest.approx(WHOLE)
    forgets = _looks("tensorrt_llm", [json.dumps([TENSORRT_LLM] * n) for n in (3, 0, 1, 1)])  # what it has told
    assert _seconds(_one_ends(forgets)) == pytest.approx(WHOLE)
    assert _seconds(_one_ends(forgets)) == pytest.approx(WHOLE)


def test_requests_that_overlap_get_no_account_and_the_next_one_does() -> None:
    counted = _looks("vllm", [_page("vllm", n) for n in (1, 3, 4)])
    with counted.request():
        assert _one_ends(counted) is None  # and nothing is read while the other is under way
    assert counted.account() is None
    assert _seconds(_one_ends(counted)) == pytest.approx(WHOLE)


def test_one_look_that_fails_costs_one_account(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(accounts, "_PATIENCE", 0.0)
    counted = _looks("vllm", [_page("vllm", 1), None, _page("vllm", 3), _page("vllm", 4)])
    assert _one_ends(counted) is None
    two = _one_ends(counted)
    assert two is not None
    assert two.notes
    assert _seconds(_one_ends(counted)) == pytest.approx(WHOLE)
    asked: list[str] = []

    def without_counts(path: str) -> bytes:
        asked.append(path)
        return b"up 1"

    silent = Counted("vllm", without_counts)
    assert [_one_ends(silent) for _ in range(3)] == [None] * 3
    assert asked == ["/metrics"] * 2


@pytest.fixture(scope="module")
def lab(labs: dict[str, Lab]) -> Lab:
    return labs["tiny-qwen2.5-vl"]


@pytest.fixture(scope="module")
def request_() -> Request:
    from fastvl_lab import photo

    return Request(images=[photo("astronaut", (56, 56))], prompt="What?", max_new_tokens=3, ignore_eos=True)


@pytest.fixture
def served(fake: Any, lab: Lab, request_: Request, chunk: Make, usage: Make) -> Callable[..., Run]:
    """A run of a request that the endpoint, of this owner, takes 120 ms for, and ends with this event."""

    def run(owner: str, last: Mapping[str, Any], options: str = "") -> Run:
        fake.models = {"data": [{"id": "m", "owned_by": owner}]}
        fake.script = [0.12, chunk("a"), 0.04, chunk("b"), usage(2) | dict(last)]
        return lab.apart().run(request_, fake.url + options)

    return run


def test_a_run_keeps_the_account_and_shows_it(served: Callable[..., Run], fake: Any) -> None:
    fake.pages["/metrics"] = [_page("vllm", 7), _page("vllm", 8)]
    run = served("vllm", {"metrics": VLLM})
    assert run.account is not None
    assert run.account.source == "vLLM's metrics and vLLM's Prometheus"
    assert (run.account.begins, run.account.ttft) == ("scheduled", pytest.approx(PREFILL))
    assert _seconds(run.account) == pytest.approx(WHOLE, abs=1e-6)
    assert fake.read == ["/metrics"] * 2
    rows = {row["stage"]: row["host_ms"] for row in run.stage_table()}
    parts = {name: ms for name, ms in rows.items() if name.startswith(OF_WAIT)}
    assert list(parts) == [REST, "wait: preprocess", "wait: queue", "wait: prefill"]
    assert sum(parts.values()) == pytest.approx(rows[WAIT], rel=1e-6)
    assert sum(run.trace.stages().values()) + run.trace.unaccounted_ns == pytest.approx(run.trace.first_chunk_ns, rel=1e-6)
    text = repr(run)
    assert re.search(r"wait: preprocess +50\.000 ms .*▒", text)
    assert "its own account (▒), vLLM's metrics and vLLM's Prometheus: TTFT 30.0 ms from scheduled" in text
    assert "<td>wait: prefill</td>" in run_html(run)
    table = view.stage_frame([run])
    assert list(table["stage"])[3:7] == list(parts)
    again = Run.from_record(json.loads(json.dumps(run.to_record())))
    assert (again.account, repr(again)) == (run.account, text)
    older = {name: value for name, value in run.to_record().items() if name != "account"}
    assert Run.from_record(older).account is None


def test_the_waterfall_draws_the_account_inside_wait_and_names_whose_clock_it_is(served: Callable[..., Run]) -> None:
    run = served("someone", {"metrics": VLLM})
    figure = view.waterfall([run])
    own = next(bars for bars in figure.data if bars.legendgroup == "its own account")
    host = next(bars for bars in figure.data if bars.legendgroup == "host")
    begin, length = next((b, x) for b, x, y in zip(host.base, host.x, host.y, strict=True) if y == WAIT)
    assert list(own.y) == [REST, "wait: queue", "wait: prefill"]
    assert sum(own.x) == pytest.approx(length)
    assert (own.base[0], own.base[-1] + own.x[-1]) == (pytest.approx(begin), pytest.approx(begin + length))
    assert own.marker.opacity < 1
    assert own.marker.pattern.shape not in (None, host.marker.pattern.shape, "/")
    assert all("by the clock of vLLM's metrics" in data[3] for data in own.customdata)
    plain = view.waterfall([dataclasses.replace(run, account=None)])
    assert "its own account" not in {bars.legendgroup for bars in plain.data}
    assert len(plain.data) == len(figure.data) - 1


def test_the_workbench_draws_the_account_of_the_bar_to_beat(served: Callable[..., Run]) -> None:
    run = served("someone", {"metrics": VLLM})
    drawn, plain = series(run, "vLLM"), series(dataclasses.replace(run, account=None), "vLLM")
    own = [bar for bar in drawn.bars if bar[1] == "own"]
    assert [name for name, *_ in own] == [REST, "wait: queue", "wait: prefill"]
    assert sum(length for *_, length in own) == pytest.approx(drawn.host[WAIT])
    assert drawn.host["wait: prefill"] == pytest.approx(PREFILL * 1e3)
    assert drawn.files["wait: prefill"] == "by the clock of vLLM's metrics"
    assert [bar for bar in drawn.bars if bar[1] != "own"] == list(plain.bars)


def test_whoever_is_not_known_is_asked_nothing_more_and_off_is_off(served: Callable[..., Run], fake: Any) -> None:
    fake.pages["/metrics"] = [_page("vllm", 7), _page("vllm", 8)]
    known = ({"model", "messages", "temperature", "stream", "max_tokens", "stream_options"} | {"ignore_eos"}, [])
    assert (served("someone", {}).account, set(fake.asked[-1]), fake.read) == (None, *known)
    off = served("vllm", {}, ", account=off")
    assert (off.account, fake.read, off.engine) == (None, [], f"{fake.url}, account=off")
    served("fastvl_lab", {})
    assert fake.asked[-1]["return_trace"] is True
    served("fastvl_lab", {}, ", model=m, account=off")
    assert "return_trace" not in fake.asked[-1]
    fake.pages = {}
    assert served("sglang", {}).account is None


def test_reading_counts_is_no_part_of_the_request(served: Callable[..., Run], fake: Any) -> None:
    fake.pages["/metrics"] = [*[_page("sglang", 7)] * 6, _page("sglang", 8)]
    run = served("sglang", {})
    assert _seconds(run.account) == pytest.approx(WHOLE, abs=1e-6)
    assert len(fake.read) == 7
    assert run.trace.end_ns < 0.16e9 + 5 * 0.02e9  # five pauses would have been


def _verdict(run: Run) -> Finding:
    return next(finding for finding in audit(run).said if finding.verdict == "own_ttft_leaves_out")


def test_the_audit_names_what_an_engines_own_ttft_leaves_out(served: Callable[..., Run]) -> None:
    """The worked case of vLLM's issue 41267: 293 ms, of which 126 ms after being scheduled and 167 ms before."""
    own = Account(source="vLLM's metrics", parts=_told(preprocess=0.167, queue=0.0, prefill=0.126), ttft=0.126, begins="scheduled")
    trace = _trace(upload=0.001, wait=0.296, whole=0.3)
    run = dataclasses.replace(served("someone", {}), trace=trace, account=own)
    found = _verdict(run)
    assert found.severity == "suspect"
    assert "126.0 ms, is not what a client waits for: it runs from scheduled to first token" in found.sentence
    assert "the processor" in found.sentence
    assert (
        "296.0 ms from the upload's end to the first text - 126.0 ms by vLLM's metrics = 170.0 ms outside, 57%" in found.arithmetic
    )
    assert "the engine tells preprocess 167.0 ms and queue 0.0 ms" in found.arithmetic
    whole = dataclasses.replace(run, account=dataclasses.replace(own, ttft=0.293, begins="arrival"))
    assert _verdict(whole).severity == "clear"
    assert "3.0 ms outside, 1%" in _verdict(whole).arithmetic
    assert _verdict(dataclasses.replace(run, account=None)).severity == "not checked"
    unsound = dataclasses.replace(run, account=dataclasses.replace(own, ttft=9.0).held_against(trace))
    assert _verdict(unsound).severity == "note"
    assert "TTFT of 9 s is longer than" in _verdict(unsound).sentence
    of_the_lab = dataclasses.replace(run, device="CPU (1 threads)", account=None)
    assert "own_ttft_leaves_out" not in [finding.verdict for finding in audit(of_the_lab).said]
    told_once = [run, dataclasses.replace(run, account=None), run]
    assert "in 2 of 3 runs" in next(f for f in audit(told_once).findings if f.verdict == "own_ttft_leaves_out").sentence


@pytest.fixture(scope="module")
def vllm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a real vLLM that serves the tiny checkpoint, and ends with all its processes."""
    program = os.environ.get("FASTVL_LAB_VLLM")
    if not program:
        pytest.skip("FASTVL_LAB_VLLM, the path of a vllm, is not set")
    port = free_port()
    log = tmp_path_factory.mktemp("vllm") / "log"
    flags = f"--host 127.0.0.1 --port {port} --served-model-name m --dtype float32 --max-model-len 2048 --max-num-seqs 2"
    caches = "--enforce-eager --no-enable-prefix-caching --mm-processor-cache-gb 0 --skip-mm-profiling --enable-per-request-metrics"
    few = ["--limit-mm-per-prompt", '{"image": 1, "video": 0}']
    of_cpus = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "0-1"}
    serve = [program, "serve", str(tiny.folder("tiny-qwen2.5-vl")), *flags.split(), *caches.split(), *few]
    with log.open("w") as out:
        started = subprocess.Popen(serve, stdout=out, stderr=out, env={**os.environ, **of_cpus}, start_new_session=True)
    try:
        until = time.monotonic() + 600
        while True:
            assert started.poll() is None, log.read_text()[-2000:]
            assert time.monotonic() < until, log.read_text()[-2000:]
            with contextlib.suppress(OSError), urllib.request.urlopen(f"http://127.0.0.1:{port}/health"):
                break
            time.sleep(1)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        os.killpg(started.pid, signal.SIGKILL)
        started.wait()


@pytest.mark.engine
@pytest.mark.alone
def test_a_real_vllm_gives_its_account(vllm: str, lab: Lab, request_: Request) -> None:
    lab.run(request_, vllm)
    run = lab.run(request_, vllm)
    assert run.account is not None
    assert run.account.notes == ()
    assert run.account.source == "vLLM's metrics and vLLM's Prometheus"
    assert run.account.begins == "scheduled"
    parts = _seconds(run.account)
    assert list(parts) == ["preprocess", "queue", "prefill"]
    assert run.account.ttft == parts["prefill"] > 0
    assert 0 < parts["preprocess"] < run.ttft
    assert run.account.e2e is not None
    assert sum(parts.values()) < run.account.e2e
    rows = {row["stage"]: row["host_ms"] for row in run.stage_table()}
    assert sum(ms for name, ms in rows.items() if name.startswith(OF_WAIT)) == pytest.approx(rows[WAIT], rel=1e-6)
    assert _verdict(run).severity in ("suspect", "clear")
    alone = dataclasses.replace(lab.apart().run(request_, f"{vllm}, account=off"), trace=run.trace)
    assert alone.account is not None  # what comes unasked is read
    assert list(_seconds(alone.account)) == ["queue", "prefill"]
