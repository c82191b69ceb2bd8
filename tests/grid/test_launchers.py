"""Launchers give the same rows for the same plan, resume what was left, and end all that they started."""

from __future__ import annotations

import importlib.util
import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from threading import Thread
from types import SimpleNamespace
from typing import Any

import pytest

from fastvl_lab import FastvlError, RequestError, SweepSettings, sweep
from fastvl_lab.errors import DeviceError
from fastvl_lab.grid.launchers import Order, how_many, start
from fastvl_lab.grid.merge import GridResult
from fastvl_lab.grid.plan import Plan, of_mapping
from fastvl_lab.grid.run import run
from fastvl_lab.measure.sweep import LAUNCHERS, SweepResult, sweep as alone

STUB = Path(__file__).with_name("stub_cell.py")
SIZES = [[56, 56], [84, 56], [112, 56], [56, 84], [56, 112], [84, 84]]
PACKAGES = {"local": "fastvl_lab", "ray": "ray", "submitit": "submitit"}
OPTIONS: dict[str, dict[str, Any]] = {"submitit": {"cluster": "local"}}
# Two workers need a core each, and a test may be given one.
WORKERS = min(2, len(os.sched_getaffinity(0)))


def _program(**ways: Any) -> list[str]:
    return [sys.executable, "-I", "-S", str(STUB), json.dumps(ways)]


SMALL = {
    "checkpoints": ["tiny-qwen2.5-vl", "tiny-qwen3-vl"],
    "recipes": ["transformers", "baseline"],
    "image_sizes": SIZES,
    "max_new_tokens": 2,
    "repeats": 1,
    "quiet": 0,
    "device": "cpu",
}


@pytest.fixture
def plan_of(tmp_path: Path) -> Callable[..., Plan]:
    """Makes the plan of twelve cells, with what a test changes."""

    def made(**changes: Any) -> Plan:
        own = {"output_dir": str(tmp_path / "run"), "workers": WORKERS, "beat": 0.1, "reference": {"repeats": 2}}
        return of_mapping(SMALL | own | changes)

    return made


@pytest.fixture(scope="session")
def in_one_process() -> SweepResult:
    """The twelve cells as a sweep without a launcher measures them."""
    return alone(SweepSettings(**SMALL), progress=False)


def _installed(launcher: str) -> None:
    if importlib.util.find_spec(PACKAGES[launcher]) is None:
        pytest.skip(f"needs the package {PACKAGES[launcher]}, which is not installed")


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_a_launcher_has_every_cell_measured_once(launcher: str, plan_of: Callable[..., Plan], tmp_path: Path) -> None:
    _installed(launcher)
    plan = plan_of(launcher=launcher, launcher_options=OPTIONS.get(launcher, {}))
    told: list[int] = []
    result = run(plan, program=_program(), progress=False, on_cell=lambda so_far: told.append(len(so_far.cells)))
    assert [(row["cell"], row["state"], row["claims"]) for row in result.cells] == [(cell.id, "done", 1) for cell in plan.cells]
    assert told
    assert len((tmp_path / "run" / "ran").read_text().splitlines()) == 12
    assert result.points == ()  # stubs measure nothing
    run(plan, program=_program(), progress=False)
    assert len((tmp_path / "run" / "ran").read_text().splitlines()) == 12  # nothing was left to do


class _StandIn:
    """As much of Ray as the launcher asks for, with threads for tasks: it shows what the launcher asks, where no cluster starts."""

    def __init__(self) -> None:
        self.asked: list[str] = []

    def is_initialized(self) -> bool:
        return False

    def init(self, **_: Any) -> None:
        self.asked.append("init")

    def remote(self, function: Callable[..., Any]) -> Any:
        def options(**given: Any) -> Any:
            self.asked.append(f"num_cpus={given['num_cpus']} num_gpus={given['num_gpus']} max_retries={given['max_retries']}")
            return SimpleNamespace(remote=lambda *arguments: self._started(function, arguments))

        return SimpleNamespace(options=options)

    def _started(self, function: Callable[..., Any], arguments: Sequence[Any]) -> Thread:
        thread = Thread(target=function, args=arguments)
        thread.start()
        return thread

    def wait(self, tasks: Sequence[Thread], *, num_returns: int, timeout: float) -> tuple[list[Thread], list[Thread]]:
        assert num_returns == len(tasks)
        for task in tasks:
            task.join(timeout)
        return [task for task in tasks if not task.is_alive()], [task for task in tasks if task.is_alive()]

    def cancel(self, task: Thread) -> None:
        self.asked.append("cancel")

    def shutdown(self) -> None:
        self.asked.append("shutdown")


def test_ray_is_asked_for_a_task_a_worker(plan_of: Callable[..., Plan], monkeypatch: pytest.MonkeyPatch) -> None:
    ray = _StandIn()
    monkeypatch.setattr("fastvl_lab.grid.launchers.require", lambda *_: ray)
    plan = plan_of(launcher="ray", image_sizes=SIZES[:2], launcher_options={"num_cpus": 2})
    assert {row["state"] for row in run(plan, program=_program(), progress=False).cells} == {"done"}
    tasks = ["num_cpus=2 num_gpus=0 max_retries=0"]
    assert ray.asked == [*tasks, "init", *["cancel"] * WORKERS, "shutdown"]


def test_options_that_a_launcher_does_not_know_are_one_sentence_and_start_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuses(**given: Any) -> Any:
        raise NameError(f"no option is called {', '.join(given)}")

    ray = _StandIn()
    ray.remote = lambda _: SimpleNamespace(options=refuses)  # type: ignore[method-assign]
    submitit = SimpleNamespace(AutoExecutor=lambda **_: SimpleNamespace(update_parameters=refuses))
    for launcher, package in (("ray", ray), ("submitit", submitit)):
        monkeypatch.setattr("fastvl_lab.grid.launchers.require", lambda *_, package=package: package)
        options = OPTIONS.get(launcher, {}) | {"num_cpu": 2}
        with pytest.raises(RequestError, match=r"launcher_options: NameError: no option is called .*num_cpu"):
            start(launcher, Order(folder=tmp_path, names=["a"], cuda=False, options=options))
    assert ray.asked == []


class _Job:
    """A job of SLURM that ends some time after it was cancelled."""

    def __init__(self) -> None:
        self.cancelled_at = math.inf

    def cancel(self, check: bool = True) -> None:
        assert not check, "one that cannot be cancelled would leave the others"
        self.cancelled_at = time.monotonic()

    def done(self) -> bool:
        return time.monotonic() - self.cancelled_at > 0.3


def test_jobs_are_waited_for_once_they_are_cancelled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    jobs = [_Job(), _Job()]
    executor = SimpleNamespace(update_parameters=lambda **_: None, map_array=lambda *_: jobs)
    submitit = SimpleNamespace(AutoExecutor=lambda **_: executor)
    monkeypatch.setattr("fastvl_lab.grid.launchers.require", lambda *_: submitit)
    launched = start("submitit", Order(folder=tmp_path, names=["a", "b"], cuda=False, options={"cluster": "local"}))
    assert launched.alive() == 2
    launched.stop()
    assert launched.alive() == 0


def test_without_an_output_dir_the_logs_that_an_error_names_stay(
    sweep_settings: Callable[..., SweepSettings], monkeypatch: pytest.MonkeyPatch
) -> None:
    folders: list[Path] = []

    def fails(plan: Plan, **_: Any) -> GridResult:
        folders.append(Path(plan.settings.output_dir))
        if len(folders) == 2:
            raise KeyboardInterrupt
        raise FastvlError(f"all workers ended; what they said is in {folders[-1]}")

    monkeypatch.setattr("fastvl_lab.grid.run.run", fails)
    with pytest.raises(FastvlError, match="what they said is in"):
        sweep(sweep_settings(), launcher="local")
    assert folders[0].is_dir()
    folders[0].rmdir()
    with pytest.raises(KeyboardInterrupt):
        sweep(sweep_settings(), launcher="local")
    assert not folders[1].exists()


def test_a_failed_cell_is_a_row_and_is_measured_again_only_when_asked_for(plan_of: Callable[..., Plan]) -> None:
    plan = plan_of(image_sizes=SIZES[:2])
    result = run(plan, program=_program(**{"qwen3-vl · 56": "raises", "qwen2.5-vl · 56": "fails"}), progress=False)
    assert [row["state"] for row in result.cells] == ["failed in part", "done", "failed", "done"]
    assert [(error["checkpoint"], error["image"], error["engine"]) for error in result.errors] == [
        ("tiny-qwen2.5-vl", "56×56", "baseline"),
        ("tiny-qwen3-vl", "56×56", ""),
    ]
    assert "ZeroDivisionError: surprise" in result.errors[1]["error"]
    assert [row["state"] for row in run(plan, program=_program(), progress=False).cells] == [row["state"] for row in result.cells]
    assert run(plan, program=_program(), progress=False, again=True).errors == ()


def test_an_interruption_ends_all_workers_and_the_next_start_goes_on(plan_of: Callable[..., Plan], tmp_path: Path) -> None:
    plan = plan_of()

    def interrupted(so_far: GridResult) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(plan, program=_program(seconds=0.05), progress=False, on_cell=interrupted)
    left = [entry for entry in Path("/proc").iterdir() if entry.name.isdigit() and _is_of(entry, str(tmp_path))]
    assert left == []
    began = time.monotonic()
    result = run(plan, program=_program(), progress=False)
    assert time.monotonic() - began < plan.stale / 4  # what ended workers had is taken back at once
    assert {row["state"] for row in result.cells} == {"done"}
    ran = len((tmp_path / "run" / "ran").read_text().splitlines())
    assert 12 <= ran <= 12 + WORKERS


def _is_of(process: Path, word: str) -> bool:
    try:
        return word.encode() in (process / "cmdline").read_bytes()
    except OSError:
        return False


def test_workers_that_all_end_early_are_an_error_that_says_where_to_look(plan_of: Callable[..., Plan], tmp_path: Path) -> None:
    def kill(_: GridResult) -> None:
        for file in (tmp_path / "run" / "workers").glob("local-*.json"):
            os.kill(int(json.loads(file.read_text())["process"].split()[-2]), signal.SIGKILL)

    with pytest.raises(FastvlError, match=r"all workers ended, and \d+ of 12 cells are not measured; .*running again goes on"):
        run(plan_of(), program=_program(seconds=0.1), progress=False, on_cell=kill)


def test_each_local_worker_has_its_share_of_the_cores(tmp_path: Path, plan_of: Callable[..., Plan]) -> None:
    if WORKERS < 2:
        pytest.skip("needs two cores")
    program = [sys.executable, "-c", "import os, sys; print(sorted(os.sched_getaffinity(0)))"]
    run(plan_of(), program=program, progress=False)
    said = {line for log in (tmp_path / "run" / "logs").iterdir() for line in log.read_text().splitlines() if line.startswith("[")}
    shares = [set(json.loads(line)) for line in said]
    assert len(shares) == 2
    assert not shares[0] & shares[1]


def test_how_many_workers_there_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-a, GPU-b,GPU-c,")
    assert how_many("local", 0, False, 12) == 1
    assert how_many("local", 0, True, 12) == 3
    assert how_many("local", 0, True, 2) == 2
    assert how_many("ray", 8, True, 12) == 8
    with pytest.raises(DeviceError, match="workers is 4, and this machine has 3 CUDA devices, of which each worker takes one"):
        how_many("local", 4, True, 12)
    with pytest.raises(DeviceError, match="workers is 9, and this machine has 8 cores"):
        how_many("local", 9, False, 12)
    with pytest.raises(RequestError, match="workers is 0; say how many launcher 'submitit' shall start"):
        how_many("submitit", 0, True, 12)


def test_each_local_worker_sees_one_card(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    seen = []
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-a, GPU-b")
    monkeypatch.setattr("fastvl_lab.grid.launchers.Kept", lambda line, *, env, log: seen.append(env["CUDA_VISIBLE_DEVICES"]))
    start("local", Order(folder=tmp_path, names=["a", "b"], cuda=True))
    assert seen == ["GPU-a", "GPU-b"]


def test_a_launcher_says_what_it_lacks(tmp_path: Path, sweep_settings: Callable[..., SweepSettings]) -> None:
    with pytest.raises(RequestError, match="launcher_options has partition, and launcher 'local' takes none"):
        start("local", Order(folder=tmp_path, names=["a"], cuda=False, options={"partition": "gpu"}))
    with pytest.raises(RequestError, match="output_dir is empty; launcher 'ray' needs a folder that all hosts share"):
        sweep(sweep_settings(), launcher="ray", workers=2)
    with pytest.raises(RequestError, match="launcher is 'rays'; the choices are local, ray, submitit, or empty"):
        sweep(sweep_settings(), launcher="rays")
    with pytest.raises(RequestError, match="workers is 2, and launcher is empty"):
        sweep(sweep_settings(), workers=2)
    for launcher, extra in (("ray", "ray"), ("submitit", "slurm")):
        if importlib.util.find_spec(PACKAGES[launcher]) is None:
            with pytest.raises(FastvlError, match=rf"pip install 'fastvl-lab\[{extra}\]'"):
                start(launcher, Order(folder=tmp_path, names=["a"], cuda=False))


@pytest.mark.nightly
@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_twelve_cells_have_the_same_rows_whoever_starts_their_workers(
    launcher: str, plan_of: Callable[..., Plan], in_one_process: SweepResult
) -> None:
    """Ids, tokens and parity are those of a sweep in one process."""
    _installed(launcher)
    plan = plan_of(launcher=launcher, launcher_options=OPTIONS.get(launcher, {}))
    result = run(plan, progress=False)
    assert result.errors == ()
    assert [point.environment["cell"] for point in result.points] == [cell.id for cell in plan.cells]
    here = in_one_process
    keys = ("checkpoint", "image", "engine", "visual_tokens", "tokens_equal", "parity_says")
    assert [[row[key] for key in keys] for row in result.summary()] == [[row[key] for key in keys] for row in here.summary()]
    tokens = [[run.tokens for run in map(point.comparison.representative, point.comparison.engines)] for point in result.points]
    assert tokens == [[run.tokens for run in map(p.comparison.representative, p.comparison.engines)] for p in here.points]
    for row in result.samples():
        assert all(row[name] for name in ("host", "card", "code", "torch", "transformers", "threads", "cores"))
        assert {"driver", "card_id", "others_on_card"} <= row.keys()
    assert [host.cells for host in result.hosts] == [12]
    assert {"results.parquet", "result.json", "report.html", "record.json"} <= {path.name for path in result.write()}


@pytest.mark.nightly
@pytest.mark.alone
def test_a_ctrl_c_ends_the_command_and_the_next_start_goes_on(plan_of: Callable[..., Plan], tmp_path: Path) -> None:
    plan = tmp_path / "plan.yaml"
    plan.write_text(
        "checkpoints: [tiny-qwen3-vl]\nrecipes: [baseline]\nimage_sizes: [[56, 56], [84, 56], [56, 84]]\nmax_new_tokens: 2\n"
        f"repeats: 1\ndevice: cpu\nbeat: 0.2\noutput_dir: {tmp_path / 'run'}\n"
    )
    command = [sys.executable, "-m", "fastvl_lab.measure.sweep", str(plan)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        while not list((tmp_path / "run").glob("results/*.json")) and process.poll() is None:
            time.sleep(0.1)
        process.send_signal(signal.SIGINT)
        said = process.communicate(timeout=60)[1]
    assert process.returncode == 130
    assert "stopped, and every worker with it; running again goes on" in said
    assert [entry for entry in Path("/proc").iterdir() if entry.name.isdigit() and _is_of(entry, str(tmp_path))] == []
    kept = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "run" / "results").glob("*.json")}
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "3 of 3 cells are done" in done.stdout
    assert all((tmp_path / "run" / "results" / name).stat().st_mtime_ns == moment for name, moment in kept.items())
