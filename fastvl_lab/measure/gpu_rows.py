"""What the GPU report writes down of runs: TTFT by stage on both lanes, idle time, memory, captures; and its time limit."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch.profiler import ProfilerActivity, profile

from fastvl_lab.capture.execute import Capture
from fastvl_lab.engine import EngineLike
from fastvl_lab.lab import Lab
from fastvl_lab.measure.capturing import break_even
from fastvl_lab.measure.compare import Comparison
from fastvl_lab.measure.operations import covered
from fastvl_lab.measure.slot_report import Row
from fastvl_lab.measure.statistics import median_interval
from fastvl_lab.request import Request
from fastvl_lab.run import Run
from fastvl_lab.trace import ON_DEVICE, Lane, Trace

_LONGEST = 12  # kernels that are named


@dataclass(frozen=True, kw_only=True)
class Deadline:
    """Until when work may begin; `minutes` is the limit in words, `ends` a reading of `time.monotonic`."""

    minutes: float
    ends: float

    @classmethod
    def after(cls, minutes: float) -> Deadline:
        return cls(minutes=minutes, ends=time.monotonic() + 60 * minutes)

    @property
    def passed(self) -> bool:
        return time.monotonic() >= self.ends

    def rounds(self, wanted: int, least: int, seconds: float, *, warm_up: int) -> int:
        """How many rounds of so many seconds each there is time for besides those of warm-up; 0 if they are fewer than `least`."""
        fitting = int((self.ends - time.monotonic()) / max(seconds, 1e-9)) - warm_up
        return min(wanted, fitting) if fitting >= least else 0

    def skipped(self) -> str:
        return f"skipped: no time left of the {self.minutes:g} minutes"


def timed_row(comparison: Comparison, label: str, reference: str, floor_ms: float) -> Row:
    """An engine's times out of a comparison, or why it has none after all; floor_ms: from patches to the first token."""
    if label in comparison.failures:
        return {"parity": False, "error": comparison.failures[label]}
    if not comparison.parity(label):
        return {"parity": False, "error": comparison.checks[label].why}
    if not comparison.runs(label):
        return {"parity": None, "error": "no run was warm: its graphs were given up for want of room"}
    row = first_token_row(comparison, label, reference)
    return row | {"floor_ms": floor_ms, "floor_share": floor_ms / row["patches_ms"]}


def first_token_row(comparison: Comparison, label: str, reference: str) -> Row:
    """Medians of an engine's warm runs for one token: TTFT, from patches on, by stage, and idle; its ratios, paired by round."""
    runs = comparison.runs(label)
    ttft = median_interval([run.ttft * 1e3 for run in runs])
    row: Row = {"rounds": len(runs), "ttft_ms": ttft.median, "ttft_low_ms": ttft.low, "ttft_high_ms": ttft.high}
    row |= {"patches_ms": _median([since_upload(run.trace) for run in runs])}
    row |= {"host_ms": _stages(runs, "host"), "device_ms": _stages(runs, "device")}
    row |= {"unaccounted_ms": _median([run.trace.unaccounted_ns for run in runs])}
    idle = [device_idle(run.trace) for run in runs]
    shares = [ns / run.trace.first_chunk_ns for ns, run in zip(idle, runs, strict=True) if ns is not None]
    row["idle_share"] = median_interval(shares).median if shares else None
    of_what: dict[str, Callable[[Trace], int]] = {"ratio": lambda trace: trace.first_chunk_ns, "patches_ratio": since_upload}
    for name, of in of_what.items():
        theirs, ours = (_warm(comparison, engine, of) for engine in (reference, label))
        pairs = [theirs[number] / ours[number] for number in ours if number in theirs]
        ratio = median_interval(pairs) if pairs else (None, None, None)
        row |= dict(zip((name, f"{name}_low", f"{name}_high"), ratio, strict=True))
    return row


def _warm(comparison: Comparison, engine: str, of: Callable[[Trace], int]) -> dict[int, int]:
    """Round -> what `of` reads from the engine's run there, if that was warm."""
    mine = [sample for sample in comparison.samples if sample.engine == engine and sample.round >= 0]
    return {sample.round: of(sample.run.trace) for sample in mine if sample.run.kind == "warm"}


def _stages(runs: Sequence[Run], lane: Lane) -> dict[str, float]:
    """The median ms of each stage in TTFT, in order of first start."""
    of_each = [run.trace.stages(lane) for run in runs]
    return {stage: _median([stages.get(stage, 0) for stages in of_each]) for stage in of_each[0]}


def _median(ns: Sequence[int]) -> float:
    """Nanoseconds to a median in ms."""
    return median_interval([x / 1e6 for x in ns]).median


def since_upload(trace: Trace) -> int:
    """Nanoseconds from the host's leaving the last upload, when the patches are there or on their way, to the first token."""
    return trace.first_chunk_ns - max(s.end_ns for s in trace.within_ttft() if s.name == "upload")


def device_idle(trace: Trace) -> int | None:
    """Nanoseconds between the start of the device's first stage and the first token that no stage of the device covers.

    What is idle between the kernels of a stage is not seen here. None without a device lane.
    """
    spans = [span for span in trace.within_ttft("device") if span.name in ON_DEVICE]
    if not spans:
        return None
    idle, reached = 0, spans[0].start_ns
    for span in spans:
        idle += max(span.start_ns - reached, 0)
        reached = max(reached, span.end_ns)
    return idle + max(trace.first_chunk_ns - reached, 0)


def memory_row(lab: Lab, request: Request, engine: EngineLike) -> Row:
    """Memory of a warm run that is not timed; None on a CPU.

    peak_mb: the most that was allocated, with weights and all caches; working_mb: what of it was not held before. What a CUDA graph
    works in is in the graphs' pool, and so in neither.
    """
    if lab.device.type != "cuda":
        return {"peak_mb": None, "working_mb": None}
    held = torch.cuda.memory_allocated(lab.device)
    torch.cuda.reset_peak_memory_stats(lab.device)
    lab.run(request, engine, trace="off")
    peak = torch.cuda.max_memory_allocated(lab.device)
    return {"peak_mb": peak / 1e6, "working_mb": (peak - held) / 1e6}


def kernels_row(lab: Lab, request: Request, engine: EngineLike) -> Row:
    """What ran on the device in a warm request, by torch's profiler (`by_kernel`).

    Its own run, and never before others are timed: a profiler that has been used may slow what follows.
    """
    lab.run(request, engine, trace="off")
    with profile(activities=[ProfilerActivity.CUDA]) as seen:
        lab.run(request, engine, trace="off")
    on_device = [event for event in seen.events() if event.device_type.name == "CUDA"]
    return by_kernel([(event.name, event.time_range.start, event.time_range.end) for event in on_device])


def by_kernel(ran: Sequence[tuple[str, float, float]]) -> Row:
    """Of kernels and copies (name, start and end in microseconds) the milliseconds in which any ran, None if there are none.

    "longest": those that took most, by name, with how often they ran and the sum of their milliseconds.
    """
    spent: dict[str, list[float]] = {}
    for name, start, end in ran:
        spent.setdefault(name, []).append((end - start) / 1e3)
    longest = sorted(spent.items(), key=lambda item: -sum(item[1]))[:_LONGEST]
    return {
        "kernels_ms": covered((start, end) for _, start, end in ran) / 1e3 if ran else None,
        "longest": [{"name": name, "times": len(each), "ms": sum(each)} for name, each in longest],
    }


def tuned_launches() -> list[Row]:
    """The launch settings that this process has tuned its attention kernels to, each for a dtype and a shape."""
    from fastvl_lab.kernels.decode_attention import decode_share_kernel
    from fastvl_lab.kernels.prefill_attention import prefill_attention_kernel
    from fastvl_lab.kernels.segment_attention import segment_attention_kernel

    kernels = (segment_attention_kernel, prefill_attention_kernel, decode_share_kernel)
    return [
        {"kernel": kernel.kernel.fn.__name__, "tuned_for": tuned_for, "launch": launch}
        for kernel in kernels
        for tuned_for, launch in kernel.launches()
    ]


def capture_row(fresh: Sequence[Capture], kept: Sequence[Capture]) -> Row:
    """What was captured for a run, or for earlier ones where nothing new was needed: each program, and the sums of s and MB."""
    captures = [capture for capture in fresh or kept if capture.stage != "decode"]
    return {
        "captures": [vars(capture) for capture in captures],
        "captured_before": bool(captures) and not fresh,
        "capture_s": sum(capture.seconds for capture in captures),
        "capture_mb": sum(capture.n_bytes for capture in captures) / 1e6,
    }


def pays_after(row: Row, eager: Row) -> int | None:
    """After how many requests a row's captures have paid; None where it has none, or is not shown to be faster than eager."""
    if not row.get("captures") or "ttft_ms" not in row or "ttft_ms" not in eager:
        return None
    if not row["ttft_high_ms"] < eager["ttft_low_ms"]:  # NaN where there were too few rounds for an interval
        return None
    captures = [Capture(**capture) for capture in row["captures"]]
    return break_even(captures, eager=eager["ttft_ms"] / 1e3, captured=row["ttft_ms"] / 1e3)
