"""Where a cell was measured, beyond `measure.environment`: host, card, driver, threads, state of the code, who else was there."""

from __future__ import annotations

import os
import platform
import subprocess
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

import fastvl_lab
from fastvl_lab.machine import processor_name


def where(device: torch.device) -> dict[str, Any]:
    """Of this process and the device it computes on; what a system does not tell is None, and stands in every row all the same.

    card: the GPU's name, of a CPU the processor's. card_id: its UUID, "" of a CPU. others_on_card: processes beside this one that
    compute on it, as nvidia-smi names them; None where it names none, not even this one.
    """
    found: dict[str, Any] = {
        "host": platform.node(),
        "card": processor_name(),
        "card_id": "",
        "driver": None,
        "cuda": None,
        "others_on_card": None,
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "triton": _version("triton"),
        "code": code_state(),
    }
    return found | _of_gpu(device) if device.type == "cuda" else found


def _of_gpu(device: torch.device) -> dict[str, Any]:
    properties = torch.cuda.get_device_properties(device)
    card = f"GPU-{properties.uuid}"
    found: dict[str, Any] = {"card": properties.name, "card_id": card, "cuda": torch.version.cuda}
    if told := _lines("nvidia-smi", f"--id={card}", "--query-gpu=driver_version", "--format=csv,noheader"):
        found["driver"] = told[0]
    running = _lines("nvidia-smi", f"--id={card}", "--query-compute-apps=pid,process_name", "--format=csv,noheader")
    if running:  # in a container it may name nobody, not even this process
        mine = str(os.getpid())
        found["others_on_card"] = "; ".join(line for line in running if line.split(",")[0].strip() != mine)
    return found


def code_state() -> str:
    """The commit of the package's working tree, "-dirty" after it where files differ; its version where there is no tree."""
    git = ("git", "-C", str(Path(fastvl_lab.__file__).parent))
    its_own = _lines(*git, "ls-files", "__init__.py")  # an environment may lie in a repository of something else
    told = _lines(*git, "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*") if its_own else []
    return told[0] if told else _version("fastvl-lab") or "unknown"


def _version(package: str) -> str | None:
    with suppress(PackageNotFoundError):
        return version(package)
    return None


def _lines(*command: str) -> list[str]:
    """What a program says, by lines; nothing where it is not there, fails or hangs."""
    with suppress(OSError, subprocess.SubprocessError):
        told = subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout
        return [line.strip() for line in told.splitlines() if line.strip()]
    return []
