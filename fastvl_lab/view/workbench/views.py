"""The panel's views: for each a figure and a table of a result, and what must be measured for it first."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from fastvl_lab.errors import require
from fastvl_lab.measure.load import Load, Measure
from fastvl_lab.measure.recipes import STOCK
from fastvl_lab.run import Run
from fastvl_lab.view import figures, tables
from fastvl_lab.view.loads import load_curves, load_timeline
from fastvl_lab.view.tables import layer_frame, stage_frame
from fastvl_lab.view.timelines import block_waterfall, chunk_timeline, operation_timeline
from fastvl_lab.view.waterfall import waterfall
from fastvl_lab.view.workbench.session import BEFORE, RECIPE, Result, Session

if TYPE_CHECKING:
    import plotly.graph_objects as go

LOAD = "load"
_ROWS = 330  # pixels of a load's requests
_CURVES: tuple[Measure, ...] = ("ttft", "tpot", "gap")

# A result and the one to hold against it -> a figure, and the table that says the same.
Draw = Callable[[Result, Result | None], tuple["go.Figure", Any]]


@dataclass(frozen=True, kw_only=True)
class View:
    """One way to look at a result. lacks: whether it must be measured for it, by what `measure` wishes for with so many repeats.

    by_hand: what measures it where looking does not. more: figures below the first, of a result and the one to hold against it.
    """

    name: str
    about: str
    draw: Draw
    lacks: Callable[[Result], bool] = lambda _: False
    measure: Callable[[Session, Result, int], None] = lambda *_: None
    by_hand: str = ""
    more: Callable[[Result, Result | None], Sequence[go.Figure]] = lambda *_: ()


def views() -> dict[str, View]:
    """Every view by name, the first being what the panel opens with."""
    every = (
        View(name="waterfall", about="every stage from the request's bytes to the first text", draw=_waterfall),
        _layers_of("ViT blocks", "vit", "every block of the vision tower"),
        _layers_of("decoder layers", "prefill", "every layer of the prefill"),
        View(
            name="toggle by toggle",
            about="from the baseline to this recipe, what each toggle takes off TTFT; runs every step on the way",
            draw=_attribution,
            lacks=lambda result: result.attribution is None,
            measure=lambda session, result, repeats: session.attribute(result, repeats=max(repeats, 1)),
        ),
        View(
            name="share of the floor",
            about="what stages must cost at least, by their operations and bytes and what this device was seen to do",
            draw=_floors,
            lacks=lambda result: result.floors is None,
            measure=lambda session, result, _: session.find_floors(result),
        ),
        View(name="tokens over time", about="when each chunk of text arrived", draw=_tokens),
        View(name="memory", about="what holds how many bytes after the run", draw=_memory),
        View(
            name="operations",
            about="every operation that Python called and every kernel, as torch's profiler sees them; it slows what it watches",
            draw=_operations,
            lacks=lambda result: result.profile is None,
            measure=lambda session, result, _: session.see_operations(result),
        ),
        View(
            name=LOAD,
            about="many requests at once: whom each waited for, and what that costs",
            draw=_load,
            more=_more_of_load,
            lacks=lambda result: result.loads is None,
            by_hand="say how many requests arrive, and press load",
        ),
    )
    return {view.name: view for view in every}


def _layers_of(name: str, stage: str, parts: str) -> View:
    return View(
        name=name,
        about=f"one run each with {parts} timed",
        draw=lambda result, _: _layers(result, stage),
        lacks=lambda result: result.layers is None,
        measure=lambda session, result, _: session.open_up(result),
    )


def _runs(result: Result, other: Result | None, *, ours_first: bool = False) -> dict[str, Run]:
    """The bar to beat, the result's own, and the run before where it was asked the same.

    ours_first: where a figure colours runs in turn, this recipe is blue, as on the rest of the page.
    """
    against = None
    if other is not None and (other.question, other.where) == (result.question, result.where):
        beside = result.comparison is not None and result.before == other.recipe
        against = result.comparison.representative(BEFORE) if result.comparison is not None and beside else other.shown
    reference = result.reference
    every = {reference.engine if reference else STOCK: reference, RECIPE: result.shown, BEFORE: against}
    if ours_first:
        every = {RECIPE: result.shown, **every}
    return {label: run for label, run in every.items() if run is not None}


def _waterfall(result: Result, other: Result | None) -> tuple[go.Figure, Any]:
    runs = list(_named(_runs(result, other)).values())
    return waterfall(runs), stage_frame(runs)


def _named(runs: dict[str, Run]) -> dict[str, Run]:
    """The runs under the names that the panel has for them."""
    return {label: replace(run, engine=label) for label, run in runs.items()}


def _layers(result: Result, stage: str) -> tuple[go.Figure, Any]:
    assert result.layers is not None
    pandas = require("pandas", "notebooks")
    frames = [layer_frame(run).assign(run=label) for label, run in result.layers.items()]
    return block_waterfall(list(result.layers.values()), stage), pandas.concat(frames)[["run", *frames[0].columns[:-1]]]


def _operations(result: Result, _: Result | None) -> tuple[go.Figure, Any]:
    """All of the request's; the page zooms to a stage, a block or a layer by the ranges (ms) in the layout's meta."""
    assert result.profile is not None
    ways = {RECIPE: result.profile}
    began = min(stage.start_us for stage in result.profile.stages)
    ranges: dict[str, list[float]] = {}
    for part in (*result.profile.stages, *result.profile.layers):
        start, end = (part.start_us - began) / 1e3, (part.end_us - began) / 1e3
        ranges.setdefault(part.name, [start, end])  # the first of several
    figure = operation_timeline(ways)
    for lane in figure.data:  # a name stands in a bar that has room for it
        names = [told[3].removeprefix("aten::") for told in lane.customdata]
        lane.update(text=names, textposition="inside", insidetextanchor="middle")
    figure.update_layout(meta={"ranges": ranges}, uniformtext={"minsize": 9, "mode": "hide"})
    return figure, tables.called_frame(result.profile)


def _attribution(result: Result, _: Result | None) -> tuple[go.Figure, Any]:
    assert result.attribution is not None
    return figures.step_down(result.attribution), tables.attribution_frame(result.attribution)


def _floors(result: Result, _: Result | None) -> tuple[go.Figure, Any]:
    assert result.floors is not None
    runs = _runs(result, None, ours_first=True)
    return figures.floor_bars(runs, result.floors), tables.floor_frame(runs, result.floors)


def _tokens(result: Result, other: Result | None) -> tuple[go.Figure, Any]:
    runs = _runs(result, other, ours_first=True)
    columns: dict[str, Callable[[Run], object]] = {
        "run": lambda run: next(label for label, one in runs.items() if one is run),
        "chunks": lambda run: len(run.chunks),
        "tokens": lambda run: len(run.tokens),
        "TTFT ms": lambda run: f"{run.ttft * 1e3:.2f}",
        "TPOT ms": lambda run: None if run.tpot is None else f"{run.tpot * 1e3:.2f}",
        "longest gap ms": lambda run: (
            f"{max(b.time - a.time for a, b in pairwise(run.chunks)) * 1e3:.2f}" if run.chunks[1:] else None
        ),
        "whole answer ms": lambda run: f"{run.chunks[-1].time * 1e3:.1f}",
    }
    return chunk_timeline(runs), tables.frame(runs.values(), columns)


def _memory(result: Result, _: Result | None) -> tuple[go.Figure, Any]:
    return figures.memory_bars(result.held), tables.memory_frame(result.held)


def _load(result: Result, _: Result | None) -> tuple[go.Figure, Any]:
    assert result.loads is not None
    return _timeline(result.loads, RECIPE), tables.load_frame(result.loads)


def _more_of_load(result: Result, _: Result | None) -> Sequence[go.Figure]:
    assert result.loads is not None
    others = [_timeline(result.loads, label) for label in result.loads if label != RECIPE]
    shown = [of for of in _CURVES if any(load.values(of) for load in result.loads.values())]
    return *others, *(load_curves(result.loads, of) for of in shown)


def _timeline(loads: Mapping[str, Load], label: str) -> go.Figure:
    """One of them over time; all have the same scale."""
    until = 1.01 * max(load.seconds for load in loads.values())
    return load_timeline(loads[label], title=f"{label}, {loads[label].how}", until=until, pixels=_ROWS)
