"""How much memory is free, before something large is put into it."""

from __future__ import annotations

from pathlib import Path

import torch


def available_bytes(device: torch.device) -> int | None:
    """Free bytes on the device, or None where they are not known.

    CUDA: the driver's figure and what torch holds without using it. Linux hosts: `MemAvailable`, or what the control group
    (a container's limit) leaves, whichever is less.
    """
    if device.type == "cuda":
        held = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(torch.cuda.mem_get_info(device)[0]) + held
    known = [n for n in (_mem_available(), _control_group_left()) if n is not None]
    return min(known) if known else None


def _mem_available() -> int | None:
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")), None)


def _control_group_left(root: Path = Path("/sys/fs/cgroup")) -> int | None:
    """The limit of a version 2 control group less its use, not counting cached files; None without a limit ("max")."""
    try:
        limit, used = (int((root / name).read_text()) for name in ("memory.max", "memory.current"))
        counted = dict(line.split() for line in (root / "memory.stat").read_text().splitlines())
    except (OSError, ValueError):
        return None
    return limit - used + int(counted.get("inactive_file", 0)) + int(counted.get("active_file", 0))


def gigabytes(n_bytes: int) -> str:
    """A byte count as a person reads it: decimal GB, one digit; MB below one."""
    return f"{n_bytes / 1e9:.1f} GB" if n_bytes >= 1e9 else f"{n_bytes / 1e6:.1f} MB"
