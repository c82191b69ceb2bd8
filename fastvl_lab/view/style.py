"""One look for every figure: colour-blind-safe colours, one per kind of work, and patterns for what colour must not carry alone."""

from __future__ import annotations

from typing import Any

from fastvl_lab.errors import require

# Okabe and Ito's palette, safe for the common kinds of colour blindness (https://jfly.uni-koeln.de/color/).
STAGE_COLOURS = {
    "queued": "#CFCFCF",
    "waiting": "#E8E2D0",
    "encode": "#8C8C8C",
    "connect": "#8C8C8C",
    "wait": "#0072B2",
    "queue": "#8C8C8C",
    "rest": "#8C8C8C",
    "decode_image": "#E69F00",
    "preprocess": "#E69F00",
    "tokenize": "#8C8C8C",
    "grammar": "#8C8C8C",
    "admit": "#8C8C8C",
    "await_image": "#F7E2B5",
    "upload": "#8C8C8C",
    "vit": "#0072B2",
    "merge": "#56B4E9",
    "prefill": "#009E73",
    "first_token": "#0072B2",
    "sample": "#CC79A7",
    "emit": "#CC79A7",
    "decode": "#D55E00",
}
SERIES_COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#D55E00", "#56B4E9", "#8C8C8C")
SERIES_MARKERS = ("circle", "square", "diamond", "triangle-up", "x", "cross", "star")

# Besides colour: the device lane is hatched, an engine's own account the other way, what a second thread did is dotted, time in no
# stage is an outline.
DEVICE_PATTERN = "/"
BESIDE_PATTERN = "."
OWN_PATTERN = "\\"
UNACCOUNTED_PATTERN = "x"
FAILED = "#AA0000"
INK = "#222222"
GRID = "#DDDDDD"
PAPER = "#FFFFFF"

# plotly offers to upload charts to a cloud service; the lab does not.
CONFIG = {"displaylogo": False, "modeBarButtonsToRemove": ["sendChartToCloud", "sendchart"]}


def series(number: int) -> dict[str, Any]:
    """How the number-th of several lines is drawn: colour, marker, and dashes once the colours have all been used."""
    colour, again = SERIES_COLOURS[number % len(SERIES_COLOURS)], number // len(SERIES_COLOURS) % 2
    return {
        "mode": "lines+markers",
        "line": {"color": colour, "width": 2, "dash": ("solid", "dash")[again]},
        "marker": {"color": colour, "symbol": SERIES_MARKERS[number % len(SERIES_MARKERS)], "size": 9},
    }


def graph_objects() -> Any:
    """plotly.graph_objects, or a clear error naming the extra."""
    return require("plotly.graph_objects", "notebooks")


def layout(**changes: Any) -> dict[str, Any]:
    """The layout every figure starts from."""
    base = {
        "template": "plotly_white",
        "font": {"family": "DejaVu Sans, Arial, sans-serif", "size": 13, "color": INK},
        "margin": {"l": 120, "r": 30, "t": 70, "b": 55},
        "hoverlabel": {"font": {"size": 13}},
        "modebar": {"remove": CONFIG["modeBarButtonsToRemove"]},
    }
    return base | changes
