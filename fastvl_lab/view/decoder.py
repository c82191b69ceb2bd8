"""What the notebooks of the attention and the cache slot draw: steps side by side, bytes over steps, and a chat turn by turn."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from fastvl_lab.errors import require
from fastvl_lab.measure.compare import Conversation
from fastvl_lab.measure.samples import Samples, StageSample
from fastvl_lab.run import in_words
from fastvl_lab.view import style
from fastvl_lab.view.tables import times

if TYPE_CHECKING:
    import plotly.graph_objects as go

_MEBIBYTE = 2**20

# A turn that used what was kept.
_HIT_PATTERN = "/"


def step_frame(rounds: Samples[StageSample], reference: str) -> Any:
    """One line a variant: of every step the median ms, and how many times as fast as the reference's it is."""
    table = []
    for label in rounds.engines:
        row: dict[str, str] = {"variant": label}
        for step in rounds.samples[0].steps:
            row[f"{step} ms"] = f"{rounds.median(label, step).median * 1e3:.2f}"
            row[f"{step}, times as fast as {reference} (95% CI)"] = (
                "reference" if label == reference else times(rounds.ratio(label, reference, step))
            )
        table.append(row)
    return require("pandas", "notebooks").DataFrame(table)


def step_panels(rounds: Samples[StageSample], titles: Mapping[str, str]) -> go.Figure:
    """One panel a step, one bar a variant, in median milliseconds; titles: step -> what stands over its panel."""
    figure_of = style.graph_objects()
    labels = list(reversed(rounds.engines))
    figure = _panels([html.escape(title) for title in titles.values()], shared_yaxes=True, horizontal_spacing=0.04)
    for column, step in enumerate(titles, start=1):
        medians = [rounds.median(label, step).median * 1e3 for label in labels]
        figure.add_trace(
            figure_of.Bar(
                x=medians,
                y=[html.escape(label) for label in labels],
                orientation="h",
                showlegend=False,
                marker={"color": style.STAGE_COLOURS.get(step, style.SERIES_COLOURS[0])},
                text=[f"{median:.2f}" for median in medians],
                textposition="outside",
                cliponaxis=False,
                hovertemplate="%{y}, " + step + ": %{x:.3f} ms<extra></extra>",
            ),
            row=1,
            col=column,
        )
        figure.update_xaxes(title_text="milliseconds (medians)", range=[0, max(medians) * 1.25], row=1, col=column)
    figure.update_xaxes(gridcolor=style.GRID)
    figure.update_yaxes(ticklabelstandoff=6)
    figure.update_layout(**style.layout(height=130 + 26 * len(labels), margin={"l": 190, "r": 30, "t": 50, "b": 55}))
    return figure


def steps_against_length(points: Mapping[int, Samples[StageSample]], titles: Mapping[str, str]) -> go.Figure:
    """Median milliseconds of each step against the prompt's tokens, on logarithmic axes: one panel a step, one line a variant.

    titles: step -> what stands over its panel.
    """
    figure_of = style.graph_objects()
    figure = _panels([html.escape(title) for title in titles.values()], horizontal_spacing=0.08)
    lengths = sorted(points)
    for column, step in enumerate(titles, start=1):
        for number, label in enumerate(points[lengths[0]].engines):
            figure.add_trace(
                figure_of.Scatter(
                    x=lengths,
                    y=[points[length].median(label, step).median * 1e3 for length in lengths],
                    name=html.escape(label),
                    legendgroup=label,
                    showlegend=column == 1,
                    **style.series(number),
                    hovertemplate="%{x} tokens: %{y:.3f} ms<extra>%{fullData.name}</extra>",
                ),
                row=1,
                col=column,
            )
        drawn = [y for trace in figure.data[-len(points[lengths[0]].engines) :] for y in trace.y]
        digits = (1, 2, 5) if max(drawn) > 10 * min(drawn) else (1, 1.5, 2, 3, 4, 5, 7)
        ticks = [digit * 10.0**power for power in range(-4, 6) for digit in digits]
        figure.update_yaxes(tickvals=ticks, ticktext=[f"{tick:.6g}" for tick in ticks], row=1, col=column)
    axis = {"type": "log", "minor": {"ticks": ""}, "gridcolor": style.GRID}
    figure.update_xaxes(title_text="tokens of the prompt", tickvals=lengths, ticktext=[str(n) for n in lengths], **axis)
    figure.update_yaxes(**axis)
    figure.update_yaxes(title_text="milliseconds (medians)", row=1, col=1)
    figure.update_layout(
        **style.layout(height=440, margin={"l": 80, "r": 30, "t": 90, "b": 60}),
        legend={"orientation": "h", "x": 0, "y": 1.12, "yanchor": "bottom"},
    )
    return figure


def bytes_over_steps(held: Mapping[str, Sequence[int]], length: int) -> go.Figure:
    """MiB that hold keys and values against the decode steps after a prompt of `length` tokens, one line a cache.

    held: cache -> bytes after prefill and after each step. All caches stand in the left panel; those that change with the steps
    again in the right one, on a scale of their own.
    """
    figure_of = style.graph_objects()
    changing = {label: values for label, values in held.items() if min(values) != max(values)}
    panels = {"all of them": held} | ({"those that grow, magnified": changing} if changing else {})
    figure = _panels(list(panels), horizontal_spacing=0.09)
    for column, lines in enumerate(panels.values(), start=1):
        for number, (label, values) in enumerate(held.items()):
            if label not in lines:
                continue
            line = style.series(number)["line"] | {"shape": "hv", "width": 3, "dash": ("solid", "dash", "dot")[number % 3]}
            figure.add_trace(
                figure_of.Scatter(
                    x=list(range(len(values))),
                    y=[value / _MEBIBYTE for value in values],
                    mode="lines",
                    line=line,
                    name=html.escape(label),
                    legendgroup=label,
                    showlegend=column == 1,
                    hovertemplate="%{y:.3f} MiB after step %{x}<extra>%{fullData.name}</extra>",
                ),
                row=1,
                col=column,
            )
    figure.update_xaxes(title_text=f"decode steps after {length} tokens", gridcolor=style.GRID)
    figure.update_yaxes(gridcolor=style.GRID)
    figure.update_yaxes(title_text="keys and values, MiB", rangemode="tozero", row=1, col=1)
    figure.update_layout(
        **style.layout(height=420, margin={"l": 80, "r": 30, "t": 90, "b": 60}),
        legend={"orientation": "h", "x": 0, "y": 1.12, "yanchor": "bottom"},
    )
    return figure


def turn_frame(chat: Conversation, over: str) -> Any:
    """One line a turn and engine: what the turn found, its TTFT, and how many times as fast it is as the engine `over`."""
    table = []
    for row in chat.summary(over):
        engine, speedup = row["engine"], chat.speedup(row["engine"], row["turn"] - 1, over)
        line = {
            "turn": row["turn"],
            "engine": engine,
            "kind": in_words(row["kind"]),
            "prompt tokens": row["prompt_tokens"],
            "found in the cache": row["tokens_found"],
            "images found": row["images_found"],
            "TTFT ms": f"{row['ttft_ms']:.1f}",
            "tokens equal": "yes" if row["tokens_equal"] else "NO",
            f"times as fast as {over} (95% CI)": "reference" if engine == over else times(speedup),
        }
        table.append(line)
    return require("pandas", "notebooks").DataFrame(table)


def turn_bars(chat: Conversation) -> go.Figure:
    """The median TTFT of every turn, one bar an engine; hatched where something of an earlier turn was used."""
    figure_of = style.graph_objects()
    turns = range(len(chat.texts))
    names = [f"turn {turn + 1}<br>{chat.runs(chat.reference, turn)[-1].n_prompt} tokens" for turn in turns]
    figure = figure_of.Figure()
    highest = 0.0
    for number, engine in enumerate(chat.engines):
        medians = [chat.ttft(engine, turn).median * 1e3 for turn in turns]
        highest = max(highest, *medians)
        found = [chat.found(engine, turn) for turn in turns]
        figure.add_trace(
            figure_of.Bar(
                x=names,
                y=medians,
                name=html.escape(engine),
                offsetgroup=str(number),
                marker={
                    "color": style.SERIES_COLOURS[number % len(style.SERIES_COLOURS)],
                    "pattern": {
                        "shape": [_HIT_PATTERN if chat.kind(engine, turn) == "cache_hit" else "" for turn in turns],
                        "fgcolor": "white",
                        "fgopacity": 0.7,
                    },
                },
                text=[f"{median:.0f}" if median >= 100 else f"{median:.1f}" for median in medians],
                textposition="outside",
                textangle=0,
                textfont={"size": 11},
                cliponaxis=False,
                customdata=[[in_words(chat.kind(engine, turn)), *found[turn]] for turn in turns],
                hovertemplate="%{y:.2f} ms, %{customdata[0]}<br>%{customdata[1]} tokens and %{customdata[2]} images found"
                "<extra>%{fullData.name}</extra>",
            )
        )
    hatched = {"color": style.SERIES_COLOURS[-1], "pattern": {"shape": _HIT_PATTERN, "fgcolor": "white"}}
    explained = figure_of.Bar(x=[None], y=[None], name="hatched: what was kept is used", marker=hatched, offsetgroup="0")
    figure.add_trace(explained)
    figure.update_xaxes(showgrid=False)
    figure.update_yaxes(title_text="TTFT, ms (medians)", range=[0, highest * 1.12], gridcolor=style.GRID)
    figure.update_layout(
        **style.layout(height=460, margin={"l": 80, "r": 30, "t": 90, "b": 60}, barmode="group", bargap=0.2),
        legend={"orientation": "h", "x": 0, "y": 1.04, "yanchor": "bottom"},
    )
    return figure


def _panels(titles: Sequence[str], **spacing: Any) -> Any:
    return require("plotly.subplots", "notebooks").make_subplots(rows=1, cols=len(titles), subplot_titles=titles, **spacing)
