"""How tokens leave, drawn: when chunks arrived, how launches stand to steps, and rates against what memory allows."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from fastvl_lab.errors import require
from fastvl_lab.measure.audit import audit, audit_reported
from fastvl_lab.run import Run
from fastvl_lab.view import style

if TYPE_CHECKING:
    import plotly.graph_objects as go


def chunk_timeline(runs: Mapping[str, Run]) -> go.Figure:
    """When each chunk was in the consumer's hands: a row a run, a mark a chunk, larger the more tokens it has; ms.

    The first mark is TTFT; a chunk of more than four tokens has their number beside it.
    """
    figure = style.graph_objects().Figure()
    for number, (label, run) in enumerate(runs.items()):
        counts = [len(chunk.tokens) for chunk in run.chunks]
        look = style.series(number)["marker"]
        figure.add_scatter(
            x=[chunk.time * 1e3 for chunk in run.chunks],
            y=[html.escape(label)] * len(counts),
            mode="markers+text",
            marker=look | {"size": [6 + 2 * min(count - 1, 9) for count in counts], "opacity": 0.8},
            text=[f"{count} tokens" if count > 4 else "" for count in counts],
            textposition="top center",
            cliponaxis=False,
            showlegend=False,
            customdata=counts,
            hovertemplate="%{x:.2f} ms: %{customdata} tokens<extra></extra>",
        )
    figure.update_xaxes(title="milliseconds since the request's bytes; a mark is a chunk", rangemode="tozero", gridcolor=style.GRID)
    figure.update_yaxes(autorange="reversed", ticklabelstandoff=8)
    margin = {"l": 40 + 7 * max(map(len, runs)), "r": 50, "t": 30, "b": 55}
    figure.update_layout(**style.layout(height=120 + 52 * len(runs), margin=margin))
    return figure


def launches_and_steps(runs: Mapping[str, Run], n_steps: int = 34) -> go.Figure:
    """The first decode steps of each run on two lanes, the host's launches and the device's work; ms since the first launch.

    For runs whose steps are launched in rounds: on CUDA, or on a CPU, where a thread plays the device.
    """
    figure = require("plotly.subplots", "notebooks").make_subplots(
        rows=len(runs),
        cols=1,
        shared_xaxes=True,
        subplot_titles=[html.escape(label) for label in runs],
        vertical_spacing=0.5 / len(runs) ** 2,
    )
    for row, run in enumerate(runs.values(), start=1):
        spans = [span for span in run.trace.spans if span.name == "decode" and span.depth == 0]
        lanes = {lane: [span for span in spans if span.lane == lane][:n_steps] for lane in ("host", "device")}
        began = min(span.start_ns for lane in lanes.values() for span in lane)
        for lane, mine in lanes.items():
            colour = style.STAGE_COLOURS["decode" if lane == "device" else "upload"]
            marker: dict[str, Any] = {"color": colour, "line": {"color": style.INK, "width": 0.5}}
            if lane == "device":
                marker["pattern"] = {"shape": style.DEVICE_PATTERN, "fillmode": "replace", "size": 5}
            figure.add_bar(
                **style.placed_bars(
                    [{"host": "launched (host)", "device": "done (device)"}[lane]] * len(mine),
                    [(span.start_ns - began) / 1e6 for span in mine],
                    [span.duration_ns / 1e6 for span in mine],
                ),
                marker=marker,
                showlegend=False,
                row=row,
                col=1,
            )
    figure.update_yaxes(autorange="reversed", ticklabelstandoff=8)
    figure.update_xaxes(gridcolor=style.GRID)
    figure.update_xaxes(title="milliseconds since the first step was launched", row=len(runs), col=1)
    figure.update_layout(
        **style.layout(height=110 + 130 * len(runs), barmode="overlay", margin={"l": 130, "r": 30, "t": 50, "b": 55})
    )
    return figure


def reported_rates(rows: Sequence[Mapping[str, Any]], hardware: str) -> go.Figure:
    """Others' tokens a second as shares of what the memory of a GPU allows their model; those above it are hatched.

    rows: "engine", "model", "ttft" (seconds) and "tokens_per_second" each.
    """
    impossible = [not found.ok for found in audit_reported(rows, hardware)]
    figure = style.graph_objects().Figure()
    figure.add_bar(
        y=[f"{row['engine']}<br>{html.escape(str(row['model']))}" for row in rows],
        x=[row["tokens_per_second"] for row in rows],
        orientation="h",
        marker={
            "color": [style.SERIES_COLOURS[4] if bad else style.SERIES_COLOURS[0] for bad in impossible],
            "pattern": {"shape": ["x" if bad else "" for bad in impossible], "fillmode": "replace", "size": 6},
        },
        text=[
            f"{row['tokens_per_second']:.0f} tokens/s{', impossible' if bad else ''}"
            for row, bad in zip(rows, impossible, strict=True)
        ],
        textposition="outside",
        cliponaxis=False,
        showlegend=False,
    )
    figure.update_xaxes(title=f"tokens a second, one request, {html.escape(hardware)}", gridcolor=style.GRID)
    figure.update_yaxes(autorange="reversed", ticklabelstandoff=8)
    figure.update_layout(**style.layout(height=120 + 58 * len(rows), margin={"l": 210, "r": 130, "t": 30, "b": 55}))
    return figure


def reported_frame(rows: Sequence[Mapping[str, Any]], hardware: str) -> Any:
    """The same as a table: the numbers, the verdict, and the arithmetic behind it."""
    table = []
    for row, found in zip(rows, audit_reported(rows, hardware), strict=True):
        said = found.findings[0].arithmetic if not found.ok else found.cleared[0].arithmetic
        verdict = found.findings[0].severity if not found.ok else "clear"
        shown = {"TTFT s": f"{row['ttft']:.3f}", "tokens/s": f"{row['tokens_per_second']:.0f}"}
        table.append({"engine": row["engine"], "model": row["model"], **shown, "audit": verdict, "arithmetic": said})
    return require("pandas", "notebooks").DataFrame(table)


def streaming_frame(runs: Mapping[str, Run], expected: Run) -> Any:
    """A line a setting: TTFT, the whole answer, chunks, whether its tokens are those of `expected`, and what the audit says."""
    table = []
    for label, run in runs.items():
        total, found = run.chunks[-1].time, audit(run)
        wrong = [finding.verdict for finding in found.findings if finding.severity != "note"]
        table.append(
            {
                "setting": label,
                "TTFT ms": f"{run.ttft * 1e3:.1f}",
                "answer ms": f"{total * 1e3:.1f}",
                "TTFT of the answer": f"{run.ttft / total:.0%}",
                "chunks": len(run.chunks),
                "largest chunk": max(len(chunk.tokens) for chunk in run.chunks),
                "same tokens": "yes" if run.made(expected.tokens, expected.text) else "NO",
                "audit": ", ".join(wrong) or "clear",
            }
        )
    return require("pandas", "notebooks").DataFrame(table)
