"""A cell's own process: the reference, then every recipe of the cell, interleaved, on one device.

    python -m fastvl_lab.grid.cell FOLDER ID RESULT PROGRESS

FOLDER: of the grid, whose plan has the cell ID. RESULT: the file to write, JSON. PROGRESS: a file that says "done of" in runs.
A worker imports this file and forks, so to import it computes nothing and asks for no device.
"""

from __future__ import annotations

import dataclasses
import json
import sys
import time
from pathlib import Path
from typing import Any

import torch

from fastvl_lab.checkpoint import resolve_device
from fastvl_lab.errors import sentence
from fastvl_lab.grid.plan import Reference, runs
from fastvl_lab.grid.rendezvous import read_plan
from fastvl_lab.grid.where import where
from fastvl_lab.lab import Lab
from fastvl_lab.measure.compare import compare
from fastvl_lab.measure.publish import picture
from fastvl_lab.measure.quiet import QUIET
from fastvl_lab.measure.sweep import SweepSettings, sweep
from fastvl_lab.request import Request
from fastvl_lab.whole import write_whole

# Seconds between two words of progress. The thread that serves a load writes them while the load is timed, perhaps to a slow disk.
_TELL = 1.0


def measured(given: dict[str, Any], reference: Reference, progress: Path) -> dict[str, Any]:
    """A cell's result, JSON-ready: its comparison as a record, what failed, where it was, and the reference's runs."""
    settings, done, total, told_at = SweepSettings(**given), 0, runs(given), time.monotonic()

    def ran() -> None:
        nonlocal done, told_at
        done += 1
        if time.monotonic() - told_at > _TELL:
            write_whole(progress, f"{done} {total}".encode())
            told_at = time.monotonic()

    write_whole(progress, f"0 {total}".encode())
    of_reference = _reference(reference, settings)
    result = sweep(settings, progress=False, on_run=ran)
    return {
        "comparisons": [point.comparison.to_record() for point in result.points],
        "loads": [point.found.to_record() for point in result.loaded],
        "errors": list(result.errors),
        "environment": {**result.environment, **where(resolve_device(settings.device or None))},
        "reference": of_reference,
    }


def _reference(reference: Reference, settings: SweepSettings) -> dict[str, Any]:
    """The seconds to the first token of the reference's warm, undisturbed runs; or why there are none: the cell goes on without."""
    width, height = reference.size
    try:
        lab = Lab(reference.checkpoint, device=settings.device or None)
        request = Request(images=[picture(width, height)], prompt="What is this?", max_new_tokens=1, ignore_eos=True)
        quiet = dataclasses.replace(QUIET, total=settings.quiet)
        found = compare(lab, request, {"reference": reference.recipe}, repeats=reference.repeats, warm_up=2, quiet=quiet)
    except Exception as error:
        return {"error": sentence(error)}
    return {"seconds": [run.ttft for run in found.runs("reference")]}


def main(folder: str, cell: str, result: str, progress: str) -> None:
    assert not torch.cuda._is_in_bad_fork(), "the worker asked for a CUDA device before it forked, so a cell would not find one"
    plan = read_plan(Path(folder))
    found = measured(plan["cells"][cell]["settings"], Reference(**plan["reference"]), Path(progress))
    write_whole(Path(result), json.dumps(found).encode())


if __name__ == "__main__":
    main(*sys.argv[1:])
