"""The TTFT waterfall: one row a stage at its true place in time, several runs under one another on one axis."""

from __future__ import annotations

import dataclasses
import html
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from fastvl_lab import shown
from fastvl_lab.account import OF_WAIT, REST
from fastvl_lab.measure.compare import Comparison
from fastvl_lab.run import Run, in_words, milliseconds
from fastvl_lab.trace import LANES, STAGES, Span
from fastvl_lab.view import style
from fastvl_lab.view.charts import Axis, Panel, panels, said, timeline

if TYPE_CHECKING:
    import plotly.graph_objects as go

_ROW_PIXELS = 24
_HEADING_PIXELS = 66
_OWN = "its own account"
_NAMES = {
    "host": "host (solid)",
    "beside": "another thread (dotted)",
    "device": "device (hatched)",
    "unaccounted": "unaccounted",
    _OWN: f"{_OWN} (pale)",
}
_PATTERNS = {"beside": style.BESIDE_PATTERN, "device": style.DEVICE_PATTERN}  # of what stands below the host's bars


@shown.figure.register(Run)
def _of_run(run: Run) -> go.Figure:
    return waterfall([run])


@shown.figure.register(Comparison)
def _of_comparison(comparison: Comparison) -> go.Figure:
    runs = [comparison.representative(engine) for engine in comparison.engines]
    marked = {engine: f"{engine} (disturbed by others)" for engine in comparison.engines if comparison.disturbed(engine)}
    return waterfall([dataclasses.replace(run, engine=marked.get(run.engine, run.engine)) for run in runs])


def waterfall(runs: Sequence[Run]) -> go.Figure:
    """Draw one panel a run, each bar from the start of its stage to its end, in ms since the request's bytes.

    Host bars are solid and device bars (CUDA) hatched below them, and so are, dotted, those of a second thread of the host;
    `unaccounted` is drawn where no stage ran; the line is TTFT. What an endpoint's engine tells of its wait stands below `wait`,
    pale and hatched the other way.
    """
    assert runs
    until = max(run.ttft for run in runs) * 1e3 * 1.24
    x = Axis(title="milliseconds since the request's bytes (dotted line: TTFT)", until=until)
    parts = [_panel(run, x) for run in runs]
    figure = panels(parts, row=_ROW_PIXELS, gap=_HEADING_PIXELS, down=True, barmode="overlay", above=_HEADING_PIXELS - 40)
    legend = {"orientation": "h", "x": 1, "xanchor": "right", "y": 0.995, "yanchor": "top", "yref": "container"}
    figure.update_layout(bargap=0.25, legend=legend)
    figure.update_xaxes(zeroline=False)
    for number, run in enumerate(runs, start=1):
        axis = "" if number == 1 else str(number)
        place = {"x": 0, "y": 1, "xref": f"x{axis} domain", "yref": f"y{axis} domain", "xanchor": "left", "yanchor": "bottom"}
        figure.add_annotation(text=_heading(run), yshift=4, align="left", showarrow=False, **place)
    return figure


def _panel(run: Run, x: Axis) -> Panel:
    """A row for each stage that ran before the first text, in the order in which they began, then for `unaccounted`.

    Stages that only a second thread ran have theirs before the last: they are no part of TTFT.
    """
    lanes: dict[str, Sequence[Span]] = {lane: run.trace.within_ttft(lane) for lane in LANES} | {_OWN: run.own_spans()}
    stages = {lane: [(s.name, s.start_ns / 1e6, s.duration_ns / 1e6) for s in spans] for lane, spans in lanes.items()}
    bars = stages | {"unaccounted": [("unaccounted", start / 1e6, (end - start) / 1e6) for start, end in run.trace.gaps()]}
    ends: dict[str, float] = {}
    for stage, start, length in (bar for lane in bars.values() for bar in lane):
        ends[stage] = max(ends.get(stage, 0.0), start + length)
    table = run.stage_table()
    rows, notes = [row["stage"] for row in table[:-1]], []
    for row in table:
        device = "" if row["device_ms"] is None else f" · device {milliseconds(row['device_ms'])}"
        text = f"{milliseconds(row['host_ms'])} · {_share(row['share'])}{device}"
        if row["stage"] in rows:
            notes.append((ends.get(row["stage"], run.ttft * 1e3), row["stage"], text))
    for stage, ns in run.trace.stages("beside").items():
        if stage not in rows:
            rows.insert(-1, stage)
            notes.append((ends[stage], stage, f"{milliseconds(ns / 1e6)}, beside others"))
    return Panel(
        traces=[_lane(run, lane, mine) for lane, mine in bars.items() if mine], x=x, rows=rows, notes=notes, limit=run.ttft * 1e3
    )


def _lane(run: Run, lane: str, bars: Sequence[tuple[str, float, float]]) -> Any:
    stages, starts, lengths = zip(*bars, strict=True)
    colours = [style.STAGE_COLOURS.get(stage.removeprefix(OF_WAIT), style.INK) for stage in stages]
    marker: dict[str, Any] = {"color": colours, "line": {"color": colours, "width": 1}}
    if lane in _PATTERNS:
        marker["pattern"] = {"shape": _PATTERNS[lane], "fillmode": "replace", "size": 5}
    if lane == _OWN:
        marker |= {"opacity": 0.55, "pattern": {"shape": style.OWN_PATTERN, "fillmode": "overlay", "fgcolor": "white", "size": 5}}
    if lane == "unaccounted":
        hatched = {"shape": style.UNACCOUNTED_PATTERN, "fgcolor": style.INK, "size": 4}
        marker = {"color": "white", "line": {"color": style.INK, "width": 1}, "pattern": hatched}
    place: dict[str, Any] = {"width": 0.6, "offset": -0.3}
    if any(span.lane in _PATTERNS for span in run.trace.spans):
        place = {"width": 0.36, "offset": 0.04 if lane in _PATTERNS else -0.36}
    files = [[said(_file(run, stage))] for stage in stages]
    look = {"name": _NAMES[lane], "legendgroup": lane, **place}
    return timeline(stages, starts, lengths, marker, below="<br>%{customdata[3]}", beside=lane, texts=files, **look)


def _file(run: Run, stage: str) -> str:
    """What to open to see the stage's work; a peer's is not ours to name."""
    if stage == "unaccounted":
        return "in no stage"
    if stage.startswith(OF_WAIT) and run.account is not None:
        rest = "what no part tells, such as HTTP; " if stage == REST else ""
        return f"{rest}a length by the clock of {run.account.source}, at a place inside wait that it does not tell"
    return f"fastvl_lab/{STAGES[stage]}" if run.recipe is not None and stage in STAGES else f"inside {run.engine}"


def _share(share: float) -> str:
    """Of what is too short for its digits, that it is there."""
    return "<0.1%" if 0 < share < 5e-4 else f"{share:.1%}"


def _heading(run: Run) -> str:
    """What stands above a run's panel; what a long recipe may push out of the picture comes last."""
    ttft = f"{in_words(run.kind)} TTFT {milliseconds(run.ttft * 1e3)}"
    heading = f"<b>{html.escape(run.engine)}: {ttft}</b> · {html.escape(run.checkpoint)} · "
    return f"{heading}{html.escape(run.device)} {run.dtype}<br><span style='font-size:12px'>{run.subtitle()}</span>"
