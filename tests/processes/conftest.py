"""A stub engine as a program, and what is left of it."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

STUB = Path(__file__).with_name("stub_engine.py")


@pytest.fixture
def marked(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Callable[[], list[int]]]:
    """Processes that carry this test's mark in their environment, this one apart; none must be left."""
    mark = f"FASTVL_LAB_TEST={tmp_path}"
    monkeypatch.setenv(*mark.split("=", 1))

    def alive() -> list[int]:
        found = []
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit() and int(entry.name) != os.getpid():
                try:
                    environment = (entry / "environ").read_bytes().split(b"\0")
                    zombie = (entry / "stat").read_text().rpartition(")")[2].split()[0] == "Z"
                except OSError:
                    continue
                if mark.encode() in environment and not zombie:
                    found.append(int(entry.name))
        return found

    yield alive
    left = alive()
    for pid in left:
        os.kill(pid, signal.SIGKILL)
    assert not left


@pytest.fixture
def until() -> Callable[..., None]:
    """Wait for something to be so, for a while."""

    def wait(so: Callable[[], object], seconds: float = 20.0) -> None:
        end = time.monotonic() + seconds
        while not so():
            assert time.monotonic() < end, "it never was so"
            time.sleep(0.05)

    return wait
