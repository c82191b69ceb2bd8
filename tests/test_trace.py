"""Spans, gaps, lanes: what a trace promises about time."""

from __future__ import annotations

import gc
import json
import statistics
import time

import pytest
import torch

from fastvl_lab import Lab, Request, photo, trace as trace_module
from fastvl_lab.measure.samples import Interval, median_interval
from fastvl_lab.trace import STAGES, Anchor, Span, Trace, Tracer, module_spans, shared_span

CPU = torch.device("cpu")


def _span(name: str, start: int, end: int, **changes: object) -> Span:
    return Span(**{"name": name, "lane": "host", "depth": 0, "start_ns": start, "end_ns": end} | changes)  # type: ignore[arg-type]


@pytest.mark.alone
def test_stages_and_unaccounted_add_up_to_ttft(lab: Lab, picture: bytes) -> None:
    request = Request(images=[picture], prompt="What is this?", max_new_tokens=4)
    for engine in ("transformers", "baseline", "fastest"):
        trace = lab.run(request, engine).trace
        total = sum(trace.stages().values()) + trace.unaccounted_ns
        assert total == pytest.approx(trace.first_chunk_ns, rel=0.01)
        if engine != "transformers":  # what generate() does between its modules is in no stage, and is shown so
            again = [lab.run(request, engine).trace for _ in range(3)]  # the machine may pause in any one of them
            assert min(t.unaccounted_ns / t.first_chunk_ns for t in again) < 0.1, engine


def test_stages_come_in_the_corridors_order(lab: Lab, picture: bytes) -> None:
    # `first_token` stands for several, a request is `queued` and `waiting` where there are others, and awaits an image of a thread;
    # its answer has a `grammar` where it must keep to one.
    other = ("queued", "waiting", "await_image", "grammar", "first_token", "decode")
    expected = [stage for stage in STAGES if stage not in other]
    for engine in ("transformers", "baseline", "fastest"):
        run = lab.run(Request(images=[picture], prompt="What is this?", max_new_tokens=4, ignore_eos=True), engine)
        stages = [stage for stage in run.trace.stages() if stage != "decode"]
        # Transformers has no cache to be admitted to.
        assert stages == [stage for stage in expected if engine != "transformers" or stage != "admit"], engine
        steps = [span for span in run.trace.spans if span.name == "decode" and span.depth == 0]
        assert len(steps) == 3, engine


def test_text_only_requests_have_no_image_stages(lab: Lab) -> None:
    for engine in ("transformers", "baseline"):
        stages = lab.run(Request(prompt="Hello.", max_new_tokens=2), engine).trace.stages()
        assert not {"decode_image", "preprocess", "vit"} & set(stages)
        assert {"tokenize", "merge", "prefill", "sample", "emit"} <= set(stages), engine


def test_layers_nest_inside_their_stage(lab: Lab, picture: bytes) -> None:
    request = Request(images=[picture], prompt="What is this?", max_new_tokens=2, ignore_eos=True)
    config = lab.checkpoint.config
    for engine in ("transformers", "baseline", "fastest"):
        spans = lab.run(request, engine, trace="layers").trace.spans
        stage = {span.name: span for span in reversed(spans) if span.depth == 0}
        blocks = [span for span in spans if span.name.startswith("vit.block.")]
        layers = [span for span in spans if span.name.startswith("language.layer.")]
        assert len(blocks) == config.vision_config.depth, engine
        assert len(layers) == 2 * config.text_config.num_hidden_layers, engine  # prefill and one decode step
        assert all(span.depth == 1 for span in blocks + layers)
        assert all(stage["vit"].start_ns <= b.start_ns <= b.end_ns <= stage["vit"].end_ns for b in blocks)


def test_tracing_off_records_nothing_but_ttft(lab: Lab, picture: bytes) -> None:
    run = lab.run(Request(images=[picture], prompt="What is this?", max_new_tokens=2), trace="off")
    assert run.trace.spans == ()
    assert 0 < run.trace.first_chunk_ns <= run.trace.end_ns
    with pytest.raises(ValueError, match="off, stages, layers"):
        lab.run(Request(prompt="Hello."), trace="everything")  # type: ignore[arg-type]


def test_gaps_are_where_no_stage_is_and_stop_at_ttft() -> None:
    trace = Trace(spans=(_span("vit", 10, 40), _span("prefill", 50, 90), _span("decode", 95, 200)), first_chunk_ns=120, end_ns=220)
    assert trace.gaps() == ((0, 10), (40, 50), (90, 95))
    assert trace.unaccounted_ns == 25
    assert trace.stages() == {"vit": 30, "prefill": 40, "decode": 25}


def test_overlapping_stages_do_not_hide_behind_unaccounted() -> None:
    trace = Trace(spans=(_span("vit", 0, 60), _span("prefill", 40, 100)), first_chunk_ns=100, end_ns=100)
    assert sum(trace.stages().values()) + trace.unaccounted_ns == 120


def test_a_trace_survives_its_record() -> None:
    trace = Trace(spans=(_span("vit", 1, 2), _span("vit", 1, 3, lane="device")), first_chunk_ns=4, end_ns=5)
    assert Trace.from_record(json.loads(json.dumps(trace.to_record()))) == trace


def test_chrome_export_has_a_track_a_lane_in_microseconds() -> None:
    spans = (_span("vit", 1000, 3000), _span("vit.block.0", 1000, 2000, depth=1), _span("vit", 2000, 5000, lane="device"))
    events = json.loads(json.dumps(Trace(spans=spans, first_chunk_ns=9000, end_ns=9000).to_chrome("label")))["traceEvents"]
    tracks = {event["args"]["name"]: event["tid"] for event in events if event["name"] == "thread_name"}
    assert set(tracks) == {"host", "device"}
    timed = [(e["name"], e["tid"], e["ts"], e["dur"]) for e in events if e["ph"] == "X"]
    assert timed == [
        ("vit", tracks["host"], 1.0, 2.0),
        ("vit.block.0", tracks["host"], 1.0, 1.0),
        ("vit", tracks["device"], 2.0, 3.0),
    ]
    host_only = Trace(spans=spans[:1], first_chunk_ns=9000, end_ns=9000).to_chrome()
    assert not any(e.get("args") == {"name": "device"} for e in host_only["traceEvents"])


def test_device_spans_are_put_on_the_hosts_axis_without_a_sync_inside(monkeypatch: pytest.MonkeyPatch) -> None:
    """CUDA is played by events on a made-up device clock, in ms; the real one is in tests/gpu."""
    device_ms = iter([1000.0, 1002.0, 1005.5])
    syncs: list[str] = []

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self, stream: str) -> None:
            assert stream == "stream of cuda:1"
            self.at = next(device_ms)

        def elapsed_time(self, other: Event) -> float:
            return other.at - self.at

        def synchronize(self) -> None:
            syncs.append(f"event of {self.at}")

    monkeypatch.setattr(trace_module.torch.cuda, "Event", Event)
    monkeypatch.setattr(trace_module.torch.cuda, "synchronize", lambda _: syncs.append("sync"))
    monkeypatch.setattr(trace_module.torch.cuda, "current_stream", lambda device: f"stream of {device}")
    tracer = Tracer(torch.device("cuda:1"))
    tracer.start()
    with tracer.span("vit"):
        pass
    assert syncs == ["sync"]  # the one before the request
    tracer.delivered()
    assert syncs == ["sync"]
    spans = {span.lane: span for span in tracer.finish().spans}
    assert syncs == ["sync", "event of 1005.5"]  # its own last stage's: another request's work is not waited for
    assert (spans["device"].start_ns, spans["device"].end_ns) == (2_000_000, 5_500_000)
    assert spans["host"].end_ns < 2_000_000


def test_a_request_that_others_were_served_before_shares_their_anchor() -> None:
    """Its clock runs since it arrived, 4 ms after the anchor; what it did until it was admitted was wait."""
    tracer = Tracer(CPU)
    now = time.perf_counter_ns()
    tracer.start_at(now - 3_000_000, Anchor(now - 7_000_000, None))
    tracer.fill("queued")
    with tracer.span("vit"):
        time.sleep(0.001)
    time.sleep(0.002)
    tracer.fill("waiting")
    tracer.delivered()
    trace = tracer.finish()
    assert [span.name for span in trace.spans] == ["queued", "vit", "waiting"]
    assert trace.spans[0].start_ns == 0
    assert trace.stages()["queued"] >= 3_000_000
    assert trace.stages()["waiting"] >= 2_000_000
    assert trace.spans[2].start_ns == trace.spans[1].end_ns


def test_device_spans_lie_behind_a_shared_anchor(monkeypatch: pytest.MonkeyPatch) -> None:
    """The device's clock was at 1,000 ms when the anchor was dropped, and the request came 4 ms later."""

    class Event:
        def __init__(self, at: float = 0.0) -> None:
            self.at = at

        def record(self, stream: str) -> None:
            self.at = next(device_ms)

        def elapsed_time(self, other: Event) -> float:
            return other.at - self.at

        def synchronize(self) -> None: ...

    device_ms = iter([1006.0, 1009.0])
    monkeypatch.setattr(trace_module.torch.cuda, "Event", lambda enable_timing: Event())
    monkeypatch.setattr(trace_module.torch.cuda, "current_stream", lambda device: "stream")
    tracer, now = Tracer(torch.device("cuda:0")), time.perf_counter_ns()
    tracer.start_at(now, Anchor(now - 4_000_000, Event(1000.0)))
    with tracer.span("vit"):
        pass
    (device,) = (span for span in tracer.finish().spans if span.lane == "device")
    assert (device.start_ns, device.end_ns) == (2_000_000, 5_000_000)


def test_spans_that_an_exception_left_open_close_with_their_stage() -> None:
    tracer = Tracer(CPU, "layers")
    tracer.start()

    def fails_inside_a_block() -> None:
        with tracer.span("vit"):
            tracer.begin("vit.block.0")
            raise KeyError

    with pytest.raises(KeyError):
        fails_inside_a_block()
    assert [(span.name, span.depth) for span in tracer.finish().spans] == [("vit", 0), ("vit.block.0", 1)]
    with pytest.raises(AssertionError, match="span 'prefill' is not open"):
        tracer.end("prefill")


def test_an_error_inside_a_stock_module_closes_its_span() -> None:
    class Breaks(torch.nn.Module):
        def forward(self) -> None:
            raise KeyError

    tracer, module = Tracer(CPU, "layers"), Breaks()
    tracer.start()
    with pytest.raises(KeyError), tracer.span("vit"), tracer.modules({"vit.block.0": module}):
        module()
    gc.collect()
    assert [(span.name, span.depth) for span in tracer.finish().spans] == [("vit", 0), ("vit.block.0", 1)]


def test_stock_modules_are_left_alone_unless_layers_are_asked_for() -> None:
    module = torch.nn.Linear(2, 2)
    for level, hooks in (("off", 0), ("stages", 0), ("layers", 1)):
        with Tracer(CPU, level).modules({"linear": module}):  # type: ignore[arg-type]
            assert len(module._forward_hooks) == hooks


def test_module_spans_leave_no_hook_behind() -> None:
    module, names = torch.nn.Linear(2, 2), []
    tracer = Tracer(CPU, "layers")
    with module_spans({"linear": module}, tracer.inner):
        module(torch.zeros(2))
    assert not module._forward_hooks
    assert not module._forward_pre_hooks
    names = [span.name for span in tracer.finish().spans]
    assert names == ["linear"]


@pytest.mark.alone
def test_a_runs_tracing_calls_cost_under_one_percent_of_its_ttft(lab: Lab, picture: bytes) -> None:
    """The calls alone, for as many spans as a run has: what tracing adds to a run, free of the run's own noise."""
    request = Request(images=[picture], prompt="What is this?", max_new_tokens=1)
    lab.run(request, "fastest")
    run = lab.run(request, "fastest")
    costs = []
    for _ in range(200):
        tracer = Tracer(CPU)
        tracer.start()
        begin = time.perf_counter()
        for _ in run.trace.spans:
            with tracer.span("vit"):
                pass
        costs.append(time.perf_counter() - begin)
    assert statistics.median(costs) < 0.01 * run.ttft


@pytest.mark.benchmark
def test_tracing_costs_under_one_percent_of_ttft(lab: Lab) -> None:
    """On against off, interleaved, 30 paired ratios; a cost above 1% would show in every one of three measurements."""
    request = Request(images=[photo("coffee", (448, 336))], prompt="What is this?", max_new_tokens=1)
    for level in ("off", "stages"):
        lab.run(request, "fastest", trace=level)
    intervals = []
    for _ in range(3):
        intervals.append(_traced_over_untraced(lab, request))
        print("TTFT with tracing over without: {:.4f} [{:.4f}, {:.4f}]".format(*intervals[-1]))
        if intervals[-1].low < 1.01:
            return
    pytest.fail(f"tracing costs over 1% of TTFT: {intervals}")


def _traced_over_untraced(lab: Lab, request: Request) -> Interval:
    ratios = []
    for number in range(30):
        order = ("off", "stages") if number % 2 else ("stages", "off")
        # The better of two runs each: the machine's pauses are far longer than what is looked for.
        ttft = {level: min(lab.run(request, "fastest", trace=level).ttft for _ in range(2)) for level in order}
        ratios.append(ttft["stages"] / ttft["off"])
    return median_interval(ratios)


def test_a_step_that_requests_share_marks_the_device_once_for_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """A pair of events takes microseconds of the host; a pair a request would be a tenth of a decode step of 32."""
    made: list[Event] = []

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            made.append(self)

        def record(self, stream: str) -> None:
            self.at = len(made)

        def synchronize(self) -> None: ...

        def elapsed_time(self, other: Event) -> float:
            return float(other.at - self.at)

    monkeypatch.setattr(trace_module.torch.cuda, "Event", Event)
    monkeypatch.setattr(trace_module.torch.cuda, "synchronize", lambda _: None)
    monkeypatch.setattr(trace_module.torch.cuda, "current_stream", lambda device: "stream")
    tracers, anchor = (
        [Tracer(torch.device("cuda"), level) for level in ("stages", "off", "stages")],
        Anchor.now(torch.device("cuda")),
    )
    for tracer in tracers:
        tracer.start_at(anchor.ns, anchor)
    for name in ("decode", "sample"):
        with shared_span(tracers, name):
            pass
    assert len(made) == 1 + 2 * 2
    for tracer in (tracers[0], tracers[2]):
        on_device = [(span.name, span.duration_ns) for span in tracer.finish().spans if span.lane == "device"]
        assert on_device == [("decode", 1_000_000), ("sample", 1_000_000)]
    assert tracers[1].finish().spans == ()
