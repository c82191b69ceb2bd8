"""What is compared, as bars and lines: times by engine, step and size, what each toggle saves, floors, bytes and padding."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from fastvl_lab.errors import counted
from fastvl_lab.measure.audit import Audit
from fastvl_lab.measure.compare import Attribution, Comparison, Conversation
from fastvl_lab.measure.floors import Cost
from fastvl_lab.measure.recipes import STOCK
from fastvl_lab.measure.samples import Samples, StageSample, saves
from fastvl_lab.run import Run, in_words
from fastvl_lab.view import style
from fastvl_lab.view.charts import Axis, Panel, arms, bars, decades, line, panels, said
from fastvl_lab.view.tables import floored, share_of, spent_ms

if TYPE_CHECKING:
    import plotly.graph_objects as go

_PATTERNS = ("", "/", ".", "x", "-")
_BUSY = "the machine was busy"


def ttft_against_visual_tokens(rows: Sequence[Mapping[str, Any]]) -> go.Figure:
    """Median warm TTFT (ms, with its 95% interval) against visual tokens, one panel a checkpoint and card, one line an engine.

    rows: as `SweepResult.summary` gives them; engines without a run that is compared are left out. Those of an endpoint that does
    not say whether it reused anything are marked.
    """
    x, y = Axis(title="visual tokens", zero=True), Axis(title="warm TTFT, ms (median, 95% CI)", zero=True)
    parts = []
    cards = {row.get("card", "") for row in rows}
    for checkpoint, card in dict.fromkeys((row["checkpoint"], row.get("card", "")) for row in rows):
        here = [row for row in rows if (row["checkpoint"], row.get("card", "")) == (checkpoint, card)]
        lines = []
        for number, engine in enumerate(dict.fromkeys(row["engine"] for row in rows)):
            mine = [row for row in here if row["engine"] == engine and row["ttft_ms"]]
            mine.sort(key=lambda row: row["visual_tokens"])
            medians = [row["ttft_ms"] for row in mine]
            name = engine + (" (reuse unknown)" if any(row["unknown_runs"] for row in mine) else "")
            told, tokens = "%{x} visual tokens: %{y:.1f} ms", [row["visual_tokens"] for row in mine]
            reach = arms((row["ttft_ms"], row["ttft_low_ms"], row["ttft_high_ms"]) for row in mine)
            lines.append(line(name, tokens, medians, style.series(number), told=told, error_y=reach))
        parts.append(Panel(title=f"{checkpoint} · {card}" if len(cards) > 1 else checkpoint, traces=lines, x=x, y=y))
    return panels(parts)


def sample_dots(comparison: Comparison) -> go.Figure:
    """TTFT (ms) of every timed run, a dot a run; hollow where others disturbed it, which counts for nothing."""
    rows, traces = comparison.engines, []
    for number, engine in enumerate(rows):
        colour = style.SERIES_COLOURS[number % len(style.SERIES_COLOURS)]
        for disturbed in (False, True):
            mine = [s for s in comparison.samples if s.engine == engine and s.round >= 0 and bool(s.disturbed) is disturbed]
            marker = {"color": colour, "size": 9, "symbol": "circle-open" if disturbed else "circle", "line": {"width": 2}}
            about = [f"round {s.round}, {in_words(s.kind)}{f'; {s.use.why}' if s.use else ''}" for s in mine]
            xs, look = [s.run.ttft * 1e3 for s in mine], {"mode": "markers", "marker": marker}
            told = "%{y}: %{x:.2f} ms, %{customdata}"
            traces.append(line("", xs, [said(engine)] * len(mine), look, told=told, customdata=about))
    x = Axis(title="TTFT, ms; a dot a run, hollow where others disturbed it", zero=True)
    return panels([Panel(traces=[trace for trace in traces if trace.x], x=x, rows=rows)])


def step_bars(rounds: Samples[StageSample], title: str) -> go.Figure:
    """One bar a variant, made of its steps' median milliseconds; at its end the 95% interval of all of them together."""
    traces = [
        bars(
            rounds.engines,
            _medians(rounds, step),
            style.SERIES_COLOURS[number % len(style.SERIES_COLOURS)],
            name=step,
            pattern=_PATTERNS[number % len(_PATTERNS)],
            told=f"%{{y}}, {step}: %{{x:.2f}} ms",
        )
        for number, step in enumerate(rounds.samples[0].steps)
    ]
    totals = {label: rounds.median(label).ms for label in rounds.engines}
    traces[-1].error_x = arms(totals.values()) | {"color": style.INK, "thickness": 1.2}
    ends = {label: _longest((total.median, total.high), least=0.0) for label, total in totals.items()}
    texts = {label: f"{total.median:.1f} ms" if total.median == total.median else _BUSY for label, total in totals.items()}
    notes = [(ends[label], label, text) for label, text in texts.items()]
    x = Axis(title="milliseconds (medians, 95% CI)", until=_longest(ends.values()) * 1.15)
    return panels([Panel(traces=traces, x=x, rows=rounds.engines, notes=notes)], row=32, barmode="stack", title=title)


def step_panels(rounds: Samples[StageSample], titles: Mapping[str, str]) -> go.Figure:
    """One panel a step, one bar a variant, in median milliseconds; titles: step -> what stands over its panel."""
    parts = []
    for step, title in titles.items():
        medians = _medians(rounds, step)
        colour, told = style.STAGE_COLOURS.get(step, style.SERIES_COLOURS[0]), f"%{{y}}, {step}: %{{x:.3f}} ms"
        texts = [f"{median:.2f}" if median == median else _BUSY for median in medians]
        trace = bars(rounds.engines, medians, colour, texts=texts, told=told)
        x = Axis(title="milliseconds (medians)", until=_longest(medians) * 1.25)
        parts.append(Panel(title=title, traces=[trace], x=x, rows=rounds.engines))
    return panels(parts)


def _medians(rounds: Samples[StageSample], *steps: str) -> list[float]:
    """Milliseconds of these steps, of all if none is named, for each variant; NaN where others disturbed every round."""
    return [rounds.median(label, *steps).median * 1e3 for label in rounds.engines]


def _longest(times: Iterable[float], least: float = 1.0) -> float:
    """Of those that are numbers; `least` where none is."""
    return max((time for time in times if time == time), default=least)


def cost_against_size(points: Mapping[float, Samples[StageSample]], *, x_title: str, y_title: str) -> go.Figure:
    """Median milliseconds of all steps against a size, one line a variant, on logarithmic axes.

    The three that are fastest at the largest size, and the first, which they are held against, are strong; the others are pale.
    """
    traces, ticks = _against_size(points, told="%{x:.2f}: %{y:.2f} ms"), decades(1, 2, 5)
    strong = [traces[0], *sorted((trace for trace in traces if trace.y[-1] == trace.y[-1]), key=lambda trace: trace.y[-1])[:3]]
    for trace in traces:
        trace.opacity = 1.0 if any(trace is one for one in strong) else 0.3
    part = Panel(traces=traces, x=Axis(title=x_title, ticks=ticks), y=Axis(title=y_title, ticks=ticks))
    return panels([part], height=390, beside=True)


def steps_against_length(points: Mapping[int, Samples[StageSample]], titles: Mapping[str, str]) -> go.Figure:
    """Median milliseconds of each step against the prompt's tokens: one panel a step, one line a variant.

    The axes are logarithmic; where the times of a step lie within a factor of three, theirs is not, and begins at 0. titles: step
    -> what stands over its panel.
    """
    parts = []
    for step, title in titles.items():
        traces = _against_size(points, step, told="%{x} tokens: %{y:.3f} ms")
        drawn = [y for trace in traces for y in trace.y if y == y] or [1.0]
        ticks = decades(1, 2, 5) if max(drawn) > 10 * min(drawn) else decades(1, 1.5, 2, 3, 4, 5, 7)
        near = max(drawn) < 3 * min(drawn)
        y = Axis(title="milliseconds (medians)", ticks=() if near else ticks, zero=near)
        parts.append(Panel(title=title, traces=traces, x=Axis(title="tokens of the prompt", ticks=sorted(points)), y=y))
    return panels(parts, gap=0.08, own_scales=True)


def _against_size(points: Mapping[Any, Samples[StageSample]], *steps: str, told: str) -> list[Any]:
    """A line a variant: median milliseconds of these steps, of all if none is named."""
    sizes = sorted(points)
    medians = {size: _medians(points[size], *steps) for size in sizes}
    labels = points[sizes[0]].engines
    return [
        line(label, sizes, [medians[size][number] for size in sizes], style.series(number), told=told)
        for number, label in enumerate(labels)
    ]


def cost_parts(
    points: Mapping[int, Samples[StageSample]],
    costs: Mapping[str, Cost],
    *,
    steps: Sequence[str] = (),
    unit: str = "patches",
    y_title: str = "vision tower, ms",
) -> go.Figure:
    """Measured times against a size, and what of the fitted curve is fixed, linear and quadratic; one panel a variant.

    steps: what is timed of the rounds; all, if none is named. unit: what the sizes count.
    """
    sizes = sorted(points)
    along = np.linspace(0, sizes[-1], 60)
    grey, sky, blue = style.SERIES_COLOURS[6], style.SERIES_COLOURS[5], style.SERIES_COLOURS[0]
    kinds = (("fixed", grey, "."), (f"with {unit}", sky, ""), ("with their square", blue, "/"))
    parts = []
    for column, (label, cost) in enumerate(costs.items(), start=1):
        traces = []
        for number, (name, colour, pattern) in enumerate(kinds):
            look: dict[str, Any] = {"mode": "lines", "line": {"width": 0.5, "color": colour}, "fillcolor": colour}
            look |= {"stackgroup": f"parts {column}", "fillpattern": {"shape": pattern, "fgcolor": "white", "fgopacity": 0.7}}
            parts_ms = [cost.parts(n)[number] * 1e3 for n in along]
            traces.append(line(name, along, parts_ms, look, told=f"%{{y:.2f}} ms at %{{x:.0f}} {unit}"))
        medians = [points[n].median(label, *steps).median * 1e3 for n in sizes]
        marks = {"mode": "markers", "marker": {"color": style.INK, "size": 9, "symbol": "diamond"}}
        traces.append(line("measured (medians)", sizes, medians, marks, told=f"%{{y:.2f}} ms at %{{x}} {unit}"))
        parts.append(Panel(title=label, traces=traces, x=Axis(title=unit, zero=True), y=Axis(title=y_title, zero=True)))
    return panels(parts)


def bytes_over_steps(held: Mapping[str, Sequence[int]], length: int) -> go.Figure:
    """MiB that hold keys and values against the decode steps after a prompt of `length` tokens, one line a cache.

    held: cache -> bytes after prefill and after each step. All caches stand in the left panel; those that change with the steps
    again in the right one, on a scale of their own.
    """
    growing = {label for label, values in held.items() if min(values) != max(values)}
    parts: list[Panel] = []
    for title, shown in {"all of them": set(held), "those that grow, magnified": growing}.items():
        traces = []
        for number, (label, values) in enumerate(held.items()):
            colour = style.series(number)["line"]["color"]
            drawn = {"color": colour, "shape": "hv", "width": 3, "dash": ("solid", "dash", "dot")[number % 3]}
            mebibytes = [value / 2**20 for value in values]
            if label in shown:
                told = "%{y:.3f} MiB after step %{x}"
                traces.append(line(label, range(len(values)), mebibytes, {"mode": "lines", "line": drawn}, told=told))
        y = Axis(title="keys and values, MiB", zero=not parts)
        if shown:
            parts.append(Panel(title=title, traces=traces, x=Axis(title=f"decode steps after {length} tokens"), y=y))
    return panels(parts, gap=0.09, own_scales=True)


def padding_by_size(padding: Mapping[str, Mapping[int, Mapping[str, float]]], programs: Mapping[str, int]) -> go.Figure:
    """The share of each stage's work that is padding, against visual tokens: one panel a stage, one line a way to share shapes.

    padding: way -> visual tokens -> stage -> share. programs: way -> how many programs all the sizes need together.
    """
    parts = []
    for stage in dict.fromkeys(stage for sizes in padding.values() for shares in sizes.values() for stage in shares):
        traces = [
            line(
                f"{way}: {counted(programs[way], 'program')}",
                sizes,
                [shares.get(stage, 0.0) for shares in sizes.values()],
                style.series(number),
                told="%{x} visual tokens: %{y:.1%}",
            )
            for number, (way, sizes) in enumerate(padding.items())
        ]
        y = Axis(title="padding's share of the work", zero=True, number_format=".0%")
        parts.append(Panel(title=stage, traces=traces, x=Axis(title="visual tokens", zero=True), y=y))
    return panels(parts)


def turn_bars(chat: Conversation) -> go.Figure:
    """The median TTFT of every turn, one bar an engine; hatched where something of an earlier turn was used."""
    upright, hatch = style.graph_objects().Bar, {"fgcolor": "white", "fgopacity": 0.7}
    turns = range(len(chat.texts))
    names = [f"turn {turn + 1}<br>{chat.runs(chat.reference, turn)[-1].n_prompt} tokens" for turn in turns]
    traces, highest = [], 0.0
    for number, engine in enumerate(chat.engines):
        medians = [chat.ttft(engine, turn).median * 1e3 for turn in turns]
        highest = max(highest, _longest(medians))
        patterns = ["/" if chat.kind(engine, turn) == "cache_hit" else "" for turn in turns]
        colour = style.SERIES_COLOURS[number % len(style.SERIES_COLOURS)]
        traces.append(
            upright(
                x=names,
                y=medians,
                name=said(engine),
                offsetgroup=str(number),
                marker={"color": colour, "pattern": {"shape": patterns} | hatch},
                text=[f"{median:.0f}" if median >= 100 else f"{median:.1f}" if median == median else _BUSY for median in medians],
                textposition="outside",
                textangle=0,
                textfont={"size": 11},
                cliponaxis=False,
                customdata=[[in_words(chat.kind(engine, turn)), *chat.found(engine, turn)] for turn in turns],
                hovertemplate="%{y:.2f} ms, %{customdata[0]}<br>%{customdata[1]} tokens and %{customdata[2]} images found"
                "<extra>%{fullData.name}</extra>",
            )
        )
    marker = {"color": style.SERIES_COLOURS[-1], "pattern": {"shape": "/"} | hatch}
    traces.append(upright(x=[None], y=[None], name="hatched: what was kept is used", marker=marker, offsetgroup="0"))
    part = Panel(traces=traces, x=Axis(), y=Axis(title="TTFT, ms (medians)", until=highest * 1.12))
    return panels([part], height=310, barmode="group").update_layout(bargap=0.2, xaxis_showgrid=False)


def step_down(found: Attribution) -> go.Figure:
    """TTFT of Transformers and of the recipe it starts from, then what each step takes off or adds, down to the last recipe's.

    Pale steps are those of which no saving or loss is shown: their interval holds zero, or there are too few rounds for one.
    """
    comparison, reached = found.comparison, 0.0
    drawn = []
    for label in dict.fromkeys((STOCK, found.steps[0])):
        reached = comparison.representative(label).ttft * 1e3
        drawn.append(_Bar(label=label, length=reached, colour=style.SERIES_COLOURS[6], text=f"{reached:.1f} ms"))
    for step in found.steps[1:]:
        saved = found.saved(step)
        amount = saved.median if saved else 0.0
        lost = amount < 0
        text = f"{'+' if lost else '−'}{abs(amount):.2f} ms"
        if not saved:
            text = "never warm, or the machine was busy" if comparison.parity(step) else "no parity: not compared"
        look: dict[str, Any] = {"colour": style.SERIES_COLOURS[4 if lost else 2], "pattern": "x" if lost else ""}
        look["strength"] = 1.0 if saves(saved) or (saved is not None and saved.high < 0) else 0.35
        start = min(reached, reached - amount) if saved else 0.0  # a sentence has room from there
        drawn.append(_Bar(label=step, start=start, length=abs(amount), text=text, **look))
        reached -= amount
    last = comparison.representative(found.steps[-1]).ttft * 1e3
    drawn.append(_Bar(label="in the end", length=last, colour=style.SERIES_COLOURS[0], text=f"{last:.1f} ms"))
    labels = [bar.label for bar in drawn]
    trace = bars(
        labels,
        [bar.length for bar in drawn],
        [bar.colour for bar in drawn],
        base=[bar.start for bar in drawn],
        pattern=[bar.pattern for bar in drawn],
        texts=[bar.text for bar in drawn],
        marker={"opacity": [bar.strength for bar in drawn]},
        told="%{y}: %{text}",
    )
    longest = max(bar.start + bar.length for bar in drawn)
    x = Axis(title="TTFT, ms; each step against the one before; pale: no difference shown", until=1.15 * longest)
    return panels([Panel(traces=[trace], x=x, rows=labels)])


@dataclass(frozen=True, kw_only=True)
class _Bar:
    """start, length: ms. strength: how opaque it is."""

    label: str
    length: float
    colour: str
    text: str
    start: float = 0.0
    pattern: str = ""
    strength: float = 1.0


def floor_bars(runs: Mapping[str, Run], floors: Mapping[str, float]) -> go.Figure:
    """Stages that have a floor: each run's ms as bars, the floor as a line across them, and the share of the time it is.

    floors: stage -> seconds (`Work.seconds`); "decode" stands for one step.
    """
    stages = [stage for stage in floors if any(spent_ms(run, stage) for run in runs.values())]
    rows, traces, longest = [floored(stage) for stage in stages], [], 0.0
    for number, (label, run) in enumerate(runs.items()):
        spent = [spent_ms(run, stage) for stage in stages]
        texts = [f"{ms:.2f} ms, floor {share_of(floors[stage], ms)}" for stage, ms in zip(stages, spent, strict=True)]
        traces.append(bars(rows, spent, style.SERIES_COLOURS[number], name=label, pattern=_PATTERNS[number % 3], texts=texts))
        longest = max([longest, *spent])
    x = Axis(title="ms (medians' runs); the line is the floor", until=1.35 * (longest or 1.0))
    figure = panels([Panel(traces=traces, x=x, rows=rows)], row=34 * len(runs), barmode="group")
    for number, stage in enumerate(stages):
        floor, drawn = floors[stage] * 1e3, {"color": style.INK, "width": 3}
        figure.add_shape(type="line", x0=floor, x1=floor, y0=number - 0.42, y1=number + 0.42, line=drawn)
    return figure


def memory_bars(held: Mapping[str, int]) -> go.Figure:
    """Megabytes that are held, by what holds them."""
    shown = {name: n_bytes / 1e6 for name, n_bytes in held.items() if n_bytes}
    trace = bars(shown, shown.values(), style.SERIES_COLOURS[0], texts=[f"{size:.1f} MB" for size in shown.values()])
    x = Axis(title="MB held after the run", until=1.2 * max(shown.values(), default=1e-6))
    return panels([Panel(traces=[trace], x=x, rows=list(shown))])


def reported_rates(rows: Sequence[Mapping[str, Any]], audits: Sequence[Audit], hardware: str) -> go.Figure:
    """Others' tokens a second, a bar a row; hatched where the audit finds more than the memory of the GPU allows the model.

    rows: "engine", "model", "ttft" (seconds) and "tokens_per_second" each. audits: one of each (`measure.audit.audit_reported`).
    """
    bad = [not found.ok for found in audits]
    rates = [row["tokens_per_second"] for row in rows]
    texts = [f"{rate:.0f} tokens/s{', impossible' if wrong else ''}" for rate, wrong in zip(rates, bad, strict=True)]
    colours = [style.SERIES_COLOURS[4 if wrong else 0] for wrong in bad]
    hatched = {"pattern": {"shape": ["x" if wrong else "" for wrong in bad], "fillmode": "replace", "size": 6}}
    labels = [f"{row['engine']}\n{row['model']}" for row in rows]
    x = Axis(title=f"tokens a second, one request, {hardware}", until=1.3 * max(rates))
    return panels([Panel(traces=[bars(labels, rates, colours, marker=hatched, texts=texts)], x=x, rows=labels)], row=58)
