"""Results that last: a folder each, whole or absent, from which another process draws everything again without a model.

`record.json` is small and says what the result is. `samples.parquet` has a row a run, for pandas; where pandas or pyarrow is not
installed, `samples.jsonl` has the same rows, a line each. `trace.json` is in the Trace Event Format, which Perfetto opens, and
keeps under "record" all that `open` makes the result of. What is no number is null in all three.
"""

from __future__ import annotations

import importlib
import json
import math
import os
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastvl_lab import shown
from fastvl_lab.errors import MissingExtraError, RequestError, counted, quoted, require, sentence
from fastvl_lab.trace import Trace
from fastvl_lab.whole import write_folder

FORMAT = "fastvl_lab record 1"
RECORD, TRACE = "record.json", "trace.json"
_TABLE, _LINES = "samples.parquet", "samples.jsonl"

# Class -> the module that defines it, imported when such a record is opened.
_CLASSES = {
    "Run": "fastvl_lab.run",
    "Comparison": "fastvl_lab.measure.compare",
    "Attribution": "fastvl_lab.measure.compare",
    "Shares": "fastvl_lab.measure.shares",
    "Load": "fastvl_lab.measure.load",
    "SweepResult": "fastvl_lab.measure.sweep",
    "GridResult": "fastvl_lab.grid.merge",
    "Tuned": "fastvl_lab.measure.tune",
}

# What reading a file may fail with that is damaged, or another program's.
_DAMAGED = (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError)


@dataclass(frozen=True, kw_only=True)
class Traced:
    """A trace among others of one file. ours: whether the package's own files did the work. since_ns: when its request began."""

    label: str
    trace: Trace
    ours: bool
    since_ns: int = 0


@dataclass(frozen=True, kw_only=True)
class About:
    """What stands beside a result. title: in a few words; findings: in sentences; environment: where and when it was measured.

    samples: a row a run; traces: those that are worth looking at.
    """

    title: str
    findings: Sequence[str]
    environment: Mapping[str, str]
    samples: Sequence[Mapping[str, Any]]
    traces: Iterable[Traced] = ()


class Lasting:
    """A result that can be kept. Its class is one of `_CLASSES`, and has `to_record`, `from_record` and `about`."""

    def to_record(self) -> dict[str, Any]:
        raise NotImplementedError

    def about(self) -> About:
        """What stands beside it in its folder."""
        raise NotImplementedError

    def save(self, folder: str | Path, *, replace: bool = False) -> Path:
        """Keep it as a folder, whole or not at all; `fl.open` reads it back. replace: a record that is there is overwritten.

        Raises `RequestError` where the folder is there, or cannot be written.
        """
        target = _place(folder).absolute()
        if target.exists() and not (replace and (target / RECORD).is_file()):
            raise RequestError(f"{target} is there already; name a new folder{'' if replace else ', or pass replace=True'}")
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            write_folder(target, self._write, replace=replace)
        except OSError as error:
            raise RequestError(f"{target} cannot be written: {error.strerror or error}") from None
        return target

    def _write(self, folder: Path) -> None:
        about = self.about()
        samples = _write_samples(folder, [dict(row) for row in about.samples])
        whole = {"traceEvents": list(_events(about.traces)), "displayTimeUnit": "ms", "record": self.to_record()}
        (folder / TRACE).write_text(_json(whole), encoding="utf-8")
        head = {
            "format": FORMAT,
            "kind": next(one.__name__ for one in type(self).__mro__ if one.__name__ in _CLASSES),
            "when": time.time(),
            "title": about.title,
            "findings": list(about.findings),
            "environment": dict(about.environment),
            "files": {name: (folder / name).stat().st_size for name in (samples, TRACE)},
        }
        (folder / RECORD).write_text(_json(head, indent=1), encoding="utf-8")


@dataclass(frozen=True, kw_only=True)
class Entry:
    """What a list tells of a record. kind: the class of its result; when: it was written, in seconds since 1970."""

    path: Path
    kind: str
    when: float
    title: str
    findings: tuple[str, ...]
    environment: Mapping[str, str]

    @property
    def moment(self) -> str:
        """When, in local time."""
        return time.strftime("%Y-%m-%d %H:%M", time.localtime(self.when))

    def open(self) -> Any:
        """The result; raises as `fl.open`."""
        return open(self.path)


@dataclass(frozen=True, kw_only=True)
class Records(Sequence[Entry]):
    """The records of a folder, the newest first; skipped: a sentence for each that cannot be read."""

    found: tuple[Entry, ...]
    skipped: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.found)

    def __getitem__(self, index: Any) -> Any:
        return self.found[index]

    def __repr__(self) -> str:
        lines = [f"{entry.moment}  {entry.kind:<12} {entry.title}  ({entry.path})" for entry in self.found[:_SHOWN]]
        more = [f"and {len(self.found) - _SHOWN} more"] if self.found[_SHOWN:] else []
        return "\n".join([counted(len(self.found), "record"), *lines, *more, *(f"skipped: {why}" for why in self.skipped)])

    def frame(self) -> Any:
        """A row a record, as a pandas DataFrame; raises `MissingExtraError` without pandas."""
        return shown.frame(self)


_SHOWN = 50  # of many records, as text


def open(folder: str | Path) -> Any:
    """The result that was kept in a folder: a `Run`, `Comparison`, `Load` or any other of `_CLASSES`.

    Logits are not kept. Raises `RequestError` for a folder that holds no record, one that is not whole, or another version's.
    """
    path = _place(folder)
    try:
        entry = _told(path)
        made = getattr(importlib.import_module(_CLASSES[entry.kind]), entry.kind)
        return made.from_record(json.loads((path / TRACE).read_text(encoding="utf-8"))["record"])
    except _DAMAGED as error:
        raise RequestError(f"{path} is no record that can be read: {sentence(error)}") from None


def records(folder: str | Path) -> Records:
    """The records in a folder and in those inside it, by reading each `record.json` alone.

    One that is damaged, not whole or another program's is skipped with a sentence. Raises `RequestError` where there is no folder.
    """
    top = _place(folder)
    if not top.is_dir():
        raise RequestError(f"there is no folder {top}")
    found, skipped = list[Entry](), list[str]()
    for place, inside, files in os.walk(top, onerror=lambda error: skipped.append(f"{error.filename} ({sentence(error)})")):
        inside[:] = [name for name in inside if not name.startswith(".")] if RECORD not in files else []  # those are not whole
        if RECORD in files:
            try:
                found.append(_told(Path(place)))
            except _DAMAGED as error:
                skipped.append(f"{place} ({sentence(error)})")
    return Records(found=tuple(sorted(found, key=lambda entry: -entry.when)), skipped=tuple(sorted(skipped)))


def _place(folder: str | Path) -> Path:
    if not isinstance(folder, str | Path):
        raise RequestError(f"the folder is {quoted(folder)}; give its path")
    return Path(folder).expanduser()


def _told(folder: Path) -> Entry:
    """What a folder's `record.json` says; raises one of `_DAMAGED` for what is no whole record."""
    head = json.loads((folder / RECORD).read_bytes())
    if not isinstance(head, dict) or head.get("format") != FORMAT:
        raise RequestError(f"its format is not {FORMAT!r}")
    for name, size in head["files"].items():
        if (there := os.stat(folder / name).st_size) != size:
            raise RequestError(f"{name} has {there} bytes of {size}")
    if head["kind"] not in _CLASSES:
        raise RequestError(f"its kind is {head['kind']!r}; the choices are {', '.join(_CLASSES)}")
    return Entry(
        path=folder,
        kind=head["kind"],
        when=float(head["when"]),
        title=str(head["title"]),
        findings=tuple(head["findings"]),
        environment=dict(head["environment"]),
    )


def _write_samples(folder: Path, rows: Sequence[Mapping[str, Any]]) -> str:
    """The file's name."""
    try:
        require("pyarrow", "notebooks")
        require("pandas", "notebooks").DataFrame(rows).to_parquet(folder / _TABLE)
    except MissingExtraError:
        (folder / _LINES).write_text("".join(f"{_json(row)}\n" for row in rows), encoding="utf-8")
        return _LINES
    return _TABLE


def _events(traces: Iterable[Traced]) -> Iterator[dict[str, Any]]:
    """The events of all of them, a process each."""
    for number, one in enumerate(traces, start=1):
        for event in one.trace.to_chrome(one.label, ours=one.ours)["traceEvents"]:
            later = {"ts": event["ts"] + one.since_ns / 1e3} if "ts" in event else {}
            yield event | later | {"pid": number}


def _json(value: object, indent: int | None = None) -> str:
    return json.dumps(_plain(value), allow_nan=False, indent=indent)


def _plain(value: Any) -> Any:
    """The same without what JSON has no word for: NaN and infinities are null."""
    if isinstance(value, Mapping):
        return {key: _plain(inside) for key, inside in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(inside) for inside in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
