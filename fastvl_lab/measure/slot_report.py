"""What the reports on one slot alone have in common: which options run here, what errors are held to, the table, the command."""

from __future__ import annotations

import argparse
import io
import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from fastvl_lab.catalogue import Option, Target, Toggle, toggles
from fastvl_lab.errors import DeviceError, FastvlError
from fastvl_lab.measure.publish import json_value

Row = dict[str, Any]


def runnable(slot: str, device: torch.device, dtype: torch.dtype) -> Iterator[tuple[Toggle, Option]]:
    """The exact options of a slot that can run here, toggle by toggle, the first of each among them."""
    target = Target(device=device, dtype=dtype)
    for toggle in toggles():
        for option in toggle.options if toggle.slot == slot else ():
            if option.exact and option.needs.unmet(target) is None:
                yield toggle, option


def picture(width: int, height: int) -> bytes:
    """A JPEG with edges, gradients and noise, for machines without photographs."""
    row, column = np.linspace(0, 6, height)[:, None], np.linspace(0, 8, width)
    waves = np.stack([np.sin(row * column), np.cos(row + column), np.sin(row) * np.cos(3 * column)], axis=-1)
    noise = np.random.default_rng(0).normal(0, 8, waves.shape)
    out = io.BytesIO()
    Image.fromarray((127 + 100 * waves + noise).clip(0, 255).astype(np.uint8)).save(out, "JPEG", quality=92)
    return out.getvalue()


def table(rows: Sequence[Row], title: Callable[[Row], str], line: Callable[[Row], str]) -> str:
    """The rows as text, a block for each title; one whose parity failed, or that has an error for another reason, says why instead.

    Rows have "recipe", "parity" (None where nothing was checked), and "error", a number or a sentence.
    """
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


def command(
    report: Callable[..., list[Row]],
    table: Callable[[list[Row]], str],
    *,
    full: dict[str, Any],
    tiny: dict[str, Any],
    about: str | None,
    repeats: int,
    arguments: Sequence[str] | None,
    more: Mapping[str, Mapping[str, Any]] | None = None,
) -> None:
    """A report's command: the rows to a file as they come, the table to the terminal, status 1 if a parity check failed.

    full, tiny: the report's arguments without and with `--tiny`. about: what `--help` prints first. arguments: those of the
    process, if None. more: options of this report alone, an argument of it each: name -> what argparse is told about it.
    """
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="the built-in checkpoints and small inputs, on any device")
    parser.add_argument("--out", type=Path, help="a file for the rows as JSON")
    parser.add_argument("--repeats", type=int, default=repeats, help=f"timed rounds (default {repeats})")
    for name, option in (more or {}).items():
        parser.add_argument(f"--{name}", **option)
    given = parser.parse_args(arguments)
    if given.out is not None and not given.out.parent.is_dir():
        parser.error(f"--out is {given.out}, and there is no folder {given.out.parent}")

    def keep(rows: list[Row]) -> None:
        if given.out is not None:
            plain = [{key: json_value(value) for key, value in row.items()} for row in rows]
            given.out.write_text(json.dumps(plain, indent=1) + "\n", encoding="utf-8")

    own = {name: getattr(given, name) for name in more or {}}
    try:
        rows = report(**((tiny if given.tiny else full) | own), repeats=given.repeats, on_rows=keep)
    except FastvlError as error:
        without_gpu = isinstance(error, DeviceError) and not torch.cuda.is_available() and not given.tiny
        sys.exit(f"{error}{'; on a CPU there is --tiny' if without_gpu else ''}")
    print(table(rows))
    if any(row["parity"] is False for row in rows):  # None: nothing was checked
        sys.exit(1)
