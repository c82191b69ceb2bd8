"""Where time and memory go, and what could be had: savings a toggle at a time, shares of the floor, bytes held."""

from __future__ import annotations

import html
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from fastvl_lab.errors import require
from fastvl_lab.measure.compare import Attribution
from fastvl_lab.measure.recipes import STOCK
from fastvl_lab.measure.samples import saves
from fastvl_lab.run import Run
from fastvl_lab.view import style
from fastvl_lab.view.tables import times

if TYPE_CHECKING:
    import plotly.graph_objects as go

_SAVED, _LOST = style.SERIES_COLOURS[2], style.SERIES_COLOURS[4]


def step_down(found: Attribution) -> go.Figure:
    """TTFT of Transformers and of the recipe it starts from, then what each step takes off or adds, down to the last recipe's.

    Pale steps are those of which no saving or loss is shown: their interval holds zero, or there are too few rounds for one.
    """
    comparison, first = found.comparison, found.steps[0]
    labels, base, lengths, colours, patterns, texts, strengths = [], [], [], [], [], [], []
    for label in dict.fromkeys((STOCK, first)):
        ttft = comparison.representative(label).ttft * 1e3
        labels.append(label)
        base.append(0.0)
        lengths.append(ttft)
        colours.append(style.SERIES_COLOURS[6])
        patterns.append("")
        texts.append(f"{ttft:.1f} ms")
        strengths.append(1.0)
    reached = lengths[-1]
    for step in found.steps[1:]:
        saved = found.saved(step)
        labels.append(step)
        amount = saved.median if saved else 0.0
        base.append(min(reached, reached - amount))
        lengths.append(abs(amount))
        colours.append(_SAVED if amount >= 0 else _LOST)
        patterns.append("" if amount >= 0 else "x")
        texts.append(_signed(-amount) if saved else "never warm" if comparison.parity(step) else "no parity: not compared")
        strengths.append(1.0 if saves(saved) or (saved is not None and saved.high < 0) else 0.35)
        reached -= amount
    last = comparison.representative(found.steps[-1]).ttft * 1e3
    labels.append("in the end")
    base.append(0.0)
    lengths.append(last)
    colours.append(style.SERIES_COLOURS[0])
    patterns.append("")
    texts.append(f"{last:.1f} ms")
    strengths.append(1.0)
    figure = style.graph_objects().Figure()
    figure.add_bar(
        y=[html.escape(label) for label in labels],
        base=base,
        x=lengths,
        orientation="h",
        marker={"color": colours, "opacity": strengths, "pattern": {"shape": patterns, "fgcolor": "white"}},
        text=texts,
        textposition="outside",
        cliponaxis=False,
        showlegend=False,
        hovertemplate="%{y}: %{text}<extra></extra>",
    )
    longest = max(start + length for start, length in zip(base, lengths, strict=True))
    figure.update_xaxes(
        title="TTFT, ms; each step against the one before; pale: no difference shown",
        range=[0, 1.15 * longest],
        gridcolor=style.GRID,
    )
    figure.update_yaxes(autorange="reversed", ticklabelstandoff=8)
    margin = {"l": 40 + 7 * min(max(map(len, labels)), 40), "r": 40, "t": 30, "b": 55}
    figure.update_layout(**style.layout(height=110 + 27 * len(labels), margin=margin))
    return figure


def attribution_frame(found: Attribution) -> Any:
    """The same as a table, with intervals, and whether the tokens stayed what they must be."""
    table = []
    for step in dict.fromkeys((STOCK, *found.steps)):
        saved = found.saved(step) if step in found.steps[1:] else None
        row = {"step": step, "TTFT ms": f"{found.comparison.representative(step).ttft * 1e3:.2f}"}
        interval = "" if saved is None or saved.low != saved.low else f" [{saved.low:.2f}, {saved.high:.2f}]"
        row["saves ms (95% CI)"] = "–" if saved is None else f"{saved.median:.2f}{interval}"
        row["times as fast as Transformers (95% CI)"] = "reference" if step == STOCK else times(found.comparison.speedup(step))
        row["parity"] = found.comparison.checks[step].says
        table.append(row)
    return require("pandas", "notebooks").DataFrame(table)


def floor_bars(runs: Mapping[str, Run], floors: Mapping[str, float]) -> go.Figure:
    """Stages that have a floor: each run's ms as bars, the floor as a line across them, and the share of the time it is.

    floors: stage -> seconds (`Work.seconds`); "decode" stands for one step.
    """
    figure = style.graph_objects().Figure()
    stages = [stage for stage in floors if any(_milliseconds(run, stage) for run in runs.values())]
    for number, (label, run) in enumerate(runs.items()):
        spent = [_milliseconds(run, stage) for stage in stages]
        figure.add_bar(
            y=[_floored(stage) for stage in stages],
            x=spent,
            name=html.escape(label),
            orientation="h",
            marker={"color": style.SERIES_COLOURS[number], "pattern": {"shape": ("", "/", ".")[number % 3], "fgcolor": "white"}},
            text=[f"{ms:.2f} ms, floor {_share(floors[stage], ms)}" for stage, ms in zip(stages, spent, strict=True)],
            textposition="outside",
            cliponaxis=False,
        )
    for number, stage in enumerate(stages):
        floor = floors[stage] * 1e3
        line = {"color": style.INK, "width": 3}
        figure.add_shape(type="line", x0=floor, x1=floor, y0=number - 0.42, y1=number + 0.42, line=line)
    longest = max((ms for bars in figure.data for ms in bars.x), default=1.0)
    figure.update_xaxes(title="ms (medians' runs); the line is the floor", range=[0, 1.35 * longest], gridcolor=style.GRID)
    figure.update_yaxes(autorange="reversed", ticklabelstandoff=8)
    figure.update_layout(
        **style.layout(height=150 + 34 * len(stages) * len(runs), barmode="group", margin={"l": 130, "r": 40, "t": 60, "b": 55}),
        legend={"orientation": "h", "x": 0, "y": 1.02, "yanchor": "bottom"},
    )
    return figure


def floor_frame(runs: Mapping[str, Run], floors: Mapping[str, float]) -> Any:
    """The same as a table."""
    table = [
        {
            "stage": _floored(stage),
            "floor ms": f"{floor * 1e3:.3f}",
            **{
                f"{label}: ms": f"{ms:.3f} (the floor is {_share(floor, ms)} of it)" if ms else "–"
                for label, run in runs.items()
                for ms in (_milliseconds(run, stage),)
            },
        }
        for stage, floor in floors.items()
    ]
    return require("pandas", "notebooks").DataFrame(table)


def memory_bars(held: Mapping[str, int]) -> go.Figure:
    """Megabytes that are held, by what holds them."""
    shown = {name: n_bytes for name, n_bytes in held.items() if n_bytes}
    figure = style.graph_objects().Figure()
    figure.add_bar(
        y=[html.escape(name) for name in shown],
        x=[n_bytes / 1e6 for n_bytes in shown.values()],
        orientation="h",
        marker={"color": style.SERIES_COLOURS[0]},
        text=[f"{n_bytes / 1e6:.1f} MB" for n_bytes in shown.values()],
        textposition="outside",
        cliponaxis=False,
        showlegend=False,
    )
    figure.update_xaxes(title="MB held after the run", rangemode="tozero", gridcolor=style.GRID)
    largest = max(shown.values(), default=1) / 1e6
    figure.update_xaxes(range=[0, 1.2 * largest])
    figure.update_yaxes(autorange="reversed", ticklabelstandoff=8)
    figure.update_layout(**style.layout(height=120 + 30 * len(shown), margin={"l": 230, "r": 60, "t": 30, "b": 55}))
    return figure


def memory_frame(held: Mapping[str, int]) -> Any:
    """The same as a table."""
    table = [{"held by": name, "MB": f"{n_bytes / 1e6:.2f}"} for name, n_bytes in held.items()]
    return require("pandas", "notebooks").DataFrame(table)


def _milliseconds(run: Run, stage: str) -> float:
    """What a stage took before the first text, on the device where that has a lane; of "decode" a step's mean."""
    if stage == "decode":
        return 0.0 if run.tpot is None else run.tpot * 1e3
    lane = run.trace.stages("device") or run.trace.stages()
    return lane.get(stage, 0) / 1e6


def _floored(stage: str) -> str:
    return "a decode step" if stage == "decode" else stage


def _share(floor: float, ms: float) -> str:
    return "–" if not ms else f"{floor * 1e3 / ms:.0%}"


def _signed(ms: float) -> str:
    return f"{'+' if ms > 0 else '−'}{abs(ms):.2f} ms"
