"""A keeper ends all that came of its program, as soon as whoever asked for it has gone."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from fastvl_lab.processes import keeper

Alive = Callable[[], list[int]]
KEEPER = [sys.executable, "-I", "-S", keeper.__file__]
FAMILY = "sleep 1000 & setsid sleep 1000 & (setsid sleep 1000 &) ; wait"
STUBBORN = f"trap '' TERM INT HUP; {FAMILY}"


def _kept(*arguments: str, parent: int | None = None) -> subprocess.Popen[bytes]:
    return subprocess.Popen([*KEEPER, str(parent or os.getpid()), *arguments], stdin=subprocess.PIPE, stderr=subprocess.PIPE)


def _sessions(ancestor: int) -> list[int]:
    """One a descendant; none while one of them goes."""
    with contextlib.suppress(ProcessLookupError):
        return [os.getsid(pid) for pid in keeper.descendants(ancestor)]
    return []


def test_descendants_are_found_in_whichever_session(marked: Alive, until: Callable[..., None]) -> None:
    kept = _kept("", "sh", "-c", FAMILY)
    # while the family grows there are four before the two that leave have sessions of their own
    until(lambda: len(sessions := _sessions(kept.pid)) == 4 and len({*sessions}) == 3)
    assert {os.getpgid(pid) for pid in keeper.descendants(kept.pid)} >= {os.getpgid(kept.pid)}
    assert sorted(marked()) == sorted((kept.pid, *keeper.descendants(kept.pid)))
    kept.communicate()
    assert not marked()


def test_all_end_that_will_not(marked: Alive, until: Callable[..., None]) -> None:
    """Whether the pipe is closed, a word comes, or SIGTERM: three keepers at once, each of which waits for its own."""
    closed, told, signalled = kept = [_kept("", "sh", "-c", STUBBORN) for _ in range(3)]
    until(lambda: len(marked()) == 15)
    began = time.monotonic()
    closed.stdin.close()  # type: ignore[union-attr]
    told.stdin.write(b"!")  # type: ignore[union-attr]
    told.stdin.flush()  # type: ignore[union-attr]
    signalled.terminate()
    for each in kept:
        each.wait(20)
        assert keeper.GRACE / 2 < time.monotonic() - began < keeper.GRACE + 10
    assert not marked()


def test_a_keeper_that_is_interrupted_goes_on(marked: Alive, until: Callable[..., None]) -> None:
    kept = _kept("", "sleep", "1000")
    until(lambda: len(marked()) == 2)
    for number in (signal.SIGINT, signal.SIGHUP):
        kept.send_signal(number)
    time.sleep(0.3)
    assert len(marked()) == 2
    kept.communicate(timeout=20)
    assert kept.returncode == 0


def test_a_parent_that_has_gone_is_noticed_though_its_pipe_is_open(marked: Alive) -> None:
    """Where a fork of the parent holds the other end of the pipe."""
    assert _kept("", "sleep", "1000", parent=1).wait(20) == 0
    assert not marked()


@pytest.mark.parametrize(("program", "code"), [("exit 3", 3), ("kill -9 $$", 137), ("sleep 1000 & exit 0", 0)])
def test_it_ends_with_its_program_and_as_it(program: str, code: int, marked: Alive) -> None:
    kept = _kept("", "sh", "-c", program)
    assert kept.wait(20) == code
    assert kept.stderr is not None
    assert b"the program ended with exit code" in kept.stderr.read()
    assert not marked()


def test_a_program_that_there_is_not_is_said(marked: Alive) -> None:
    kept = _kept("", "/nowhere/vllm", "serve")
    assert kept.wait(20) == 127
    assert kept.stderr is not None
    assert b"error: /nowhere/vllm: No such file or directory" in kept.stderr.read()


@pytest.mark.parametrize("with_program", [False, True])
def test_a_folder_goes_with_it(with_program: bool, marked: Alive, tmp_path: Path) -> None:
    folder = tmp_path / "weights"
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(b"0")
    kept = _kept(str(folder), *(["sleep", "1000"] if with_program else []))
    time.sleep(0.3)
    assert folder.exists()
    kept.communicate(timeout=20)
    assert not folder.exists()
