"""The rows of a report as text: a table for each of its parts, under the rows' own names."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Any

from fastvl_lab.errors import shortened

Row = dict[str, Any]

# Part of a report, or task -> what its title says, and its columns: the label, then numbers; what has parts stands under its row.
_TIMES = "recipe ttft_ms ratio patches_ms patches_ratio floor_share idle_share"
_TABLES = {
    "tower": ("tower of {checkpoint}, {image}", "recipe ms ratio floor_ms share error"),
    "decoder": (
        "decoder of {checkpoint}, {length} tokens and {steps} steps",
        "recipe prefill_ms prefill_ratio prefill_share decode_ms tokens_per_second decode_ratio decode_share kv_bytes error",
    ),
    "ceilings": ("ceilings of {checkpoint}", "device matmul_tflops copy_gb_s upload_gb_s"),
    "floors": ("floors of {checkpoint}", "image prompt_tokens patches_floor_ms tokens_per_second floor_ms"),
    "main": ("TTFT of {checkpoint}, {image}", f"{_TIMES} peak_mb working_mb error host_ms device_ms unaccounted_ms"),
    "sizes": (
        "one recipe of {checkpoint} executed in several ways, {image}",
        f"{_TIMES} capture_s capture_mb captured_before break_even error",
    ),
    "decode": (
        "decode steps of {checkpoint}, {new_tokens} tokens, {image}",
        "recipe tpot_ms tokens_per_second share same_steps",
    ),
    "kernels": ("kernels of TTFT of {checkpoint} in part {of}, {image}", "recipe kernels_ms longest"),
    "launches": ("launch settings that attention kernels were tuned to", "kernel tuned_for launch"),
}
_LONGEST = 100  # letters of a text in a table: with the arguments of its template, a kernel's name can be pages


def text(rows: Sequence[Row]) -> str:
    """The rows of any task: a table for each part, and what was not timed."""
    shown: dict[str, list[Row]] = {name: [] for name in _TABLES}
    left_out: dict[str, dict[str, list[str]]] = {}
    for row in rows:
        if row["parity"] is None and isinstance(row["error"], str) and "image" in row:
            place = f"{row['checkpoint']} {row['part']} {row['image']}"
            left_out.setdefault(row["error"], {}).setdefault(place, []).append(row["recipe"])
        else:
            shown[row.get("part") or ("decoder" if "length" in row else "tower")].append(row)
    blocks = []
    for name, (title, columns) in _TABLES.items():
        for said, same in groupby(shown[name], f"{title}; {{device}} {{dtype}}".format_map):
            blocks.append(f"{said}\n{_table(list(same), columns.split())}")
    return "\n\n".join([*blocks, *([_left_out(left_out)] if left_out else [])])


def _table(rows: Sequence[Row], columns: Sequence[str]) -> str:
    """A row whose check failed, or that has an error for another reason, says why instead of its times."""
    parts = [key for key in columns if any(isinstance(row.get(key), dict | list) for row in rows)]
    heads = [key for key in columns if key not in parts]
    cells = [[_cell(row, key) for key in heads] if not _why(row) else [row[heads[0]]] for row in rows]
    widths = [max(len(line[i]) for line in (heads, *cells) if i < len(line)) for i in range(len(heads))]
    lines = [_line(["", *heads[1:]], widths)]
    for row, line in zip(rows, cells, strict=True):
        why = _why(row)
        lines.append(_line([*line, f"{why}; not timed"] if why else line, [widths[0], 0] if why else widths))
        for key in parts if not why else ():
            each = row[key] if key == "longest" else [row[key]]
            lines += [f"{'':<8}{key}: {_cell({key: one}, key)}" for one in each if one]
    return "\n".join(lines)


def _line(cells: Sequence[str], widths: Sequence[int]) -> str:
    label, *numbers = (cell.rjust(width) for cell, width in zip(cells, widths, strict=True))
    return "  ".join(["", label.strip().ljust(widths[0]), *numbers]).rstrip()


def _cell(row: Mapping[str, Any], key: str) -> str:
    """A value as its kind is read: a share in percent, a ratio with its interval where there is one, a time to a microsecond."""
    value = row.get(key)
    if value is None or isinstance(value, bool):
        return {None: "", True: "yes", False: "no"}[value]
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {_cell(value, name)}" for name in value)
    if isinstance(value, list):
        return ", ".join(_cell({"": one}, "") for one in value)
    if not isinstance(value, float):
        return shortened(str(value), _LONGEST)
    if f"{key}_low" in row:
        low, high = row[f"{key}_low"], row[f"{key}_high"]
        return f"{value:.2f}x" + ("" if low is None or low != low else f" [{low:.2f}, {high:.2f}]")
    return f"{value:.0%}" if "share" in key else f"{value:.1e}" if key == "error" else f"{value:.3f}"


def _left_out(reasons: Mapping[str, Mapping[str, Sequence[str]]]) -> str:
    """What could not run here or was skipped, which is no fault of it: reason -> place -> labels."""
    lines = ["not timed"]
    for reason, by_place in reasons.items():
        lines.append(f"  {reason}")
        for labels in dict.fromkeys(map(tuple, by_place.values())):
            places = ", ".join(place for place, mine in by_place.items() if tuple(mine) == labels)
            lines.append(f"    {' · '.join(labels)}, in {places}")
    return "\n".join(lines)


def _why(row: Row) -> str:
    if isinstance(row["error"], str):
        return f"failed: {row['error']}" if row["parity"] is False else row["error"]
    error = math.nan if row["error"] is None else row["error"]  # a file has null for what is no number
    return f"parity failed: error {error:.1e}" if row["parity"] is False else ""
