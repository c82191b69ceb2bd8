"""The shared folder where workers meet: who has which cell, who is alive, and what was measured. Of the standard library alone.

    plan.json          the cells by id, in the order in which they are taken, and the plan's times
    claims/ID.N        the Nth claim of a cell, made once and never changed: which worker has it
    workers/NAME.json  a worker's heartbeat: a number that counts up, what it does, and whether it has ended
    results/ID.json    what came of a cell, made once: of two workers who finish one cell the second is told that it was late
    logs/              what the processes of workers and cells said

A claim is stale when its worker has ended, when its process is gone and this is the same machine, or when its heartbeat has stood
still for `stale` seconds of the observer's own clock: clocks of hosts are compared nowhere. A stale claim is taken back by making
the next, which one worker alone can.
"""

from __future__ import annotations

import json
import os
import platform
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fastvl_lab.errors import RequestError
from fastvl_lab.whole import write_whole

PLAN = "plan.json"

# Workers that may vanish over a cell: one that takes its worker down each time would take all of them.
MOST_VANISHED = 5


@dataclass(frozen=True, kw_only=True)
class Beat:
    """What a worker last told. process: `this_process` of it. doing: its cell's id, "" between two. done: runs of it, of `of`."""

    worker: str
    count: int
    process: str
    doing: str = ""
    done: int = 0
    of: int = 0
    ended: bool = False


@dataclass(kw_only=True)
class Rendezvous:
    """One participant's view of the folder. stale: seconds without a heartbeat after which a worker counts as gone."""

    folder: Path
    stale: float
    _seen: dict[str, tuple[int, float]] = field(default_factory=dict)  # worker -> its count, and when that was new to us

    def results(self) -> set[str]:
        """Ids of the cells that something came of."""
        return {path.stem for path in _files(self.folder / "results", ".json")}

    def claims(self) -> dict[str, int]:
        """Cell -> the number of its last claim."""
        last: dict[str, int] = {}
        for path in _files(self.folder / "claims"):
            cell, _, number = path.name.partition(".")
            last[cell] = max(last.get(cell, 0), int(number))
        return last

    def claim(self, cell: str, worker: str, last: int) -> int | None:
        """Claim a cell whose last claim is the number `last`, 0 for none: the number of ours, or None where another was faster."""
        made = write_whole(self._claim_file(cell, last + 1), json.dumps({"worker": worker}).encode(), replace=False)
        return last + 1 if made else None

    def is_stale(self, cell: str, number: int) -> bool:
        """Whether nobody works at a claim any more."""
        claim = _json(self._claim_file(cell, number))
        worker = str(claim.get("worker", ""))
        beat = self.beat(worker)
        count = -1 if beat is None else beat.count
        if beat is not None and (beat.ended or gone(beat.process)):
            return True
        if self._seen.get(worker, (None, 0.0))[0] != count:
            self._seen[worker] = count, time.monotonic()
        return time.monotonic() - self._seen[worker][1] > self.stale

    def vanished(self, cell: str, last: int) -> int:
        """How many of a cell's claims, up to the number `last`, are of workers that never told that they ended."""
        claims = (_json(self._claim_file(cell, number)) for number in range(1, last + 1))
        beats = [self.beat(str(claim.get("worker", ""))) for claim in claims]
        return sum(beat is None or not beat.ended for beat in beats)

    def holds(self, cell: str, number: int) -> bool:
        """Whether a claim is still the last one of its cell, which has no result yet."""
        return not (self._claim_file(cell, number + 1).exists() or self._result_file(cell).exists())

    def tell(self, beat: Beat) -> None:
        write_whole(self.folder / "workers" / f"{beat.worker}.json", json.dumps(vars(beat)).encode())

    def beat(self, worker: str) -> Beat | None:
        told = _json(self.folder / "workers" / f"{worker}.json")
        return Beat(**told) if told else None

    def publish(self, cell: str, result: Mapping[str, Any]) -> bool:
        """Keep what came of a cell; whether it is the first."""
        return write_whole(self._result_file(cell), json.dumps(result).encode(), replace=False)

    def result(self, cell: str) -> dict[str, Any] | None:
        """What came of a cell, None as yet; raises `RequestError` for a file that is damaged."""
        path = self._result_file(cell)
        try:
            found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return None
        except ValueError:
            raise RequestError(f"{path} is damaged; remove it, and its cell is measured again") from None
        return found

    def forget(self, cell: str) -> None:
        """Have a cell measured again: its result and its claims go. Only while no worker is here."""
        for path in [*self.folder.glob(f"claims/{cell}.*"), self._result_file(cell)]:
            path.unlink(missing_ok=True)

    def _claim_file(self, cell: str, number: int) -> Path:
        return self.folder / "claims" / f"{cell}.{number}"

    def _result_file(self, cell: str) -> Path:
        return self.folder / "results" / f"{cell}.json"


def prepare(folder: Path, plan: Mapping[str, Any]) -> None:
    """Make the folder and write the plan into it; raises `RequestError` for a folder that cannot be written."""
    try:
        for name in ("claims", "workers", "results", "logs"):
            (folder / name).mkdir(parents=True, exist_ok=True)
        write_whole(folder / PLAN, json.dumps(plan, indent=1).encode())
    except OSError as error:
        raise RequestError(f"output_dir {str(folder)!r} cannot be written: {error.strerror or error}") from None


def read_plan(folder: Path) -> dict[str, Any]:
    """The plan in the folder; raises `RequestError` where there is none."""
    plan = _json(folder / PLAN)
    if not plan:
        raise RequestError(f"{str(folder)!r} is no folder of a grid: it has no {PLAN}")
    return plan


def this_process() -> str:
    """This process, as `gone` knows it: its machine, its id, and when it began."""
    return f"{_machine()} {os.getpid()} {_began(os.getpid())}"


def gone(process: str) -> bool:
    """Whether a process of this very machine is no more; False of another machine's, of which that is not known."""
    machine, pid, began = process.rsplit(" ", 2)
    return " " in machine and machine == _machine() and _began(int(pid)) != began


def _machine() -> str:
    """Its name, its boot, and the namespace of its processes' ids; elsewhere than on Linux its name alone, which tells nothing."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{platform.node()} {boot} {os.stat('/proc/self/ns/pid').st_ino}"
    except OSError:
        return platform.node()


def _began(pid: int) -> str:
    """When a process began, in ticks since the boot; "" for none that runs."""
    with suppress(OSError):
        state, *fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return "" if state in "ZX" else fields[18]
    return ""


def _files(folder: Path, suffix: str = "") -> list[Path]:
    """Whole files in a folder; those that are still being written begin with a dot."""
    with suppress(FileNotFoundError):
        return [folder / name for name in os.listdir(folder) if not name.startswith(".") and name.endswith(suffix)]
    return []


def _json(path: Path) -> dict[str, Any]:
    """Nothing of a file that is not there, or damaged, as a host that loses its power may leave it."""
    with suppress(FileNotFoundError, ValueError):
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return found
    return {}
