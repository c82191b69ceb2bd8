"""Where and when something was measured."""

from __future__ import annotations

import platform
import shutil
import subprocess
from contextlib import suppress
from datetime import date

import torch
import transformers

from fastvl_lab.lab import Lab, device_name, dtype_name
from fastvl_lab.machine import processor_name

# What `nvidia-smi --query-gpu` is asked -> what its answer is called, and its unit.
_OF_A_CARD = {
    "clocks.sm": ("sm_clock", "MHz"),
    "clocks.max.sm": ("sm_clock_limit", "MHz"),
    "power.limit": ("power_limit", "W"),
    "temperature.gpu": ("temperature", "°C"),
}


def environment(lab: Lab) -> dict[str, str]:
    """Device, dtype, the host's processor, the day, the versions that matter, and of a card what `card` reads."""
    return {
        "device": device_name(lab.device),
        "processor": processor_name(),
        "date": date.today().isoformat(),
        "dtype": dtype_name(lab.dtype),
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "transformers": transformers.__version__,
        **card(lab.device),
    }


def card(device: torch.device) -> dict[str, str]:
    """A card's clocks, power limit and temperature as they are now, as nvidia-smi reads them; what it does not tell is absent."""
    program = shutil.which("nvidia-smi") if device.type == "cuda" else None
    if program is None:
        return {}
    which = f"GPU-{torch.cuda.get_device_properties(device).uuid}"
    command = [program, f"--id={which}", f"--query-gpu={','.join(_OF_A_CARD)}", "--format=csv,noheader,nounits"]
    with suppress(OSError, subprocess.SubprocessError):
        said = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout
        answers = zip(_OF_A_CARD.values(), said.strip().split(","), strict=False)
        return {name: f"{value.strip()} {unit}" for (name, unit), value in answers if value.strip()[:1].isdigit()}
    return {}
