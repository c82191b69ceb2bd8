"""What the rows of `measure.report` show: where TTFT goes, what it does with size, and decode against its ceiling."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from fastvl_lab.errors import require
from fastvl_lab.trace import ON_DEVICE, STAGES
from fastvl_lab.view import style
from fastvl_lab.view.report import figure_html, page

if TYPE_CHECKING:
    import plotly.graph_objects as go

Row = Mapping[str, Any]

_FLOOR = {"color": style.INK, "width": 2, "dash": "dot"}
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
    figure_of = style.graph_objects()
    mine = _timed(rows, "main", checkpoint)
    images = list(dict.fromkeys(row["image"] for row in mine))
    labels = list(dict.fromkeys(row["recipe"] for row in mine))[::-1]
    figure = _panels(images, horizontal_spacing=0.05, shared_yaxes=True)
    parts = {row["image"] + row["recipe"]: _parts(row) for row in mine}
    stages = [stage for stage in STAGES if any(stage in of_one for of_one in parts.values())]
    for column, image in enumerate(images, start=1):
        here = {row["recipe"]: row for row in mine if row["image"] == image}
        names = [label for label in labels if label in here]
        for stage in [*stages, _REST]:
            figure.add_trace(
                figure_of.Bar(
                    x=[parts[image + label].get(stage, 0.0) for label in names],
                    y=[html.escape(label) for label in names],
                    orientation="h",
                    name=stage,
                    legendgroup=stage,
                    showlegend=column == 1,
                    marker=_marker(stage),
                    hovertemplate="%{y}, " + stage + ": %{x:.3f} ms<extra></extra>",
                ),
                row=1,
                col=column,
            )
        floor = next(iter(here.values()))["floor_ms"]
        figure.add_trace(
            figure_of.Scatter(
                x=[here[label]["ttft_ms"] - here[label]["patches_ms"] + floor for label in names],
                y=[html.escape(label) for label in names],
                mode="markers",
                marker={"symbol": "line-ns", "size": 8, "line": {"color": style.INK, "width": 3}},
                name="the end, at the floor",
                legendgroup="floor",
                showlegend=column == 1,
                hovertemplate="%{y}: %{x:.2f} ms with the floor after the upload<extra></extra>",
            ),
            row=1,
            col=column,
        )
        for label in names:
            _beside(figure, column, here[label]["ttft_ms"], label, _ms(here[label]["ttft_ms"]))
        longest = max(row["ttft_ms"] for row in here.values())
        figure.update_xaxes(title_text=f"ms; floor after the upload {_ms(floor)}", range=[0, longest * 1.22], row=1, col=column)
    figure.update_xaxes(gridcolor=style.GRID)
    _rows_of(figure, labels)
    return _with_heading(figure, mine, "TTFT by stage", height=170 + 24 * len(labels), left=190, barmode="stack")


def ttft_by_size(rows: Sequence[Row], *, patches: bool = True) -> go.Figure:
    """TTFT of part "sizes" against the side of a square image, one panel a checkpoint, one line a way to execute; dotted: the
    floor.

    patches: from the patches on, as the floor is, instead of from the image's bytes.
    """
    figure_of = style.graph_objects()
    mine = _timed(rows, "sizes")
    checkpoints = list(dict.fromkeys(row["checkpoint"] for row in mine))
    ways = list(dict.fromkeys(row["recipe"] for row in mine))
    figure = _panels([html.escape(name) for name in checkpoints], horizontal_spacing=0.06, shared_yaxes=True)
    key = "patches_ms" if patches else "ttft_ms"
    sides = sorted({_side(row) for row in mine})
    for column, checkpoint in enumerate(checkpoints, start=1):
        lines = {way: sorted((r for r in mine if (r["checkpoint"], r["recipe"]) == (checkpoint, way)), key=_side) for way in ways}
        for number, (way, points) in enumerate(lines.items()):
            figure.add_trace(
                figure_of.Scatter(
                    x=[_side(row) for row in points],
                    y=[row[key] for row in points],
                    name=html.escape(way),
                    legendgroup=way,
                    showlegend=column == 1,
                    **style.series(number),
                    hovertemplate="%{x} pixels: %{y:.2f} ms<extra>%{fullData.name}</extra>",
                ),
                row=1,
                col=column,
            )
        floors = {_side(row): row["floor_ms"] for row in mine if row["checkpoint"] == checkpoint}
        figure.add_trace(
            figure_of.Scatter(
                x=sorted(floors),
                y=[floors[side] for side in sorted(floors)],
                mode="lines",
                line=_FLOOR,
                name="floor, from patches",
                legendgroup="floor",
                showlegend=column == 1,
                hovertemplate="%{x} pixels: %{y:.2f} ms<extra>%{fullData.name}</extra>",
            ),
            row=1,
            col=column,
        )
    digits = [digit * 10.0**power for power in range(-3, 6) for digit in (1, 2, 5)]
    axis = {"type": "log", "minor": {"ticks": ""}, "gridcolor": style.GRID}
    figure.update_xaxes(title_text="side of the image, pixels", tickvals=sides, ticktext=[str(side) for side in sides], **axis)
    figure.update_yaxes(tickvals=digits, ticktext=[f"{digit:g}" for digit in digits], **axis)
    figure.update_yaxes(title_text="patches to first token, ms" if patches else "TTFT, ms", row=1, col=1)
    return _with_heading(figure, mine, "TTFT by image size, medians", height=480, left=80)


def decode_speed(rows: Sequence[Row], checkpoint: str) -> go.Figure:
    """Tokens a second of part "decode", one bar an engine with steps of its own, one panel an image size; dotted: the ceiling."""
    figure_of = style.graph_objects()
    mine = _timed(rows, "decode", checkpoint)
    images = list(dict.fromkeys(row["image"] for row in mine))
    labels = list(dict.fromkeys(row["recipe"] for row in mine))[::-1]
    figure = _panels(images, horizontal_spacing=0.05, shared_yaxes=True)
    for column, image in enumerate(images, start=1):
        here = {row["recipe"]: row for row in mine if row["image"] == image}
        names = [label for label in labels if label in here]
        figure.add_trace(
            figure_of.Bar(
                x=[here[label]["tokens_per_second"] for label in names],
                y=[html.escape(label) for label in names],
                orientation="h",
                showlegend=False,
                marker={"color": style.STAGE_COLOURS["decode"]},
                customdata=[html.escape(", ".join(here[label]["same_steps"])) for label in names],
                hovertemplate="%{x:.1f} tokens/s<br>the same steps: %{customdata}<extra></extra>",
            ),
            row=1,
            col=column,
        )
        for label in names:
            shown = f"{here[label]['tokens_per_second']:.0f} · {here[label]['share']:.0%}"
            _beside(figure, column, here[label]["tokens_per_second"], label, shown)
        ceiling = next(iter(here.values()))["ceiling"]
        figure.add_vline(x=ceiling, line=_FLOOR, row=1, col=column)
        highest = max(ceiling, *(row["tokens_per_second"] for row in here.values()))
        figure.update_xaxes(title_text=f"tokens/s; ceiling {ceiling:.0f}", range=[0, highest * 1.3], row=1, col=column)
    figure.update_xaxes(gridcolor=style.GRID)
    _rows_of(figure, labels)
    return _with_heading(figure, mine, "decode steps, and share of the ceiling", height=120 + 26 * len(labels), left=190, top=80)


def _timed(rows: Sequence[Row], part: str, checkpoint: str | None = None) -> list[Row]:
    """The rows of a part that have times, which are those whose parity held."""
    return [row for row in rows if row["part"] == part and row["parity"] and checkpoint in (None, row["checkpoint"])]


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


def _beside(figure: Any, column: int, x: float, label: str, text: str) -> None:
    figure.add_annotation(
        x=x,
        y=html.escape(label),
        text=text,
        xanchor="left",
        xshift=4,
        showarrow=False,
        font={"size": 11},
        bgcolor=style.PAPER,
        borderpad=0,
        row=1,
        col=column,
    )


def _rows_of(figure: Any, labels: Sequence[str]) -> None:
    """The same engine on the same height in every panel, the first of `labels` at the bottom."""
    order = {"categoryorder": "array", "categoryarray": [html.escape(label) for label in labels]}
    figure.update_yaxes(ticklabelstandoff=6, range=[-0.6, len(labels) - 0.4], **order)


def _side(row: Row) -> int:
    return int(row["image"].partition("x")[0])


def _ms(milliseconds: float) -> str:
    return f"{milliseconds:.3g} ms" if milliseconds < 100 else f"{milliseconds:.0f} ms"


def _panels(titles: Sequence[str], **spacing: Any) -> Any:
    return require("plotly.subplots", "notebooks").make_subplots(
        rows=1, cols=max(len(titles), 1), subplot_titles=titles or None, **spacing
    )


def _with_heading(figure: Any, rows: Sequence[Row], what: str, *, height: int, left: int, top: int = 110, **more: Any) -> Any:
    """The look of all, and what ran where; a figure without rows says that nothing was timed."""
    names, places = ({row["checkpoint"] for row in rows}, {f"{row['device']} {row['dtype']}" for row in rows})
    where = ", ".join([*(names if len(names) == 1 else ()), *sorted(places)])  # of several, each has a panel
    title = f"{what}: {html.escape(where) or 'nothing was timed'}"
    figure.update_layout(
        **style.layout(height=height, margin={"l": left, "r": 30, "t": top, "b": 55}, **more),
        title={"text": title, "x": 0.01, "y": 0.98, "yanchor": "top", "yref": "container", "font": {"size": 15}},
        legend={"orientation": "h", "x": 0, "y": 1.0, "yanchor": "bottom", "yref": "paper", "traceorder": "normal"},
    )
    figure.update_layout(legend_y=1 + 34 / max(height - 165, 1))
    return figure
