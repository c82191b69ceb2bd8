"""Servers of a lab's: started, told of, and gone with it, however it goes. The engine is a stub with children."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fastvl_lab import EndpointError, Lab, Request, RequestCancelledError, compare
from fastvl_lab.processes.server import MAX_LOGS, telling

Alive = Callable[[], list[int]]
Until = Callable[..., None]
REQUEST = Request(prompt="Hi.", max_new_tokens=3, ignore_eos=True)


@pytest.fixture(autouse=True)
def notes(monkeypatch: pytest.MonkeyPatch, marked: Alive, tmp_path: Path) -> Callable[[], list[dict[str, Any]]]:
    """The stub is found as vLLM; what each start of it was given."""
    program = tmp_path / "vllm"
    program.write_text(f'#!/bin/sh\nexec {sys.executable} -S {Path(__file__).with_name("stub_engine.py")} "$@"\n')
    program.chmod(0o755)
    monkeypatch.setenv("FASTVL_LAB_VLLM", str(program))
    monkeypatch.setenv("STUB_NOTES", str(tmp_path / "notes"))
    return lambda: [json.loads(line) for line in (tmp_path / "notes").read_text().splitlines()]


@pytest.fixture
def lab(labs: dict[str, Lab]) -> Any:
    """A lab that has started nothing, and is closed at the end."""
    with Lab("tiny-qwen3-vl", device="cpu", dtype="float32") as lab:
        yield lab


def _port(note: dict[str, Any]) -> int:
    return int(note["command"][note["command"].index("--port") + 1])


def _listens(port: int) -> bool:
    with socket.socket() as client:
        return client.connect_ex(("127.0.0.1", port)) == 0


def test_an_engine_starts_once_serves_and_ends_with_its_lab(lab: Lab, notes: Any, marked: Alive) -> None:
    told: list[str] = []
    lab.start("vllm", tell=told.append)
    assert told[0].startswith("vllm starts, 0 s: ")
    runs = [lab.run(REQUEST, "vllm"), lab.run(REQUEST, " vllm "), lab.apart().run(REQUEST, "vllm, max_batch=8")]
    assert [(run.tokens, run.text, run.kind) for run in runs] == [
        ((65, 66, 67), "aaa", kind) for kind in ("cold", "warm", "cold")
    ]  # it reuses nothing, and says nothing of it
    assert (runs[0].device, runs[0].dtype) == (f"CPU ({len(os.sched_getaffinity(0))} cores)", "float32")
    assert runs[0].checkpoint == lab.run(REQUEST, "baseline").checkpoint
    assert runs[0].remote
    assert runs[0].subtitle() == "12 prompt tokens, as the endpoint counts them"
    (note,) = notes()
    processes = lab.processes("vllm")
    assert sorted(processes) == sorted(marked())
    assert len(processes) == 4
    assert lab._engines[lab.engine("vllm")].processes() == processes
    assert lab.processes("baseline") == lab.processes("vllm, graphs=off") == ()
    assert _listens(_port(note))
    lab.close()
    assert not marked()
    assert not _listens(_port(note))
    assert lab.run(REQUEST, "vllm").kind == "cold"  # started again
    assert len(notes()) == 2


def test_a_bar_shows_a_start_and_nothing_else(lab: Lab, capsys: pytest.CaptureFixture[str]) -> None:
    lab.run(REQUEST, "vllm")
    assert "vllm starts" in capsys.readouterr().err
    lab.apart().run(REQUEST, "vllm")
    assert capsys.readouterr().err == ""


def test_engines_with_other_options_are_other_servers(lab: Lab, notes: Any) -> None:
    for text in ("vllm", "vllm, graphs=off", "vllm, graphs=on", "vllm, --block-size=32"):
        lab.run(REQUEST, text)
    assert ["--enforce-eager" in note["command"] for note in notes()] == [False, True, False]
    assert notes()[2]["command"][-1] == "--block-size=32"
    assert len({_port(note) for note in notes()}) == 3


def test_weights_that_are_in_memory_alone_are_written_once(
    lab: Lab, notes: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For all engines and copies of the lab, into a folder that goes with it."""
    lab.run(REQUEST, "vllm")
    assert notes()[0]["command"][1] == lab.checkpoint.source  # a folder is used as it is
    lab.close()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    lab.checkpoint = dataclasses.replace(lab.checkpoint, source=None)
    lab.run(REQUEST, "vllm")
    lab.apart().run(REQUEST, "vllm, graphs=off")
    folders = {note["command"][1] for note in notes()[1:]}
    (folder,) = folders
    assert Path(folder).parent == tmp_path
    assert (Path(folder) / "model.safetensors").exists()
    lab.close()
    assert not Path(folder).exists()


def test_servers_stay_however_many_engines_are_let_go(lab: Lab, notes: Any) -> None:
    lab.run(REQUEST, "vllm")
    for size in ("multiples_of_64", "multiples_of_256", "powers_of_two"):
        for norms in ("eager", "native"):
            for rope in ("eager", "native"):
                lab.run(REQUEST, f"fastest, vit.norms={norms}, capture.shapes={size}, attention.norms={rope}")
    assert lab.run(REQUEST, "vllm").kind == "warm"
    assert len(notes()) == 1


def test_a_comparison_holds_it_against_transformers(lab: Lab) -> None:
    """Its tokens are others', so no speed-up stands."""
    found = compare(lab, REQUEST, {"stock": "transformers", "theirs": "vllm"}, repeats=1)
    assert (bool(found.parity("theirs")), found.speedup("theirs")) == (False, None)


def test_a_request_within_a_callback_is_refused(lab: Lab) -> None:
    """It computes on this machine, in the lab's turn."""
    with pytest.raises(ValueError, match="in which the lab serves no other"):
        lab.run(REQUEST, "vllm", on_chunk=lambda _: lab.run(REQUEST))
    assert len(list(lab.stream(REQUEST, "vllm"))) == 3


@pytest.mark.parametrize(
    ("fails", "says"),
    [
        ("raises", r"exit code 1 before it was ready: MemoryError: no room for 3 GiB of keys and values; its log is /.*\.log"),
        ("argument", "exit code 2 before it was ready: stub_engine.py: error: unrecognized arguments: --warp; its log is"),
        ("exits", "exit code 3 before it was ready: INFO loading; its log is"),
    ],
)
def test_a_start_that_fails_is_one_sentence_with_the_telling_line(
    lab: Lab, marked: Alive, monkeypatch: pytest.MonkeyPatch, fails: str, says: str
) -> None:
    monkeypatch.setenv("STUB_FAILS", fails)
    with pytest.raises(EndpointError, match=says) as raised:
        lab.run(REQUEST, "vllm")
    assert "\n" not in str(raised.value)
    assert not marked()
    monkeypatch.delenv("STUB_FAILS")
    assert lab.run(REQUEST, "vllm").text == "aaa"


def test_a_start_has_a_limit(lab: Lab, marked: Alive, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STUB_FAILS", "never")
    monkeypatch.setenv("FASTVL_LAB_START_SECONDS", "3")
    with pytest.raises(EndpointError, match=r"not ready after 3 seconds, which FASTVL_LAB_START_SECONDS can change: INFO loading"):
        lab.start("vllm")
    assert not marked()
    monkeypatch.setenv("FASTVL_LAB_START_SECONDS", "soon")
    with pytest.raises(EndpointError, match=r"FASTVL_LAB_START_SECONDS is 'soon'; it must be a number of seconds above zero"):
        lab.start("vllm")


def test_a_start_can_be_given_up(lab: Lab, marked: Alive, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STUB_FAILS", "never")
    stop = threading.Event()
    threading.Timer(1.0, stop.set).start()
    with pytest.raises(RequestCancelledError, match="given up while vllm started"):
        lab.run(REQUEST, "vllm", stop=stop)
    assert not marked()


def test_a_start_leaves_the_lab_free_and_is_waited_for_by_a_run(
    lab: Lab, notes: Any, until: Until, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("STUB_DELAY", "2")
    told: list[str] = []
    starting = threading.Thread(target=lab.start, args=("vllm",), kwargs={"tell": told.append})
    starting.start()
    until(lambda: told)
    began = time.monotonic()
    lab.run(REQUEST, "fastest")
    assert starting.is_alive()
    assert time.monotonic() - began < 2
    assert lab.run(REQUEST, "vllm").text == "aaa"
    starting.join()
    assert len(notes()) == 1


def test_a_server_that_dies_is_told_of_and_started_again(
    lab: Lab, notes: Any, marked: Alive, until: Until, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("STUB_DIES", "2")
    assert lab.run(REQUEST, "vllm").kind == "cold"
    with pytest.raises(EndpointError, match="vllm ended with exit code 137 while it served: RuntimeError: the device has gone"):
        lab.run(REQUEST, "vllm")
    assert not marked()
    assert lab.run(REQUEST, "vllm").kind == "cold"
    assert len(notes()) == 2
    os.kill(lab.processes("vllm")[1], signal.SIGKILL)  # between two runs
    until(lambda: not marked())
    assert lab.run(REQUEST, "vllm").kind == "cold"


def test_a_refusal_is_the_servers_own(lab: Lab) -> None:
    lab.start("vllm")
    with pytest.raises(EndpointError, match="shows no logits"):
        lab.logits_along(REQUEST, "vllm", [1])


def test_logs_are_bounded(lab: Lab) -> None:
    folder = Path(os.environ["XDG_CACHE_HOME"]) / "fastvl_lab" / "logs"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "gone.log").symlink_to("no-more")  # as one that another process has just removed
    lab.start("vllm")
    (folder / "gone.log").unlink()
    for number in range(MAX_LOGS + 5):
        (folder / f"old-{number}.log").touch()
        os.utime(folder / f"old-{number}.log", (number, number))
    lab.start("vllm, graphs=off")
    assert len(list(folder.glob("*.log"))) == MAX_LOGS
    assert repr(lab.servers).count("its log is") == 2


SCRIPT = """
import signal, sys, fastvl_lab as fl
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it, and so do those that it starts
lab = fl.Lab("tiny-qwen3-vl", device="cpu")
request = fl.Request(prompt="Hi.", max_new_tokens=int(sys.argv[1]), ignore_eos=True)
print("run", flush=True)
lab.run(request, "vllm", on_chunk=lambda chunk: print("chunk", flush=True))
print("done", flush=True)
"""


@pytest.mark.parametrize(
    ("when", "how", "stubborn"),
    [
        ("start", signal.SIGKILL, True),
        ("start", signal.SIGINT, False),
        ("run", signal.SIGKILL, False),
        ("run", signal.SIGTERM, False),
        ("end", None, True),
    ],
)
def test_nothing_is_left_of_a_script_however_it_ends(
    when: str,
    how: int | None,
    stubborn: bool,
    marked: Alive,
    until: Until,
    notes: Any,
    start_forked: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    """Killed while the engine starts or answers, interrupted, or at its end: no process and no port."""
    if when == "start":
        monkeypatch.setenv("STUB_FAILS", "never")
    monkeypatch.setenv("STUB_STEP", "0.05")
    if stubborn:
        monkeypatch.setenv("STUB_STUBBORN", "")
    (tmp_path / "script.py").write_text(SCRIPT)
    script = start_forked(tmp_path / "script.py", "3" if when == "end" else "1000", **os.environ)
    if when == "start":
        until(lambda: len(marked()) >= 4, 60)  # keeper, engine and its two
        assert script.said().startswith("run\n")
    else:
        until(lambda: "chunk\n" in script.said(), 60)
    if how is not None:
        os.killpg(script.pid, how)  # as a kernel is killed: all of its group
    status = script.wait(60)
    until(lambda: not marked())
    assert not _listens(_port(notes()[0]))
    assert status == "0" if how is None else status not in ("0", "late")


@pytest.mark.parametrize("seconds", [0.0, 0.02, 0.05, 0.1, 0.2])
def test_nothing_is_left_of_a_parent_that_is_killed_at_any_moment(seconds: float, marked: Alive, until: Until) -> None:
    """Also between its fork and its first word to the keeper."""
    code = (
        "import subprocess, sys, os; from fastvl_lab.processes import keeper; print(1, flush=True);"
        "subprocess.Popen([sys.executable, '-I', '-S', keeper.__file__, str(os.getpid()), '', 'sh', '-c', 'sleep 1000 & wait'],"
        " stdin=subprocess.PIPE, start_new_session=True); import time; time.sleep(1000)"
    )
    parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
    assert parent.stdout is not None
    parent.stdout.readline()
    time.sleep(seconds)
    parent.kill()
    parent.wait()
    until(lambda: not marked())


def test_the_line_that_tells_what_failed() -> None:
    log = [
        "INFO loading",
        "(EngineCore pid=7) ERROR 11-26 05:10:50 [core.py:1] Traceback (most recent call last):",
        '(EngineCore pid=7) ERROR 11-26 05:10:50 [core.py:1]   File "/a/error.py", line 3, in load',
        "(EngineCore pid=7) ERROR 11-26 05:10:50 [core.py:1] ValueError: no room",
        "RuntimeError: Engine core initialization failed. See root cause above. Failed core proc(s): {}",
        "INFO stopped",
        "keeper: the program ended with exit code 1",
    ]
    assert telling(log).endswith("ValueError: no room")
    assert telling(["INFO a", "vllm: error: argument --x", "bye"]) == "vllm: error: argument --x"
    assert telling(["INFO a", "Killed", "bye"]) == "Killed"
    assert telling(["INFO a", "keeper: the program ended with exit code 1"]) == "INFO a"
    assert telling([]) == "it said nothing"
