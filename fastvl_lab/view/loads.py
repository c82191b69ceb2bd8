"""A load: its requests over time and whom each waited for, how times are distributed, and what becomes of them as more arrive."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

from fastvl_lab import shown
from fastvl_lab.errors import RequestError
from fastvl_lab.measure.load import NAMES, Load, Measure
from fastvl_lab.schedule.loop import Step
from fastvl_lab.trace import STAGES, WAITS, Span
from fastvl_lab.view import style
from fastvl_lab.view.charts import Axis, Panel, arms, line, panels, said, timeline

if TYPE_CHECKING:
    import plotly.graph_objects as go

_MOST_BARS = 6_000  # a browser draws so many in about a second
_PIXELS = 1_500  # of a figure's width
_ROWS_PIXELS = 700  # of all requests, where that is not too little for one, unless a caller says so
_FEW_STEPS = 150  # between which lines are drawn
_ADMISSION = ("admit", "decode_image", "preprocess", "upload")


class _Bar(NamedTuple):
    """Of a request's stage, in ns since the first arrival; text: what is told of it besides its times."""

    number: int
    stage: str
    start: int
    end: int
    text: str


@shown.figure.register(Load)
def load_timeline(load: Load, *, title: str = "", until: float | None = None, pixels: int = _ROWS_PIXELS) -> go.Figure:
    """A row a request: its stages on the host from its arrival on, in ms since the first one's; below, what each step computed.

    until: seconds at which the time axis ends, by default a little after the last request. pixels: of all rows together.

    Pointing at a wait tells whose prompts and how many rows the steps computed meanwhile. A diamond is a request's first text, a
    cross one that failed. Of a load with more than 6,000 spans those that are thinner than a pixel are joined, under the stage that
    has most of them.
    """
    names = [f"request {number}" for number in range(len(load.runs))]
    bars = list(_bars(load))
    stages = dict.fromkeys((*STAGES, *(bar.stage for bar in bars)))
    traces = [_stage(stage, mine, names) for stage in stages if (mine := [bar for bar in bars if bar.stage == stage])]
    row = max(3, min(24, pixels // len(names)))
    first = [(number, load.begun[number] * 1e3 + run.ttft * 1e3) for number, run in enumerate(load.runs) if run is not None]
    failed = [(number, load.begun[number] * 1e3) for number in load.failures]
    size = min(8, row)
    traces.append(_marks("first text", first, names, {"symbol": "diamond", "size": size, "color": style.INK}))
    if failed:
        why = [said(load.failures[number]) for number, _ in failed]
        traces.append(_marks("failed", failed, names, {"symbol": "x", "size": size + 2, "color": style.FAILED}, why))
    x = Axis(title="milliseconds since the first request arrived", until=(until or load.seconds * 1.01) * 1e3)
    parts = [Panel(traces=traces, x=x, rows=names), *_lanes(load.steps, x)]
    figure = panels(parts, height=60, row=row, gap=34, down=True, barmode="overlay", above=10, title=title)
    figure.update_annotations(x=0, xanchor="left", font_size=12)
    body = figure.layout.height - figure.layout.margin.t - figure.layout.margin.b
    figure.update_layout(legend={"font": {"size": 11}, "entrywidth": 70, "y": 1 + 8 / body})  # many stages in a few lines
    return figure.update_layout(bargap=0.1 if row > 6 else 0)


def _stage(stage: str, bars: Sequence[_Bar], names: Sequence[str]) -> Any:
    starts, lengths = [bar.start / 1e6 for bar in bars], [(bar.end - bar.start) / 1e6 for bar in bars]
    marker = {"color": style.STAGE_COLOURS.get(stage, style.INK), "line": {"width": 0}}
    telling: dict[str, Any] = {"told": f"%{{y}}, {stage}", "below": "%{customdata[3]}", "decimals": 2}
    telling["texts"] = [["<br>" + said(bar.text) if bar.text else ""] for bar in bars]
    return timeline([names[bar.number] for bar in bars], starts, lengths, marker, name=stage, **telling)


def _marks(
    name: str, at: Sequence[tuple[int, float]], names: Sequence[str], marker: Mapping[str, Any], why: Sequence[str] = ()
) -> Any:
    look = {"mode": "markers", "marker": marker, "cliponaxis": False, "customdata": why or None}
    told = "%{y}: %{customdata}" if why else "%{y}: %{x:.2f} ms"
    return line(name, [ms for _, ms in at], [names[number] for number, _ in at], look, told=told)


def _lanes(steps: Sequence[Step], x: Axis) -> Iterator[Panel]:
    """Prompt tokens, decode rows and patches of each step; what no step had is left out."""
    starts = [step.start_ns / 1e6 for step in steps]
    lengths = [(step.end_ns - step.start_ns) / 1e6 for step in steps]
    told = [f"step {number}: {said(_in_words(step))}; {step.waiting} not admitted yet" for number, step in enumerate(steps)]
    lanes = {
        "prompt tokens of each step": ("prefill", [sum(n for _, n in step.prefilled) for step in steps]),
        "decode rows": ("decode", [len(step.decoded) for step in steps]),
        "patches": ("vit", [sum(n for _, n in step.encoded) for step in steps]),
    }
    for title, (stage, values) in lanes.items():
        if any(values):
            bar = style.graph_objects().Bar(
                x=starts,
                y=values,
                width=lengths,
                offset=0,
                customdata=[[text, length] for text, length in zip(told, lengths, strict=True)],
                hovertemplate="%{customdata[0]}; %{customdata[1]:.2f} ms<extra></extra>",
                marker={
                    "color": style.STAGE_COLOURS[stage],
                    "line": {"width": 0.5 * (len(steps) <= _FEW_STEPS), "color": style.PAPER},
                },
            )
            yield Panel(title=title, traces=[bar], x=x, y=Axis(zero=True))


# Whom a request waited for


def _bars(load: Load) -> Iterator[_Bar]:
    """Every span of every request, or what they are joined to."""
    work, ends = _Work(load), [step.end_ns for step in load.steps]
    joined = sum(len(run.trace.spans) for run in load.finished) > _MOST_BARS
    for number, run in enumerate(load.runs):
        if run is None:
            continue
        spans = [span for span in run.trace.spans if span.lane == "host" and span.depth == 0]
        since = round(load.begun[number] * 1e9)
        for group in _groups(spans, load.seconds * 1e9 / _PIXELS if joined else 0):
            stage, start, end = _most(group), since + group[0].start_ns, since + group[-1].end_ns
            text = f"{len(group)} short spans" if len(group) > 1 else ""
            if stage in WAITS:
                met = range(bisect_right(ends, start), len(ends))
                steps = {at: work.meanwhile(number, load.steps[at], start, end) for at in met if load.steps[at].start_ns < end}
                text = _of_steps(steps)
            yield _Bar(number, stage, start, end, text)


def _groups(spans: Sequence[Span], pixel: float) -> Iterator[list[Span]]:
    """The spans one by one; those of less than a pixel (ns) together, until they fill one."""
    group: list[Span] = []
    for span in spans:
        if group and span.end_ns - group[0].start_ns > pixel:
            yield group
            group = []
        group.append(span)
    if group:
        yield group


def _most(group: Sequence[Span]) -> str:
    """The stage that has most of the time."""
    times: Counter[str] = Counter()
    for span in group:
        times[span.name] += span.duration_ns
    return times.most_common(1)[0][0]


class _Work:
    """When each request was worked for: by its number, the starts and ends (ns) of its admission, prefill and decode spans."""

    def __init__(self, load: Load) -> None:
        self._failed = load.failures
        self._spans: dict[tuple[int, str], tuple[list[int], list[int]]] = {}
        for number, run in enumerate(load.runs):
            since = round(load.begun[number] * 1e9)
            for span in () if run is None else run.trace.spans:
                if span.lane == "host" and span.depth == 0:
                    kind = "admitted" if span.name in _ADMISSION else span.name
                    starts, ends = self._spans.setdefault((number, kind), ([], []))
                    starts.append(since + span.start_ns)
                    ends.append(since + span.end_ns)

    def meanwhile(self, number: int, step: Step, start: int, end: int) -> Step:
        """What of a step was done for others than this request between two times (ns); of one that failed, all that it did."""
        start, end = max(start, step.start_ns), min(end, step.end_ns)
        whole = not (step.encoded or step.prefilled or step.decoded)  # one at a time: a step is a whole answer

        def was(other: int, kind: str) -> bool:
            if other == number or whole or other in self._failed:
                return other != number
            starts, ends = self._spans.get((other, kind), ((), ()))
            return bisect_right(ends, start) < bisect_left(starts, end)

        return replace(
            step,
            admitted=tuple(other for other in step.admitted if was(other, "admitted")),
            encoded=tuple(pair for pair in step.encoded if was(pair[0], "vit")),
            prefilled=tuple(pair for pair in step.prefilled if was(pair[0], "prefill")),
            decoded=tuple(other for other in step.decoded if was(other, "decode")),
        )


def _of_steps(steps: Mapping[int, Step]) -> str:
    """Which steps did what, by their numbers."""
    busy = {number: step for number, step in steps.items() if step.admitted or step.encoded or step.prefilled or step.decoded}
    if not busy:
        return "meanwhile requests were taken in or tokens sent"
    first, last = min(busy), max(busy)
    return (
        f"step {first}: {_in_words(*busy.values())}" if first == last else f"steps {first} to {last}: {_in_words(*busy.values())}"
    )


def _in_words(*steps: Step) -> str:
    """What steps did together: whose prompts, how many tokens and patches, how many rows were decoded, and who gave way."""
    prompts = [number for step in steps for number in (*step.admitted, *(one for one, _ in (*step.encoded, *step.prefilled)))]
    n_tokens, n_patches = sum(n for step in steps for _, n in step.prefilled), sum(n for step in steps for _, n in step.encoded)
    n_rows = sum(len(step.decoded) for step in steps)
    found = [f"{'prompts' if n_tokens or n_rows else 'all'} of {_listed(prompts)}"] if prompts else []
    counted = ((n_tokens, "prompt tokens"), (n_patches, "patches"), (n_rows, "decode rows" if n_rows > 1 else "decode row"))
    preempted = [number for step in steps for number in step.preempted]
    gave_way = [f"{_listed(preempted)} gave way"] if preempted else []
    return ", ".join([*found, *(f"{n:,} {what}" for n, what in counted if n), *gave_way])


def _listed(numbers: Sequence[int]) -> str:
    """Requests by their numbers, the first few of many."""
    mine = sorted(set(numbers))
    named = ", ".join(map(str, mine[:8])) + (f" and {len(mine) - 8} more" if len(mine) > 8 else "")
    return f"request {named}" if len(mine) == 1 else f"requests {named}"


# Several loads side by side


def load_curves(loads: Mapping[str, Load], of: Measure = "ttft") -> go.Figure:
    """The share of requests (of gaps: of all gaps) that took so many ms or less, a line a load; what failed is told in its name."""
    lines = []
    for number, (label, load) in enumerate(loads.items()):
        values = sorted(value * 1e3 for value in load.values(of))
        look = {"mode": "lines", "line": style.series(number)["line"] | {"shape": "hv"}}
        failed = f" ({len(load.failures)} of {len(load.runs)} failed)" if load.failures else ""
        shares = [rank / len(values) for rank in range(len(values) + 1) if values]  # answers of one token have no gap
        told = "%{y:.0%} within %{x:.1f} ms"
        lines.append(line(label + failed, [*values[:1], *values], shares, look, told=told))
    what = "chunks" if of == "gap" else "requests"
    x, y = Axis(title=f"{NAMES[of]}, ms", zero=True), Axis(title=f"share of {what}", until=1.02, number_format=".0%")
    return panels([Panel(traces=lines, x=x, y=y)], height=330)


def load_rates(loads: Mapping[str, Sequence[Load]], of: Measure = "ttft") -> go.Figure:
    """p50 and p90 of a measure (ms, with 95% intervals) against arrivals a second or requests at once, two lines a label.

    Beside it stand the requests answered a second; arrivals that are answered as fast as they come lie on the dotted line. Raises
    `RequestError` where loads differ in how requests arrive, or came as recorded.
    """
    asked = [load for mine in loads.values() for load in mine]
    closed = all(load.concurrency is not None for load in asked)
    if not closed and any(load.rate is None for load in asked):
        raise RequestError(f"loads against rates must all come at rates, or all so many at once, not {_differ(asked)}")
    times, answered = [], []
    for number, (label, mine) in enumerate(loads.items()):
        look, xs = style.series(number), [(load.concurrency if closed else load.rate) or 0.0 for load in mine]
        for percent in (50, 90):
            points = [(x, found.ms) for x, load in zip(xs, mine, strict=True) if (found := load.percentile(of, percent))]
            look |= {} if percent == 50 else {"line": look["line"] | {"dash": "dot", "width": 1.5}}
            ys, told = [point.median for _, point in points], f"%{{x:.3g}}: {NAMES[of]} p{percent} %{{y:.1f}} ms"
            more = {"error_y": arms([point for _, point in points]), "legendgroup": label}
            times.append(line(f"{label}, p{percent}", [x for x, _ in points], ys, look, told=told, **more))
        told = "%{x:.3g}: %{y:.2f} answered a second"
        answered.append(
            line("", xs, [load.requests_per_second for load in mine], style.series(number), told=told, legendgroup=label)
        )
    most = max(load.rate or 0.0 for load in asked)
    if not closed:
        look = {"mode": "lines", "line": {"color": style.INK, "dash": "dot", "width": 1}}
        answered.append(line("as fast as they come", [0, most], [0, most], look))
    x = Axis(title="requests at once" if closed else "requests that arrive a second", zero=True)
    what = Panel(title=f"{NAMES[of]}, ms (95% CI)", traces=times, x=x, y=Axis(zero=True))
    return panels(
        [what, Panel(title="requests answered a second", traces=answered, x=x, y=Axis(zero=True))], own_scales=True, gap=0.08
    )


def _differ(loads: Sequence[Load]) -> str:
    return " and ".join(dict.fromkeys(load.how for load in loads))
