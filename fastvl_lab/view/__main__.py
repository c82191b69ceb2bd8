"""`python -m fastvl_lab.view RUN_FOLDER`: print the table of a finished sweep and where its report is."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from fastvl_lab.view.tables import summary_frame


def main(folder: Path) -> None:
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
        raise SystemExit("usage: python -m fastvl_lab.view RUN_FOLDER")
    main(Path(sys.argv[1]))
