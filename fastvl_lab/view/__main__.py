"""`python -m fastvl_lab.view RUN_FOLDER`: print the tables of a finished sweep and where its report is.

With the rows of a GPU report, `python -m fastvl_lab.view gpu.json`: print its tables, and draw them on a page beside the file.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from fastvl_lab.measure.sweep import told_failure
from fastvl_lab.measure.tables import text
from fastvl_lab.view import gpu_report
from fastvl_lab.view.tables import loaded_frame, summary_frame


def main(arguments: Sequence[str] | None = None) -> None:
    """Arguments: those of the process, if None."""
    parser = argparse.ArgumentParser(
        prog="python -m fastvl_lab.view", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("path", type=Path, help="the folder of a sweep, or the rows of a GPU report")
    path = parser.parse_args(arguments).path
    if not path.is_file() and not (path / "result.json").is_file():
        sys.exit(f"{path} is neither the folder of a sweep, which has a result.json, nor the rows of a GPU report")
    if path.is_file():
        rows, page = _rows(path), path.with_suffix(".html")
        page.write_text(gpu_report.report_html(rows), encoding="utf-8")
        print(f"{text(rows)}\n\nreport: {page}")
    else:
        _sweep(path)


def _rows(path: Path) -> list[dict[str, Any]]:
    with suppress(ValueError):
        rows = json.loads(path.read_bytes())
        if isinstance(rows, list) and all(isinstance(row, dict) and "checkpoint" in row for row in rows):
            return rows
    sys.exit(f"{path} has no rows of a GPU report, which measure.report writes with --out")


def _sweep(folder: Path) -> None:
    result = json.loads((folder / "result.json").read_text())
    rows = [
        {"checkpoint": point["checkpoint"], "image": point["image"], "engine": engine, **row}
        for point in result["points"]
        for engine, row in point["engines"].items()
    ]
    for error in result["errors"]:
        print(told_failure(error))
    loads = result.get("loads", [])  # absent where nothing was under load
    if rows or loads:
        print(" · ".join(f"{name} {value}" for name, value in result["environment"].items()))
    if rows:
        print(summary_frame(rows).to_string(index=False))
    if loads:
        print(loaded_frame(loads).to_string(index=False))
    print(f"report: {folder / 'report.html'}")


if __name__ == "__main__":
    main()
