"""Files that are either whole or absent, whatever becomes of the process that writes them."""

from __future__ import annotations

import os
import tempfile
from contextlib import suppress
from pathlib import Path

# How the names of files end that are not whole yet; they begin with a dot.
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
        return False
    finally:
        with suppress(OSError):  # gone where it was renamed
            os.unlink(aside)
    return True
