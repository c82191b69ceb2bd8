"""The grammar of the figures: bars, lines and timelines as traces, traces in panels, and one layout for all of them."""

from __future__ import annotations

import html
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

from fastvl_lab.errors import require
from fastvl_lab.view import style

if TYPE_CHECKING:
    import plotly.graph_objects as go


@dataclass(frozen=True, kw_only=True)
class Axis:
    """How a scale is drawn. ticks: it is logarithmic, and labelled there. until: it runs from 0 to there. zero: it begins at 0.

    number_format: of the labels, as D3 writes it.
    """

    title: str = ""
    ticks: Sequence[float] = ()
    until: float | None = None
    zero: bool = False
    number_format: str = ""

    def look(self) -> dict[str, Any]:
        """What plotly calls it."""
        made: dict[str, Any] = {"gridcolor": style.GRID}
        if self.title:
            made["title"] = {"text": said(self.title), "font": {"size": 13}}
        if self.until is not None:
            made["range"] = [0, self.until]
        elif self.zero:
            made["rangemode"] = "tozero"
        if self.ticks:
            made |= {"type": "log", "minor": {"ticks": ""}, "tickvals": self.ticks}
            made["ticktext"] = [f"{tick:.6g}" for tick in self.ticks]
        return made | ({"tickformat": self.number_format} if self.number_format else {})


@dataclass(frozen=True, kw_only=True)
class Panel:
    """Traces on axes of their own. rows: from the top down, the labels of a y axis without a scale.

    notes: (x, row, text) behind the ends of bars. limit: where on the x axis a dotted line stands.
    """

    traces: Sequence[Any]
    x: Axis
    y: Axis = Axis()
    rows: Sequence[str] = ()
    title: str = ""
    notes: Sequence[tuple[float, str, str]] = ()
    limit: float | None = None


def panels(
    parts: Sequence[Panel],
    *,
    height: int = 280,
    row: int = 26,
    gap: float | None = None,
    down: bool = False,
    own_scales: bool = False,
    barmode: Literal["stack", "group", "overlay"] | None = None,
    title: str = "",
    beside: bool = False,
    above: int = 0,
) -> go.Figure:
    """Panels side by side, which share a y axis, or with `down` under one another, which share an x axis.

    height: pixels of each; of a panel with rows, `row` for each of them. gap: between panels, in pixels if `down`, else a share of
    the figure. own_scales: side by side without sharing. barmode: what bars of one row do. beside: the legend, which has each name
    once, stands beside the panels instead of above. above: pixels that are left free there.
    """
    titles = [said(part.title) for part in parts]
    heights = [row * len(part.rows) + 20 if part.rows else height for part in parts]
    body = max(heights, default=height)
    grid: dict[str, Any] = {"cols": max(len(parts), 1), "shared_yaxes": not own_scales, "horizontal_spacing": gap or 0.04}
    if down:
        body = sum(heights) + round(gap or 40) * (len(parts) - 1)
        grid = {"rows": len(parts), "row_heights": heights, "shared_xaxes": True, "vertical_spacing": (gap or 40) / body}
    figure = require("plotly.subplots", "notebooks").make_subplots(**grid, subplot_titles=titles if any(titles) else None)
    for number, part in enumerate(parts, start=1):
        x = replace(part.x, title="") if down and number < len(parts) else part.x
        y = replace(part.y, title="") if not down and number > 1 else part.y
        _fill(figure, replace(part, x=x, y=y), {"row": number, "col": 1} if down else {"row": 1, "col": number})
    if down:
        figure.update_xaxes(showticklabels=True)  # a long column is read a screen at a time
    shown: set[str] = set()
    for trace in figure.data:
        trace.showlegend = bool(trace.name) and trace.name not in shown
        if trace.name:
            trace.legendgroup = trace.legendgroup or (trace.name if len(parts) > 1 else None)
            shown.add(trace.name)
    labels = [text for part in parts for row_label in part.rows for text in row_label.split("\n")]
    left = 40 + 7 * min(max(map(len, labels)), 40) if labels else 80
    over = 8 + 26 * any(titles)  # the panels, in pixels
    top = 22 + over + (32 if shown and not beside else 0) + (25 if title else 0) + above
    look: dict[str, Any] = {"height": body + top + 60, "margin": {"l": left, "r": 30, "t": top, "b": 60}, "barmode": barmode}
    if title:
        look["title"] = {"text": said(title), "x": 0.01, "y": 0.98, "yanchor": "top", "yref": "container", "font": {"size": 15}}
    if not beside:
        look["legend"] = {"orientation": "h", "x": 0, "y": 1 + over / body, "yanchor": "bottom", "traceorder": "normal"}
    return figure.update_layout(**style.layout(**look))


def _fill(figure: go.Figure, part: Panel, place: Mapping[str, int]) -> None:
    for trace in part.traces:
        figure.add_trace(trace, **place)
    for x, row, text in part.notes:
        look = {"xanchor": "left", "xshift": 5, "showarrow": False, "font": {"size": 12}, "borderpad": 0}
        figure.add_annotation(x=x, y=said(row), text=said(text), bgcolor=style.PAPER, **look, **place)  # over what crosses it
    if part.limit is not None:
        figure.add_vline(x=part.limit, line={"color": style.INK, "width": 1.5, "dash": "dot"}, **place)
    figure.update_xaxes(**part.x.look(), **place)
    y = part.y.look()
    if part.rows:
        y = {"categoryorder": "array", "categoryarray": [said(row) for row in part.rows], "ticklabelstandoff": 8}
        y["range"] = [len(part.rows) - 0.5, -0.5]
    figure.update_yaxes(**y, **place)


def bars(
    rows: Iterable[str],
    values: Iterable[float],
    colour: str | Sequence[str],
    *,
    name: str = "",
    texts: Sequence[str] | None = None,
    pattern: str | Sequence[str] = "",
    told: str = "",
    **more: Any,
) -> Any:
    """A horizontal bar a row. texts: behind their ends. told: to who points at one. more: what else plotly's Bar takes."""
    patterned = {"pattern": {"shape": pattern, "fgcolor": "white", "fgopacity": 0.6}} if pattern else {}
    marker = {"color": colour} | patterned | more.pop("marker", {})
    behind = {} if texts is None else {"text": list(texts), "textposition": "outside", "cliponaxis": False}
    shown = {"y": [said(row) for row in rows], "x": list(values), "orientation": "h", "name": said(name), "marker": marker}
    return style.graph_objects().Bar(**shown, **behind, hovertemplate=f"{told}<extra></extra>" if told else None, **more)


def line(name: str, xs: Iterable[float], ys: Iterable[Any], look: Mapping[str, Any], *, told: str = "", **more: Any) -> Any:
    """Points, or the line through them. look: as `style.series` gives it. more: what else plotly's Scatter takes."""
    hover = f"{told}<extra>{'%{fullData.name}' if name else ''}</extra>" if told else None
    return style.graph_objects().Scatter(x=list(xs), y=list(ys), name=said(name), hovertemplate=hover, **{**look, **more})


def arms(intervals: Iterable[tuple[float, float, float]]) -> dict[str, Any]:
    """Error bars of (median, low, high); an interval that does not exist, which is NaN, has none."""
    known = [(median, low, high) if low == low and high == high else (median,) * 3 for median, low, high in intervals]
    above, below = [max(high - median, 0.0) for median, _, high in known], [max(median - low, 0.0) for median, low, _ in known]
    return {"type": "data", "array": above, "arrayminus": below}


def timeline(
    rows: Sequence[str],
    starts: Sequence[float],
    lengths: Sequence[float],
    marker: Mapping[str, Any],
    *,
    told: str = "%{y}",
    below: str = "",
    beside: str = "",
    texts: Sequence[Sequence[str]] | None = None,
    decimals: int = 3,
    **more: Any,
) -> Any:
    """Bars at their places in time (ms); who points at one is told its own length, its start and its end.

    told, below, beside: what stands before the times, under them and next to them; with texts of each bar as %{customdata[3]} and
    on. more: what else plotly's Bar takes.
    """
    # The length is told from customdata: plotly's %{x} of a bar with a base is where it ends.
    length, start, end = (f"%{{customdata[{number}]:.{decimals}f}}" for number in range(3))
    times = [[lasts, begins, begins + lasts] for begins, lasts in zip(starts, lengths, strict=True)]
    return style.graph_objects().Bar(
        y=[said(row) for row in rows],
        base=list(starts),
        x=list(lengths),
        orientation="h",
        marker=marker,
        customdata=[[*time, *of_bar] for time, of_bar in zip(times, texts or [[]] * len(times), strict=True)],
        hovertemplate=f"{told}: {length} ms, from {start} to {end} ms{below}<extra>{beside}</extra>",
        **more,
    )


def decades(*digits: float) -> tuple[float, ...]:
    """Ticks at these digits of every power of ten."""
    return tuple(digit * 10.0**power for power in range(-4, 6) for digit in digits)


def said(text: str) -> str:
    """A text as plotly shows it as it is, with its line breaks."""
    return html.escape(text, quote=False).replace("\n", "<br>")
