"""What the notebooks of single slots draw: variants by step, cost against size, and pixels as pictures."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from fastvl_lab.errors import require
from fastvl_lab.measure.floors import Cost
from fastvl_lab.measure.parity import PixelDifference
from fastvl_lab.measure.samples import Samples, StageSample
from fastvl_lab.request import Grid
from fastvl_lab.run import Run
from fastvl_lab.view import style
from fastvl_lab.view.tables import times

if TYPE_CHECKING:
    import plotly.graph_objects as go

# Where logarithmic axes are labelled.
_TICKS = tuple(digit * 10.0**power for power in range(-4, 6) for digit in (1, 2, 5))

# Steps of a variant are told apart by pattern besides colour.
_STEP_PATTERNS = ("", "/", ".", "x", "-")


def rounds_frame(rounds: Samples[StageSample], reference: str, *steps: str) -> Any:
    """One line a variant: median ms of each step and in all, and how many times as fast as the reference it is.

    steps: what the ratio is over; all, if none is named.
    """
    table = []
    for label in rounds.engines:
        names = next(sample.steps for sample in rounds.samples if sample.engine == label)
        row = {"variant": label} | {f"{step} ms": f"{rounds.median(label, step).median * 1e3:.2f}" for step in names}
        row["in all ms"] = f"{rounds.median(label).median * 1e3:.2f}"
        row[f"{' + '.join(steps) or 'all'}, times as fast as {reference} (95% CI)"] = (
            "reference" if label == reference else times(rounds.ratio(label, reference, *steps))
        )
        table.append(row)
    return require("pandas", "notebooks").DataFrame(table)


def step_bars(rounds: Samples[StageSample], title: str) -> go.Figure:
    """One bar a variant, made of its steps' median milliseconds."""
    figure_of = style.graph_objects()
    labels = list(reversed(rounds.engines))
    figure = figure_of.Figure()
    for number, step in enumerate(rounds.samples[0].steps):
        figure.add_trace(
            figure_of.Bar(
                x=[rounds.median(label, step).median * 1e3 for label in labels],
                y=[html.escape(label) for label in labels],
                orientation="h",
                name=step,
                marker={
                    "color": style.SERIES_COLOURS[number % len(style.SERIES_COLOURS)],
                    "pattern": {"shape": _STEP_PATTERNS[number % len(_STEP_PATTERNS)], "fgcolor": "white", "fgopacity": 0.6},
                },
                hovertemplate="%{y}, " + step + ": %{x:.2f} ms<extra></extra>",
            )
        )
    totals = [rounds.median(label).median * 1e3 for label in labels]
    for label, total in zip(labels, totals, strict=True):
        figure.add_annotation(x=total, y=html.escape(label), text=f" {total:.1f} ms", showarrow=False, xanchor="left")
    figure.update_xaxes(title_text="milliseconds (medians)", range=[0, max(totals) * 1.15], gridcolor=style.GRID)
    figure.update_layout(
        **style.layout(height=130 + 34 * len(labels), margin={"l": 220, "r": 30, "t": 90, "b": 55}, barmode="stack"),
        title={"text": html.escape(title), "x": 0.01},
        legend={"orientation": "h", "x": 0, "y": 1.02, "yanchor": "bottom", "traceorder": "normal"},
    )
    return figure


def cost_against_size(points: Mapping[float, Samples[StageSample]], *, x_title: str, y_title: str) -> go.Figure:
    """Median milliseconds of all steps against a size, one line a variant, on logarithmic axes."""
    figure_of = style.graph_objects()
    figure = figure_of.Figure()
    sizes = sorted(points)
    for number, label in enumerate(points[sizes[0]].engines):
        figure.add_trace(
            figure_of.Scatter(
                x=sizes,
                y=[points[size].median(label).median * 1e3 for size in sizes],
                name=html.escape(label),
                **style.series(number),
                hovertemplate="%{x:.2f}: %{y:.2f} ms<extra>%{fullData.name}</extra>",
            )
        )
    axis = {"type": "log", "tickvals": _TICKS, "minor": {"ticks": ""}, "gridcolor": style.GRID}
    figure.update_xaxes(title_text=x_title, **axis)
    figure.update_yaxes(title_text=y_title, **axis)
    figure.update_layout(
        **style.layout(height=480, margin={"l": 80, "r": 30, "t": 30, "b": 60}),
        legend={"x": 1.02, "y": 1, "yanchor": "top"},
    )
    return figure


def difference_maps(picture: np.ndarray, differences: Mapping[str, PixelDifference]) -> go.Figure:
    """The reference's picture, then where each variant's pixels differ from it.

    Variants with the same map share a panel, and those that are equal to the reference have none. A pixel shows the largest
    difference of its three channels: black for none, grey for one level, and up to white on a logarithmic scale.
    """
    figure_of = style.graph_objects()
    panels: dict[bytes, list[str]] = {}
    for label, difference in differences.items():
        if difference.largest > 0:
            panels.setdefault(difference.levels.tobytes(), []).append(label)
    titles, images = ["the picture, as the reference resizes it"], [picture]
    for labels in panels.values():
        shown = differences[labels[0]]
        titles.append(f"{html.escape('; '.join(labels))}:<br>at most {shown.largest} of 255, mean {shown.mean:.3f}")
        levels = shown.levels.max(2, keepdims=True).astype(float)
        grey = np.where(levels > 0, 96 + 159 * np.log2(np.maximum(levels, 1)) / 8, 0)
        images.append(np.broadcast_to(np.rint(grey).astype(np.uint8), shown.levels.shape))
    columns = min(len(images), 3)
    rows = -(-len(images) // columns)
    figure = require("plotly.subplots", "notebooks").make_subplots(
        rows=rows, cols=columns, subplot_titles=titles, horizontal_spacing=0.02, vertical_spacing=0.2 / rows
    )
    for number, image in enumerate(images):
        source = _png(image, np.max if number else np.mean)
        figure.add_trace(figure_of.Image(source=source, hoverinfo="skip"), row=number // columns + 1, col=number % columns + 1)
    figure.update_xaxes(visible=False)
    figure.update_yaxes(visible=False)
    figure.update_annotations(font_size=12)
    height, width = picture.shape[:2]
    figure.update_layout(
        **style.layout(height=round(rows * (1060 / columns * height / width + 70)), margin={"l": 10, "r": 10, "t": 60, "b": 10})
    )
    return figure


def block_waterfall(runs: Sequence[Run], stage: str = "vit", number: int = 0) -> go.Figure:
    """One stage of each run beside the others: every block or layer from its start to its end, in ms since the stage's own start.

    The runs must have been traced with "layers". number: which, of a stage that ran several times; -1 is its last time. On CUDA
    the bars are the device's.
    """
    figure_of = style.graph_objects()
    panels = [_inside(run, stage, number) for run in runs]
    figure = require("plotly.subplots", "notebooks").make_subplots(
        rows=1,
        cols=len(runs),
        shared_yaxes=True,
        horizontal_spacing=0.03,
        subplot_titles=[
            f"{html.escape(run.engine[: 90 // len(runs)])}: {spans[0][2]:.2f} ms" for run, spans in zip(runs, panels, strict=True)
        ],
    )
    names = list(dict.fromkeys(name for spans in panels for name, _, _ in spans))
    names.sort(key=lambda name: name.rpartition(".")[2].isdigit())  # blocks and layers below what has no number
    for column, spans in enumerate(panels, start=1):
        figure.add_trace(
            figure_of.Bar(
                **style.placed_bars(*zip(*spans, strict=True)),
                showlegend=False,
                marker={"color": [style.STAGE_COLOURS[stage if name == stage else "merge"] for name, _, _ in spans]},
                text=[f"{length:.2f}" for _, _, length in spans],
                textposition="outside",
                cliponaxis=False,
            ),
            row=1,
            col=column,
        )
    longest = max(spans[0][2] for spans in panels)
    figure.update_xaxes(range=[0, longest * 1.25], title_text=f"ms since {stage} began", gridcolor=style.GRID)
    figure.update_yaxes(categoryorder="array", categoryarray=names[::-1], ticklabelstandoff=6)
    figure.update_layout(**style.layout(height=160 + 24 * len(names), margin={"l": 120, "r": 30, "t": 60, "b": 55}))
    return figure


def _inside(run: Run, stage: str, number: int) -> list[tuple[str, float, float]]:
    """(name, start, length) in ms: the whole stage first, then what is inside it."""
    lanes = {span.lane for span in run.trace.spans if span.name == stage}
    mine = [span for span in run.trace.spans if span.lane == ("device" if "device" in lanes else "host")]
    whole = [span for span in mine if span.name == stage and span.depth == 0][number]
    inside = [span for span in mine if span.depth > 0 and whole.start_ns <= span.start_ns and span.end_ns <= whole.end_ns]
    return [(s.name, (s.start_ns - whole.start_ns) / 1e6, s.duration_ns / 1e6) for s in (whole, *inside)]


def window_layout(picture: bytes, grid: Grid, window: int | None, merge_size: int) -> go.Figure:
    """The windows of windowed attention over the picture; window: visual tokens along a side, or None where a tower has none."""
    figure_of = style.graph_objects()
    rows, columns = grid.h // merge_size, grid.w // merge_size
    token = max(1, 900 // columns)  # pixels of a visual token in the drawing
    shown = Image.open(io.BytesIO(picture)).convert("RGB").resize((columns * token, rows * token))
    faded = np.asarray(Image.blend(shown, Image.new("RGB", shown.size, "white"), 0.45))
    source = _png(faded, np.mean, largest_side=max(faded.shape))
    figure = figure_of.Figure(figure_of.Image(source=source, hoverinfo="skip"))
    kinds: dict[int, list[tuple[int, int, int, int]]] = {}
    for top in range(0, rows, window or rows):
        for left in range(0, columns, window or columns):
            height, width = min(window or rows, rows - top), min(window or columns, columns - left)
            kinds.setdefault(height * width, []).append((top, left, height, width))
    for number, (tokens, places) in enumerate(sorted(kinds.items(), reverse=True)):
        xs: list[float | None] = []
        ys: list[float | None] = []
        for top, left, height, width in places:
            xs += [(left + dx * width) * token + inset for dx, inset in ((0, 1), (1, -1), (1, -1), (0, 1), (0, 1))] + [None]
            ys += [(top + dy * height) * token + inset for dy, inset in ((0, 1), (0, 1), (1, -1), (1, -1), (0, 1))] + [None]
        colour = style.SERIES_COLOURS[number % len(style.SERIES_COLOURS)]
        figure.add_trace(
            figure_of.Scatter(
                x=xs,
                y=ys,
                mode="lines",
                line={"color": colour, "width": 2.5, "dash": ("solid", "dash", "dot", "dashdot")[number % 4]},
                name=f"{len(places)} × {tokens * merge_size**2} patches ({tokens} visual tokens)",
                hoverinfo="skip",
            )
        )
    figure.update_xaxes(visible=False)
    figure.update_yaxes(visible=False)
    figure.update_layout(
        **style.layout(height=round(800 * rows / columns) + 90, width=860, margin={"l": 10, "r": 10, "t": 70, "b": 10}),
        legend={"orientation": "h", "x": 0, "y": 1.02, "yanchor": "bottom"},
    )
    return figure


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
    figure_of = style.graph_objects()
    figure = require("plotly.subplots", "notebooks").make_subplots(
        rows=1, cols=len(costs), shared_yaxes=True, horizontal_spacing=0.03, subplot_titles=[html.escape(label) for label in costs]
    )
    sizes = sorted(points)
    line = np.linspace(0, sizes[-1], 60)
    grey, sky, blue = style.SERIES_COLOURS[6], style.SERIES_COLOURS[5], style.SERIES_COLOURS[0]
    parts = (("fixed", grey, "."), (f"with {unit}", sky, ""), ("with their square", blue, "/"))
    for column, (label, cost) in enumerate(costs.items(), start=1):
        for number, (name, colour, pattern) in enumerate(parts):
            figure.add_trace(
                figure_of.Scatter(
                    x=line,
                    y=[cost.parts(n)[number] * 1e3 for n in line],
                    stackgroup=f"parts {column}",
                    mode="lines",
                    line={"width": 0.5, "color": colour},
                    fillcolor=colour,
                    fillpattern={"shape": pattern, "fgcolor": "white", "fgopacity": 0.7},
                    name=name,
                    legendgroup=name,
                    showlegend=column == 1,
                    hovertemplate=name + ": %{y:.2f} ms at %{x:.0f} " + unit + "<extra></extra>",
                ),
                row=1,
                col=column,
            )
        measured = [points[n].median(label, *steps).median * 1e3 for n in sizes]
        figure.add_trace(
            figure_of.Scatter(
                x=sizes,
                y=measured,
                mode="markers",
                marker={"color": style.INK, "size": 9, "symbol": "diamond"},
                name="measured (medians)",
                legendgroup="measured",
                showlegend=column == 1,
                hovertemplate="%{y:.2f} ms at %{x} " + unit + "<extra></extra>",
            ),
            row=1,
            col=column,
        )
    figure.update_xaxes(title_text=unit, rangemode="tozero", gridcolor=style.GRID)
    figure.update_yaxes(rangemode="tozero", gridcolor=style.GRID)
    figure.update_yaxes(title_text=y_title, row=1, col=1)
    figure.update_layout(
        **style.layout(height=440, margin={"l": 80, "r": 30, "t": 90, "b": 60}),
        legend={"orientation": "h", "x": 0, "y": 1.12, "yanchor": "bottom"},
    )
    return figure


def _png(image: np.ndarray, reduce: Callable[..., np.ndarray], largest_side: int = 700) -> str:
    """A data URI, shrunk by whole steps: to the mean for a picture, to the largest for differences, so that none is lost."""
    step = -(-max(image.shape[:2]) // largest_side)
    height, width = (side // step * step for side in image.shape[:2])
    blocks = image[:height, :width].reshape(height // step, step, width // step, step, 3)
    small = reduce(blocks, axis=(1, 3)).astype(np.uint8)
    out = io.BytesIO()
    Image.fromarray(small).save(out, "PNG")
    return "data:image/png;base64," + base64.b64encode(out.getvalue()).decode()
