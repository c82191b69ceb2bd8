"""What the reports on one slot alone have in common: which options run here, what errors are held to, the table, the command."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from fastvl_lab.measure.publish import json_value
from fastvl_lab.recipe import Option, Toggle, toggles

Row = dict[str, Any]


def runnable(slot: str, device: torch.device, dtype: torch.dtype) -> Iterator[tuple[Toggle, Option]]:
    """The exact options of a slot that can run here, toggle by toggle, the first of each among them."""
    for toggle in toggles():
        for option in toggle.options if toggle.slot == slot else ():
            in_half = option.value != "varlen" or dtype != torch.float32
            if option.exact and in_half and option.unavailable(device) is None:
                yield toggle, option


def wider(dtype: torch.dtype) -> torch.dtype:
    """In what the truth is computed that a dtype's errors are measured against."""
    return torch.float64 if dtype == torch.float32 else torch.float32


def worst_error(pairs: Iterable[tuple[torch.Tensor, torch.Tensor]]) -> float:
    """The largest relative error of any row of ours against the truth's, [n, width] each; NaN where there is one.

    The worst row, and not all together: what went wrong may be a few rows of thousands.
    """
    return float(torch.stack([((ours.to(t.dtype) - t).norm(dim=1) / t.norm(dim=1)).max() for ours, t in pairs]).max())


def within_budget(found: Mapping[str, float | str], reference: str, dtype: torch.dtype) -> frozenset[str]:
    """Those whose error is at most twice the reference's in the same dtype, plus rounding; none where that could not run."""
    allowed = found[reference]
    if isinstance(allowed, str):
        return frozenset()
    bound = 2 * allowed + torch.finfo(dtype).eps
    return frozenset(label for label, error in found.items() if not isinstance(error, str) and error <= bound)


def table(rows: Sequence[Row], title: Callable[[Row], str], line: Callable[[Row], str]) -> str:
    """The rows as text, a block for each title; a row whose parity failed says why instead of its line."""
    lines, above = [], ""
    for row in rows:
        if title(row) != above:
            above = title(row)
            lines += ["", above]
        if row["parity"]:
            lines.append(f"  {row['recipe']:<26} {line(row)}")
        else:
            why = f"failed: {row['error']}" if isinstance(row["error"], str) else f"parity failed: error {row['error']:.1e}"
            lines.append(f"  {row['recipe']:<26} {why}; not timed")
    return "\n".join(lines).lstrip()


def command(
    report: Callable[..., list[Row]],
    table: Callable[[list[Row]], str],
    *,
    full: Mapping[str, Any],
    tiny: Mapping[str, Any],
    about: str | None,
    repeats: int,
    arguments: Sequence[str] | None,
) -> None:
    """A report's command: the rows to a file as they come, the table to the terminal, status 1 if a parity check failed.

    full, tiny: the report's arguments without and with `--tiny`. about: what `--help` prints first. arguments: those of the
    process, if None.
    """
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="the built-in checkpoints and small inputs, on any device")
    parser.add_argument("--out", type=Path, help="a file for the rows as JSON")
    parser.add_argument("--repeats", type=int, default=repeats, help=f"timed rounds (default {repeats})")
    given = parser.parse_args(arguments)

    def keep(rows: list[Row]) -> None:
        if given.out is not None:
            plain = [{key: json_value(value) for key, value in row.items()} for row in rows]
            given.out.write_text(json.dumps(plain, indent=1) + "\n", encoding="utf-8")

    rows = report(**(tiny if given.tiny else full), repeats=given.repeats, on_rows=keep)
    print(table(rows))
    if not all(row["parity"] for row in rows):
        sys.exit(1)
