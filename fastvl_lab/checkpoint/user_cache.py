"""The user's cache folder, and folders in it that are either whole or absent."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from fastvl_lab.errors import CheckpointError
from fastvl_lab.whole import write_folder


def cache_root() -> Path:
    """`$XDG_CACHE_HOME/fastvl_lab`, by default `~/.cache/fastvl_lab` (XDG Base Directory Specification).

    Raises `CheckpointError` where nobody knows that home.
    """
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    try:
        return Path(base).expanduser() / "fastvl_lab"
    except RuntimeError:
        raise CheckpointError(
            f"no home is known for the cache folder {base}; set XDG_CACHE_HOME to a folder that can be written"
        ) from None


def whole_folder(name: str, write: Callable[[Path], None]) -> Path:
    """The folder `name` in the cache, made by `write` on first use, whole or not at all; raises `CheckpointError`."""
    target = cache_root() / name
    if target.is_dir():
        return target
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        write_folder(target, write)
    except OSError as error:
        if not target.is_dir():  # a rename onto a folder that another process has just completed is no failure
            raise CheckpointError(
                f"the cache folder {target.parent} cannot be written ({error.strerror or error}); "
                f"set XDG_CACHE_HOME to a folder that can"
            ) from error
    return target
