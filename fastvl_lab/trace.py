"""The clock at every door: spans on a host lane and a device lane, on one time axis, without a sync inside a request.

A `Tracer` records while a request runs; `Tracer.finish` turns what it saw into a frozen `Trace`. The host lane holds
`time.perf_counter_ns` intervals. The device lane (CUDA only) holds pairs of CUDA events, read after the request has ended and
placed on the host's axis through an anchor event recorded while the device was idle. A device span reaches from when the device
came to the stage's first command to when it had passed its last; time it waited for launches in between is inside the span. A
thread that plays the device on a CPU (`streaming.rounds`) writes its spans on the device lane. The lane "beside" holds what a
second thread of the host did while the first went on (`schedule.overlap`); the first one's wait for it is a stage of the host lane.

Every stage begins with a look at whether anybody still waits for the request, so that it ends at the next door once nobody does.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import cache
from typing import Any, Literal, NamedTuple

import torch

from fastvl_lab.errors import RequestCancelledError, RequestError

# What times a block or a layer inside a stage, by its name.
Inner = Callable[[str], AbstractContextManager[None]]

# Marks the device's work, and gives the mark.
Mark = Callable[[], Any]

Lane = Literal["host", "beside", "device"]
Level = Literal["off", "stages", "layers"]

# What is counted where inputs are padded: "vit: patches computed", and of them "vit: patches of padding".
COMPUTED, OF_PADDING = " computed", " of padding"

LANES: tuple[Lane, ...] = ("host", "beside", "device")
LEVELS: tuple[Level, ...] = ("off", "stages", "layers")

# Stage -> the file or folder of the package that does the work, in the order a request meets them.
STAGES: dict[str, str] = {
    "queued": "schedule/",
    "waiting": "schedule/",
    "decode_image": "preprocessor/decode_image.py",
    "tokenize": "tokenizer.py",
    "grammar": "grammars.py",
    "admit": "cache/",
    "preprocess": "preprocessor/",
    "await_image": "schedule/overlap.py",
    "upload": "preprocessor/upload.py",
    "vit": "vit/",
    "merge": "decoder/steps.py",
    "prefill": "decoder/steps.py",
    "first_token": "capture/stages.py",
    "sample": "decoder/steps.py",
    "emit": "streaming/text.py",
    "decode": "decoder/steps.py",
}

# Stages that always give a GPU work, and those that never do; the others do with some options.
ON_DEVICE = ("upload", "vit", "merge", "prefill", "first_token", "sample", "decode")
WAITS = ("queued", "waiting")  # in which others were served
ON_HOST = (*WAITS, "tokenize", "grammar", "await_image", "emit")


@dataclass(frozen=True, kw_only=True, slots=True)
class Span:
    """One timed interval: nanoseconds since the request was handed over; depth 0 is a stage, deeper is inside one."""

    name: str
    lane: Lane
    depth: int
    start_ns: int
    end_ns: int

    @property
    def duration_ns(self) -> int:
        return self.end_ns - self.start_ns


@dataclass(frozen=True, kw_only=True)
class Trace:
    """Every span of one run, and the two instants that frame it.

    `first_chunk_ns` is TTFT: when the first text chunk was in the consumer's hands. `end_ns` is when the engine returned.
    `counts` says how often something happened that takes no time of its own, such as a table found that was made before.
    """

    spans: tuple[Span, ...]
    first_chunk_ns: int
    end_ns: int
    counts: Mapping[str, int] = field(default_factory=dict)

    def within_ttft(self, lane: Lane = "host") -> tuple[Span, ...]:
        """The stages (depth 0) of one lane that began before the first chunk, cut off at it, in order of start."""
        cut = [
            Span(name=s.name, lane=lane, depth=0, start_ns=s.start_ns, end_ns=min(s.end_ns, self.first_chunk_ns))
            for s in self.spans
            if s.lane == lane and s.depth == 0 and s.start_ns < self.first_chunk_ns
        ]
        return tuple(sorted(cut, key=lambda s: s.start_ns))

    def stages(self, lane: Lane = "host") -> dict[str, int]:
        """Nanoseconds of TTFT spent in each stage, in order of first start; a stage that did not run is absent."""
        totals: dict[str, int] = {}
        for span in self.within_ttft(lane):
            totals[span.name] = totals.get(span.name, 0) + span.duration_ns
        return totals

    def gaps(self, lane: Lane = "host") -> tuple[tuple[int, int], ...]:
        """The intervals of TTFT, in nanoseconds, that no stage of the lane covers.

        They are measured as the complement of the union of spans, not as TTFT less a sum: spans that overlapped would make
        stages and gaps add up to more than TTFT, and so be found.
        """
        gaps, reached = [], 0
        for span in self.within_ttft(lane):
            if span.start_ns > reached:
                gaps.append((reached, span.start_ns))
            reached = max(reached, span.end_ns)
        if reached < self.first_chunk_ns:
            gaps.append((reached, self.first_chunk_ns))
        return tuple(gaps)

    @property
    def unaccounted_ns(self) -> int:
        """Nanoseconds of TTFT in no host stage."""
        return sum(end - start for start, end in self.gaps())

    @property
    def has_device_lane(self) -> bool:
        return any(span.lane == "device" for span in self.spans)

    @property
    def padding(self) -> dict[str, float]:
        """Of each stage whose inputs were padded, the share of what it computed that was padding; a mean over its times."""
        computed = {name.removesuffix(COMPUTED): times for name, times in self.counts.items() if name.endswith(COMPUTED)}
        return {what.partition(":")[0]: self.counts.get(f"{what}{OF_PADDING}", 0) / times for what, times in computed.items()}

    def to_chrome(self, label: str = "fastvl_lab", *, ours: bool = True) -> dict[str, Any]:
        """The trace in the Trace Event format that chrome://tracing and Perfetto open: one track a lane, microseconds.

        ours: whether the package's own files did the work; then each stage names its file.
        Format: "Trace Event Format", https://docs.google.com/document/d/1CvAClvFfyA5R-PhYUmn5OOQtYMH4h6I0nSsKchNAySU
        """
        tracks = {"host": 1, "device": 2, "beside": 3}
        events: list[dict[str, Any]] = [{"ph": "M", "pid": 1, "name": "process_name", "args": {"name": label, **self.counts}}]
        for lane, track in tracks.items():
            if lane == "host" or any(span.lane == lane for span in self.spans):
                events.append({"ph": "M", "pid": 1, "tid": track, "name": "thread_name", "args": {"name": lane}})
        for span in self.spans:
            event = {"ph": "X", "pid": 1, "tid": tracks[span.lane], "name": span.name, "cat": "stage"}
            event |= {"ts": span.start_ns / 1e3, "dur": span.duration_ns / 1e3}
            if span.depth > 0:
                event["cat"] = "layer"
            elif ours and span.name in STAGES:
                event["args"] = {"file": f"fastvl_lab/{STAGES[span.name]}"}
            events.append(event)
        events.append({"ph": "i", "s": "g", "pid": 1, "tid": 1, "name": "first chunk (TTFT)", "ts": self.first_chunk_ns / 1e3})
        return {"traceEvents": events, "displayTimeUnit": "ms"}

    def to_record(self) -> dict[str, Any]:
        """The trace as JSON-ready data; `from_record` reads it back."""
        spans = [[s.name, s.lane, s.depth, s.start_ns, s.end_ns] for s in self.spans]
        return {"spans": spans, "first_chunk_ns": self.first_chunk_ns, "end_ns": self.end_ns, "counts": dict(self.counts)}

    @classmethod
    def from_record(cls, record: dict[str, Any]) -> Trace:
        fields = ("name", "lane", "depth", "start_ns", "end_ns")
        spans = tuple(Span(**dict(zip(fields, row, strict=True))) for row in record["spans"])
        counts = record.get("counts", {})  # absent in records of before they were kept
        return cls(spans=spans, first_chunk_ns=record["first_chunk_ns"], end_ns=record["end_ns"], counts=counts)


def no_inner(_: str) -> AbstractContextManager[None]:
    """Times nothing: for what is compiled or captured, where no clock can be read."""
    return nullcontext()


class Anchor(NamedTuple):
    """An instant on both clocks: nanoseconds of the host's, and a mark that the device passed when it had nothing to do."""

    ns: int
    event: Any

    @classmethod
    def now(cls, device: torch.device) -> Anchor:
        """Wait for the device, and mark; there is no mark on a CPU."""
        if device.type != "cuda":
            return cls(time.perf_counter_ns(), None)
        torch.cuda.synchronize(device)
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(device))
        return cls(time.perf_counter_ns(), event)


class _OfThread(threading.local):
    """What one thread of a request has open, and the lane on which it writes."""

    def __init__(self) -> None:
        self.open: list[tuple[str, int, Any, Any]] = []
        self.lane: Lane = "host"


def _profiler_range(name: str) -> Any:
    """The span as a range of torch's profiler, where one is watching; else None."""
    if not torch.autograd.profiler._is_profiler_enabled:
        return None
    entered = torch.profiler.record_function(name)
    entered.__enter__()
    return entered


class Tracer:
    """Records the spans of one run; level "off" records none, "stages" the stages, "layers" also blocks and layers.

    Usage: `start()`, then `with span("vit"):` at each stage, `delivered()` at the consumer, then `finish()`. Waits for the device
    in `start` and `finish` only, both outside the request. Spans nest by thread, so a request's threads may share it; the
    device is watched from the thread that started it. Under torch's profiler every span is a range of its. stop: set by whoever
    gives the request up; the next stage of it to begin raises `RequestCancelledError`. on_begin: given the name and start (ns) of
    each stage of the host as it begins, and on_stage its span as it ends, while the request waits.
    """

    def __init__(
        self,
        device: torch.device,
        level: Level = "stages",
        *,
        stop: threading.Event | None = None,
        on_begin: Callable[[str, int], object] | None = None,
        on_stage: Callable[[Span], object] | None = None,
    ) -> None:
        if level not in LEVELS:
            raise RequestError(f"trace is {level!r}; the choices are {', '.join(LEVELS)}")
        self.level = level
        self.stop = stop or threading.Event()
        self._on_begin, self._on_stage = on_begin, on_stage
        self._cuda = device.type == "cuda"
        self._device = device
        self._mine = _OfThread()
        self._owner = threading.get_ident()
        self._closed: list[tuple[str, Lane, int, int, int, Any, Any]] = []
        self._anchor = Anchor(0, None)
        self._started_ns = 0
        self._first_chunk_ns: int | None = None
        self._counts: dict[str, int] = {}

    def start(self) -> None:
        """Start the clock: what follows is the request."""
        anchor = Anchor.now(self._device)
        self.start_at(anchor.ns, anchor)

    def start_at(self, ns: int, anchor: Anchor) -> None:
        """The clock was started at that time of the host's; the anchor was dropped by the calling thread, before or after."""
        self._owner, self._anchor, self._started_ns = threading.get_ident(), anchor, ns

    @property
    def started_ns(self) -> int:
        """When the clock was started, on the host's."""
        return self._started_ns

    def fill(self, name: str) -> None:
        """A stage of the host from the end of the last one, or from the start, until now: what the request did was wait."""
        self.check()
        if self.level != "off":
            ends = (stop_ns for _, lane, depth, _, stop_ns, *_ in reversed(self._closed) if lane == "host" and depth == 0)
            self._closed.append((name, "host", 0, next(ends, self._started_ns), time.perf_counter_ns(), None, None))

    def delivered(self) -> float:
        """Stamp a chunk that has just reached the consumer: seconds since `start`; the first one ends TTFT."""
        now = time.perf_counter_ns()
        if self._first_chunk_ns is None:
            self._first_chunk_ns = now - self._started_ns
        return (now - self._started_ns) / 1e9

    def span(self, name: str) -> AbstractContextManager[None]:
        """A stage; raises `RequestCancelledError` if the request has been given up."""
        self.check()
        return nullcontext() if self.level == "off" else _Recorded(self, name)

    def check(self) -> None:
        """Raise `RequestCancelledError` if the request has been given up."""
        if self.stop.is_set():
            raise RequestCancelledError("the request was given up by whoever made it")

    def on_device(self) -> AbstractContextManager[None]:
        """The calling thread's spans are those of a device that it plays."""
        return self._on("device")

    def beside(self) -> AbstractContextManager[None]:
        """The calling thread's spans are those of a second thread of the host, while the first goes on."""
        return self._on("beside")

    @contextmanager
    def _on(self, lane: Lane) -> Iterator[None]:
        self._mine.lane = lane
        try:
            yield
        finally:
            self._mine.lane = "host"

    def inner(self, name: str) -> AbstractContextManager[None]:
        """A block or layer inside a stage; recorded at level "layers" only."""
        return _Recorded(self, name) if self.level == "layers" else nullcontext()

    def count(self, name: str, times: int = 1) -> None:
        """Something happened once more, or so many times; what did not happen is not written down."""
        if times:
            self._counts[name] = self._counts.get(name, 0) + times

    def modules(self, modules: Mapping[str, torch.nn.Module]) -> AbstractContextManager[None]:
        """Time stock modules as blocks or layers; touches them at level "layers" only."""
        return module_spans(modules, self.inner) if self.level == "layers" else nullcontext()

    def begin(self, name: str, mark: Mark | None = None) -> None:
        """Open a span where no `with` can stand, as in a hook; close it with `end`. mark: in place of its own of the device."""
        if self.level != "off":
            event = self._event() if mark is None else mark()
            self._mine.open.append((name, time.perf_counter_ns(), event, _profiler_range(name)))
            if self._on_begin is not None and len(self._mine.open) == 1 and self._mine.lane == "host":
                self._on_begin(name, self._mine.open[0][1] - self._started_ns)

    def end(self, name: str, mark: Mark | None = None) -> None:
        """Close the span `name`, and with it any that an exception left open inside it. mark: as `begin` has it."""
        if self.level == "off":
            return
        opened = self._mine.open
        assert any(name == other for other, *_ in opened), f"span {name!r} is not open"
        closed = ""
        while closed != name:
            closed, start_ns, start_event, watched = opened.pop()
            end_event = None if start_event is None else self._event() if mark is None else mark()
            self._closed.append((closed, self._mine.lane, len(opened), start_ns, time.perf_counter_ns(), start_event, end_event))
            if watched is not None:
                watched.__exit__(None, None, None)
            if self._on_stage is not None and not opened and self._mine.lane == "host":
                begin, end = start_ns - self._started_ns, self._closed[-1][4] - self._started_ns
                self._on_stage(Span(name=closed, lane="host", depth=0, start_ns=begin, end_ns=end))

    def _event(self) -> Any:
        """A mark in the device's own work, or None from where that is not launched."""
        if not self._cuda or threading.get_ident() != self._owner:
            return None
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self._device))
        return event

    def finish(self) -> Trace:
        """Stop the clock, wait for the device, and put both lanes on one axis."""
        end_ns = time.perf_counter_ns() - self._started_ns
        assert not self._mine.open, f"spans left open: {[name for name, *_ in self._mine.open]}"
        if events := [end for *_, end in self._closed if end is not None]:
            events[-1].synchronize()  # of its last stage: what others have launched since is not waited for
        spans, late = [], self._anchor.ns - self._started_ns
        for name, lane, depth, start_ns, stop_ns, start_event, end_event in self._closed:
            begin, stop = start_ns - self._started_ns, stop_ns - self._started_ns
            spans.append(Span(name=name, lane=lane, depth=depth, start_ns=begin, end_ns=stop))
            if start_event is not None and name not in ON_HOST:
                begin = late + round(self._anchor.event.elapsed_time(start_event) * 1e6)
                stop = late + round(self._anchor.event.elapsed_time(end_event) * 1e6)
                spans.append(Span(name=name, lane="device", depth=depth, start_ns=begin, end_ns=stop))
        spans.sort(key=lambda s: (s.start_ns, s.depth))
        first_chunk_ns = end_ns if self._first_chunk_ns is None else self._first_chunk_ns
        return Trace(spans=tuple(spans), first_chunk_ns=first_chunk_ns, end_ns=end_ns, counts=self._counts)


class _Recorded(AbstractContextManager[None]):
    """A span as a `with`; not a generator, which an interruption on its way in would close a second time."""

    def __init__(self, tracer: Tracer, name: str, begin: Mark | None = None, end: Mark | None = None) -> None:
        self._tracer, self._name, self._begin, self._end = tracer, name, begin, end

    def __enter__(self) -> None:
        self._tracer.begin(self._name, self._begin)

    def __exit__(self, *_: object) -> None:
        self._tracer.end(self._name, self._end)


def shared_span(tracers: Sequence[Tracer], name: str) -> ExitStack:
    """A stage of several requests that one thread serves, which marks the device once: it goes on, whoever of them gives up."""
    begin, end = cache(tracers[0]._event), cache(tracers[0]._event)
    stack = ExitStack()
    for tracer in tracers:
        stack.enter_context(_Recorded(tracer, name, begin, end))
    return stack


@contextmanager
def module_spans(modules: Mapping[str, torch.nn.Module], span: Callable[[str], AbstractContextManager[None]]) -> Iterator[None]:
    """Time stock modules from outside: a span a forward, through hooks that are removed on leaving."""
    handles, entered = [], []

    def enter(name: str) -> Callable[..., None]:
        def hook(*_: Any) -> None:
            opened = span(name)
            opened.__enter__()
            entered.append(opened)

        return hook

    def leave(*_: Any) -> None:
        entered.pop().__exit__(None, None, None)

    for name, module in modules.items():
        handles += [module.register_forward_pre_hook(enter(name)), module.register_forward_hook(leave)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        while entered:  # left open by an exception inside a module
            entered.pop().__exit__(None, None, None)
