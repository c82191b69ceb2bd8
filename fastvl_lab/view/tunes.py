"""What a tune has tried, as a table and as bars."""

from __future__ import annotations

import html
import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from fastvl_lab import shown
from fastvl_lab.errors import MissingExtraError, shortened
from fastvl_lab.measure.samples import UNKNOWN
from fastvl_lab.measure.search import CastOut, Tried
from fastvl_lab.measure.tune import Tuned
from fastvl_lab.view import style
from fastvl_lab.view.charts import Axis, Panel, arms, bars, panels, said
from fastvl_lab.view.tables import frame, show, times

if TYPE_CHECKING:
    import plotly.graph_objects as go

_LONGEST = 40  # characters of a label; all of it is in the hover text and the table
_COLOURS = {"taken": style.SERIES_COLOURS[2], "slower": style.SERIES_COLOURS[4]}  # any other verdict is pale


@shown.frame.register(Tuned)
def tuned_frame(found: Tuned) -> Any:
    """A line a recipe and race: what it changed, its ratio over the best of then, what became of it; then what was cast out."""
    columns: dict[str, Callable[[Any], object]] = {
        "tried": lambda row: row.label,
        "in": lambda row: row.phase if isinstance(row, Tried) else None,
        f"times {found.times_what} the best so far (95% CI)": lambda row: times(row.ratio) if isinstance(row, Tried) else None,
        "rounds": lambda row: row.rounds if isinstance(row, Tried) else None,
        "what became of it": _became,
    }
    return frame([*found.tried, *found.cast_out], columns)


def _became(row: Tried | CastOut) -> str:
    if isinstance(row, Tried):
        return row.verdict
    return f"{'not searched' if row.recipe is None else 'cast out'}: {row.why}"


@shown.figure.register(Tuned)
def tuned_bars(found: Tuned) -> go.Figure:
    """A bar a recipe that was raced: how much faster than the best as it was then, in percent; whiskers are the 95% interval.

    Of goodput: how much more. Green was taken, red is slower, pale shows no difference. Those that were never timed, or whose ratio
    is over no goodput at all, are in the table alone.
    """
    timed = [tried for tried in found.tried if tried.ratio is not None and math.isfinite(tried.ratio.median)]
    labels = [f"{number}. {shortened(tried.label, _LONGEST)}" for number, tried in enumerate(timed, start=1)]
    ratios = [tried.ratio or UNKNOWN for tried in timed]
    gained = [(ratio.median - 1) * 100 for ratio in ratios]
    trace = bars(
        labels,
        gained,
        [_COLOURS.get(tried.verdict, style.SERIES_COLOURS[6]) for tried in timed],
        pattern=["x" if tried.verdict == "slower" else "" for tried in timed],
        error_x=arms(tuple((end - 1) * 100 for end in ratio) for ratio in ratios),  # type: ignore[misc]
        customdata=[[tried.verdict, tried.phase, times(tried.ratio), said(tried.label)] for tried in timed],
        told="%{customdata[3]}: %{customdata[2]}<br>%{customdata[1]}: %{customdata[0]}",
    )
    x = Axis(title=f"percent {'faster' if found.load is None else 'more goodput'} than the best so far (medians, 95% CI)")
    return panels([Panel(traces=[trace], x=x, rows=labels, limit=0.0)])


@shown.bundle.register(Tuned)
def tuned_bundle(found: Tuned) -> dict[str, Any]:
    """What was found, in sentences, and the table; without pandas, text."""
    made = {"text/plain": repr(found)}
    try:
        table = show(tuned_frame(found)).data
    except MissingExtraError:
        return made
    said = "<br>".join(html.escape(line) for line in (str(found.recipe), *found.findings()))
    return made | {"text/html": f"<p>{said}</p>{table}"}
