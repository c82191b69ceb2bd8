"""Workers meet in a folder: each cell is measured by one of them, whatever becomes of the others."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import time
from _thread import interrupt_main
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from threading import Timer
from typing import Any

import pytest

from fastvl_lab import SweepSettings
from fastvl_lab.errors import RequestError
from fastvl_lab.grid import cell
from fastvl_lab.grid.plan import Reference, of_mapping
from fastvl_lab.grid.rendezvous import MOST_VANISHED, Beat, Rendezvous, gone, prepare, read_plan, this_process
from fastvl_lab.grid.where import code_state
from fastvl_lab.grid.worker import Worker, work
from fastvl_lab.measure.sweep import SweepResult

HERE = Path(__file__).parent


def _program(**ways: Any) -> list[str]:
    return [sys.executable, "-I", "-S", str(HERE / "stub_cell.py"), json.dumps(ways)]


@pytest.fixture
def folder_of(tmp_path: Path) -> Callable[..., Path]:
    """Makes the folder of a grid with cells of these labels, which are their ids too."""

    def made(*labels: str, **times: float) -> Path:
        cells = {label: {"label": label} for label in labels}
        prepare(tmp_path, {"cells": cells, "cell_seconds": 60.0, "beat": 0.05, "stale": 60.0, **times})
        return tmp_path

    return made


def _ran(folder: Path) -> list[str]:
    return [line.split()[0] for line in (folder / "ran").read_text().splitlines()]


def test_a_cell_is_claimed_once_and_has_one_result(folder_of: Callable[..., Path]) -> None:
    rendezvous = Rendezvous(folder=folder_of("a"), stale=60.0)
    assert rendezvous.claim("a", "one", 0) == 1
    assert rendezvous.claim("a", "two", 0) is None
    assert rendezvous.claims() == {"a": 1}
    assert rendezvous.holds("a", 1)
    assert rendezvous.claim("a", "two", 1) == 2
    assert not rendezvous.holds("a", 1)
    assert rendezvous.publish("a", {"by": "two"})
    assert not rendezvous.publish("a", {"by": "one"})
    assert rendezvous.result("a") == {"by": "two"}
    assert rendezvous.results() == {"a"}
    assert not list(rendezvous.folder.glob("*/.*"))  # nothing that was written aside is left


def test_a_claim_is_stale_once_its_worker_stands_still_has_ended_or_is_gone(folder_of: Callable[..., Path]) -> None:
    rendezvous = Rendezvous(folder=folder_of("a"), stale=0.1)
    rendezvous.claim("a", "far", 0)
    elsewhere = Beat(worker="far", count=1, process="another-host boot 4026531836 17 99", doing="a")
    rendezvous.tell(elsewhere)
    assert not rendezvous.is_stale("a", 1)
    time.sleep(0.15)
    rendezvous.tell(replace(elsewhere, count=2))
    assert not rendezvous.is_stale("a", 1)  # it beats
    time.sleep(0.15)
    assert rendezvous.is_stale("a", 1)
    rendezvous.tell(replace(elsewhere, count=3, ended=True))
    assert rendezvous.is_stale("a", 1)

    with subprocess.Popen([sys.executable, "-I", "-S", "-c", "input()"], stdin=subprocess.PIPE) as process:
        machine = this_process().rsplit(" ", 2)[0]
        began = Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()[19]
        alive = f"{machine} {process.pid} {began}"
        assert not gone(alive)
        assert gone(f"{machine} {process.pid} 1")  # its id was another's before
        process.kill()
        process.wait()
        assert gone(alive)
    assert not gone(this_process())


def test_a_worker_measures_what_is_left_and_a_failed_cell_is_a_result_with_its_sentence(folder_of: Callable[..., Path]) -> None:
    folder = folder_of("a", "b", "c")
    Worker(folder, "first", _program(b="raises")).work()
    rendezvous = Rendezvous(folder=folder, stale=60.0)
    assert rendezvous.results() == {"a", "b", "c"}
    failed = rendezvous.result("b")
    assert failed is not None
    assert failed["error"].startswith("its process ended with exit code 1: ZeroDivisionError: surprise; its log is ")
    assert "Traceback" in Path(failed["error"].partition("its log is ")[2]).read_text()
    beat = rendezvous.beat("first")
    assert beat is not None
    assert beat.ended
    rendezvous.forget("b")
    Worker(folder, "second", _program()).work()
    again = rendezvous.result("b")
    assert again is not None
    assert (again["worker"], again["reference"]) == ("second", {"seconds": [0.01] * 9})
    assert sorted(_ran(folder)) == ["a", "b", "b", "c"]


def test_a_stuck_cell_is_ended_after_its_time_and_tried_once_more(folder_of: Callable[..., Path]) -> None:
    folder = folder_of("a", cell_seconds=0.3)
    Worker(folder, "only", _program(a="hangs")).work()
    found = Rendezvous(folder=folder, stale=60.0).result("a")
    assert found is not None
    assert found["error"].startswith("it took longer than its 0.3 seconds (cell_seconds), 2 times")
    log = Path(found["error"].partition("its log is ")[2]).read_text()
    assert [line[0] for line in log.splitlines() if "stub_cell" in line] == ["$", "$"]  # as it was started
    assert not list(folder.glob("*/.*"))


def test_a_worker_whose_cell_was_taken_lets_go_of_it(folder_of: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """One that was paused for longer than `stale`, and goes on."""
    folder = folder_of("a")
    other, told = Rendezvous(folder=folder, stale=60.0), Rendezvous.tell

    def taken_at_its_second_beat(self: Rendezvous, beat: Beat) -> None:
        told(self, beat)
        if beat.doing and other.claims() == {"a": 1}:
            other.claim("a", "other", 1)
            other.publish("a", {"by": "other"})

    monkeypatch.setattr(Rendezvous, "tell", taken_at_its_second_beat)
    Worker(folder, "paused", _program(a="hangs")).work()
    assert other.result("a") == {"by": "other"}


def test_a_cell_that_takes_every_worker_down_is_given_up(folder_of: Callable[..., Path]) -> None:
    folder = folder_of("a")
    rendezvous = Rendezvous(folder=folder, stale=60.0)
    no_more = f"{this_process().rpartition(' ')[0]} 1"  # what had the id of this process before
    for number in range(MOST_VANISHED):
        assert rendezvous.claim("a", f"lost-{number}", number)
        rendezvous.tell(Beat(worker=f"lost-{number}", count=1, process=no_more))
    Worker(folder, "last", _program(a="hangs")).work()
    found = rendezvous.result("a")
    assert found is not None
    assert found["error"] == f"{MOST_VANISHED} workers that measured it vanished"


def test_a_cell_whose_workers_were_stopped_time_and_again_is_measured_all_the_same(folder_of: Callable[..., Path]) -> None:
    """As on a cluster that takes its machines back."""
    folder = folder_of("a")
    rendezvous = Rendezvous(folder=folder, stale=60.0)
    for number in range(2 * MOST_VANISHED):
        assert rendezvous.claim("a", f"stopped-{number}", number)
        rendezvous.tell(Beat(worker=f"stopped-{number}", count=1, process="far", ended=True))
    Worker(folder, "last", _program()).work()
    assert "error" not in (rendezvous.result("a") or {"error": "none"})


def test_of_two_claims_one_is_made_also_where_nfs_loses_its_answer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    link = os.link

    def refused_the_second_time(*names: Any) -> None:
        link(*names)
        link(*names)

    monkeypatch.setattr(os, "link", refused_the_second_time)
    rendezvous = Rendezvous(folder=tmp_path, stale=60.0)
    assert rendezvous.claim("a", "mine", 0) == 1
    assert rendezvous.claim("a", "other", 0) is None
    assert [path.name for path in (tmp_path / "claims").iterdir()] == ["a.1"]


def test_a_cell_is_forked_by_a_worker_that_has_one_thread_and_has_touched_no_device(tmp_path: Path) -> None:
    """With as many threads as libraries like; what a forked cell gives is whole."""
    plan = of_mapping(
        {
            "checkpoints": ["tiny-qwen3-vl"],
            "recipes": ["baseline"],
            "image_sizes": [[56, 56]],
            "max_new_tokens": 2,
            "repeats": 1,
            "quiet": 0,
            "device": "cpu",
            "output_dir": str(tmp_path),
            "reference": {"repeats": 1},
        }
    )
    prepare(tmp_path, plan.to_dict())
    script = """
import os, sys, torch
from pathlib import Path
touched, worker, threads = [], os.getpid(), []
for name in ("init", "_lazy_init", "is_available", "device_count", "is_bf16_supported", "get_device_capability"):
    def asked(*given, name=name, real=getattr(torch.cuda, name), **more):
        if os.getpid() == worker:
            touched.append(name)
        return real(*given, **more)
    setattr(torch.cuda, name, asked)
os.register_at_fork(after_in_parent=lambda: threads.append(len(os.listdir("/proc/self/task"))))
from fastvl_lab.grid.worker import Worker, work
Worker(Path(sys.argv[1]), "only").work()
print(touched, threads, torch.get_num_threads() == len(os.sched_getaffinity(0)))
"""
    free = {name: value for name, value in os.environ.items() if name not in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS")}
    done = subprocess.run([sys.executable, "-c", script, str(tmp_path)], capture_output=True, text=True, check=False, env=free)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "[] [1] True\n"
    found = Rendezvous(folder=tmp_path, stale=60.0).result(plan.cells[0].id)
    assert found is not None
    assert found.get("errors") == [], found
    assert len(found["comparisons"]) == 1
    assert len(found["reference"]["seconds"]) == 1
    assert found["environment"]["threads"] == len(os.sched_getaffinity(0))
    log = (tmp_path / "logs" / f"{plan.cells[0].id}.1.log").read_text()
    assert log.startswith(f"$ {sys.executable} -m fastvl_lab.grid.cell {tmp_path} {plan.cells[0].id} ")  # as it is run by hand


@pytest.mark.alone
@pytest.mark.usefixtures("keyboard")
def test_a_clusters_task_that_is_cancelled_ends_its_worker_at_once(
    folder_of: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As Ray cancels a task: it interrupts the interpreter, which wakes no wait of the system's."""
    folder = folder_of("a")
    monkeypatch.setattr("fastvl_lab.grid.worker.command", lambda *_, **__: ["sleep", "30"])
    began = time.monotonic()
    Timer(0.3, interrupt_main).start()
    with pytest.raises(KeyboardInterrupt):
        work(str(folder), "task", ())
    assert time.monotonic() - began < 15


def test_a_folder_that_cannot_be_written_or_is_no_grid_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="output_dir '/dev/null/x' cannot be written: Not a directory"):
        prepare(Path("/dev/null/x"), {})
    with pytest.raises(RequestError, match=r"is no folder of a grid: it has no plan\.json"):
        read_plan(tmp_path)


@pytest.mark.parametrize("seeds", [(0, 1), pytest.param(range(10), marks=pytest.mark.nightly)], ids=["two seeds", "ten seeds"])
def test_of_workers_killed_at_random_moments_no_cell_is_lost_and_none_counts_twice(tmp_path: Path, seeds: Sequence[int]) -> None:
    """By SIGKILL."""
    command = [sys.executable, str(HERE / "killed_workers.py"), str(tmp_path), *map(str, seeds)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert [seed["seed"] for seed in found] == list(seeds)
    for seed in found:
        assert sorted(seed["claims"]) == seed["cells"]  # each has a result, and a file is one
        assert all(1 <= claims <= 4 for claims in seed["claims"].values())
        assert sum(seed["ran"].values()) <= len(seed["cells"]) + 3  # at most what was in flight ran again
    assert any(max(seed["claims"].values()) > 1 for seed in found)  # somebody was killed at work


def test_progress_is_not_written_after_each_request_of_a_load_that_is_timed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sweep_settings: Callable[..., SweepSettings]
) -> None:
    settings, written = sweep_settings(device="cpu"), list[bytes]()

    def many(_: SweepSettings, *, progress: bool, on_run: Callable[[], object]) -> SweepResult:
        for _ in range(1000):
            on_run()
        return SweepResult(settings=settings, environment={}, points=(), errors=())

    monkeypatch.setattr(cell, "sweep", many)
    monkeypatch.setattr(cell, "_reference", lambda *_: {})
    monkeypatch.setattr(cell, "write_whole", lambda _, data: written.append(data))
    cell.measured(dataclasses.asdict(settings), Reference(), tmp_path)
    assert 1 <= len(written) < 10


def test_the_state_of_the_code_is_not_that_of_a_repository_it_is_installed_in(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / ".venv" / "fastvl_lab"
    package.mkdir(parents=True)
    (package / "__init__.py").touch()
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b"]
    for arguments in (["init", "-q"], ["commit", "-q", "--allow-empty", "-m", "of somebody else"]):
        subprocess.run([*git, *arguments], check=True)
    monkeypatch.setattr("fastvl_lab.__file__", str(package / "__init__.py"))
    assert code_state() in (*_versions(), "unknown")
    subprocess.run([*git, "add", "-A"], check=True)
    assert code_state().endswith("-dirty")


def _versions() -> list[str]:
    with suppress(PackageNotFoundError):
        return [version("fastvl-lab")]
    return []


def test_a_damaged_claim_or_heartbeat_is_nobodys_and_a_damaged_result_is_named(folder_of: Callable[..., Path]) -> None:
    """As a host that loses its power leaves files."""
    folder = folder_of("a")
    rendezvous = Rendezvous(folder=folder, stale=0.0)
    (folder / "claims" / "a.1").touch()
    (folder / "workers" / "far.json").write_text('{"worker"')
    assert rendezvous.beat("far") is None
    time.sleep(0.01)
    assert rendezvous.is_stale("a", 1) or rendezvous.is_stale("a", 1)
    (folder / "results" / "a.json").touch()
    with pytest.raises(RequestError, match=r"results/a\.json is damaged; remove it, and its cell is measured again"):
        rendezvous.result("a")


def test_a_worker_that_is_told_to_end_is_not_kept_from_saying_so() -> None:
    """By a second signal: SLURM sends one to each process, and the keeper another."""
    script = """
import os, signal
from fastvl_lab.grid import worker
signal.signal(signal.SIGTERM, worker._stop)
try:
    os.kill(os.getpid(), signal.SIGTERM)
    signal.pause()
except worker._Stopped:
    os.kill(os.getpid(), signal.SIGTERM)
    print("told")
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert (done.stdout, done.stderr) == ("told\n", "")
