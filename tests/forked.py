"""Runs scripts each in a process of its own that need not import torch: it is forked from this one, which has computed nothing.

    python tests/forked.py

A line of JSON is a wish, and a line its answer. {"path", "arguments", "environment", "out"} starts the script with these arguments
and, over its own, that environment (null takes a variable away), in a session of its own; it prints into the file `out`. The answer
is its process id. {"wait": id, "seconds"} waits for its end: the answer is its exit status, negative where a signal ended it, and
"late" where it had to be killed.
"""

from __future__ import annotations

import json
import os
import runpy
import signal
import sys
import time
from pathlib import Path
from typing import Any

import torch._inductor.compile_fx as inductor

import fastvl_lab


def run(path: str, arguments: list[str], environment: dict[str, str | None], out: str) -> None:
    """In a child: the script, up to the end of its last line."""
    os.setsid()
    with Path(out).open("w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    os.environ.update({name: value for name, value in environment.items() if value is not None})
    for name in [name for name, value in environment.items() if value is None]:
        os.environ.pop(name, None)
    sys.argv = [path, *arguments]
    sys.path.insert(0, str(Path(path).parent))
    runpy.run_path(path, run_name="__main__")


def wait(child: int, seconds: float) -> int | str:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.01)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return "late"


def main() -> None:
    assert fastvl_lab.Lab  # what takes seconds to import is imported, and what half of the scripts compile by
    assert inductor
    for line in sys.stdin:
        asked: dict[str, Any] = json.loads(line)
        if "wait" in asked:
            print(wait(asked["wait"], asked["seconds"]), flush=True)
            continue
        child = os.fork()
        if child == 0:
            run(**asked)
            return  # it ends as any program does, by what it leaves at exit
        print(child, flush=True)


if __name__ == "__main__":
    main()
