"""What the rows of `measure.report` show: where TTFT goes, what it does with size, and decode against its ceiling."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from fastvl_lab.run import milliseconds
from fastvl_lab.trace import ON_DEVICE, STAGES
from fastvl_lab.view import style
from fastvl_lab.view.charts import Axis, Panel, bars, decades, line, panels, said
from fastvl_lab.view.report import figure_html, page

if TYPE_CHECKING:
    import plotly.graph_objects as go

Row = Mapping[str, Any]

_REST = "idle, or in no stage"


def report_html(rows: Sequence[Row]) -> str:
    """One page with every figure that the rows can fill, which needs nothing beside it."""
    checkpoints = list(dict.fromkeys(row["checkpoint"] for row in rows))
    figures = [draw(rows, name) for draw in (ttft_by_engine, decode_speed) for name in checkpoints]
    figures += [ttft_by_size(rows), ttft_by_size(rows, patches=False)]
    return page("GPU report", ["<h1>GPU report</h1>", *(figure_html(figure) for figure in figures if figure.data)])


def ttft_by_engine(rows: Sequence[Row], checkpoint: str) -> go.Figure:
    """TTFT of part "main" as one bar an engine, made of its stages, one panel an image size.

    A stage that gives the device work counts as long as the device had it; what is left of TTFT is the white end of the bar. The
    upright line in a bar is where it would end if all that follows the upload took no longer than its floor.
    """
    mine = _timed(rows, "main", checkpoint)
    engines = list(_by(mine, "recipe"))
    stages = [stage for stage in STAGES if any(stage in _parts(row) for row in mine)]
    parts = []
    for image, here in _by(mine, "image").items():
        labels, floor = [row["recipe"] for row in here], here[0]["floor_ms"]
        traces = []
        for stage in (*stages, _REST):
            lengths = [_parts(row).get(stage, 0.0) for row in here]
            traces.append(bars(labels, lengths, "", name=stage, marker=_marker(stage), told=f"%{{y}}, {stage}: %{{x:.3f}} ms"))
        ends = [row["ttft_ms"] - row["patches_ms"] + floor for row in here]
        look = {"mode": "markers", "marker": {"symbol": "line-ns", "size": 8, "line": {"color": style.INK, "width": 3}}}
        told = "%{y}: %{x:.2f} ms with the floor after the upload"
        traces.append(line("the end, at the floor", ends, map(said, labels), look, told=told))
        x = Axis(title=f"ms; floor after the upload {milliseconds(floor)}", until=max(row["ttft_ms"] for row in here) * 1.22)
        # Medians of stages can add up to more than the median of TTFT.
        notes = [(max(row["ttft_ms"], sum(_parts(row).values())), row["recipe"], milliseconds(row["ttft_ms"])) for row in here]
        parts.append(Panel(title=image, traces=traces, x=x, rows=engines, notes=notes))
    return _figure(parts, mine, "TTFT by stage", barmode="stack", above=20)


def ttft_by_size(rows: Sequence[Row], *, patches: bool = True) -> go.Figure:
    """TTFT of part "sizes" against the side of a square image, one panel a checkpoint, one line a way to execute.

    The floor is dotted. patches: from the patches on, as the floor is, instead of from the image's bytes.
    """
    mine = sorted(_timed(rows, "sizes"), key=_side)
    ways = list(_by(_timed(rows, "sizes"), "recipe"))
    key, told = "patches_ms" if patches else "ttft_ms", "%{x} pixels: %{y:.2f} ms"
    x = Axis(title="side of the image, pixels", ticks=sorted({_side(row) for row in mine}))
    y = Axis(title="patches to first token, ms" if patches else "TTFT, ms", ticks=decades(1, 2, 5))
    floor = {"mode": "lines", "line": {"color": style.INK, "width": 2, "dash": "dot"}}
    parts = []
    for checkpoint, here in _by(mine, "checkpoint").items():
        traces = []
        for number, way in enumerate(ways):
            points = [row for row in here if row["recipe"] == way]
            times = [row[key] for row in points]
            traces.append(line(way, map(_side, points), times, style.series(number), told=told))
        floors = {_side(row): row["floor_ms"] for row in here}
        traces.append(line("floor, from patches", floors, floors.values(), floor, told=told))
        parts.append(Panel(title=checkpoint, traces=traces, x=x, y=y))
    return _figure(parts, mine, "TTFT by image size, medians", height=315)


def decode_speed(rows: Sequence[Row], checkpoint: str) -> go.Figure:
    """Tokens a second of part "decode", one bar an engine with steps of its own, one panel an image size; dotted: the ceiling."""
    mine = _timed(rows, "decode", checkpoint)
    engines = list(_by(mine, "recipe"))
    parts = []
    for image, here in _by(mine, "image").items():
        speeds, ceiling = [row["tokens_per_second"] for row in here], here[0]["ceiling"]
        labels, same = [row["recipe"] for row in here], [said(", ".join(row["same_steps"])) for row in here]
        told = "%{x:.1f} tokens/s<br>the same steps: %{customdata}"
        notes = [(row["tokens_per_second"], row["recipe"], f"{row['tokens_per_second']:.0f} · {row['share']:.0%}") for row in here]
        x = Axis(title=f"tokens/s; ceiling {ceiling:.0f}", until=1.3 * max(ceiling, *speeds))
        traces = [bars(labels, speeds, style.STAGE_COLOURS["decode"], customdata=same, told=told)]
        parts.append(Panel(title=image, traces=traces, x=x, rows=engines, notes=notes, limit=ceiling))
    return _figure(parts, mine, "decode steps, and share of the ceiling")


def _timed(rows: Sequence[Row], part: str, checkpoint: str | None = None) -> list[Row]:
    """The rows of a part that have times, which are those whose parity held."""
    return [row for row in rows if row.get("part") == part and row["parity"] and checkpoint in (None, row["checkpoint"])]


def _by(rows: Sequence[Row], key: str) -> dict[str, list[Row]]:
    """The rows by what they have there."""
    return {value: [row for row in rows if row[key] == value] for value in dict.fromkeys(row[key] for row in rows)}


def _parts(row: Row) -> dict[str, float]:
    """Milliseconds of a row's TTFT by stage, the device's where it has work in the stage; then what is left."""
    device = row["device_ms"]
    parts = {stage: device[stage] if stage in ON_DEVICE and stage in device else ms for stage, ms in row["host_ms"].items()}
    return parts | {_REST: max(row["ttft_ms"] - sum(parts.values()), 0.0)}


def _marker(stage: str) -> dict[str, Any]:
    """Stages that share a colour are told apart by pattern."""
    if stage == _REST:
        return {"color": "white", "line": {"color": style.INK, "width": 1}}
    before = [other for other in STAGES if style.STAGE_COLOURS[other] == style.STAGE_COLOURS[stage]]
    pattern = ("", "/", ".", "x")[before.index(stage) % 4]
    return {"color": style.STAGE_COLOURS[stage], "pattern": {"shape": pattern, "fgcolor": "white", "fgopacity": 0.7}}


def _side(row: Row) -> int:
    return int(row["image"].partition("x")[0])


def _figure(parts: Sequence[Panel], rows: Sequence[Row], what: str, **look: Any) -> go.Figure:
    """The panels under what ran where; without rows, the heading says that nothing was timed."""
    names, places = ({row["checkpoint"] for row in rows}, {f"{row['device']} {row['dtype']}" for row in rows})
    where = ", ".join([*(names if len(names) == 1 else ()), *sorted(places)])  # of several, each has a panel
    return panels(parts, title=f"{what}: {where or 'nothing was timed'}", **look)
