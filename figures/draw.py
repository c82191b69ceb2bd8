"""Draw every picture of the README from the records beside it; with --measure, make the records first.

    python figures/draw.py [--measure]

Needs the extras "notebooks" and "dev" and a Chrome or Chromium for PNG.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import fastvl_lab as fl
from fastvl_lab import Run, view

FOLDER = Path(__file__).parent
CHECKPOINT = "tiny-qwen2.5-vl"


def measure() -> None:
    """The median of ten warm runs an engine, interleaved, on a 1280x960 photograph."""
    lab = fl.Lab(CHECKPOINT)
    request = fl.Request(
        images=[fl.photo("coffee", (1280, 960))], prompt="What is in this picture?", max_new_tokens=8, ignore_eos=True
    )
    comparison = fl.compare(lab, request, {name: name for name in ("transformers", "baseline", "fastest")}, repeats=10)
    records = [comparison.representative(engine).to_record() for engine in comparison.engines]
    (FOLDER / "waterfall.json").write_text(json.dumps(records, indent=1) + "\n", encoding="utf-8")


def draw() -> None:
    runs = [Run.from_record(record) for record in json.loads((FOLDER / "waterfall.json").read_text(encoding="utf-8"))]
    view.waterfall(runs).write_image(FOLDER / "waterfall.png", width=1100, scale=1.5)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--measure", action="store_true", help="run the engines again on this machine")
    if parser.parse_args().measure:
        measure()
    draw()
