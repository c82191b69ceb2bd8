"""What the notebook of the capture slot draws: operations and gaps between them, what captures cost, what padding wastes."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from fastvl_lab.capture.execute import Capture
from fastvl_lab.errors import require
from fastvl_lab.measure.compare import Comparison, break_even
from fastvl_lab.measure.profile import Profile
from fastvl_lab.measure.samples import gains
from fastvl_lab.run import Run
from fastvl_lab.trace import Lane
from fastvl_lab.view import style
from fastvl_lab.view.tables import times

if TYPE_CHECKING:
    import plotly.graph_objects as go

_LANES: tuple[Lane, ...] = ("host", "device")


def operation_timeline(ways: Mapping[str, Profile]) -> go.Figure:
    """Profile as bars on one axis, a panel a way of executing the same, in milliseconds; between bars is Python and dispatch.

    The host's lane, and on CUDA below it the device's kernels: white there is time in which the device waits.
    """
    figure = require("plotly.subplots", "notebooks").make_subplots(
        rows=len(ways),
        cols=1,
        shared_xaxes=True,
        subplot_titles=[f"{html.escape(label)}: {_in_words(seen)}" for label, seen in ways.items()],
        vertical_spacing=0.5 / len(ways) ** 2,
    )
    any_device = any(seen.number("device") for seen in ways.values())
    for row, seen in enumerate(ways.values(), start=1):
        began = min(stage.start_us for stage in seen.stages)
        for lane in _LANES[: 1 + any_device]:
            mine = [operation for operation in seen.operations if operation.lane == lane]
            marker: dict[str, Any] = {"color": [style.STAGE_COLOURS.get(o.stage, style.STAGE_COLOURS["vit"]) for o in mine]}
            marker["line"] = {"width": 0}
            if lane == "device":
                marker["pattern"] = {"shape": style.DEVICE_PATTERN, "fillmode": "replace", "size": 5}
            figure.add_bar(
                **style.placed_bars(
                    [lane] * len(mine),
                    [(operation.start_us - began) / 1e3 for operation in mine],
                    [(operation.end_us - operation.start_us) / 1e3 for operation in mine],
                    told="%{customdata[3]}",
                    beside="%{customdata[4]}",
                    decimals=4,
                    texts=[[html.escape(operation.name[:80]), operation.stage] for operation in mine],
                ),
                width=0.7,
                marker=marker,
                showlegend=False,
                row=row,
                col=1,
            )
    figure.update_yaxes(autorange="reversed", ticklabelstandoff=8)
    figure.update_xaxes(gridcolor=style.GRID, rangemode="tozero")
    figure.update_xaxes(title="milliseconds; a bar is an operation that Python called", row=len(ways), col=1)
    height = 120 + (95 + 45 * any_device) * len(ways)
    figure.update_layout(**style.layout(height=height, barmode="overlay", margin={"l": 90, "r": 30, "t": 50, "b": 55}))
    return figure


def operation_frame(ways: Mapping[str, Profile]) -> Any:
    """The same as a table: how many operations, and the share of the time in which none was under way."""
    table = []
    for label, seen in ways.items():
        row = {"executed": label, "ms under the profiler": f"{seen.seconds * 1e3:.2f}"}
        for lane in _LANES:
            if seen.number(lane):
                row[f"{lane} operations"] = str(seen.number(lane))
                row[f"{lane}: between them"] = f"{1 - seen.covered(lane) / seen.seconds:.0%}"
        table.append(row)
    return require("pandas", "notebooks").DataFrame(table).fillna("–")


def capture_frame(runs: Mapping[str, Run]) -> Any:
    """One line a program that a run compiled or captured: what for, seconds, MB, and the run's TTFT with it."""
    table = [
        {
            "executed": label,
            "stage": capture.stage,
            "how": capture.how,
            "made for": capture.shape,
            "seconds": f"{capture.seconds:.2f}",
            "MB held": f"{capture.n_bytes / 1e6:.1f}",
            "run": f"{run.kind}, TTFT {run.ttft * 1e3:.0f} ms",
        }
        for label, run in runs.items()
        for capture in run.captures
    ]
    columns = ("executed", "stage", "how", "made for", "seconds", "MB held", "run")
    return require("pandas", "notebooks").DataFrame(table, columns=columns)


def break_even_frame(points: Mapping[str, Comparison], captures: Mapping[str, Sequence[Capture]], eager: str = "eager") -> Any:
    """One line a size and way of executing: its TTFT against eager, and after how many such requests its captures have paid.

    captures: way -> what was made for it, of stages before the first token. A way whose interval does not lie above 1 is not shown
    to gain anything.
    """
    table = []
    for size, comparison in points.items():
        without = comparison.representative(eager).ttft
        for way, made in captures.items():
            ratio, ttft = comparison.speedup(way, eager), comparison.representative(way).ttft
            pays = break_even(made, eager=without, captured=ttft) if gains(ratio) else None
            table.append(
                {
                    "image": size,
                    "executed": way,
                    "eager TTFT ms": f"{without * 1e3:.1f}",
                    "TTFT ms": f"{ttft * 1e3:.1f}",
                    "times as fast as eager (95% CI)": times(ratio),
                    "captures cost s": f"{sum(capture.seconds for capture in made):.1f}",
                    "have paid after": f"{pays} requests" if pays is not None else "never: no gain is shown",
                }
            )
    return require("pandas", "notebooks").DataFrame(table)


def padding_by_size(padding: Mapping[str, Mapping[int, Mapping[str, float]]], programs: Mapping[str, int]) -> go.Figure:
    """The share of each stage's work that is padding, against visual tokens: one panel a stage, one line a way to share shapes.

    padding: way -> visual tokens -> stage -> share. programs: way -> how many programs all the sizes need together.
    """
    stages = list(dict.fromkeys(stage for sizes in padding.values() for shares in sizes.values() for stage in shares))
    figure = require("plotly.subplots", "notebooks").make_subplots(
        rows=1, cols=len(stages), shared_yaxes=True, subplot_titles=stages, horizontal_spacing=0.05
    )
    for column, stage in enumerate(stages, start=1):
        for number, (way, sizes) in enumerate(padding.items()):
            figure.add_scatter(
                x=list(sizes),
                y=[shares.get(stage, 0.0) for shares in sizes.values()],
                name=f"{html.escape(way)}: {programs[way]} programs",
                legendgroup=way,
                showlegend=column == 1,
                **style.series(number),
                hovertemplate="%{x} visual tokens: %{y:.1%}<extra>%{fullData.name}</extra>",
                row=1,
                col=column,
            )
    figure.update_xaxes(title_text="visual tokens", rangemode="tozero", gridcolor=style.GRID)
    figure.update_yaxes(rangemode="tozero", tickformat=".0%", gridcolor=style.GRID)
    figure.update_yaxes(title_text="padding's share of the work", row=1, col=1)
    figure.update_layout(
        **style.layout(height=400, margin={"l": 80, "r": 30, "t": 90, "b": 60}),
        legend={"orientation": "h", "x": 0, "y": 1.12, "yanchor": "bottom"},
    )
    return figure


def _in_words(seen: Profile) -> str:
    lanes = [lane for lane in _LANES if seen.number(lane)]
    return "; ".join(
        f"{seen.number(lane)} on the {lane}, {1 - seen.covered(lane) / seen.seconds:.0%} between them" for lane in lanes
    )
