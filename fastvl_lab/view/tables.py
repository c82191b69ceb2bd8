"""The tables that stand beside the charts, as pandas DataFrames of text ready to read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from fastvl_lab.catalogue import toggles
from fastvl_lab.errors import require
from fastvl_lab.measure.statistics import Interval
from fastvl_lab.run import Run
from fastvl_lab.trace import STAGES


def summary_frame(rows: Sequence[Mapping[str, Any]]) -> Any:
    """One line an engine and point: times, intervals, parity and speed-up.

    A speed-up stands only beside a parity check that held; an interval needs at least six warm runs. Runs of an endpoint that does
    not say whether it reused anything are counted as such.
    """
    any_hits = any(row["hit_runs"] for row in rows)
    table = [
        {
            **{key: row[key] for key in ("checkpoint", "image") if key in row},
            "engine": row["engine"],
            "visual tokens": row["visual_tokens"],
            "TTFT ms (95% CI)": _interval(row["ttft_ms"], row["ttft_low_ms"], row["ttft_high_ms"], ".1f"),
            "cold TTFT ms": _number(row["cold_ttft_ms"], ".0f"),
            **({"cache-hit TTFT ms": _number(row["hit_ttft_ms"], ".1f")} if any_hits else {}),
            "TPOT ms": _number(row["tpot_ms"], ".2f"),
            "parity": row["parity_says"],
            "speed-up (95% CI)": (
                "reference"
                if row["is_reference"]
                else _interval(row["speedup"], row["speedup_low"], row["speedup_high"], ".2f", "×")
            ),
            "warm runs": f"{row['unknown_runs']} (reuse unknown)" if row["unknown_runs"] else row["warm_runs"],
        }
        for row in rows
    ]
    return require("pandas", "notebooks").DataFrame(table)


def stage_frame(runs: Sequence[Run]) -> Any:
    """Host milliseconds a stage, one column a run; stages add up to TTFT with `unaccounted`."""
    columns: dict[str, dict[str, float]] = {}
    for run in runs:
        name, same = run.engine, 2
        while name in columns:
            name, same = f"{run.engine} ({same})", same + 1
        columns[name] = {row["stage"]: row["host_ms"] for row in run.stage_table()}
    seen = dict.fromkeys(name for column in columns.values() for name in column)
    known = [name for name in (*STAGES, "unaccounted", "TTFT") if name in seen]
    order = [*(name for name in seen if name not in known), *known]  # what an endpoint lets us see has names of its own
    table = [{"stage": name, **{engine: _number(column.get(name), ".3f") for engine, column in columns.items()}} for name in order]
    return require("pandas", "notebooks").DataFrame(table)


def show(frame: Any) -> Any:
    """The whole frame as an HTML table: pandas' own display cuts long texts and long tables."""
    return require("IPython.display", "notebooks").HTML(frame.to_html(index=False, border=0, max_rows=None))


def layer_frame(run: Run) -> Any:
    """Host milliseconds of every ViT block and decoder layer inside TTFT; the run must have been traced with "layers"."""
    table = [
        {
            "block or layer": span.name,
            "ms": _number(span.duration_ns / 1e6, ".3f"),
            "share of TTFT": f"{span.duration_ns / 1e9 / run.ttft:.1%}",
        }
        for span in run.trace.spans
        if span.lane == "host" and span.depth > 0 and span.end_ns <= run.trace.first_chunk_ns
    ]
    return require("pandas", "notebooks").DataFrame(table)


def times(ratio: Interval | None) -> str:
    """A ratio with its interval where there is one, such as "1.62× [1.59, 1.66]"."""
    return "–" if ratio is None else _interval(*ratio, ".2f", "×")


def catalogue_frame() -> Any:
    """Every option of every toggle, the baseline first."""
    table = [
        {
            "toggle": toggle.path,
            "option": option.value,
            "exact": option.exactness,
            "needs": ", ".join(option.needs.words) or "–",
            "what it does; who does it": option.does,
        }
        for toggle in toggles()
        for option in toggle.options
    ]
    return require("pandas", "notebooks").DataFrame(table)


def _number(value: float | None, spec: str) -> str:
    return "–" if value is None or value != value else format(value, spec)


def _interval(median: float | None, low: float | None, high: float | None, spec: str, unit: str = "") -> str:
    if median is None:
        return "–"
    text = f"{median:{spec}}{unit}"
    return text if low is None or low != low else f"{text} [{low:{spec}}, {high:{spec}}]"
