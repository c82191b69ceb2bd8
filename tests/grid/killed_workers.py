"""By seed: three workers of eight stub cells, each killed at a random moment (SIGKILL), and one that goes on after them.

    killed_workers.py FOLDER SEED…

Prints a line a seed, JSON: the ids of the cells, which claim each result came of, and what ran how often. The workers are forks of
this process, which has imported what they need.
"""

import json
import os
import random
import signal
import sys
import time
from collections import Counter
from pathlib import Path

from fastvl_lab.grid.rendezvous import Rendezvous, prepare
from fastvl_lab.grid.worker import Worker

CELLS = {f"cell{number:02}": {"label": f"cell {number}"} for number in range(8)}
PROGRAM = [sys.executable, "-I", "-S", str(Path(__file__).with_name("stub_cell.py")), json.dumps({"seconds": 0.03})]


def forked(folder: Path, name: str) -> int:
    pid = os.fork()
    if pid == 0:
        try:
            Worker(folder, name, PROGRAM).work()
        finally:
            os._exit(0)
    return pid


def main(folder: Path, seed: int) -> dict[str, object]:
    prepare(folder, {"cells": CELLS, "cell_seconds": 60.0, "beat": 0.05, "stale": 30.0})
    drawn = random.Random(seed)
    moments = {forked(folder, f"first-{number}"): drawn.uniform(0.0, 0.6) for number in range(3)}
    began = time.monotonic()
    for pid, moment in sorted(moments.items(), key=lambda one: one[1]):
        time.sleep(max(0.0, began + moment - time.monotonic()))
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    os.waitpid(forked(folder, "second"), 0)
    rendezvous = Rendezvous(folder=folder, stale=30.0)
    claims = {cell: (rendezvous.result(cell) or {}).get("claims") for cell in sorted(rendezvous.results())}
    ran = Counter(line.split()[0] for line in (folder / "ran").read_text().splitlines())
    return {"seed": seed, "cells": sorted(CELLS), "claims": claims, "ran": ran}


if __name__ == "__main__":
    for given in map(int, sys.argv[2:]):
        print(json.dumps(main(Path(sys.argv[1]) / str(given), given)), flush=True)
