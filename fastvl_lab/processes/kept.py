"""A program in the care of a keeper, so that it does not outlive the process that started it."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from fastvl_lab.errors import EndpointError
from fastvl_lab.processes import keeper


class Kept:
    """A program under a keeper, or a folder that a keeper removes: both end with `let_go`, and with this process."""

    def __init__(
        self,
        command: Sequence[str] = (),
        *,
        folder: str = "",
        env: Mapping[str, str] | None = None,
        log: Path | None = None,
    ) -> None:
        if not sys.platform.startswith("linux"):
            raise EndpointError(
                f"programs are started on Linux alone, whose prctl lets one process answer for all that it starts, and this is "
                f"{sys.platform}; start an engine by hand and give its address, or sweep without a launcher"
            )
        with open(log or os.devnull, "ab") as output:
            # A session of its own: Ctrl-C in a terminal, or an interrupted cell, is meant for this process alone.
            self._process = subprocess.Popen(
                [sys.executable, "-I", "-S", keeper.__file__, str(os.getpid()), folder, *command],
                stdin=subprocess.PIPE,
                stdout=output,
                stderr=output,
                env=env,
                cwd=log.parent if log else None,
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
