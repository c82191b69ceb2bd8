"""What a folder of records holds, and what became slower between two of them, as tables."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from fastvl_lab import shown
from fastvl_lab.lasting import Entry, Records
from fastvl_lab.measure.regressions import Change, Regressions
from fastvl_lab.view.tables import frame, times


@shown.frame.register(Records)
def records_frame(found: Records) -> Any:
    """A line a record, the newest first."""
    columns: dict[str, Callable[[Entry], object]] = {
        "when": lambda entry: entry.moment,
        "what": lambda entry: entry.kind,
        "of": lambda entry: entry.title,
        "device": lambda entry: entry.environment.get("device"),
        "folder": lambda entry: str(entry.path),
    }
    return frame(found, columns)


@shown.frame.register(Regressions)
def regressions_frame(found: Regressions) -> Any:
    """A line an engine and size: TTFT before and after, how many times as long it is, and where the difference lies."""

    def ms(median: float | None) -> str | None:
        return None if median is None or median != median else f"{median * 1e3:.2f}"

    columns: dict[str, Callable[[Change], object]] = {
        "checkpoint": lambda change: change.checkpoint,
        "image": lambda change: change.image,
        "engine": lambda change: change.engine,
        "TTFT ms before": lambda change: ms(change.before and change.before.median),
        "after": lambda change: ms(change.after and change.after.median),
        "times as long (95% CI)": lambda change: times(change.ratio),
        f"slower than {found.bound:g}": lambda change: "YES" if change in found.slower else "no" if change.ratio else None,
        "most of it in": lambda change: change.stage,
        "why not compared": lambda change: change.why or None,
    }
    return frame(found.changes, columns)
