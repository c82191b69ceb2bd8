"""Where compiled kernels are kept from process to process: torch's and Triton's caches, in the user's cache folder."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import torch
from torch._inductor.runtime.cache_dir_utils import default_cache_dir

from fastvl_lab.checkpoint.user_cache import cache_root

T = TypeVar("T")

_VARIABLES = {"TORCHINDUCTOR_CACHE_DIR": "inductor", "TRITON_CACHE_DIR": "triton"}


def keep_compiled() -> None:
    """Let torch and Triton keep what they compile in the user's cache folder, from now on in this process.

    A folder for each version of torch: what another version left is not looked at. Variables that somebody has set are left as they
    are, and where the folder cannot be written torch's and Triton's own defaults stay.
    """
    if os.environ.get("TORCHINDUCTOR_CACHE_DIR") == default_cache_dir():  # torch sets its default when it first asks for it
        del os.environ["TORCHINDUCTOR_CACHE_DIR"]
    folder = cache_root() / "compiled" / f"torch-{torch.__version__}"
    for variable, name in _VARIABLES.items():
        if variable not in os.environ:
            try:
                (folder / name).mkdir(parents=True, exist_ok=True)
            except OSError:
                continue
            os.environ[variable] = str(folder / name)


def may_be_damaged() -> bool:
    """Whether torch's cache is in this package's cache folder, and holds anything; a folder of somebody else's is not judged."""
    folder = Path(os.environ.get("TORCHINDUCTOR_CACHE_DIR", ""))
    return folder.is_relative_to(cache_root()) and folder.is_dir()


def without_cache(compiled: Callable[[], T]) -> T:
    """Call it without what torch's cache holds: if that helps, the cache was damaged and is given up; else it stays as it was."""
    assert may_be_damaged()
    folder = Path(os.environ["TORCHINDUCTOR_CACHE_DIR"])
    aside = folder.with_name(f".{folder.name}-{os.getpid()}")
    folder.rename(aside)
    try:
        made = compiled()
    except Exception:
        shutil.rmtree(folder, ignore_errors=True)
        aside.rename(folder)
        raise
    shutil.rmtree(aside, ignore_errors=True)
    return made
