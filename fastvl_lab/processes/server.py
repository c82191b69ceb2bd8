"""Servers that this process starts: each in the care of a keeper, so that none outlives the lab that it was started for."""

from __future__ import annotations

import contextlib
import http.client
import os
import re
import shlex
import tempfile
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

from fastvl_lab.checkpoint import Checkpoint
from fastvl_lab.checkpoint.saved import write_folder
from fastvl_lab.checkpoint.user_cache import cache_root
from fastvl_lab.errors import EndpointError, RequestCancelledError, shortened
from fastvl_lab.processes import keeper
from fastvl_lab.processes.kept import Kept

START_SECONDS = "FASTVL_LAB_START_SECONDS"
_DEFAULT_START_SECONDS = 600.0

MAX_LOGS = 20  # newest that are kept

# Between two looks at whether a server is ready.
_LOOK_UP = 0.25

# How long a server that has been seen to fail may take to end, and how long one is waited for that has been told to.
_ENDING = 2 * keeper.GRACE
_MOST_ENDING = 60.0

Tell = Callable[[str], object]


class Server:
    """A server on a port of 127.0.0.1 that is started here; name: as errors call it. Its log is a file, `log`."""

    def __init__(self, name: str, command: Sequence[str], port: int, *, env: Mapping[str, str]) -> None:
        self.name, self.port, self.log = name, port, _new_log(name)
        self.log.write_text(f"$ {shlex.join(command)}\n")
        self.kept = Kept(command, env=env, log=self.log)

    def __repr__(self) -> str:
        state = "runs" if self.alive else f"ended with exit code {self.kept.exit_code}"
        return f"Server({self.name!r} at {self.address}, {state}; its log is {self.log})"

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.port}/v1"

    @property
    def alive(self) -> bool:
        return self.kept.exit_code is None

    def answers(self, path: str) -> bool:
        """Whether a GET of the path answers 200."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=5.0)
        try:
            connection.request("GET", path)
            return connection.getresponse().status == 200
        except (OSError, http.client.HTTPException):
            return False
        finally:
            connection.close()

    def wait_until_ready(self, path: str, tell: Tell, stop: threading.Event | None) -> None:
        """Until a GET of the path answers 200; raises `EndpointError` where it ends first, or takes too long.

        stop: once it is set, a `RequestCancelledError` is raised.
        """
        began, most = time.monotonic(), _start_seconds()
        while not self.answers(path):
            if not self.alive:
                raise EndpointError(self.how_it_ended("before it was ready"))
            if (taken := time.monotonic() - began) > most:
                raise EndpointError(
                    f"{self.name} was not ready after {most:g} seconds, which {START_SECONDS} can change: {self.telling_line()}; "
                    f"its log is {self.log}"
                )
            _check(stop, self.name)
            tell(f"{self.name} starts, {taken:.0f} s: {shortened(self.last_line(), 90)}")
            time.sleep(_LOOK_UP)
        if not self.alive:  # somebody else's server answers on this port
            raise EndpointError(self.how_it_ended("before it was ready"))

    def has_ended(self, path: str) -> bool:
        """Whether a server that has just failed has ended, or is about to."""
        return not self.answers(path) and self.kept.wait(_ENDING) is not None

    def how_it_ended(self, when: str) -> str:
        """A sentence."""
        return f"{self.name} ended with exit code {self.kept.exit_code} {when}: {self.telling_line()}; its log is {self.log}"

    def last_line(self) -> str:
        return next(iter(_lines(self.log)[-1:]), "")

    def telling_line(self) -> str:
        """The line of the log that best says what went wrong."""
        return shortened(telling(_lines(self.log)), 300)


class Servers:
    """The servers that a lab has started, each by its engine's name, and the folder of a checkpoint that has none of its own.

    They end with `close`, with this object, and with the process, in whichever way that ends.
    """

    def __init__(self) -> None:
        self._servers: dict[str, Server] = {}
        self._folder: tuple[Checkpoint, str] | None = None
        self._kept: list[Kept] = []
        self._one_at_a_time = threading.Lock()
        weakref.finalize(self, _end_all, self._kept, os.getpid())

    def folder(self, checkpoint: Checkpoint) -> str:
        """Where a program finds the checkpoint: its folder or hub id, else a folder that is written once and goes with the lab."""
        if checkpoint.source is not None:
            return checkpoint.source
        if self._folder is None or self._folder[0] is not checkpoint:
            folder = tempfile.mkdtemp(prefix="fastvl-lab-")
            kept = Kept(folder=folder)
            self._kept.append(kept)
            try:
                write_folder(checkpoint, Path(folder))
            except BaseException:
                kept.let_go()
                raise
            self._folder = checkpoint, folder
        return self._folder[1]

    def get(self, name: str, start: Callable[[], Server], ready: str, tell: Tell, stop: threading.Event | None = None) -> Server:
        """The server of that name, started where there is none that runs, once a GET of `ready` answers 200.

        One starts at a time; another thread's is waited for. Raises `EndpointError` for one that does not become ready, and
        `RequestCancelledError` once `stop` is set; it is ended, as by any interruption.
        """
        while not self._one_at_a_time.acquire(timeout=_LOOK_UP):
            _check(stop, name)
        try:
            server = self._servers.get(name)
            if server is None or not server.alive:
                server = start()
                self._kept.append(server.kept)
                try:
                    server.wait_until_ready(ready, tell, stop)
                except BaseException:
                    _end_all([server.kept])
                    raise
                finally:
                    self._kept[:] = [kept for kept in self._kept if kept.exit_code is None]
                self._servers[name] = server
            return server
        finally:
            self._one_at_a_time.release()

    def processes(self, name: str) -> tuple[int, ...]:
        """Ids of the processes of the server of that name, and of its keeper; none where there is none."""
        return self._servers[name].kept.processes() if name in self._servers else ()

    def __iter__(self) -> Iterator[Server]:
        return iter(tuple(self._servers.values()))

    def __repr__(self) -> str:
        return "\n".join(map(repr, self)) or "no server has been started"

    def close(self) -> None:
        """End them, and remove the checkpoint's folder; what is asked for afterwards is started again."""
        _end_all(self._kept)
        self._servers.clear()
        self._folder = None


def _check(stop: threading.Event | None, name: str) -> None:
    if stop is not None and stop.is_set():
        raise RequestCancelledError(f"the request was given up while {name} started")


def _end_all(kept: list[Kept], owner: int | None = None) -> None:
    """End them side by side; owner: the process that may, since a fork of it holds them too."""
    if owner not in (None, os.getpid()):
        return
    ending = kept[:]
    for one in ending:
        one.let_go()
    for one in ending:
        one.wait(_MOST_ENDING)
    kept[:] = [one for one in kept if one not in ending]


def _start_seconds() -> float:
    given = os.environ.get(START_SECONDS, "").strip()
    try:
        seconds = float(given) if given else _DEFAULT_START_SECONDS
    except ValueError:
        seconds = 0.0
    if not seconds > 0:
        raise EndpointError(f"{START_SECONDS} is {given!r}; it must be a number of seconds above zero")
    return seconds


def _new_log(name: str) -> Path:
    """A new file among the user's logs, of which the oldest go."""
    folder = cache_root() / "logs"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(FileNotFoundError):  # another process tidies too
            for old in sorted(folder.glob("*.log"), key=lambda path: path.stat().st_mtime)[: 1 - MAX_LOGS]:
                old.unlink(missing_ok=True)
        handle, path = tempfile.mkstemp(
            prefix=f"{re.split(r'[^a-z]', name)[0]}-{time.strftime('%H%M%S')}-", suffix=".log", dir=folder
        )
        os.close(handle)
    except OSError as error:
        raise EndpointError(
            f"the folder of logs {folder} cannot be written ({error.strerror}); set XDG_CACHE_HOME to a folder that can"
        ) from None
    return Path(path)


# Lines that say that something failed; what only says that something else did; and how terminals are coloured.
_FAULT = re.compile(r"\b\w*(Error|Exception)\b|\b[eE]rror:|\bERROR\b|out of memory|Killed")
_HEARSAY = re.compile(r"See root cause above|initialization failed|Traceback \(most recent call last\)|^keeper: ")
_COLOUR = re.compile(r"\x1b\[[0-9;]*m")


def _lines(log: Path, most: int = 65_536) -> list[str]:
    """The last lines of a log that are not empty; a line that was written over counts as what it became."""
    with contextlib.suppress(OSError), open(log, "rb") as file:
        file.seek(max(0, file.seek(0, os.SEEK_END) - most))
        text = _COLOUR.sub("", file.read().decode(errors="replace"))
        lines = (line.rstrip("\r").rpartition("\r")[2] for line in text.split("\n"))
        return [line for line in lines if line.strip() and not line.startswith("$ ")]  # which is the command
    return []


def telling(lines: Sequence[str]) -> str:
    """The last line that says what failed, rather than where or that something did; else the last at all."""
    faults = [line for line in lines if _FAULT.search(line) and not _HEARSAY.search(line) and not re.search(r'^\s*File "', line)]
    named = [line for line in faults if re.search(r"\b\w*(Error|Exception)\b: \S", line)]
    return next(iter((named or faults or [line for line in lines if not line.startswith("keeper: ")])[-1:]), "it said nothing")
