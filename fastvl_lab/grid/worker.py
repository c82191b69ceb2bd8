"""A worker: it takes one cell after another, each in a fresh process, until every cell of the plan has a result.

    python -m fastvl_lab.grid.worker [--cores 0,1] FOLDER NAME [PROGRAM ARGUMENT…]

FOLDER: where the workers of a grid meet, on a file system that all of them share. NAME: the worker's own, unlike any other's.
--cores: those that it and its cells may use. PROGRAM: what measures a cell; it is given the folder, the cell's id, a file for the
result and one for its progress. By default it is the lab: the worker imports it once, and each cell is a fork, which is as fresh as
a process that imports it for itself, and starts some seconds earlier. A worker computes nothing and touches no device, and it has
one thread: those that numpy's OpenBLAS starts end before a fork.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import platform
import random
import shlex
import signal
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import fastvl_lab
from fastvl_lab.errors import shortened
from fastvl_lab.grid.rendezvous import MOST_VANISHED, Beat, Rendezvous, read_plan, this_process
from fastvl_lab.processes.kept import Kept

# What is forked for a cell; imported once the worker has its cores, for whose number of threads torch asks as it is imported.
CELL = "fastvl_lab.grid.cell"

# Seconds: between two looks at a cell's process, and how long one may take to end.
_LOOK_UP = 0.05
_ENDING = 10.0

# Seconds between two looks of a cluster's task at its worker.
_LOOK_UP_TASK = 0.5

# Attempts at a cell whose time runs out.
_ATTEMPTS = 2


class _Stopped(BaseException):
    """A SIGTERM, or a Ctrl-C: the worker lets its cell go and leaves."""


class Worker:
    """One worker of the grid in `folder`. program: what measures a cell, in place of a fork of this process."""

    def __init__(self, folder: Path, name: str, program: Sequence[str] = ()) -> None:
        plan = read_plan(folder)
        self.cells, self.seconds, self.every = tuple(plan["cells"]), plan["cell_seconds"], plan["beat"]
        self.rendezvous = Rendezvous(folder=folder, stale=plan["stale"])
        self.folder, self.name, self.program, self.process = folder, name, program, this_process()
        self._count, self._next = 0, 0.0
        self._cell: Callable[..., object] | None = None

    def work(self) -> None:
        """Until every cell has a result."""
        with suppress(_Stopped):
            self._beat()
            if not self.program and self._missing():
                self._cell = importlib.import_module(CELL).main
            while missing := self._missing():
                self._beat()
                if not self._take_one(missing):
                    time.sleep(min(self.every, 1.0) * random.uniform(0.1, 0.5))
        self._beat(ended=True, now=True)

    def _missing(self) -> list[str]:
        results = self.rendezvous.results()
        return [cell for cell in self.cells if cell not in results]

    def _take_one(self, missing: Sequence[str]) -> bool:
        """Measure the first cell that is nobody's, if there is one."""
        claims = self.rendezvous.claims()
        for cell in missing:
            last = claims.get(cell, 0)
            if last and not self.rendezvous.is_stale(cell, last):
                continue
            number = self.rendezvous.claim(cell, self.name, last)
            if number is None or self.rendezvous.result(cell) is not None:  # faster ones had it
                continue
            began = time.monotonic()
            if self.rendezvous.vanished(cell, last) >= MOST_VANISHED:
                found: dict[str, Any] | None = {"error": f"{MOST_VANISHED} workers that measured it vanished"}
            else:
                found = self._measured(cell, number)
            if found is not None:
                about = {"worker": self.name, "host": platform.node(), "claims": number, "seconds": time.monotonic() - began}
                self.rendezvous.publish(cell, found | about)
            return True
        return False

    def _measured(self, cell: str, number: int) -> dict[str, Any] | None:
        """What a cell's process gave, or why it gave nothing; None where another worker has taken the cell."""
        log, out = self.folder / "logs" / f"{cell}.{number}.log", self.folder / "results" / f".{cell}.{number}"
        progress = self.folder / "workers" / f".{self.name}.progress"
        try:
            for _ in range(_ATTEMPTS):
                exit_code = self._attempt(self._started(cell, out, progress, log), cell, number, progress)
                with suppress(FileNotFoundError):
                    result: dict[str, Any] = json.loads(out.read_text(encoding="utf-8"))
                    return result
                if not self.rendezvous.holds(cell, number):
                    return None
                if exit_code is not None:
                    return {"error": f"its process ended with exit code {exit_code}: {_last_line(log)}; its log is {log}"}
        finally:
            out.unlink(missing_ok=True)
            progress.unlink(missing_ok=True)
        return {"error": f"it took longer than its {self.seconds:g} seconds (cell_seconds), {_ATTEMPTS} times; its log is {log}"}

    def _attempt(self, kept: Kept, cell: str, number: int, progress: Path) -> int | None:
        """Watch a cell's process until it ends, its time is over, or another worker has the cell; its exit code, if it ended."""
        began = time.monotonic()
        try:
            while kept.exit_code is None and time.monotonic() - began < self.seconds:
                if self._beat(cell, progress) and not self.rendezvous.holds(cell, number):
                    break
                kept.wait(_LOOK_UP)
            return kept.exit_code
        finally:
            kept.let_go()
            kept.wait(_ENDING)

    def _started(self, cell: str, out: Path, progress: Path, log: Path) -> Kept:
        arguments = [str(self.folder), cell, str(out), str(progress)]
        line = [*(self.program or (sys.executable, "-m", CELL)), *arguments]
        with log.open("a", encoding="utf-8") as file:
            file.write(f"$ {shlex.join(line)}\n")
        if self._cell is None:
            return Kept(line, env=environment(), log=log)
        return Kept(partial(self._cell, *arguments), log=log)

    def _beat(self, doing: str = "", progress: Path | None = None, *, ended: bool = False, now: bool = False) -> bool:
        """Tell that this worker is alive, where it is time to; whether it was."""
        if not now and time.monotonic() < self._next:
            return False
        self._next, self._count = time.monotonic() + self.every, self._count + 1
        done, of = _progress(progress)
        beat = Beat(worker=self.name, count=self._count, process=self.process, doing=doing, done=done, of=of, ended=ended)
        self.rendezvous.tell(beat)
        return True


def environment() -> dict[str, str]:
    """That of this process, in which the package is found wherever it was found here."""
    found = str(Path(fastvl_lab.__file__).parents[1])
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, (found, os.environ.get("PYTHONPATH"))))}


def command(folder: Path, name: str, *, cores: Sequence[int] = (), program: Sequence[str] = ()) -> list[str]:
    """The command line of a worker."""
    pinned = ["--cores", ",".join(map(str, cores))] if cores else []
    return [sys.executable, "-m", "fastvl_lab.grid.worker", *pinned, str(folder), name, *program]


def work(folder: str, name: str, program: Sequence[str]) -> int | None:
    """A worker as a task of a cluster: a process of its own, which ends with the task; its exit code."""
    kept = Kept(command(Path(folder), name, program=program), env=environment(), log=Path(folder) / "logs" / f"{name}.log")
    try:
        while kept.exit_code is None:  # by looks: a Ray task is cancelled between two steps of Python, and never within a wait
            kept.wait(_LOOK_UP_TASK)
        return kept.exit_code
    finally:
        kept.let_go()
        kept.wait(_ENDING)


def _progress(file: Path | None) -> tuple[int, int]:
    """Runs that are done, and how many there will be; zeros where it is not told yet."""
    with suppress(OSError, ValueError):
        done, of = file.read_text().split() if file is not None else ("0", "0")
        return int(done), int(of)
    return 0, 0


def _last_line(log: Path) -> str:
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    said = [line for line in lines if line.strip() and not line.startswith(("$ ", "keeper: "))]
    return shortened(said[-1], 300) if said else "it said nothing"


def main(arguments: Sequence[str] | None = None) -> None:
    """Arguments: those of the process, if None."""
    parser = argparse.ArgumentParser(prog="python -m fastvl_lab.grid.worker", description="Measure cells of a grid, one by one.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("name")
    parser.add_argument("--cores", default="")
    parser.add_argument("program", nargs=argparse.REMAINDER)
    given = parser.parse_args(arguments)
    if given.cores:
        os.sched_setaffinity(0, {int(core) for core in given.cores.split(",")})
    signal.signal(signal.SIGTERM, _stop)
    signal.signal(signal.SIGINT, _stop)
    Worker(given.folder, given.name, given.program).work()


def _stop(*_: object) -> None:
    for number in (signal.SIGTERM, signal.SIGINT):  # another, such as a keeper's, would keep it from saying that it has ended
        signal.signal(number, signal.SIG_IGN)
    raise _Stopped


if __name__ == "__main__":
    main()
