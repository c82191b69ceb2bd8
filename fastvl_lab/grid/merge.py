"""The results of cells put together, with nothing pooled across hosts or cards, and hosts compared by the reference alone."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fastvl_lab.grid.plan import Cell, Plan
from fastvl_lab.grid.rendezvous import Rendezvous
from fastvl_lab.measure.compare import Comparison
from fastvl_lab.measure.samples import Interval, interval_of, median_interval
from fastvl_lab.measure.sweep import LoadedPoint, SweepResult, SweptPoint, size_label
from fastvl_lab.measure.under_load import UnderLoad

# What makes one machine of a host: its card, and what it computes with.
_MACHINE = ("host", "card", "card_id")


@dataclass(frozen=True, kw_only=True)
class Host:
    """One card of one host: the reference's time to the first token there, in milliseconds, of `runs` runs in `cells` cells."""

    host: str
    card: str
    card_id: str
    reference: Interval
    runs: int
    cells: int

    @property
    def label(self) -> str:
        return f"{self.host} ({self.card}{f', {self.card_id}' if self.card_id else ''})"


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class GridResult(SweepResult):
    """A grid's points, as far as its cells are done. cells: a row each, of those without a result too.

    environment: what is the same at every point; the rest stands in the rows. notes: what is to be known of hosts, in sentences.
    """

    cells: tuple[dict[str, Any], ...]
    hosts: tuple[Host, ...]
    notes: tuple[str, ...]

    def findings(self) -> list[str]:
        """What is to be known of the hosts first, then one sentence a point and engine."""
        return [*self.notes, *super().findings()]

    def published(self) -> dict[str, Any]:
        """As a sweep's, with a row a cell, and the notes."""
        return super().published() | {"cells": list(self.cells), "notes": list(self.notes)}

    def to_record(self) -> dict[str, Any]:
        """As a sweep's, with cells, hosts and notes."""
        hosts = [dataclasses.asdict(host) for host in self.hosts]
        return super().to_record() | {"cells": list(self.cells), "hosts": hosts, "notes": list(self.notes)}

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> GridResult:
        """Read `to_record`'s form."""
        swept = SweepResult.from_record(record)
        return cls(
            **{own.name: getattr(swept, own.name) for own in dataclasses.fields(SweepResult)},
            cells=tuple(record["cells"]),
            hosts=tuple(Host(**host | {"reference": interval_of(host["reference"])}) for host in record["hosts"]),
            notes=tuple(record["notes"]),
        )

    def write(self) -> list[Path]:
        """Write the raw samples, result.json, report.html and record/ into the settings' `output_dir`; needs the extra "notebooks".

        Traces are in record/ and in the cells' results (results/ID.json there).
        """
        return self._write_all_but_traces()


@dataclass(eq=False)
class Merger:
    """Reads each cell's result once, however often it merges."""

    plan: Plan
    rendezvous: Rendezvous
    _read: dict[str, dict[str, Any]] = field(default_factory=dict)
    _points: dict[str, SweptPoint] = field(default_factory=dict)
    _loaded: dict[str, LoadedPoint] = field(default_factory=dict)

    def merge(self) -> GridResult:
        """What is there by now, in the plan's order."""
        there = self.rendezvous.results()
        for cell in self.plan.cells:
            if cell.id in there and cell.id not in self._read and (result := self.rendezvous.result(cell.id)) is not None:
                self._read[cell.id] = result
                own: dict[str, Any] = {"checkpoint": cell.checkpoint, "size": cell.size, "environment": _environment(cell, result)}
                for record in result.pop("comparisons", ()):
                    self._points[cell.id] = SweptPoint(**own, comparison=Comparison.from_record(record))
                for record in result.pop("loads", ()):
                    self._loaded[cell.id] = LoadedPoint(**own, load=cell.load, found=UnderLoad.from_record(record))
        done = [(cell, self._read[cell.id]) for cell in self.plan.cells if cell.id in self._read]
        points = tuple(self._points[cell.id] for cell, _ in done if cell.id in self._points)
        loaded = tuple(self._loaded[cell.id] for cell, _ in done if cell.id in self._loaded)
        hosts = _hosts(result for _, result in done)
        return GridResult(
            settings=self.plan.settings,
            environment=_common([*(point.environment for point in points), *(point.environment for point in loaded)]),
            points=points,
            loaded=loaded,
            errors=tuple(error for cell, result in done for error in _errors(cell, result)),
            cells=tuple(_row(cell, self._read.get(cell.id)) for cell in self.plan.cells),
            hosts=hosts,
            notes=tuple(_notes(hosts, [result for _, result in done])),
        )

    def seconds(self) -> dict[str, float]:
        """Those that the cells took that are done."""
        self.merge()
        return {cell: result["seconds"] for cell, result in self._read.items() if not result.get("error")}


def _environment(cell: Cell, result: Mapping[str, Any]) -> dict[str, Any]:
    """Where a cell was measured, of a cell that failed as a whole too."""
    return {"cell": cell.id, "scenario": cell.scenario, "worker": result["worker"], **result.get("environment", {})}


def _errors(cell: Cell, result: Mapping[str, Any]) -> list[dict[str, str]]:
    """A row for the cell that failed as a whole, or for each of its engines that did."""
    own = {"checkpoint": cell.checkpoint, "image": cell.image}
    if "error" in result:
        return [own | {"engine": "", "error": result["error"]}]
    return [error | own for error in result["errors"]]


def _row(cell: Cell, result: Mapping[str, Any] | None) -> dict[str, Any]:
    row: dict[str, Any] = {
        "cell": cell.id,
        "scenario": cell.scenario,
        "checkpoint": cell.checkpoint,
        "image": size_label(cell.size),
        "load": cell.load,
    }
    if result is None:
        return row | {"state": "not measured", "host": "", "worker": "", "claims": 0, "seconds": None, "error": ""}
    failed = result.get("error") or next((error["error"] for error in result.get("errors", ())), "")
    state = "failed" if "error" in result or not result["environment"].get("device") else "failed in part" if failed else "done"
    return row | {"state": state, "error": failed, **{name: result[name] for name in ("host", "worker", "claims", "seconds")}}


def _common(environments: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """What all of them share, as texts."""
    first = environments[0] if environments else {}
    same = {key: value for key, value in first.items() if all(other.get(key) == value for other in environments)}
    return {key: str(value) for key, value in same.items() if value not in (None, "")}


def _hosts(results: Iterable[Mapping[str, Any]]) -> tuple[Host, ...]:
    seconds: dict[tuple[str, ...], list[list[float]]] = {}
    for result in results:
        if found := result.get("reference", {}).get("seconds"):
            seconds.setdefault(tuple(str(result["environment"][name]) for name in _MACHINE), []).append(found)
    return tuple(
        Host(
            **dict(zip(_MACHINE, machine, strict=True)),
            reference=median_interval([second * 1e3 for cell in cells for second in cell]),
            runs=sum(map(len, cells)),
            cells=len(cells),
        )
        for machine, cells in sorted(seconds.items())
    )


def _notes(hosts: Sequence[Host], results: Sequence[Mapping[str, Any]]) -> list[str]:
    """Hosts that are slow in the reference, cards that others used, and what should be the same everywhere and is not."""
    notes = []
    for card in dict.fromkeys(host.card for host in hosts):
        same = [host for host in hosts if host.card == card]
        fastest = min(same, key=lambda host: host.reference.median)
        for host in same:
            if host.reference.low > fastest.reference.high:  # never of an interval that is not known
                notes.append(
                    f"{host.label} is slow: the reference takes {host.reference.median:.2f} ms there ({host.reference.known}), and "
                    f"{fastest.reference.median:.2f} ms on {fastest.label} ({fastest.reference.known})"
                )
    measured = [result for result in results if "environment" in result]
    for result in measured:
        if others := result["environment"].get("others_on_card"):
            notes.append(f"{result['host']}: other processes were on the card {result['environment']['card_id']}: {others}")
    for result in measured:
        if why := result.get("reference", {}).get("error"):
            notes.append(f"{result['host']}: the reference could not be measured: {why}")
    for name in ("code", "torch", "transformers", "driver", "threads"):
        values = dict.fromkeys(str(known) for result in measured if (known := result["environment"].get(name)) is not None)
        if len(values) > 1:
            notes.append(f"the cells were measured with {len(values)} values of {name}: {', '.join(values)}")
    return list(dict.fromkeys(notes))
