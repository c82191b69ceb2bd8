"""A stub of a cell's program, of the standard library alone: stub_cell.py [HOW] FOLDER ID RESULT PROGRESS.

It notes in FOLDER/ran that it ran, and takes some milliseconds. HOW is JSON: by a word of a cell's label, "hangs", "raises" or
"fails"; "seconds" is how long any cell takes.
"""

import json
import os
import sys
import time
from pathlib import Path


def main(how: str, folder: str, cell: str, result: str, progress: str) -> None:
    ways = json.loads(how)
    plan = json.loads((Path(folder) / "plan.json").read_text())["cells"][cell]
    way = next((way for word, way in ways.items() if word in plan["label"]), "")
    with open(Path(folder) / "ran", "a") as file:
        file.write(f"{cell} {os.getppid()}\n")
    Path(progress).write_text("1 2")
    time.sleep(3600 if way == "hangs" else ways.get("seconds", 0.0))
    if way == "raises":
        raise ZeroDivisionError("surprise")
    environment = {"host": "stub", "card": "abacus", "card_id": "", "device": "stub", "torch": "1"}
    errors = [{"checkpoint": "", "image": "", "engine": "baseline", "error": "it fails"}] if way == "fails" else []
    found = {"comparisons": [], "errors": errors, "environment": environment, "reference": {"seconds": [0.01] * 9}}
    Path(result).write_text(json.dumps(found))


if __name__ == "__main__":
    main(*(sys.argv[1:] if len(sys.argv) == 6 else ["{}", *sys.argv[1:]]))
