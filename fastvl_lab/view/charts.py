"""Charts over many runs."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from fastvl_lab.errors import require
from fastvl_lab.view import style

if TYPE_CHECKING:
    import plotly.graph_objects as go


def ttft_against_visual_tokens(rows: Sequence[Mapping[str, Any]]) -> go.Figure:
    """Median warm TTFT (ms, with its 95% interval) against visual tokens, one panel a checkpoint, one line an engine.

    rows: as `SweepResult.summary` gives them; engines without a run that is compared are left out. Those of an endpoint that does
    not say whether it reused anything are marked.
    """
    figure_of = style.graph_objects()
    checkpoints = list(dict.fromkeys(row["checkpoint"] for row in rows))
    engines = list(dict.fromkeys(row["engine"] for row in rows))
    figure = require("plotly.subplots", "notebooks").make_subplots(
        rows=1,
        cols=max(len(checkpoints), 1),
        shared_yaxes=True,
        subplot_titles=[html.escape(name) for name in checkpoints],
        horizontal_spacing=0.04,
    )
    for column, checkpoint in enumerate(checkpoints, start=1):
        for number, engine in enumerate(engines):
            points = sorted(
                (row for row in rows if row["checkpoint"] == checkpoint and row["engine"] == engine and row["ttft_ms"]),
                key=lambda row: row["visual_tokens"],
            )
            figure.add_trace(
                figure_of.Scatter(
                    x=[row["visual_tokens"] for row in points],
                    y=[row["ttft_ms"] for row in points],
                    error_y={
                        "type": "data",
                        "array": [_reach(row["ttft_high_ms"], row["ttft_ms"]) for row in points],
                        "arrayminus": [_reach(row["ttft_ms"], row["ttft_low_ms"]) for row in points],
                    },
                    name=html.escape(engine) + (" (reuse unknown)" if any(row["unknown_runs"] for row in points) else ""),
                    legendgroup=engine,
                    showlegend=column == 1,
                    **style.series(number),
                    hovertemplate="%{x} visual tokens: %{y:.1f} ms<extra>%{fullData.name}</extra>",
                ),
                row=1,
                col=column,
            )
    figure.update_xaxes(title_text="visual tokens", rangemode="tozero", gridcolor=style.GRID)
    figure.update_yaxes(rangemode="tozero", gridcolor=style.GRID)
    figure.update_yaxes(title_text="warm TTFT, ms (median, 95% CI)", row=1, col=1)
    figure.update_layout(
        **style.layout(height=420, margin={"l": 80, "r": 30, "t": 80, "b": 60}),
        legend={"orientation": "h", "x": 0, "y": 1.12, "yanchor": "bottom"},
    )
    return figure


def _reach(high: float, low: float) -> float:
    """Length of one arm of an error bar; an interval that does not exist has none."""
    return 0.0 if high != high or low != low else max(high - low, 0.0)
