"""What an engine tells of one request by its own clock, held against the clock of whoever asked."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

from fastvl_lab.trace import Span, Trace

# The stage of an endpoint's run that an account splits, and what begins the names of its parts.
WAIT = "wait"
OF_WAIT = f"{WAIT}: "
REST = f"{OF_WAIT}rest"

PartName = Literal["preprocess", "queue", "vit", "prefill"]

# In the order that most engines have; the lab's own server queues requests before it preprocesses them.
PARTS: tuple[PartName, ...] = get_args(PartName)

# With what an engine's own TTFT begins: the request's arrival, the end of its preprocessing, or when it is first scheduled.
Begins = Literal["arrival", "preprocessed", "scheduled"]


@dataclass(frozen=True, kw_only=True)
class Part:
    """Seconds of something that an engine did before its first token; `prefill` holds the tower too where no `vit` is told."""

    name: PartName
    seconds: float


@dataclass(frozen=True, kw_only=True)
class Account:
    """An engine's own account of a request; what it does not tell is None or absent.

    source: where it stands, such as "vLLM's metrics". parts: in the order in which they happened. ttft: seconds to its first token,
    counted from what `begins` names. e2e: seconds of the whole request. notes: a sentence for each figure that cannot be, which is
    dropped.
    """

    source: str
    parts: tuple[Part, ...] = ()
    ttft: float | None = None
    begins: Begins = "arrival"
    e2e: float | None = None
    notes: tuple[str, ...] = ()

    def seconds(self, name: PartName) -> float | None:
        """Those of a part; None where it is not told."""
        return next((part.seconds for part in self.parts if part.name == name), None)

    def beside(self, other: Account | None) -> Account:
        """With what another account of the same request tells beyond this one."""
        if other is None:
            return self
        added = tuple(part for part in other.parts if self.seconds(part.name) is None)
        told = other if self.ttft is None else self
        return Account(
            source=f"{self.source} and {other.source}" if added or told is other else self.source,
            parts=tuple(sorted((*self.parts, *added), key=lambda part: PARTS.index(part.name))),
            ttft=told.ttft,
            begins=told.begins,
            e2e=other.e2e if self.e2e is None else self.e2e,
            notes=self.notes + other.notes,
        )

    def held_against(self, trace: Trace) -> Account:
        """Without what cannot be: figures longer than the TTFT or the whole request that the trace has seen."""
        ttft, whole, notes = trace.first_chunk_ns / 1e9, trace.end_ns / 1e9, [*self.notes]

        def kept(name: str, value: float | None, limit: float) -> float | None:
            if value is None or value <= limit:
                return value
            notes.append(f"{name} of {value:.4g} s is longer than the {limit:.4g} s that were seen from outside")
            return None

        parts = tuple(part for part in self.parts if kept(part.name, part.seconds, ttft) is not None)
        if kept("the sum of its parts", sum(part.seconds for part in parts), ttft) is None:
            parts = ()
        own, e2e = kept("TTFT", self.ttft, ttft), kept("the whole request", self.e2e, whole)
        return replace(self, parts=parts, ttft=own, e2e=e2e, notes=tuple(notes))

    def spans(self, trace: Trace) -> tuple[Span, ...]:
        """The trace's `wait` split into `REST`, which no part tells, and the parts, the last of which ends with it.

        Their lengths are the engine's, their places are not: no two clocks are compared. What is longer than `wait` began during
        the upload, and is cut off there. Empty without parts, or where the trace has no one `wait`.
        """
        waits = [span for span in trace.within_ttft() if span.name == WAIT]
        if not self.parts or len(waits) != 1:
            return ()
        (wait,), spans = waits, []
        end = wait.end_ns
        for part in reversed(self.parts):
            start = max(end - round(part.seconds * 1e9), wait.start_ns)
            spans.append(Span(name=f"{OF_WAIT}{part.name}", lane="host", depth=1, start_ns=start, end_ns=end))
            end = start
        spans.append(Span(name=REST, lane="host", depth=1, start_ns=wait.start_ns, end_ns=end))
        return tuple(reversed(spans))

    def __str__(self) -> str:
        """One line."""
        own = None if self.ttft is None else f"TTFT {self.ttft * 1e3:.1f} ms from {self.begins}"
        whole = None if self.e2e is None else f"whole request {self.e2e * 1e3:.1f} ms"
        told = [f"{part.name} {part.seconds * 1e3:.1f} ms" for part in self.parts]
        dropped = [f"dropped: {note}" for note in self.notes]
        return f"{self.source}: {', '.join(filter(None, (own, *told, whole))) or 'no figure'}{''.join(f'; {d}' for d in dropped)}"

    def to_record(self) -> dict[str, Any]:
        """As JSON-ready data; `from_record` reads it back."""
        return {**vars(self), "parts": [[part.name, part.seconds] for part in self.parts], "notes": list(self.notes)}

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> Account:
        parts = tuple(Part(name=name, seconds=seconds) for name, seconds in record["parts"])
        return cls(**{**record, "parts": parts, "notes": tuple(record["notes"])})
