"""Runs scripts each in a process of its own that need not import torch: it is forked from this one, which has computed nothing.

    python tests/forked.py

Of each line of JSON, {"path", "arguments", "environment", "out"}, it runs the script with these arguments and, over its own, that
environment (null takes a variable away), lets it print into the file `out`, and prints its exit status.
"""

from __future__ import annotations

import json
import os
import runpy
import sys
import traceback
from pathlib import Path
from typing import Any

import fastvl_lab


def run(path: str, arguments: list[str], environment: dict[str, str | None], out: str) -> int:
    """In a child: the script's exit status."""
    with Path(out).open("w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    os.environ.update({name: value for name, value in environment.items() if value is not None})
    for name in [name for name, value in environment.items() if value is None]:
        os.environ.pop(name, None)
    sys.argv = [path, *arguments]
    sys.path.insert(0, str(Path(path).parent))
    try:
        runpy.run_path(path, run_name="__main__")
    except BaseException:
        traceback.print_exc()
        return 1
    finally:
        sys.stdout.flush()
    return 0


def main() -> None:
    assert fastvl_lab.Lab  # what takes seconds to import is imported
    for line in sys.stdin:
        asked: dict[str, Any] = json.loads(line)
        child = os.fork()
        if child == 0:
            os._exit(run(**asked))
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)


if __name__ == "__main__":
    main()
