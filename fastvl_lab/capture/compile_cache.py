"""Where compiled kernels are kept from process to process: torch's and Triton's caches, in the user's cache folder."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import torch
from torch._inductor.runtime.cache_dir_utils import default_cache_dir

from fastvl_lab.checkpoint.user_cache import cache_root

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


def discard() -> bool:
    """Throw torch's compiled code away if it is in the user's cache folder of this package; a folder of others' is not touched."""
    folder = os.environ.get("TORCHINDUCTOR_CACHE_DIR")
    if folder is None or not Path(folder).is_relative_to(cache_root()):
        return False
    shutil.rmtree(folder, ignore_errors=True)
    return True
