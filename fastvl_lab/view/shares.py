"""What each choice of a recipe is worth, alone and beside the others, as bars and tables."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from fastvl_lab import shown
from fastvl_lab.measure.samples import UNKNOWN, Interval
from fastvl_lab.measure.shares import Pair, Shares
from fastvl_lab.view import style
from fastvl_lab.view.charts import Axis, Panel, arms, bars, panels
from fastvl_lab.view.tables import frame, saves_ms

if TYPE_CHECKING:
    import plotly.graph_objects as go

# What is drawn of each choice, and its colour and pattern.
_DRAWN = (("alone", 5, "/"), ("its share", 2, ""), ("left out of all", 0, "."))


@shown.figure.register(Shares)
def share_bars(found: Shares) -> go.Figure:
    """Three bars a choice, in ms of TTFT: what it takes off alone, its Shapley share, and what is lost where it alone is left out.

    Where the three differ, it acts on others. The shares add up to what all take off. A choice that is not compared has no bars.
    """
    rows, told = list(found.choices), found.shares()
    values: dict[str, Sequence[Interval]] = {
        "alone": [found.alone(one) or UNKNOWN for one in rows],
        "its share": [told.get(one, UNKNOWN) for one in rows],
        "left out of all": [found.left_out(one) or UNKNOWN for one in rows],
    }
    traces = [
        bars(
            rows,
            [value.median for value in values[name]],
            style.SERIES_COLOURS[colour],
            name=name,
            pattern=pattern,
            error_x=arms(values[name]),
            told=f"%{{y}}, {name}: %{{x:.2f}} ms",
        )
        for name, colour, pattern in _DRAWN
    ]
    whole = "" if found.saved is None else f"; the shares add up to {found.saved:.2f}"
    x = Axis(title=f"ms of TTFT taken off (95% CI){whole}")
    return panels([Panel(traces=traces, x=x, rows=rows, limit=0.0)], row=56, barmode="group")


@shown.frame.register(Shares)
def shares_frame(found: Shares) -> Any:
    """A line a choice: what it takes off alone, its share, what of that is chance, and what is lost without it."""
    told, errors = found.shares(), found.errors()
    columns: dict[str, Callable[[str], object]] = {
        "choice": str,
        "alone saves ms (95% CI)": lambda one: saves_ms(found.alone(one)),
        "its share ms (95% CI)": lambda one: saves_ms(told.get(one)),
        "± ms by the choice of orders": lambda one: f"{errors[one]:.2f}" if one in errors else None,
        "left out loses ms (95% CI)": lambda one: saves_ms(found.left_out(one)),
    }
    if not errors:
        del columns["± ms by the choice of orders"]
    return frame(found.choices, columns)


def interaction_frame(found: Shares) -> Any:
    """A line a pair of choices, the strongest first: what they take off together beyond what each does; negative: they overlap."""
    pairs: Mapping[Pair, Interval] = found.interactions()
    columns: dict[str, Callable[[Pair], object]] = {
        "choices": " and ".join,
        "together beyond each, ms (95% CI)": lambda pair: saves_ms(pairs[pair]),
    }
    return frame(sorted(pairs, key=lambda pair: -abs(pairs[pair].median)), columns)
