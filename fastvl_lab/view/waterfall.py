"""The TTFT waterfall: one row a stage at its true place in time, several runs under one another on one axis."""

from __future__ import annotations

import html
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from fastvl_lab.errors import require
from fastvl_lab.run import Run, in_words
from fastvl_lab.trace import STAGES
from fastvl_lab.view import style

if TYPE_CHECKING:
    import plotly.graph_objects as go

_ROW_PIXELS = 24
_PANEL_PIXELS = 66


def waterfall(runs: Sequence[Run]) -> go.Figure:
    """Draw one panel a run, each bar from the start of its stage to its end, in ms since the request's bytes.

    Host bars are solid and device bars (CUDA) hatched below them; `unaccounted` is drawn where no stage ran; the line is TTFT.
    """
    assert runs
    figure_of = style.graph_objects()
    panels = [_rows(run) for run in runs]
    heights = [len(rows) * _ROW_PIXELS for rows in panels]
    total = sum(heights) + _PANEL_PIXELS * len(runs)
    figure = require("plotly.subplots", "notebooks").make_subplots(
        rows=len(runs),
        cols=1,
        shared_xaxes=True,
        row_heights=[height / sum(heights) for height in heights],
        vertical_spacing=_PANEL_PIXELS / total if len(runs) > 1 else 0,
    )
    shown: set[str] = set()
    for number, (run, rows) in enumerate(zip(runs, panels, strict=True), start=1):
        for lane in ("host", "device", "unaccounted"):
            bars = _bars(run, lane)
            if bars:
                trace = figure_of.Bar(
                    **_bar_style(bars, lane, run.trace.has_device_lane), showlegend=lane not in shown, legendgroup=lane
                )
                figure.add_trace(trace, row=number, col=1)
                shown.add(lane)
        _label_panel(figure, run, rows, number)
    longest = max(run.ttft for run in runs) * 1e3
    figure.update_xaxes(range=[0, longest * 1.24], gridcolor=style.GRID, zeroline=False)
    axis_title = {"text": "milliseconds since the request's bytes (dotted line: TTFT)", "font": {"size": 13}}
    figure.update_xaxes(title=axis_title, row=len(runs), col=1)
    figure.update_layout(
        **style.layout(
            height=total + 90,
            margin={"l": 120, "r": 30, "t": _PANEL_PIXELS + 24, "b": 55},
            barmode="overlay",
            bargap=0.25,
            legend={"orientation": "h", "x": 1, "xanchor": "right", "y": 0.995, "yanchor": "top", "yref": "container"},
        )
    )
    return figure


def _rows(run: Run) -> list[str]:
    """The stages that ran before the first text, in the order in which they began, then unaccounted."""
    return [*run.trace.stages(), "unaccounted"]


def _bars(run: Run, lane: str) -> list[dict[str, Any]]:
    """One entry a bar: stage, start and length in ms, and the texts that go with it."""
    if lane == "unaccounted":
        spans = [("unaccounted", start, end) for start, end in run.trace.gaps()]
    else:
        spans = [(s.name, s.start_ns, s.end_ns) for s in run.trace.within_ttft(lane)]  # type: ignore[arg-type]
    return [
        {
            "stage": stage,
            "start": start / 1e6,
            "length": (end - start) / 1e6,
            "file": _file(run, stage),
        }
        for stage, start, end in spans
    ]


def _file(run: Run, stage: str) -> str:
    """What to open to see the stage's work; a peer's is not ours to name."""
    if stage == "unaccounted":
        return "in no stage"
    return f"fastvl_lab/{STAGES[stage]}" if run.recipe is not None and stage in STAGES else f"inside {run.engine}"


def _bar_style(bars: list[dict[str, Any]], lane: str, two_lanes: bool) -> dict[str, Any]:
    colours = [style.STAGE_COLOURS.get(bar["stage"], style.INK) for bar in bars]
    marker: dict[str, Any] = {"color": colours, "line": {"color": colours, "width": 1}}
    if lane == "device":
        marker["pattern"] = {"shape": style.DEVICE_PATTERN, "fillmode": "replace", "size": 5}
    if lane == "unaccounted":
        marker = {
            "color": "white",
            "line": {"color": style.INK, "width": 1},
            "pattern": {"shape": style.UNACCOUNTED_PATTERN, "fgcolor": style.INK, "size": 4},
        }
    placed = {"width": 0.6, "offset": -0.3}
    if two_lanes:
        placed = {"width": 0.36, "offset": 0.04 if lane == "device" else -0.36}
    stages, starts, lengths = ([bar[key] for bar in bars] for key in ("stage", "start", "length"))
    files = [[html.escape(bar["file"])] for bar in bars]
    shown = style.placed_bars(stages, starts, lengths, below="<br>%{customdata[3]}", beside=lane, texts=files)
    name = {"host": "host (solid)", "device": "device (hatched)", "unaccounted": "unaccounted"}[lane]
    return {"name": name, "marker": marker, **shown, **placed}


def _label_panel(figure: Any, run: Run, rows: list[str], number: int) -> None:
    """Heading above the panel, a time and share behind each row's last bar, and the TTFT line."""
    axis = "" if number == 1 else str(number)
    ends: dict[str, float] = {}
    for lane in ("host", "device", "unaccounted"):
        for bar in _bars(run, lane):
            ends[bar["stage"]] = max(ends.get(bar["stage"], 0.0), bar["start"] + bar["length"])
    for row in run.stage_table():
        stage, device = row["stage"], row["device_ms"]
        if stage in rows:
            beside = "" if device is None else f" · device {_ms(device)}"
            figure.add_annotation(
                x=ends.get(stage, run.ttft * 1e3),
                y=stage,
                text=f"{_ms(row['host_ms'])} · {row['share']:.1%}{beside}",
                xref=f"x{axis}",
                yref=f"y{axis}",
                xanchor="left",
                xshift=5,
                showarrow=False,
                font={"size": 12},
                bgcolor=style.PAPER,  # the TTFT line passes behind it
                borderpad=0,
            )
    figure.update_yaxes(
        categoryorder="array", categoryarray=rows, range=[len(rows) - 0.5, -0.5], ticklabelstandoff=6, row=number, col=1
    )
    figure.add_vline(x=run.ttft * 1e3, line={"color": style.INK, "width": 1.5, "dash": "dot"}, row=number, col=1)
    # What a long recipe may push out of the picture comes last.
    kind = in_words(run.kind)
    heading = f"<b>{html.escape(run.engine)}: {kind} TTFT {_ms(run.ttft * 1e3)}</b> · {html.escape(run.checkpoint)} · "
    heading += f"{html.escape(run.device)} {run.dtype}<br><span style='font-size:12px'>{run.subtitle()}</span>"
    figure.add_annotation(
        x=0,
        y=1,
        xref=f"x{axis} domain",
        yref=f"y{axis} domain",
        text=heading,
        xanchor="left",
        yanchor="bottom",
        yshift=4,
        align="left",
        showarrow=False,
    )


def _ms(milliseconds: float) -> str:
    """A duration with three significant digits."""
    decimals = 0 if milliseconds >= 100 else 1 if milliseconds >= 10 else 2 if milliseconds >= 0.1 else 3
    return f"{milliseconds:.{decimals}f} ms"
