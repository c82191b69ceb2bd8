"""Files and folders that are either whole or absent, whatever becomes of the process that writes them."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

# How the names of those end that are not whole yet; they begin with a dot.
ASIDE = ".aside"


def write_whole(path: Path, data: bytes, *, replace: bool = True) -> bool:
    """Write a file aside and rename it, so that it is never half there; raises `OSError`.

    replace: whether it takes the place of one that is there. Without, of several who write it at once one alone does (link(2), to
    which NFS keeps). Whether the file is this one.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, aside = tempfile.mkstemp(prefix=f".{path.name}-", suffix=ASIDE, dir=path.parent)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
        if replace:
            os.replace(aside, path)
        else:
            os.link(aside, path)
    except FileExistsError:
        return os.stat(aside).st_nlink == 2  # NFS may make the link, lose its answer and refuse the second try (open(2), O_EXCL)
    finally:
        with suppress(OSError):  # gone where it was renamed
            os.unlink(aside)
    return True


def write_folder(target: Path, write: Callable[[Path], None], *, replace: bool = False) -> None:
    """Have a folder filled aside and rename it when complete; raises `OSError`, also where there is one that is not empty.

    So a folder under its name is never half-written, also when the process dies or two processes start at once. replace: the one
    that is there makes room; for a moment, in which a process may die, there is none, and it lies aside.
    """
    aside = Path(tempfile.mkdtemp(prefix=f".{target.name}-", suffix=ASIDE, dir=target.parent))
    try:
        write(aside)
        aside.chmod(0o755)
        if replace and target.is_dir():
            before = Path(tempfile.mkdtemp(prefix=f".{target.name}-before-", suffix=ASIDE, dir=target.parent))
            target.rename(before)
            aside.rename(target)
            shutil.rmtree(before, ignore_errors=True)
        else:
            aside.rename(target)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
