"""The panel's own way with figures: the run before as a ghost, a run under way, and a dark page."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from fastvl_lab.run import Run
from fastvl_lab.trace import Lane, Span
from fastvl_lab.view import style
from fastvl_lab.view.waterfall import waterfall

if TYPE_CHECKING:
    import plotly.graph_objects as go

DARK = {"paper": "#111418", "ink": "#E8E8E8", "grid": "#3A3F45"}
_GHOST = "rgba(128, 128, 128, 0.35)"
# Where the ghost of a lane begins in its row, and how high it is: a little beyond the bars of `waterfall`.
_ONE_LANE: dict[Lane, tuple[float, float]] = {"host": (-0.43, 0.86)}
_TWO_LANES: dict[Lane, tuple[float, float]] = {"host": (-0.43, 0.43), "device": (0.0, 0.43)}


def with_ghost(reference: Run | None, run: Run, ghost: Run | None) -> go.Figure:
    """The run's waterfall below the reference's, with the stages of the run before it as pale bars behind its own.

    Its headings are short, and times have room beside short bars: the panel is narrow, and says the rest above.
    """
    runs = [run] if reference is None else [reference, run]
    figure = waterfall(runs)
    figure.for_each_annotation(lambda note: note.update(text=f"{note.text.partition('</b>')[0]}</b>"), {"yanchor": "bottom"})
    longest = max(one.ttft for one in (*runs, ghost) if one is not None) * 1e3
    figure.update_xaxes(range=[0, longest * 1.35])
    if ghost is None:
        return figure
    panel, rows = len(runs), set(run.trace.stages())
    lanes = _TWO_LANES if run.trace.has_device_lane else _ONE_LANE
    spans = [span for lane in lanes for span in ghost.trace.within_ttft(lane) if span.name in rows]
    figure.add_trace(
        style.graph_objects().Bar(
            name="the run before",
            width=[lanes[span.lane][1] for span in spans],
            offset=[lanes[span.lane][0] for span in spans],
            marker={"color": _GHOST, "line": {"width": 0}},
            **_placed(spans, told="%{y} before"),
        ),
        row=panel,
        col=1,
    )
    figure.data = (figure.data[-1], *figure.data[:-1])  # drawn first, so that it lies behind
    figure.add_vline(x=ghost.ttft * 1e3, line={"color": "gray", "width": 1, "dash": "dash"}, row=panel, col=1)
    return figure


def so_far(stages: Sequence[Span]) -> go.Figure:
    """The stages that have ended of a run that is under way."""
    figure = style.graph_objects().Figure()
    figure.add_bar(
        **_placed(stages),
        marker={"color": [style.STAGE_COLOURS.get(stage.name, style.INK) for stage in stages]},
        text=[f"{stage.duration_ns / 1e6:.0f} ms" for stage in stages],
        textposition="outside",
        cliponaxis=False,
        showlegend=False,
    )
    figure.update_xaxes(title="milliseconds since the request's bytes, so far", rangemode="tozero", gridcolor=style.GRID)
    figure.update_yaxes(autorange="reversed", ticklabelstandoff=8)
    figure.update_layout(**style.layout(height=140 + 24 * len(stages), margin={"l": 120, "r": 60, "t": 40, "b": 55}))
    return figure


def _placed(spans: Sequence[Span], told: str = "%{y}") -> dict[str, Any]:
    starts, lengths = [span.start_ns / 1e6 for span in spans], [span.duration_ns / 1e6 for span in spans]
    return style.placed_bars([span.name for span in spans], starts, lengths, told=told)


def themed(figure: go.Figure, *, dark: bool) -> go.Figure:
    """The same figure for a dark page or a light one."""
    if not dark:
        return figure
    paper, ink, grid = DARK["paper"], DARK["ink"], DARK["grid"]
    figure.update_layout(template="plotly_dark", paper_bgcolor=paper, plot_bgcolor=paper, font={"color": ink})
    figure.update_xaxes(gridcolor=grid)
    figure.for_each_annotation(lambda note: note.update(bgcolor=paper if note.bgcolor else None))
    figure.for_each_shape(lambda line: line.update(line={"color": ink}) if line.line.color == style.INK else None)
    for trace in figure.data:
        if trace.type == "bar" and trace.marker.color == "white":  # unaccounted: an outline
            trace.update(marker={"color": paper, "line": {"color": ink}, "pattern": {"fgcolor": ink}})
    return figure
