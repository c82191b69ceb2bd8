"""A function in the care of a keeper is as much on its own as a program is."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

# A process of its own forks: it has one thread.
_BEGIN = """
import os, signal, subprocess, sys, time
from pathlib import Path
from fastvl_lab.processes.kept import Kept

log, marker = Path(sys.argv[1]), Path(sys.argv[2])
signal.signal(signal.SIGTERM, lambda *_: marker.write_text("the parent's handler ran in the fork"))
"""


def _run(script: str, tmp_path: Path) -> tuple[str, str, Path]:
    """What the script printed, its log, and the file that it may leave."""
    log, marker = tmp_path / "logs" / "log", tmp_path / "marker"
    log.parent.mkdir()
    done = subprocess.run(
        [sys.executable, "-c", _BEGIN + script, str(log), str(marker)], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout, log.read_text(), marker


def test_a_function_is_called_in_a_session_and_a_folder_of_its_own_and_its_words_are_logged(tmp_path: Path) -> None:
    script = """
def work():
    print("session", os.getsid(0) == os.getppid(), "folder", os.getcwd(), "input", repr(sys.stdin.read()))

kept = Kept(work, log=log)
print("exit", kept.wait(30), "processes", kept.processes(), "session", os.getsid(0))
kept.let_go()
"""
    said, logged, _ = _run(script, tmp_path)
    assert said.startswith("exit 0 processes () session ")
    assert f"session True folder {tmp_path / 'logs'} input ''" in logged


@pytest.mark.parametrize(
    ("work", "code", "says"),
    [
        ("lambda: 1 / 0", 1, "ZeroDivisionError: division by zero"),
        ("lambda: os.kill(os.getpid(), signal.SIGKILL)", 137, "the program ended with exit code -9"),
        ("lambda: os.kill(os.getpid(), signal.SIGTERM)", 143, "the program ended with exit code -15"),
    ],
)
def test_the_exit_code_is_that_of_a_program(work: str, code: int, says: str, tmp_path: Path) -> None:
    said, logged, marker = _run(f"print(Kept({work}, log=log).wait(30))", tmp_path)
    assert said == f"{code}\n"
    assert says in logged
    assert not marker.exists()


def test_letting_go_ends_a_function_with_all_that_it_has_started(tmp_path: Path) -> None:
    script = """
def work():
    subprocess.Popen(["sleep", "1000"], start_new_session=True)
    time.sleep(1000)

kept = Kept(work, log=log)
while len(kept.processes()) < 3:
    time.sleep(0.02)
before = kept.processes()
print(kept.wait(0.05))
kept.let_go()
kept.wait(30)
print(kept.processes(), [pid for pid in before if Path(f"/proc/{pid}").exists()])
"""
    assert _run(script, tmp_path)[0] == "None\n() []\n"


def test_a_signal_that_comes_at_the_fork_is_handled_once_it_is_over(tmp_path: Path) -> None:
    """What a handler raises within a hook of the fork, such as that of the module logging, Python would drop."""
    script = """
def stop(*_):
    raise KeyboardInterrupt

signal.signal(signal.SIGTERM, stop)
os.register_at_fork(after_in_parent=lambda: (os.kill(os.getpid(), signal.SIGTERM), time.sleep(0.1)))
try:
    Kept(lambda: time.sleep(1000), log=log)
    print("lost")
except KeyboardInterrupt:
    print("stopped")
"""
    assert _run(script, tmp_path)[0] == "stopped\n"
