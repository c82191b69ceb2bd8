"""Run a program, and end it with all of its descendants as soon as the process that asked for it has gone, however it went.

    python keeper.py PARENT FOLDER [PROGRAM ARGUMENT…]

PARENT: id of the process that asked. FOLDER: removed at the end; "" for none. The keeper's standard input is a pipe of which the
parent holds the other end: once that is closed, or the parent has gone, or a SIGTERM comes, everything ends. It ends too when
the program does, with its exit code.

It is the reaper of its descendants (prctl(2), PR_SET_CHILD_SUBREAPER), so that one that begins a session of its own or loses its
parent is still found. It runs as a script of the standard library alone, since it stands by for each server; or as a fork of a
process that has already imported what the program, a function of it, needs.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import select
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable, Sequence

# prctl(2)
_PR_SET_PDEATHSIG, _PR_SET_CHILD_SUBREAPER = 1, 36

# Seconds: between a SIGTERM and a SIGKILL, and between two looks at whether the parent is there.
GRACE = 3.0
_LOOK_UP = 1.0


def descendants(ancestor: int) -> tuple[int, ...]:
    """Ids of the processes below one that have not ended, read from /proc."""
    children: dict[int, list[int]] = {}
    for entry in os.listdir("/proc"):
        if not entry.isdigit():
            continue
        with contextlib.suppress(OSError), open(f"/proc/{entry}/stat", "rb") as file:
            state, parent = file.read().rpartition(b")")[2].split()[:2]
            if state != b"Z":
                children.setdefault(int(parent), []).append(int(entry))
    found = list(children.get(ancestor, ()))
    for pid in found:
        found += children.get(pid, ())
    return tuple(found)


def main(parent: int, folder: str, command: Sequence[str] | Callable[[], object]) -> int:
    """command: a program's line, or what a fork of this process calls in its place; the exit code."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) != 0:
        print(f"keeper: prctl fails: {os.strerror(ctypes.get_errno())}", file=sys.stderr)
        return 1
    told, tell = os.pipe()
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):  # handled rather than ignored, which the program would inherit
        signal.signal(number, lambda number, _: os.write(tell, b"!") if number == signal.SIGTERM else None)
    ended: dict[int, int] = {}  # exit codes by process
    program = 0
    try:
        program = _start(libc, command) if command else 0
        watched = [0, told, *([os.pidfd_open(program)] if program else [])]
        while os.getppid() == parent and not select.select(watched, [], [], _LOOK_UP)[0]:
            _reap(ended)
        _reap(ended)
        if program in ended:
            print(f"keeper: the program ended with exit code {ended[program]}", file=sys.stderr, flush=True)
    finally:
        _end_all()
        if folder:
            shutil.rmtree(folder, ignore_errors=True)
    code = ended.get(program, 0)
    return code if code >= 0 else 128 - code


def _start(libc: ctypes.CDLL, command: Sequence[str] | Callable[[], object]) -> int:
    """Fork, then execute or call; the program is killed where the keeper is."""
    program = os.fork()
    if program:
        return program
    try:
        libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        if callable(command):
            os._exit(_called(command))
        try:
            os.execvp(command[0], [*command])
        except OSError as error:
            print(f"error: {command[0]}: {error.strerror}", file=sys.stderr, flush=True)
    finally:
        os._exit(127)


def _called(work: Callable[[], object]) -> int:
    """Call it as a program of its own would be run, with signals as they are there; its exit code."""
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    code = 0
    try:
        work()
    except BaseException:
        traceback.print_exc()
        code = 1
    with contextlib.suppress(OSError):
        sys.stdout.flush()
        sys.stderr.flush()
    return code


def _reap(ended: dict[int, int]) -> bool:
    """Take leave of the children that have ended, and note how; whether there are others."""
    try:
        while (status := os.waitpid(-1, os.WNOHANG))[0]:
            ended[status[0]] = os.waitstatus_to_exitcode(status[1])
    except ChildProcessError:
        return False
    return True


def _end_all() -> None:
    """SIGTERM to every descendant, SIGKILL to those that are there after a while; orphans are children, so none is missed."""
    asked: set[int] = set()
    killed_from = time.monotonic() + GRACE
    while _reap({}):
        late = time.monotonic() > killed_from
        for pid in descendants(os.getpid()):
            if late or pid not in asked:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL if late else signal.SIGTERM)
                asked.add(pid)
        time.sleep(0.02)


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), sys.argv[2], sys.argv[3:]))
