"""`python -m fastvl_lab.view RUN_FOLDER`: print the table of a finished sweep and where its report is.

With the rows of a GPU report, `python -m fastvl_lab.view gpu.json`: print its tables, and draw them on a page beside the file.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from fastvl_lab.measure.gpu_tables import text
from fastvl_lab.view import gpu_report
from fastvl_lab.view.tables import summary_frame


def main(path: Path) -> None:
    if path.is_file():
        rows, page = json.loads(path.read_text(encoding="utf-8")), path.with_suffix(".html")
        page.write_text(gpu_report.report_html(rows), encoding="utf-8")
        print(f"{text(rows)}\n\nreport: {page}")
    else:
        _sweep(path)


def _sweep(folder: Path) -> None:
    result = json.loads((folder / "result.json").read_text())
    rows = [
        {"checkpoint": point["checkpoint"], "image": point["image"], "engine": engine, **row}
        for point in result["points"]
        for engine, row in point["engines"].items()
    ]
    for error in result["errors"]:
        print(f"failed: {' · '.join(v for k, v in error.items() if v and k != 'error')}: {error['error']}")
    if rows:
        print(" · ".join(result["environment"].values()))
        print(summary_frame(rows).to_string(index=False))
    print(f"report: {folder / 'report.html'}")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        raise SystemExit("usage: python -m fastvl_lab.view RUN_FOLDER or GPU_REPORT.json")
    main(Path(sys.argv[1]))
