"""How much memory is free, before something large is put into it."""

from __future__ import annotations

from pathlib import Path

import torch


def available_bytes(device: torch.device) -> int | None:
    """Free bytes on the device: the driver's figure on CUDA, `MemAvailable` on Linux hosts, None where neither is known."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")), None)


def gigabytes(n_bytes: int) -> str:
    """A byte count as a person reads it: decimal GB, one digit."""
    return f"{n_bytes / 1e9:.1f} GB"
