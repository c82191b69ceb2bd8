"""What a request does inside: its operations and kernels as torch's profiler sees them, its device's idle time, its memory."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from fastvl_lab.engine import EngineLike
from fastvl_lab.errors import RequestError
from fastvl_lab.lab import Lab
from fastvl_lab.request import Request
from fastvl_lab.trace import ON_DEVICE, Lane, Level, Trace

_WHOLE = "fastvl_lab.request"
_LONGEST = 12  # kernels that are named


@dataclass(frozen=True, kw_only=True)
class Operation:
    """One operation: on the host an operator or a compiled program that Python called, on the device a kernel or a copy.

    stage: in which it was called; "" for none, and on the device. Times are microseconds since the request.
    """

    name: str
    lane: Lane
    stage: str
    start_us: float
    end_us: float


@dataclass(frozen=True, kw_only=True, eq=False)
class Profile:
    """All of one warm request's. stages: its stages as operations, in order of start; of a stage's time some may be in none.

    layers: the blocks and layers inside them, where these were watched too.
    """

    stages: tuple[Operation, ...]
    operations: tuple[Operation, ...]
    layers: tuple[Operation, ...] = ()

    def of(self, *stages: str) -> Profile:
        """What was called or ran between the start of the last of the first stage and the end of the last of the last one."""
        starts = [stage.start_us for stage in self.stages if stage.name == stages[0]]
        ends = [stage.end_us for stage in self.stages if stage.name == stages[-1]]
        if not starts or not ends:
            ran = ", ".join(dict.fromkeys(stage.name for stage in self.stages))
            raise RequestError(f"no stage {' or '.join(stages)} ran; those that did are {ran}")

        def within(some: Iterable[Operation]) -> tuple[Operation, ...]:
            return tuple(one for one in some if one.start_us >= max(starts) and one.end_us <= max(ends))

        return Profile(stages=within(self.stages), operations=within(self.operations))

    def to_record(self) -> dict[str, Any]:
        """As JSON-ready data; `from_record` reads it back."""
        return {name: [list(vars(one).values()) for one in some] for name, some in vars(self).items()}

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> Profile:
        """Read `to_record`'s form."""
        names = [field.name for field in fields(Operation)]
        return cls(
            **{
                name: tuple(Operation(**dict(zip(names, one, strict=True))) for one in record[name])
                for name in (f.name for f in fields(cls))
            }
        )

    @property
    def seconds(self) -> float:
        """From the start of the first stage to the end of the last."""
        return (max(s.end_us for s in self.stages) - min(s.start_us for s in self.stages)) / 1e6

    def number(self, lane: Lane) -> int:
        return sum(operation.lane == lane for operation in self.operations)

    def covered(self, lane: Lane) -> float:
        """Seconds in which any operation of the lane was under way."""
        return covered((o.start_us, o.end_us) for o in self.operations if o.lane == lane) / 1e6


def profile_request(lab: Lab, request: Request, engine: EngineLike, *, trace: Level = "stages") -> Profile:
    """Serve a request twice, and the second time under torch's profiler, which takes its share of the time between operations.

    trace: "layers" to watch ViT blocks and decoder layers too. Operations that others call are not counted again; those of threads
    that the engine makes are left out.
    """
    lab.run(request, engine, trace="off")
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (lab.device.type == "cuda")

    def watched() -> Any:
        with profile(activities=activities) as seen, record_function(_WHOLE):
            lab.run(request, engine, trace=trace)
        return seen.events()

    return _profile_of(lab.compute(watched))  # the profiler sees the thread that starts it


def _profile_of(events: Sequence[Any]) -> Profile:
    """The profiler's events as operations: ranges on the host are stages, what they call are operations."""
    whole = next(event for event in events if event.name == _WHOLE and event.device_type.name == "CPU")
    stages, layers, operations = [], [], []
    for event in events:

        def made(lane: Lane, stage: str, event: Any = event) -> Operation:
            start, end = (at - whole.time_range.start for at in (event.time_range.start, event.time_range.end))
            return Operation(name=event.name, lane=lane, stage=stage, start_us=start, end_us=end)

        if event.device_type.name != "CPU":
            if not event.is_user_annotation:  # the profiler draws ranges on the device too
                operations.append(made("device", ""))
        elif event.is_user_annotation:
            if event.cpu_parent is whole:
                stages.append(made("host", event.name))
            elif (stage := _called_in(event, whole)) is not None:
                layers.append(made("host", stage))
        elif (stage := _called_in(event, whole)) is not None:
            operations.append(made("host", stage))
    return Profile(stages=tuple(stages), operations=tuple(operations), layers=tuple(layers))


def _called_in(event: Any, whole: Any) -> str | None:
    """The stage whose Python called an operation, "" outside of any; None for what another operation or thread called."""
    stage, parent = "", event.cpu_parent
    while parent is not None and parent is not whole and parent.is_user_annotation:
        stage, parent = parent.name, parent.cpu_parent
    return stage if parent is whole else None


def covered(intervals: Iterable[tuple[float, float]]) -> float:
    """The length of the union of intervals (start, end)."""
    total, reached = 0.0, float("-inf")
    for start, end in sorted(intervals):
        total += max(end - max(start, reached), 0.0)
        reached = max(reached, end)
    return total


def kernels_of_request(lab: Lab, request: Request, engine: EngineLike) -> dict[str, Any]:
    """What ran on the device in a warm request, by torch's profiler (`by_kernel`).

    Its own run, and never before others are timed: a profiler that has been used may slow what follows.
    """
    lab.run(request, engine, trace="off")
    with profile(activities=[ProfilerActivity.CUDA]) as seen:
        lab.run(request, engine, trace="off")
    on_device = [event for event in seen.events() if event.device_type.name == "CUDA"]
    return by_kernel([(event.name, event.time_range.start, event.time_range.end) for event in on_device])


def by_kernel(ran: Sequence[tuple[str, float, float]]) -> dict[str, Any]:
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


def tuned_launches() -> list[dict[str, Any]]:
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


def device_idle(trace: Trace) -> int | None:
    """Nanoseconds between the start of the device's first stage and the first token that no stage of the device covers.

    What is idle between the kernels of a stage is not seen here. None without a device lane.
    """
    spans = [span for span in trace.within_ttft("device") if span.name in ON_DEVICE]
    if not spans:
        return None
    return trace.first_chunk_ns - spans[0].start_ns - round(covered((span.start_ns, span.end_ns) for span in spans))


def memory_of_request(lab: Lab, request: Request, engine: EngineLike) -> dict[str, float | None]:
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
