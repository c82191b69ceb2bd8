"""Quiet: what others use is told from what we use, waiting is bounded, and what was disturbed counts for nothing."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import threading
import time
import types
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from statistics import median

import pandas
import pytest
import torch

from fastvl_lab import Lab, Request, RequestError, SweepSettings, attribute, compare, photo, sweep
from fastvl_lab.measure import quiet
from fastvl_lab.measure.compare import converse
from fastvl_lab.measure.quiet import Quiet, Reading, Watch, between, others_on_gpu
from fastvl_lab.measure.samples import RunSample, time_rounds
from fastvl_lab.view import sample_dots


def _reading(at: float, *, idle: float | None, own: float = 0.0, cores: int = 2, **waited: float) -> Reading:
    return Reading(at=at, cores=cores, idle=idle, grain=0.01, own=own, waited=waited)


@pytest.mark.parametrize(
    ("idle", "own", "waited", "others", "disturbed"),
    [
        (0.100, 0.100, 0.000, 0.0, False),  # one thread, alone on two cores for 100 ms
        (0.000, 0.200, 0.000, 0.0, False),  # two threads
        (0.000, 0.200, 0.090, 0.0, False),  # four threads of ours that wait for one another
        (0.090, 0.100, 0.000, 0.1, False),  # within the tick of the clock
        (0.110, 0.100, 0.000, 0.0, False),  # less than nothing: the tick again
        (0.000, 0.100, 0.004, 1.0, True),  # a neighbour has the other core, so that memory and clock speed are shared
        (0.000, 0.100, 0.050, 1.0, True),
        (0.050, 0.100, 0.030, 0.5, True),  # stolen by the host of a virtual machine: neither idle nor ours
        (0.070, 0.100, 0.018, 0.3, True),  # little, and all of it while a thread of ours waited
        (0.070, 0.100, 0.000, 0.3, False),  # the same, and nobody waited
        (None, 0.100, 0.000, None, None),
    ],
)
def test_what_others_use_is_told_from_what_we_use(
    idle: float | None, own: float, waited: float, others: float | None, disturbed: bool | None
) -> None:
    before = _reading(5.0, idle=None if idle is None else 7.0, own=3.0, a=1.0)
    after = _reading(5.1, idle=None if idle is None else 7.0 + idle, own=3.0 + own, a=1.0 + waited, b=0.001)
    use = between(before, after, 0.125)
    assert use.others == (None if others is None else pytest.approx(others, abs=1e-6))
    assert use.disturbed is disturbed
    assert "not known" in use.why if others is None else f"others used {others:.1f} of 2 cores" in use.why


def test_the_systems_clocks_are_read_and_stolen_time_is_not_idle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As `man proc` lays /proc/stat out: user, nice, system, idle, iowait, irq, softirq, steal, guest, guest_nice."""
    monkeypatch.setattr(quiet, "PROC", tmp_path)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1})
    monkeypatch.setattr(os, "sysconf", lambda _: 100)
    assert quiet.reading().idle is None
    assert between(quiet.reading(), quiet.reading(), 0.1).disturbed is None
    lines = ["cpu  500 0 100 {} 20 0 0 {} 0 0", "cpu0 250 0 50 {} 10 0 0 0 0 0", "cpu1 250 0 50 {} 10 0 0 0 0 0", "intr 1 2 3"]

    def write(idle: int, steal: int) -> None:
        half = idle // 2
        (tmp_path / "stat").write_text("\n".join(lines).format(idle, steal, half, half))

    def schedule(process: str, thread: str, ran: int, waited: int) -> None:
        folder = tmp_path / process / "task" / thread
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "schedstat").write_text(f"{ran} {waited} 17\n")

    (tmp_path / "stat").write_text("cpu  0 0 0 0 0 0 0 0 0 0\ncpu0 0 0 0 0 0 0 0 0 0 0\n")
    assert quiet.reading().idle is None  # as gVisor has it
    write(1000, 0)
    schedule("self", "11", 5_000_000_000, 2_000_000)
    schedule("77", "78", 40_000_000, 1_000_000)
    monkeypatch.setattr(time, "process_time", lambda: 4.0)
    first = quiet.reading()
    assert (first.cores, first.idle, first.grain, first.own) == (2, 10.2, 0.01, 4.0)
    assert first.waited == {"11": 0.002}
    engine = quiet.reading([77, 99])  # 99 has ended
    assert engine.own == pytest.approx(4.04)
    assert engine.waited == {"11": 0.002, "78": 0.001}
    write(1010, 10)  # of 0.2 s on two cores the host took 0.1
    after = dataclasses.replace(quiet.reading(), at=first.at + 0.1)
    use = between(first, after, 0.125)
    assert use.disturbed
    assert use.others == pytest.approx(1.0)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {1})
    alone = quiet.reading()
    assert (alone.cores, alone.idle) == (1, 5.15)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_this_machine_tells() -> None:
    before = quiet.reading()
    until = time.process_time() + 0.05
    while time.process_time() < until:
        pass
    after = quiet.reading()
    assert after.own - before.own >= 0.05
    use = between(before, after, 0.125)
    assert use.others is not None
    assert use.waited is not None
    assert 0 <= use.others <= use.cores + 1


class Machine:
    """Two cores in play, of which others use so many; `reading` and `pause` stand in for the real ones."""

    def __init__(self, others: Callable[[float], float]) -> None:
        self.now, self.idle, self.own, self.others, self.paused = 0.0, 0.0, 0.0, others, 0.0

    def reading(self, processes: Sequence[int] = ()) -> Reading:
        return _reading(self.now, idle=self.idle, own=self.own)

    def passes(self, seconds: float, own: float = 0.0) -> None:
        self.idle += (2 - self.others(self.now) - own) * seconds
        self.own += own * seconds
        self.now += seconds

    def pause(self, seconds: float, stop: threading.Event | None) -> bool:
        self.passes(seconds)
        self.paused += seconds
        return stop is not None and stop.is_set()

    def work(self) -> str:
        self.passes(0.04, own=1.0)
        return "done"


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[float], float]], Machine]:
    def make(others: Callable[[float], float]) -> Machine:
        made = Machine(others)
        monkeypatch.delenv(quiet.VARIABLE, raising=False)
        monkeypatch.setattr(quiet, "reading", made.reading)
        monkeypatch.setattr(quiet, "pause", made.pause)
        return made

    return make


def test_on_a_quiet_machine_a_window_is_all_that_is_waited(machine: Callable[..., Machine]) -> None:
    played, watch = machine(lambda now: 0.0), Watch(Quiet())
    for _ in range(20):
        ((result, use),) = watch.measured(played.work)
        assert (result, use and use.disturbed) == ("done", False)
    assert played.paused == pytest.approx(20 * 0.05)
    assert watch.notes() == ()


def test_a_run_waits_until_the_neighbour_sleeps(machine: Callable[..., Machine]) -> None:
    played, watch = machine(lambda now: 2.0 if now < 1.2 else 0.0), Watch(Quiet())
    ((_, use),) = watch.measured(played.work)
    assert use is not None
    assert use.disturbed is False
    assert 1.2 <= played.paused <= 1.35
    assert watch.notes() == ()


@pytest.mark.parametrize(("wait", "total"), [(0.5, 2.0), (10.0, 1.0), (0.3, 60.0)])
def test_waiting_and_measuring_again_are_bounded(machine: Callable[..., Machine], wait: float, total: float) -> None:
    played, runs = machine(lambda now: 1.0), 10
    watch = Watch(Quiet(wait=wait, total=total, again=2))
    made = [use for _ in range(runs) for _, use in watch.measured(played.work)]
    assert all(use is not None and use.disturbed for use in made)
    assert runs <= len(made) <= 3 * runs
    again = (len(made) - runs) * 0.04
    assert played.paused <= (wait + 0.05) * len(made)
    assert played.paused + again <= total + 0.05 * len(made) + 0.04
    (note,) = watch.notes()
    assert "quiet never came in" in note
    assert "others used 1.0 of 2 cores" in note


def test_a_disturbed_run_is_measured_again_until_it_is_not(machine: Callable[..., Machine]) -> None:
    played = machine(lambda now: 1.5 if 0.04 < now < 0.08 else 0.0)
    first, second = Watch(Quiet()).measured(played.work)
    assert (first[1] and first[1].disturbed, second[1] and second[1].disturbed) == (True, False)
    played = machine(lambda now: 1.5 if 0.04 < now < 0.08 else 0.0)
    assert len(list(Watch(Quiet()).measured(played.work, again=False))) == 1


def test_no_wait_still_judges_and_nothing_is_watched_where_it_is_off(
    machine: Callable[..., Machine], monkeypatch: pytest.MonkeyPatch
) -> None:
    played = machine(lambda now: 1.0)
    ((_, use),) = Watch(Quiet(total=0.0)).measured(played.work)
    assert use is not None
    assert use.disturbed
    assert played.paused == 0
    ((_, use),) = Watch(None).measured(played.work)
    assert use is None
    monkeypatch.setenv(quiet.VARIABLE, "off")
    ((_, use),) = Watch(Quiet()).measured(played.work)
    assert use is None
    assert played.paused == 0
    monkeypatch.setenv(quiet.VARIABLE, "perhaps")
    with pytest.raises(RequestError, match="FASTVL_LAB_QUIET is 'perhaps'; the choices are on, off"):
        Watch(Quiet())


@pytest.mark.parametrize("given", [60, True])
def test_seconds_are_no_quiet(given: int) -> None:
    with pytest.raises(RequestError, match=rf"quiet is {given}; give a fastvl_lab.Quiet, such as Quiet\(total=60\), or None"):
        Watch(given)  # type: ignore[arg-type]


def test_an_engine_whose_processes_are_not_known_is_waited_for_and_not_judged(machine: Callable[..., Machine]) -> None:
    played = machine(lambda now: 2.0 if now < 0.5 else 0.0)
    ((_, use),) = Watch(Quiet()).measured(played.work, None)
    assert use is not None
    assert (use.disturbed, use.others) == (None, None)
    assert played.paused >= 0.5


def test_waiting_ends_when_it_is_told_to(machine: Callable[..., Machine]) -> None:
    played, stop = machine(lambda now: 2.0), threading.Event()
    stop.set()
    list(Watch(Quiet()).measured(played.work, stop=stop, again=False))
    assert played.paused <= 0.05


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"share": 0.0}, "share is 0.0"),
        ({"share": 1.5}, "share is 1.5"),
        ({"window": 0.0}, "window 0.0"),
        ({"wait": -1.0}, "wait is -1.0"),
        ({"total": float("nan")}, "total nan"),
        ({"again": -1}, "again -1"),
    ],
)
def test_senseless_settings_are_refused(settings: dict[str, float], says: str) -> None:
    with pytest.raises(RequestError, match=says):
        Quiet(**settings)


class Card:
    """NVML in play: who computes on the card, and the share of the last second of each."""

    class NVMLError(Exception):
        pass

    class NVMLError_NotFound(NVMLError):  # noqa: N801, N818 (its name)
        pass

    def __init__(self, running: dict[int, int], *, tells: bool = True) -> None:
        self.running, self.tells = running, tells

    def nvmlInit(self) -> None: ...

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> str:
        if uuid != "GPU-abc":
            raise self.NVMLError_NotFound
        return uuid

    def nvmlDeviceGetComputeRunningProcesses(self, handle: str) -> list[types.SimpleNamespace]:
        return [types.SimpleNamespace(pid=pid) for pid in self.running]

    def nvmlDeviceGetProcessUtilization(self, handle: str, since: int) -> list[types.SimpleNamespace]:
        if not self.tells:
            raise self.NVMLError("not supported")
        if not any(self.running.values()):
            raise self.NVMLError_NotFound
        now = [types.SimpleNamespace(pid=pid, smUtil=share, timeStamp=since + 2) for pid, share in self.running.items()]
        return [*now, *(types.SimpleNamespace(pid=s.pid, smUtil=100, timeStamp=since + 1) for s in now)]


@pytest.mark.parametrize(
    ("running", "tells", "processes", "used", "disturbed"),
    [
        ({os.getpid(): 90}, True, (), 0.0, False),
        ({os.getpid(): 10, 5: 60, 6: 3}, True, (), 0.63, True),
        ({os.getpid(): 10, 5: 60, 6: 3}, True, (5,), 0.03, False),
        ({os.getpid(): 0, 5: 0}, True, (), 0.0, False),  # a neighbour that sleeps
        ({5: 60}, True, (), None, False),  # as in a container, whose processes have other ids outside of it
        ({os.getpid(): 10, 5: 60}, False, (), None, False),
    ],
)
def test_the_card_has_neighbours_too(
    machine: Callable[..., Machine],
    monkeypatch: pytest.MonkeyPatch,
    running: dict[int, int],
    tells: bool,
    processes: tuple[int, ...],
    used: float | None,
    disturbed: bool,
) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", Card(running, tells=tells))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: types.SimpleNamespace(uuid="abc"))
    played, watch = machine(lambda now: 0.0), Watch(Quiet(total=0.0), torch.device("cuda"))
    ((_, use),) = watch.measured(played.work, processes)
    assert use is not None
    assert use.gpu == (None if used is None else pytest.approx(used))
    assert use.disturbed is disturbed
    assert ("of the GPU" in use.why) is bool(used)
    assert bool(watch.notes()) is (used is None)


def test_a_card_that_nvml_does_not_find_is_not_called_quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    """As a slice of a card may be, which has an id of another kind."""
    monkeypatch.setitem(sys.modules, "pynvml", Card({os.getpid(): 10, 5: 60}))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: types.SimpleNamespace(uuid="of a slice"))
    assert others_on_gpu(torch.device("cuda")) is None


def test_without_nvml_the_card_is_unknown(machine: Callable[..., Machine], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", None)
    played, watch = machine(lambda now: 0.0), Watch(Quiet(), torch.device("cuda"))
    ((_, use),) = watch.measured(played.work)
    assert use is not None
    assert (use.gpu, use.disturbed) == (None, False)
    assert watch.notes() == ("what others used of the GPU is not known: it takes the package nvidia-ml-py, outside of a container",)


# Comparisons on a machine in play: a lab's runs take no time on it, so what is judged is what the others do meanwhile


@pytest.fixture
def request_() -> Request:
    return Request(prompt="Hello.", max_new_tokens=2, ignore_eos=True)


def _busy(machine: Callable[..., Machine], monkeypatch: pytest.MonkeyPatch, busy: Callable[[int], bool]) -> Machine:
    """Every run takes 40 ms, and others use 1.3 cores during those whose number, from 0, `busy` says so of."""
    played, real, number = machine(lambda now: 0.0), Lab.run, iter(range(10_000))

    def run(lab: Lab, *arguments: object, **more: object) -> object:
        now = next(number)
        played.others = lambda _: 1.3 if busy(now) else 0.0
        played.passes(0.04, own=0.5)
        played.others = lambda _: 0.0
        return real(lab, *arguments, **more)

    monkeypatch.setattr(Lab, "run", run)
    return played


def test_what_was_disturbed_is_kept_and_counts_for_nothing(
    labs: dict[str, Lab], request_: Request, machine: Callable[..., Machine], monkeypatch: pytest.MonkeyPatch
) -> None:
    lab = labs["tiny-qwen3-vl"]
    engines = {"stock": "transformers", "ours": "fastest"}
    compare(lab, request_, engines, repeats=1, quiet=None)  # so that all that follow are warm
    _busy(machine, monkeypatch, lambda number: number % 4 == 2)
    found = compare(lab, request_, engines, repeats=8, warm_up=0)
    disturbed = [sample for sample in found.samples if sample.disturbed]
    assert 16 < len(found.samples) <= 16 + len(disturbed)
    assert len(disturbed) >= 4
    for label in engines:
        mine = [s for s in found.samples if s.engine == label]
        good = [s.run.ttft * 1e3 for s in mine if not s.disturbed]
        assert [run.ttft * 1e3 for run in found.runs(label)] == good
        assert len(good) == 8  # each round has one in the end
        row = next(row for row in found.summary() if row["engine"] == label)
        assert (row["warm_runs"], row["disturbed_runs"]) == (8, len(mine) - 8)
        assert min(good) <= row["ttft_ms"] <= max(good)
    assert found.speedup("ours") is not None
    assert f"during {len(disturbed)} of {len(found.samples)} runs, which are in no median" in found.findings()[-1]
    assert disturbed[0].others == pytest.approx(1.3)
    record = json.loads(json.dumps(disturbed[0].to_record()))
    again = RunSample.from_record(record)
    assert (again.disturbed, again.use, again.run.ttft) == (True, disturbed[0].use, disturbed[0].run.ttft)
    older = RunSample.from_record({key: value for key, value in record.items() if key not in ("use", "disturbed", "others")})
    assert (older.disturbed, older.others) == (None, None)
    hollow = [trace for trace in sample_dots(found).data if trace.marker.symbol == "circle-open"]
    assert sorted(x for trace in hollow for x in trace.x) == sorted(s.run.ttft * 1e3 for s in disturbed)
    assert all("others used 1.3 of 2 cores" in about for trace in hollow for about in trace.customdata)


def test_where_nothing_was_undisturbed_nothing_is_compared(
    labs: dict[str, Lab], request_: Request, machine: Callable[..., Machine], monkeypatch: pytest.MonkeyPatch
) -> None:
    lab = labs["tiny-qwen3-vl"]
    _busy(machine, monkeypatch, lambda number: True)
    found = attribute(lab, request_, "baseline, vit.tower=lean", repeats=7, quiet=Quiet(again=0)).comparison
    assert all(sample.disturbed or sample.kind == "cold" for sample in found.samples)
    for row in found.summary():
        assert row["ttft_ms"] is row["tpot_ms"] is row["speedup"] is None
        assert row["disturbed_runs"] == 7
        assert row["others_cores"] == pytest.approx(1.3)
    said = found.findings()
    assert sum("no undisturbed rounds to compare with transformers" in line for line in said) == len(found.engines) - 1
    n = 7 * len(found.engines)
    assert said[-1] == f"the machine was busy: others used 1.3 of 2 cores, during {n} of {n} runs, which are in no median"
    assert found.representative("transformers").kind == "warm"
    headings = [note.text for note in found.waterfall().layout.annotations]
    assert sum("(disturbed by others)" in heading for heading in headings) == len(found.engines)


def test_chats_and_stages_are_watched_as_well(
    labs: dict[str, Lab], picture: bytes, machine: Callable[..., Machine], monkeypatch: pytest.MonkeyPatch
) -> None:
    lab = labs["tiny-qwen2.5-vl"]
    _busy(machine, monkeypatch, lambda number: number >= 4)
    chat = converse(lab, picture, ["What?", "Why?"], {"a": "baseline", "b": "fastest"}, max_new_tokens=2, repeats=2)
    assert len(chat.samples) == 12  # a disturbed turn is not measured again
    assert all(bool(sample.disturbed) is (sample.round >= 0) for sample in chat.samples)
    assert chat.speedup("b", 0, "a") is None
    assert chat.summary("a")[0]["ttft_ms"] is None
    assert "during 8 of 8 runs" in chat.findings()[0]
    played, count = machine(lambda now: 0.0), iter(range(100))

    def stage() -> dict[str, float]:
        played.others = lambda _: 1.5 if next(count) % 3 == 0 else 0.0
        played.passes(0.04, own=0.5)
        played.others = lambda _: 0.0
        return {"s": 0.04}

    rounds = time_rounds({"a": stage, "b": stage}, repeats=6, warm_up=0)
    assert rounds.seconds("a") == rounds.seconds("b") == [0.04] * 6
    assert sum(bool(sample.disturbed) for sample in rounds.samples) == len(rounds.samples) - 12 > 0
    assert rounds.busy is not None
    played.others = lambda _: 2.0
    never = time_rounds({"a": lambda: played.passes(0.04) or {"s": 0.04}}, repeats=2, quiet=Quiet(total=0.0))
    assert never.median("a").median != never.median("a").median
    assert never.ratio("a", "a") is None


# Real neighbours


@pytest.fixture
def neighbours() -> Iterator[dict[str, str]]:
    """The addresses of two servers on this machine: one burns every core for a second after each answer, one sleeps for as long."""
    command, servers = [sys.executable, str(Path(__file__).with_name("neighbour.py")), "1"], {}
    for name, more in (("busy", []), ("asleep", ["asleep"])):
        servers[name] = subprocess.Popen([*command, *more], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    yield {name: f"http://127.0.0.1:{server.stdout.readline().strip()}/v1" for name, server in servers.items()}  # type: ignore[union-attr]
    for server in servers.values():
        server.communicate(timeout=10)


@pytest.mark.alone
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_neighbour_that_does_not_sleep_is_waited_for(neighbours: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Every engine's TTFT beside it is within a tenth of its TTFT beside one that sleeps; without waiting it is several times that.

    Beside one that sleeps for as long, not alone: after a second without work a run takes longer, whoever had the cores meanwhile.
    """
    monkeypatch.delenv(quiet.VARIABLE)
    lab = Lab("tiny-qwen2.5-vl", device="cpu", dtype="float32")
    request = Request(images=[photo("coffee", (448, 448))], prompt="What is this?", max_new_tokens=4, ignore_eos=True)
    own: dict[str, str] = {"transformers": "transformers", "fastest": "fastest"}
    asleep: dict[str, list[float]] = {name: [] for name in own}
    ratios: dict[str, list[float]] = {name: [] for name in own}
    for attempt in range(6):  # what one has too little of the next adds to
        for number in range(3):
            found = {}
            for which in list(neighbours)[:: (-1) ** number]:  # in turns, and paired: a machine may be slower for a while
                found[which] = compare(lab, request, own | {"neighbour": neighbours[which]}, repeats=2, warm_up=1)
            for name in own:
                busy, quiet_ = ([run.ttft for run in found[which].runs(name)] for which in ("busy", "asleep"))
                asleep[name] += quiet_
                if busy and quiet_:
                    ratios[name].append(median(busy) / median(quiet_))
        assert all(ratios.values()), "the machine, or the neighbour, was never quiet"
        apart = {name: median(of) for name, of in ratios.items()}
        print(f"attempt {attempt}: beside one that burns / beside one that sleeps {apart}, of {ratios}")
        if all(abs(ratio - 1) < 0.1 for ratio in apart.values()):
            break
    assert apart == pytest.approx(dict.fromkeys(own, 1.0), abs=0.1)

    hurried = compare(lab, request, own | {"neighbour": neighbours["busy"]}, repeats=5, warm_up=1, quiet=Quiet(total=0.0))
    mine = [sample for sample in hurried.samples if sample.engine in own and sample.round >= 0]
    assert all(sample.disturbed for sample in mine)
    assert hurried.speedup("fastest", "transformers") is None
    slow = {name: median(s.run.ttft for s in mine if s.engine == name) / median(asleep[name]) for name in own}
    print(f"without waiting / beside one that sleeps {slow}")
    assert min(slow.values()) > 1.5
    assert "the machine was busy: others used" in "\n".join(hurried.findings())
    assert "during the runs of neighbour is not known" in "\n".join(hurried.findings())


@pytest.mark.alone
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_sweep_beside_a_busy_process_prints_no_speed_up(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, sweep_settings: Callable[..., SweepSettings]
) -> None:
    monkeypatch.delenv(quiet.VARIABLE)
    busy = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(os.cpu_count() or 1)]
    try:
        settings = sweep_settings(image_sizes=[[168, 140]], max_new_tokens=3, repeats=6, output_dir=str(tmp_path), quiet=1.0)
        result = sweep(settings, progress=False)
    finally:
        for process in busy:
            process.kill()
            process.wait()
    assert [row["speedup"] for row in result.summary()] == [None, None]
    assert not any("as fast as" in line for line in result.findings())
    assert any("the machine was busy: others used" in line for line in result.findings())
    assert any("quiet never came in 1 s of waiting" in line for line in result.findings())
    result.write()
    kept = pandas.read_parquet(tmp_path / "results.parquet")
    assert kept[kept.kind == "warm"].disturbed.all()
    assert (kept[kept.kind == "warm"].others > 0.3).all()
    assert kept[kept.kind == "cold"].disturbed.isna().all()
    assert "the machine was busy" in (tmp_path / "report.html").read_text()
