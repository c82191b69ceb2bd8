"""What a folder of records holds, as a table."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from fastvl_lab import shown
from fastvl_lab.lasting import Entry, Records
from fastvl_lab.view.tables import frame


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
