"""A program in the care of a keeper, so that it does not outlive the process that started it."""

from __future__ import annotations

import contextlib
import os
import select
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NoReturn

from fastvl_lab.errors import EndpointError
from fastvl_lab.processes import keeper


class Kept:
    """A program under a keeper, or a folder that a keeper removes: both end with `let_go`, and with this process."""

    def __init__(
        self,
        command: Sequence[str] | Callable[[], object] = (),
        *,
        folder: str = "",
        env: Mapping[str, str] | None = None,
        log: Path | None = None,
    ) -> None:
        """command: a program's line; or a function, which a fork of this process calls, in this one's environment.

        A process that is forked has one thread, and has never touched a device: CUDA does not outlive a fork. It keeps one such
        program at a time, since a fork holds the pipes of the others too.
        """
        if not sys.platform.startswith("linux"):
            raise EndpointError(
                f"programs are started on Linux alone, whose prctl lets one process answer for all that it starts, and this is "
                f"{sys.platform}; start an engine by hand and give its address, or sweep without a launcher"
            )
        cwd = log.parent if log else None
        with open(log or os.devnull, "ab") as output:
            # A session of its own: Ctrl-C in a terminal, or an interrupted cell, is meant for this process alone.
            self._process: subprocess.Popen[bytes] | _Fork
            if callable(command):
                assert env is None
                self._process = _Fork(command, folder, output.fileno(), cwd)
            else:
                self._process = subprocess.Popen(
                    [sys.executable, "-I", "-S", keeper.__file__, str(os.getpid()), folder, *command],
                    stdin=subprocess.PIPE,
                    stdout=output,
                    stderr=output,
                    env=env,
                    cwd=cwd,
                    start_new_session=True,
                )

    @property
    def exit_code(self) -> int | None:
        """The program's, once it and all its descendants have ended."""
        return self._process.poll()

    def let_go(self) -> None:
        """Have it end, without waiting."""
        assert self._process.stdin is not None
        with contextlib.suppress(OSError):
            self._process.stdin.close()

    def wait(self, seconds: float | None = None) -> int | None:
        """Until it has ended, or so long: its exit code."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(seconds)
        return self.exit_code

    def processes(self) -> tuple[int, ...]:
        """Ids of the keeper and of all that it answers for; none once it has ended."""
        return () if self.exit_code is not None else (self._process.pid, *keeper.descendants(self._process.pid))


class _Fork:
    """A keeper that is a fork of this process, with as much of `subprocess.Popen` as `Kept` asks for."""

    def __init__(self, work: Callable[[], object], folder: str, output: int, cwd: Path | None) -> None:
        read, write = os.pipe()
        sys.stdout.flush()
        sys.stderr.flush()
        parent, self.pid = os.getpid(), os.fork()
        if self.pid == 0:
            os.close(write)
            _keep(work, folder, parent, (read, output, output), cwd)
        os.close(read)
        self.stdin = os.fdopen(write, "wb", buffering=0)
        self._ended = os.pidfd_open(self.pid)
        self._code: int | None = None

    def poll(self) -> int | None:
        if self._code is None and (status := os.waitpid(self.pid, os.WNOHANG))[0]:
            self._code = os.waitstatus_to_exitcode(status[1])
            os.close(self._ended)
        return self._code

    def wait(self, seconds: float | None = None) -> None:
        if self.poll() is None:
            select.select([self._ended], [], [], seconds)


def _keep(work: Callable[[], object], folder: str, parent: int, streams: Sequence[int], cwd: Path | None) -> NoReturn:
    """Be the keeper. streams: what its standard input, output and errors are."""
    code = 1
    try:
        os.setsid()
        for number, stream in enumerate(streams):
            os.dup2(stream, number)
        if cwd:
            os.chdir(cwd)
        code = keeper.main(parent, folder, work)
    finally:
        os._exit(code)
