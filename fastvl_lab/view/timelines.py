"""What happened when, inside a run: blocks and layers, launches and steps, chunks, operations. (`waterfall.py` has its stages.)"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from fastvl_lab.measure.profile import Profile
from fastvl_lab.run import Run
from fastvl_lab.trace import Lane
from fastvl_lab.view import style
from fastvl_lab.view.charts import Axis, Panel, line, panels, said, timeline

if TYPE_CHECKING:
    import plotly.graph_objects as go

_LANES: tuple[Lane, ...] = ("host", "device")


def block_waterfall(runs: Sequence[Run], stage: str = "vit", number: int = 0) -> go.Figure:
    """One stage of each run beside the others: every block or layer from its start to its end, in ms since the stage's own start.

    The runs must have been traced with "layers". number: which, of a stage that ran several times; -1 is its last time. On CUDA
    the bars are the device's.
    """
    inside = [_inside(run, stage, number) for run in runs]
    longest = max(spans[0][2] for spans in inside)
    rows = list(dict.fromkeys(name for spans in inside for name, _, _ in spans))
    rows.sort(key=lambda name: name.rpartition(".")[2].isdigit())  # blocks and layers below what has no number
    parts = []
    for run, spans in zip(runs, inside, strict=True):
        names, starts, lengths = zip(*spans, strict=True)
        marker = {"color": [style.STAGE_COLOURS[stage if name == stage else "merge"] for name in names]}
        texts: dict[str, Any] = {"text": [f"{length:.2f}" for length in lengths], "textposition": "outside", "cliponaxis": False}
        parts.append(
            Panel(
                title=f"{run.engine[: 90 // len(runs)]}: {lengths[0]:.2f} ms",
                traces=[timeline(names, starts, lengths, marker, **texts)],
                x=Axis(title=f"ms since {stage} began", until=longest * 1.25),
                rows=rows,
            )
        )
    return panels(parts)


def _inside(run: Run, stage: str, number: int) -> list[tuple[str, float, float]]:
    """(name, start, length) in ms: the whole stage first, then what is inside it."""
    lanes = {span.lane for span in run.trace.spans if span.name == stage}
    mine = [span for span in run.trace.spans if span.lane == ("device" if "device" in lanes else "host")]
    whole = [span for span in mine if span.name == stage and span.depth == 0][number]
    inside = [span for span in mine if span.depth > 0 and whole.start_ns <= span.start_ns and span.end_ns <= whole.end_ns]
    return [(s.name, (s.start_ns - whole.start_ns) / 1e6, s.duration_ns / 1e6) for s in (whole, *inside)]


def chunk_timeline(runs: Mapping[str, Run]) -> go.Figure:
    """When each chunk was in the consumer's hands: a row a run, a mark a chunk, larger the more tokens it has; ms.

    The first mark is TTFT; a chunk of more than four tokens has their number beside it.
    """
    traces = []
    for number, (label, run) in enumerate(runs.items()):
        counts = [len(chunk.tokens) for chunk in run.chunks]
        sizes = [6 + 2 * min(count - 1, 9) for count in counts]
        look = {
            "mode": "markers+text",
            "marker": style.series(number)["marker"] | {"size": sizes, "opacity": 0.8},
            "text": [f"{count} tokens" if count > 4 else "" for count in counts],
            "textposition": "top center",
            "cliponaxis": False,
            "customdata": counts,
        }
        times = [chunk.time * 1e3 for chunk in run.chunks]
        traces.append(line("", times, [said(label)] * len(counts), look, told="%{x:.2f} ms: %{customdata} tokens"))
    last = max((run.chunks[-1].time * 1e3 for run in runs.values() if run.chunks), default=1.0)
    x = Axis(title="milliseconds since the request's bytes; a mark is a chunk", until=1.08 * last)
    return panels([Panel(traces=traces, x=x, rows=list(runs))], row=52)


def launches_and_steps(runs: Mapping[str, Run], n_steps: int = 34) -> go.Figure:
    """The first decode steps of each run on two lanes, the host's launches and the device's work; ms since the first launch.

    For runs whose steps are launched in rounds: on CUDA, or on a CPU, where a thread plays the device.
    """
    rows = {"host": "launched (host)", "device": "done (device)"}
    parts = []
    for label, run in runs.items():
        spans = [span for span in run.trace.spans if span.name == "decode" and span.depth == 0]
        lanes = {lane: [span for span in spans if span.lane == lane][:n_steps] for lane in _LANES}
        began = min(span.start_ns for lane in lanes.values() for span in lane)
        traces = []
        for lane, mine in lanes.items():
            marker = _marker(lane, style.STAGE_COLOURS["decode" if lane == "device" else "upload"])
            marker["line"] = {"color": style.INK, "width": 0.5}
            starts, lengths = [(span.start_ns - began) / 1e6 for span in mine], [span.duration_ns / 1e6 for span in mine]
            traces.append(timeline([rows[lane]] * len(mine), starts, lengths, marker))
        x = Axis(title="milliseconds since the first step was launched")
        parts.append(Panel(title=label, traces=traces, x=x, rows=list(rows.values())))
    return panels(parts, row=45, down=True, barmode="overlay")


def operation_timeline(ways: Mapping[str, Profile]) -> go.Figure:
    """Operations as bars on one axis, a panel a way of executing the same, in milliseconds; between bars is Python and dispatch.

    The host's lane, and on CUDA below it the device's kernels: white there is time in which the device waits.
    """
    lanes = _LANES[: 1 + any(seen.number("device") for seen in ways.values())]
    parts = []
    for label, seen in ways.items():
        began = min(stage.start_us for stage in seen.stages)
        traces = []
        for lane in lanes:
            mine = [operation for operation in seen.operations if operation.lane == lane]
            marker = _marker(lane, [style.STAGE_COLOURS.get(o.stage, style.STAGE_COLOURS["vit"]) for o in mine])
            marker["line"] = {"width": 0}
            starts = [(operation.start_us - began) / 1e3 for operation in mine]
            lengths = [(operation.end_us - operation.start_us) / 1e3 for operation in mine]
            telling: dict[str, Any] = {"told": "%{customdata[3]}", "beside": "%{customdata[4]}", "decimals": 4}
            telling["texts"] = [[said(operation.name[:80]), operation.stage] for operation in mine]
            traces.append(timeline([lane] * len(mine), starts, lengths, marker, width=0.7, **telling))
        x = Axis(title="milliseconds; a bar is an operation that Python called", zero=True)
        parts.append(Panel(title=f"{label}: {_in_words(seen)}", traces=traces, x=x, rows=lanes))
    return panels(parts, row=45, down=True, barmode="overlay")


def _in_words(seen: Profile) -> str:
    lanes = [lane for lane in _LANES if seen.number(lane)]
    return "; ".join(
        f"{seen.number(lane)} operations on the {lane}, {1 - seen.covered(lane) / seen.seconds:.0%} of the time between them"
        for lane in lanes
    )


def _marker(lane: Lane, colour: str | list[str]) -> dict[str, Any]:
    """The device's bars are hatched."""
    hatched = {"shape": style.DEVICE_PATTERN, "fillmode": "replace", "size": 5}
    return {"color": colour} | ({"pattern": hatched} if lane == "device" else {})
