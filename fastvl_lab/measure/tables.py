"""The rows of a report as text."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

Row = dict[str, Any]
Line = Callable[[Row], str]

_INDENT = " " * 30
_NAME_WIDTH = 80


def text(rows: Sequence[Row]) -> str:
    """The rows of any task. Of whole requests: ceilings and floors, a block for each part and image, and what was not timed."""
    if any("part" in row for row in rows):
        return _of_requests(rows)
    return _blocks(rows, *((_decoder_title, _decoder) if any("length" in row for row in rows) else (_tower_title, _tower)))


def _blocks(rows: Sequence[Row], title: Line, line: Line) -> str:
    """A block for each title; a row whose check failed, or that has an error for another reason, says why instead of its times."""
    lines, above = [], ""
    for row in rows:
        if title(row) != above:
            above = title(row)
            lines += ["", above]
        if row["parity"] is False:
            why = f"failed: {row['error']}" if isinstance(row["error"], str) else f"parity failed: error {row['error']:.1e}"
        else:
            why = row["error"] if isinstance(row["error"], str) else ""
        lines.append(f"  {row['recipe']:<26} {f'{why}; not timed' if why else line(row)}")
    return "\n".join(lines).lstrip()


# One stage alone


def _tower_title(row: Row) -> str:
    return f"{row['checkpoint']}, {row['image']}, {row['device']} {row['dtype']}"


def _tower(row: Row) -> str:
    times = f"{row['ms']:9.3f} ms  {row['ratio']:5.2f}x [{row['ratio_low']:.2f}, {row['ratio_high']:.2f}]"
    return f"{times}  floor {row['floor_ms']:8.3f} ms  {row['share_of_ceiling']:4.0%} of the ceiling  error {row['error']:.1e}"


def _decoder_title(row: Row) -> str:
    """matmul, copy: shares of those ceilings."""
    place = f"{row['checkpoint']}, {row['length']} tokens and {row['steps']} steps, {row['device']} {row['dtype']}"
    heads = f"{'prefill':>12}  {'ratio':<19}{'matmul':>7}  | {'a step':>11}{'tokens/s':>10}  {'ratio':<19}{'copy':>7}"
    return f"{place}\n  {'':<26} {heads}  | {'KV, MB':>9}    error"


def _decoder(row: Row) -> str:
    prefill, step = (f"  {_step_ratio(row, of):<19}{row[f'{of}_share']:7.0%}" for of in ("prefill", "decode"))
    decode = f"{row['decode_ms']:8.3f} ms{row['tokens_per_second']:10.1f}{step}"
    return f"{row['prefill_ms']:9.3f} ms{prefill}  | {decode}  | {row['kv_bytes'] / 1e6:9.2f}  {row['error']:.1e}"


def _step_ratio(row: Row, step: str) -> str:
    ratio, low, high = (row[f"{step}_{name}"] for name in ("ratio", "ratio_low", "ratio_high"))
    return f"{ratio:.2f}x [{low:.2f}, {high:.2f}]"


# Whole requests


def _of_requests(rows: Sequence[Row]) -> str:
    parts: dict[str, tuple[Line, Line]] = {
        "main": (lambda row: f"TTFT, {_place(row)}", _engine),
        "sizes": (lambda row: f"one recipe executed in several ways, {_place(row)}", _way),
        "decode": (lambda row: f"decode steps of {row['new_tokens']} tokens, {_place(row)}", _decode),
        "kernels": (lambda row: f"kernels of TTFT in part {row['of']}, {_place(row)}", _kernels),
    }
    limits = {"ceilings": _ceilings, "floors": _floors}
    blocks = ["\n".join(limits[row["part"]](row) for row in rows if row["part"] in limits)]
    for part, (title, line) in parts.items():
        blocks.append(_blocks([row for row in rows if row["part"] == part and not _not_timed(row)], title, line))
    if launches := [_launch(row) for row in rows if row["part"] == "launches"]:
        blocks.append("\n".join(["launch settings that attention kernels were tuned to", *launches]))
    why: dict[str, list[Row]] = {}
    for row in filter(_not_timed, rows):
        why.setdefault(row["error"], []).append(row)
    if why:
        blocks.append("\n".join(["not timed", *(f"  {reason}\n{_named(mine)}" for reason, mine in why.items())]))
    return "\n\n".join(block for block in blocks if block)


def _not_timed(row: Row) -> bool:
    """Whether a row is of something that could not run here or was skipped, which is no fault of it."""
    return row["parity"] is None and isinstance(row["error"], str)


def _named(rows: Sequence[Row]) -> str:
    """The engines of rows, by part and image where not all have the same."""
    places: dict[tuple[str, ...], list[str]] = {}
    for row in rows:
        place = f"{row['checkpoint']} {row['part']} {row['image']}"
        places.setdefault(tuple(r["recipe"] for r in rows if _at(r) == _at(row)), []).append(place)
    return "\n".join(f"    {' · '.join(labels)}, in {', '.join(dict.fromkeys(at))}" for labels, at in places.items())


def _at(row: Row) -> tuple[str, str, str]:
    return row["checkpoint"], row["part"], row["image"]


def _place(row: Row) -> str:
    return f"{row['image']}, {row['checkpoint']}, {row['device']} {row['dtype']}"


def _ceilings(row: Row) -> str:
    upload = "" if row["upload_gb_s"] is None else f", upload {row['upload_gb_s']:.1f} GB/s"
    found = f"matmul {row['matmul_tflops']:.2f} TFLOP/s, copy {row['copy_gb_s']:.1f} GB/s{upload}"
    return f"{row['device']} {row['dtype']}: {found}; floors of {row['checkpoint']} in ms"


def _floors(row: Row) -> str:
    stages = ", ".join(f"{stage} {ms:.3f}" for stage, ms in row["floor_ms"].items())
    whole = f"patches to first token {row['patches_floor_ms']:.2f}, at most {row['tokens_per_second']:.0f} tokens/s"
    return f"  {row['image']:<10}{row['prompt_tokens']:5} tokens  {stages}; {whole}"


def _engine(row: Row) -> str:
    memory = "" if row["peak_mb"] is None else f"  peak {row['peak_mb']:.0f} MB, {row['working_mb']:.0f} its own"
    return f"{_ttft(row)}{memory}  error {row['error']:.1e}\n{_INDENT}{_stages(row)}"


def _way(row: Row) -> str:
    line = f"{_ttft(row)}  error {row['error']:.1e}"
    if row["captures"]:
        known = " (for an earlier size)" if row["captured_before"] else ""
        pays = "not shown to pay" if row["break_even"] is None else f"pays after {row['break_even']} requests"
        line += f"\n{_INDENT}captured in {row['capture_s']:.2f} s, {row['capture_mb']:.1f} MB{known}; {pays}"
    return line


def _decode(row: Row) -> str:
    others = ", ".join(label for label in row["same_steps"] if label != row["recipe"])
    line = f"{row['tpot_ms']:9.3f} ms a token, {row['tokens_per_second']:8.1f} tokens/s, {row['share']:4.0%} of the ceiling"
    return line + (f"\n{_INDENT}also: {others}" if others else "")


def _kernels(row: Row) -> str:
    if row["kernels_ms"] is None:
        return "the profiler saw none"
    named = [f"{_INDENT}{kernel['ms']:9.3f} ms {kernel['times']:5} x  {_short(kernel['name'])}" for kernel in row["longest"]]
    return "\n".join([f"{row['kernels_ms']:9.2f} ms", *named])


def _short(name: str) -> str:
    """The beginning of a kernel's name, which with the arguments of its template can be pages."""
    return name if len(name) <= _NAME_WIDTH else f"{name[: _NAME_WIDTH - 1]}…"


def _launch(row: Row) -> str:
    tuned_for, launch = (", ".join(f"{name} {value}" for name, value in row[key].items()) for key in ("tuned_for", "launch"))
    return f"  {row['kernel']:<26} {tuned_for}: {launch}"


def _ttft(row: Row) -> str:
    """TTFT, and that from patches on, with ratios to Transformers; how near the floor the latter is; how idle the device."""
    idle = "" if row["idle_share"] is None else f"  device idle {row['idle_share']:4.0%}"
    patches = f"patches {row['patches_ms']:9.2f} ms {_ratio(row, 'patches_ratio')}"
    return f"{row['ttft_ms']:9.2f} ms {_ratio(row, 'ratio')}  {patches}  floor {row['floor_share']:4.0%}{idle}"


def _ratio(row: Row, name: str) -> str:
    if row[name] is None:
        return ""
    low, high = row[f"{name}_low"], row[f"{name}_high"]
    interval = "" if low != low else f" [{low:.2f}, {high:.2f}]"
    return f"{row[name]:5.2f}x{interval}"


def _stages(row: Row) -> str:
    """One stage after another: ms of the host and, behind a bar, of the device."""
    device = row["device_ms"]
    shown = [f"{stage} {ms:.2f}{f'|{device[stage]:.2f}' if stage in device else ''}" for stage, ms in row["host_ms"].items()]
    return ", ".join([*shown, f"in no stage {row['unaccounted_ms']:.2f}"])
