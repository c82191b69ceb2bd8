"""What engines tell of a request by their own clocks: in its answer, or by what they have counted before and after it.

Forms and names as in the released wheels of vLLM 0.33.0, SGLang 0.5.23 and LMDeploy 0.18.0 and in TensorRT-LLM's
`serve/_perf_metrics_schema.py`; `docs/accounts.md` says what each figure means. Whatever comes instead is read as nothing, with a
note, and never raises.
"""

from __future__ import annotations

import json
import math
import re
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

from fastvl_lab.account import Account, Begins, Part, PartName

_LONGEST = 1e9  # seconds; a duration above it is none
_LATEST = 1e12  # seconds; the same of an instant
_PATIENCE, _PAUSE = 0.5, 0.02  # seconds that an engine may take to count a request that has ended

_TENSORRT_LLM = "tensorrt_llm"

# The lab's stages before a first token, as an account has them; a captured first token holds tower and prefill.
_OURS: dict[str, PartName] = {
    "queued": "queue",
    "waiting": "queue",
    **dict.fromkeys(("decode_image", "tokenize", "admit", "preprocess", "await_image", "upload"), "preprocess"),
    "vit": "vit",
    **dict.fromkeys(("merge", "prefill", "first_token", "sample"), "prefill"),
}


@dataclass(kw_only=True)
class _Draft:
    """An account being read; a figure that is no duration leaves a note."""

    source: str
    begins: Begins = "arrival"
    ttft: float | None = None
    e2e: float | None = None
    parts: list[Part] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def seconds(self, name: str, value: Any, per_second: float = 1) -> float | None:
        if value is None:
            return None
        if isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value <= _LONGEST * per_second:
            return value / per_second
        self.notes.append(f"{name} of {_shown(value)} is no duration")
        return None

    def between(self, name: str, start: Any, end: Any) -> float | None:
        """Seconds from one instant to another, both in seconds by one clock."""
        if start is None or end is None:
            return None
        good = all(isinstance(t, int | float) and not isinstance(t, bool) and 0 < t <= _LATEST for t in (start, end))
        return self.seconds(name, end - start if good else (start, end))

    def add(self, name: PartName, seconds: float | None) -> None:
        if seconds is not None:
            self.parts.append(Part(name=name, seconds=seconds))

    def account(self) -> Account | None:
        """None where nothing is told, be it amiss."""
        parts, notes = tuple(self.parts), tuple(self.notes)
        if self.ttft is None and self.e2e is None and not parts and not notes:
            return None
        return Account(source=self.source, parts=parts, ttft=self.ttft, begins=self.begins, e2e=self.e2e, notes=notes)


def in_answer(event: Mapping[str, Any]) -> Account | None:
    """What one event of a streamed chat completion, or a whole one, tells of its request."""
    choices = event.get("choices")
    first = choices[0] if isinstance(choices, list) and choices else None
    run = _of(event.get("fastvl_lab"), "run")
    for data, read in (
        (run, of_lab),
        (event.get("metrics"), of_vllm),
        (_of(first, "meta_info") or event.get("meta_info"), of_sglang),
    ):
        if isinstance(data, Mapping) and (account := read(data)) is not None:
            return account
    return None


def of_vllm(metrics: Mapping[str, Any]) -> Account | None:
    """vLLM's `metrics` of a request (`--enable-per-request-metrics`; in the event with the usage), milliseconds.

    Its time_to_first_token_ms begins when the request is first scheduled: it is the prefill, tower included.
    """
    draft = _Draft(source="vLLM's metrics", begins="scheduled")
    draft.ttft = draft.seconds("time_to_first_token_ms", metrics.get("time_to_first_token_ms"), 1e3)
    draft.add("queue", draft.seconds("queue_time_ms", metrics.get("queue_time_ms"), 1e3))
    draft.add("prefill", draft.ttft)
    return draft.account()


def of_sglang(meta_info: Mapping[str, Any]) -> Account | None:
    """SGLang's `meta_info` of a request (`--enable-metrics`): durations in seconds, and instants of the wall clock."""
    draft = _Draft(source="SGLang's meta_info")
    draft.ttft = draft.seconds("first_token_latency", meta_info.get("first_token_latency"))
    draft.e2e = draft.seconds("e2e_latency", meta_info.get("e2e_latency"))
    received, dispatched = meta_info.get("request_received_ts"), meta_info.get("api_server_dispatch_finish_ts")
    begun, ended = meta_info.get("forward_entry_time"), meta_info.get("prefill_finished_time")
    draft.add("preprocess", draft.between("the time to dispatch", received, dispatched))
    draft.add("queue", draft.seconds("queue_time", meta_info.get("queue_time")))
    draft.add("prefill", draft.between("the time of prefill", begun, ended))
    return draft.account()


def of_lab(record: Mapping[str, Any]) -> Account | None:
    """The record of a run that this project's server sends for `return_trace`: its stages until the first chunk."""
    draft, trace = _Draft(source="the server's trace"), record.get("trace")
    first, end = _of(trace, "first_chunk_ns"), _of(trace, "end_ns")
    draft.ttft, draft.e2e = draft.seconds("first_chunk_ns", first, 1e9), draft.seconds("end_ns", end, 1e9)
    totals: dict[PartName, float] = {}
    spans = _of(trace, "spans")
    for row in spans if isinstance(spans, list) and draft.ttft is not None else ():
        match row:
            case [str(name), "host", 0, int(start), int(stop)] if name in _OURS and start < first:
                lasted = draft.seconds(name, min(stop, first) - start, 1e9)
                totals[_OURS[name]] = totals.get(_OURS[name], 0) + (lasted or 0)
    for part, seconds in totals.items():
        draft.add(part, seconds)
    return draft.account()


def of_tensorrt_llm(body: bytes) -> Account | None:
    """The one request that TensorRT-LLM's /perf_metrics tells of; instants in seconds by one clock. Several are nobody's."""
    try:
        requests = json.loads(body)
    except (ValueError, RecursionError):
        return None
    if not isinstance(requests, list) or not requests:
        return None
    draft = _Draft(source="TensorRT-LLM's perf_metrics")
    if len(requests) > 1:
        draft.notes.append(f"{len(requests)} requests ended since it was last read")
        return draft.account()
    timing = _of(_of(requests[0], "perf_metrics"), "timing_metrics")
    arrived, queued, scheduled, first, last = (
        _of(timing, name)
        for name in ("server_arrival_time", "arrival_time", "first_scheduled_time", "first_token_time", "last_token_time")
    )
    draft.ttft, draft.e2e = draft.between("TTFT", arrived, first), draft.between("the whole request", arrived, last)
    draft.add("preprocess", draft.between("preprocessing", arrived, queued))
    draft.add("queue", draft.between("the queue", queued, scheduled))
    draft.add("prefill", draft.between("prefill", scheduled, first))
    return draft.account()


@dataclass(frozen=True, kw_only=True)
class _Series:
    """Where an engine's Prometheus histograms tell of requests: names without "_sum" and "_count", and of one a stage.

    begins: with what its TTFT begins; where that is the arrival, what is neither queue nor prefill is preprocessing.
    """

    source: str
    begins: Begins = "arrival"
    ttft: str
    queue: str
    prefill: str
    e2e: str
    stage: str = ""


_SERIES = {
    "vllm": _Series(
        source="vLLM's Prometheus",
        ttft="vllm:time_to_first_token_seconds",
        queue="vllm:request_queue_time_seconds",
        prefill="vllm:request_prefill_time_seconds",
        e2e="vllm:e2e_request_latency_seconds",
    ),
    "sglang": _Series(
        source="SGLang's Prometheus",
        ttft="sglang:time_to_first_token_seconds",
        queue="sglang:queue_time_seconds",
        prefill="sglang:per_stage_req_latency_seconds",
        stage="prefill_forward",
        e2e="sglang:e2e_request_latency_seconds",
    ),
    "lmdeploy": _Series(
        source="LMDeploy's Prometheus",
        begins="preprocessed",
        ttft="lmdeploy:time_to_first_token_seconds",
        queue="lmdeploy:request_queue_time_seconds",
        prefill="lmdeploy:request_prefill_time_seconds",
        e2e="lmdeploy:e2e_request_latency_seconds",
    ),
}

_LINE = re.compile(r"([a-zA-Z_:][\w:]*)_(sum|count)(?:\{(.*)\})?\s+(\S+)")
_STAGE = re.compile(r'(?:^|,)\s*stage="([^"]*)"')


# A number by its series' name without its ending, the ending, and the stage in its labels, "" where there is none.
Page = Mapping[tuple[str, Literal["sum", "count"], str], float]


def read_page(body: bytes) -> Page:
    """The sums and counts of a page in Prometheus' text format, over all labels but a stage; other lines are passed over.

    Format: https://prometheus.io/docs/instrumenting/exposition_formats/
    """
    page: dict[tuple[str, Literal["sum", "count"], str], float] = {}
    for line in body.decode(errors="replace").splitlines():
        if (found := _LINE.match(line)) is None:
            continue
        name, ending, labels, number = found.groups()
        stage = _STAGE.search(labels or "")
        key: tuple[str, Any, str] = (name, ending, stage[1] if stage else "")
        try:
            page[key] = page.get(key, 0.0) + float(number)
        except ValueError:
            page[key] = math.nan
    return page


def between_pages(owner: str, before: Page, after: Page) -> Account | None:
    """What one request has added to an engine's histograms; a figure of several requests, or of none, is nobody's."""
    series = _SERIES[owner]
    draft = _Draft(source=series.source, begins=series.begins)

    def added(what: str, name: str, stage: str = "") -> float | None:
        times = after.get((name, "count", stage), 0.0) - before.get((name, "count", stage), 0.0)
        if times not in (0, 1):
            draft.notes.append(f"{what} was counted {times:g} times since it was last read")
        if times != 1:
            return None
        return draft.seconds(what, after.get((name, "sum", stage), math.nan) - before.get((name, "sum", stage), 0.0))

    draft.ttft, draft.e2e = added("TTFT", series.ttft), added("the whole request", series.e2e)
    queue, prefill = added("the queue", series.queue), added("prefill", series.prefill, series.stage)
    if series.begins == "arrival" and draft.ttft is not None and queue is not None and prefill is not None:
        draft.add("preprocess", draft.seconds("preprocessing", draft.ttft - queue - prefill))
    draft.add("queue", queue)
    draft.add("prefill", prefill)
    return draft.account()


def told_between(owner: str, before: bytes, after: bytes) -> Account | None:
    """What two looks at an engine's metrics tell of the one request that ended between them."""
    return of_tensorrt_llm(after) if owner == _TENSORRT_LLM else between_pages(owner, read_page(before), read_page(after))


def _ended(owner: str, body: bytes) -> float | None:
    """How many requests an engine has counted to their end; None where it counts none."""
    if owner == _TENSORRT_LLM:
        return None if body.strip() in (b"", b"[]") else math.nan  # those since the last look, which are never those before it
    return read_page(body).get((_SERIES[owner].e2e, "count", ""))


class Counted:
    """What an engine counts of itself, looked at after each request that an account is wanted of, and once before the first.

    owner: of the model, as the endpoint lists it; one that is not known is asked nothing. fetch: reads a path of its server, None
    where there is nothing to read. Requests that overlap get no account, since counts do not tell them apart.
    """

    def __init__(self, owner: str, fetch: Callable[[str], bytes | None]) -> None:
        self._owner, self._fetch = owner, fetch
        self._path = "/perf_metrics" if owner == _TENSORRT_LLM else "/metrics" if owner in _SERIES else ""
        self._before = fetch(self._path) if self._path else None
        self._counting, self._looking = threading.Lock(), threading.Lock()
        self._open, self._overlap = 0, False

    @contextmanager
    def request(self) -> Iterator[None]:
        """One request under way."""
        with self._counting:
            self._open += 1
            self._overlap = self._overlap or self._open > 1
        try:
            yield
        finally:
            with self._counting:
                self._open -= 1

    def account(self) -> Account | None:
        """Of the request that has ended last; waits up to half a second until the engine has counted it."""
        with self._looking:
            with self._counting:
                under_way, overlap = self._open > 0, self._overlap
                self._overlap = under_way
            if self._before is None or under_way:
                return None
            before, until = self._before, time.monotonic() + _PATIENCE
            while (after := self._fetch(self._path)) is not None and not overlap and time.monotonic() < until:
                if (ended := _ended(self._owner, after)) is not None and ended != _ended(self._owner, before):
                    break
                time.sleep(_PAUSE)
            if after is None:
                return None
            # An engine that counts nothing is not asked again.
            self._before = None if _ended(self._owner, after) is None else after
            return None if overlap else told_between(self._owner, before, after)


def _of(data: Any, name: str) -> Any:
    return data.get(name) if isinstance(data, Mapping) else None


def _shown(value: Any) -> str:
    """The beginning of a value that is none."""
    try:
        return repr(value)[:40]
    except ValueError:  # an int of too many digits
        return "a number without end"
