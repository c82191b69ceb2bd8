"""A whole grid as one HTML page: filters, TTFT against visual tokens by card, and a table to export; it needs nothing beside it."""

from __future__ import annotations

import html
import json
from collections.abc import Mapping, Sequence
from importlib import resources
from typing import Any

from fastvl_lab import shown
from fastvl_lab.errors import counted
from fastvl_lab.grid.merge import GridResult
from fastvl_lab.measure.samples import json_value
from fastvl_lab.view import style
from fastvl_lab.view.report import errors_html, page, table_html
from fastvl_lab.view.tables import frame, settings_frame

# What the page knows of a row, and under which heading it stands in the table and in the export; "" stands in the export alone.
_COLUMNS = {
    "checkpoint": "checkpoint",
    "image": "image",
    "load": "load",
    "engine": "recipe",
    "host": "host",
    "card": "card",
    "visual_tokens": "visual tokens",
    "ttft_ms": "TTFT, ms",
    "ttft_low_ms": "from",
    "ttft_high_ms": "to",
    "cold_ttft_ms": "cold TTFT, ms",
    "tpot_ms": "TPOT, ms",
    "tokens_per_second": "tokens/s",
    "requests_per_second": "requests/s",
    "ttft_p90_ms": "TTFT p90, ms",
    "ttft_p99_ms": "p99",
    "tpot_p50_ms": "TPOT p50, ms",
    "tpot_p90_ms": "p90",
    "tpot_p99_ms": "p99",
    "end_to_end_p50_ms": "whole p50, ms",
    "end_to_end_p90_ms": "p90",
    "end_to_end_p99_ms": "p99",
    "requests": "requests",
    "failed": "failed",
    "speedup": "speed-up",
    "speedup_low": "from",
    "speedup_high": "to",
    "parity_says": "parity",
    "warm_runs": "warm runs",
    "disturbed_runs": "disturbed runs",
    "rounds": "loads",
    "disturbed_rounds": "disturbed loads",
    "tokens_per_second_low": "",
    "tokens_per_second_high": "",
    "queued_p50_ms": "",
    "queued_p90_ms": "",
    "queued_p99_ms": "",
    "gap_p50_ms": "",
    "gap_p90_ms": "",
    "gap_p99_ms": "",
    "scenario": "",
    "cell": "",
    "worker": "",
    "card_id": "",
    "driver": "",
    "cuda": "",
    "sm_clock": "",
    "sm_clock_limit": "",
    "power_limit": "",
    "temperature": "",
    "others_on_card": "",
    "cores": "",
    "threads": "",
    "dtype": "",
    "python": "",
    "torch": "",
    "triton": "",
    "transformers": "",
    "code": "",
    "date": "",
}
_FILTERS = {"checkpoint": "checkpoint", "image": "size", "load": "load", "engine": "recipe", "host": "host"}

# What only rows under a load have: these columns are left out of a grid without any.
_OF_LOADS = (
    *("load", "tokens_per_", "requests", "failed", "rounds", "disturbed_rounds"),
    *("ttft_p", "tpot_p", "end_to_end_p", "queued_p", "gap_p"),
)


@shown.page.register(GridResult)
def grid_html(result: GridResult) -> str:
    """The page: what is to be known of the hosts, what failed, the figure and the table with their filters, hosts and settings."""
    environment = " · ".join(f"{key} {value}" for key, value in result.environment.items())
    states = [row["state"] for row in result.cells]
    said = ", ".join(f"{states.count(state)} {state}" for state in dict.fromkeys(states))
    notes = "".join(f"<li>{html.escape(note)}</li>" for note in result.notes)
    body = [
        f"<h1>TTFT over a grid</h1><p>{counted(len(states), 'cell')}: {said}</p><p>{html.escape(environment)}</p>",
        f"<h2>What is to be known of the hosts</h2><ul>{notes}</ul>" if notes else "",
        errors_html(result),
        explorer_html([*result.summary(), *result.load_rows()]),
        f"<h2>Hosts</h2>{table_html(_hosts_frame(result))}" if result.hosts else "",
        f"<h2>Settings</h2>{table_html(settings_frame(result.settings))}",
    ]
    return page("TTFT over a grid", body)


def explorer_html(rows: Sequence[Mapping[str, Any]]) -> str:
    """The filters, what they leave of the figure and the table, and the script that draws both, as a piece of a `page`.

    rows: as `GridResult.summary` and `load_rows` give them. At first the filters leave those of the first checkpoint and load.
    """
    loads = any("load" in row for row in rows)
    columns = {name: said for name, said in _COLUMNS.items() if loads or not name.startswith(_OF_LOADS)}
    filters = {name: said for name, said in _FILTERS.items() if name in columns}
    data = {
        "columns": list(columns),
        "headings": list(columns.values()),
        "rows": [[json_value(row.get(name, "alone" if name == "load" else None)) for name in columns] for row in rows],
        "colours": style.SERIES_COLOURS,
        "markers": style.SERIES_MARKERS,
        "config": style.CONFIG,
    }
    # Within a script only this would end it.
    text = json.dumps(data, separators=(",", ":")).replace("</", "<\\/")
    selects = "".join(f"<label>{said} <select data-column='{name}'></select></label> " for name, said in filters.items())
    script = resources.files("fastvl_lab.view").joinpath("grid.js").read_text(encoding="utf-8")
    return (
        "<h2>TTFT against visual tokens, by card</h2>"
        "<p>Medians over warm, undisturbed runs with 95% intervals, of each cell by itself: nothing is pooled across hosts or "
        "cards. A speed-up stands only beside a parity check that held. Under a load, TTFT is that of its requests.</p>"
        f"<form id='grid-filters'>{selects}<button type='button' id='grid-export'>Export what is shown (CSV)</button></form>"
        "<p id='grid-count' role='status'></p><div id='grid-figure'></div><div class='scroll' tabindex='0'>"
        "<table id='grid-table'><thead></thead><tbody></tbody></table></div>"
        f"<script type='application/json' id='grid-data'>{text}</script><script>{script}</script>"
    )


def _hosts_frame(result: GridResult) -> Any:
    return frame(
        result.hosts,
        {
            "host": lambda host: host.host,
            "card": lambda host: host.card,
            "card's id": lambda host: host.card_id,
            "the reference's TTFT, ms (95% CI)": lambda host: f"{host.reference.median:.2f} ({host.reference.known})",
            "runs": lambda host: host.runs,
            "cells": lambda host: host.cells,
        },
    )
