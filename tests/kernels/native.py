"""Compiles the package's Triton kernels for an NVIDIA GPU that need not be there, and prints as JSON what became of them.

    python tests/kernels/native.py CAPABILITY[,CARD] CALL... [--every-launch]

Each call of a kernel's function is made on tensors of the host; compiling is real, down to machine code, and nothing is launched.
Of the launch settings that are tuned the least and the largest are compiled, or all; the last is made out to be the fastest.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from fastvl_lab.kernels import tuned
from fastvl_lab.kernels.add_norm import add_layer_norm, add_rms_norm
from fastvl_lab.kernels.argmax import argmax
from fastvl_lab.kernels.decode_attention import decode_attention
from fastvl_lab.kernels.interpolate import interpolate
from fastvl_lab.kernels.patchify import patchify
from fastvl_lab.kernels.prefill_attention import prefill_attention
from fastvl_lab.kernels.rotate_and_keep import rotate_and_keep
from fastvl_lab.kernels.rotate_packed import rotate_packed
from fastvl_lab.kernels.segment_attention import block_size, segment_attention
from fastvl_lab.kernels.silu_mul import silu_mul

CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"


class NoDevice:
    """What Triton asks its driver for until a kernel is compiled."""

    def __init__(self, capability: int) -> None:
        self._target = GPUTarget("cuda", capability, 32)

    def get_current_target(self) -> GPUTarget:
        return self._target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, _: int) -> int:
        return 0


def compile_only(
    capability: int,
    seen: Callable[[JITFunction, Any, dict[str, Any]], None],
    measure: Callable[[Callable[[], Any]], float],
    card: str = "a card",
    *,
    every_launch: bool = False,
) -> None:
    """From now on this process compiles for a GPU of that capability and launches nothing.

    seen(function, kernel, options) is told of every call; measure stands in for Triton's benchmark of launch settings. card: which
    GPU it is said to be.
    """
    compile_and_launch = JITFunction.run

    def run(function: JITFunction, *arguments: Any, **options: Any) -> Any:
        kernel = compile_and_launch(function, *arguments, **(options | {"warmup": True}))
        seen(function, kernel, options)
        return kernel

    driver.set_active(NoDevice(capability))
    JITFunction.run = run
    tuned.do_bench = lambda launch, return_mode: measure(launch)
    tuned.card_of = lambda device: card
    if not every_launch:
        launches_of = tuned.launches_of
        tuned.launches_of = lambda dtype: (min(launches_of(dtype)), max(launches_of(dtype)))


def _segments(head_dim: int, length: int, dtype: torch.dtype) -> None:
    """As many heads as the published towers have, in their packed projection."""
    q, k, v = torch.zeros(256, 3, 16, head_dim, dtype=dtype).permute(1, 2, 0, 3)
    segment_attention(q, k, v, torch.zeros(4, 3, dtype=torch.int32), block=block_size(dtype, length))


def _prefill(dtype: torch.dtype) -> None:
    kept, slots = torch.zeros(200, 8, 128, dtype=dtype), torch.zeros(1, 200, dtype=torch.int64)
    prefill_attention(torch.zeros(100, 32, 128, dtype=dtype), kept, kept, slots, torch.zeros(4, 4, dtype=torch.int32), longest=200)


def _decode(dtype: torch.dtype, longest: int = 200) -> None:
    kept, slots = torch.zeros(200, 8, 128, dtype=dtype), torch.zeros(1, 200, dtype=torch.int64)
    decode_attention(torch.zeros(1, 32, 128, dtype=dtype), kept, kept, slots, torch.ones(1, dtype=torch.int32), longest=longest)


def _rotate_and_keep(dtype: torch.dtype) -> None:
    q, k, v = torch.zeros(9, 48, 128, dtype=dtype).split((32, 8, 8), dim=1)
    angles, kept, written = torch.zeros(9, 64), torch.zeros(20, 8, 128, dtype=dtype), torch.zeros(9, dtype=torch.int64)
    for norm in (None, torch.zeros(128, dtype=dtype)):
        rotate_and_keep(q, k, v, angles, angles, norm, norm, 1e-6, kept, kept, written)


def _patchify(dtype: torch.dtype) -> None:
    pixels, ones = torch.zeros(1, 56, 56, 3, dtype=torch.uint8), torch.ones(3)
    patchify(pixels, ones, ones, patch_size=14, merge_size=2, frames=2, dtype=dtype)


def _add_norm(dtype: torch.dtype) -> None:
    x, weight = torch.zeros(9, 1280, dtype=dtype), torch.zeros(1280, dtype=dtype)
    add_rms_norm(x, x, weight, 1e-6)
    add_layer_norm(x, x, weight, weight, 1e-6)


def _rest(dtype: torch.dtype) -> None:
    """The small ones, at the shapes of published models."""
    _rotate_and_keep(dtype)
    _patchify(dtype)
    _add_norm(dtype)
    rotate_packed(torch.zeros(9, 3, 16, 80, dtype=dtype), torch.zeros(9, 40), torch.zeros(9, 40))
    silu_mul(*torch.zeros(9, 2, 3420, dtype=dtype).unbind(1))
    interpolate(torch.zeros(2304, 1024, dtype=dtype), torch.zeros(9, 4, dtype=torch.int64), torch.zeros(9, 4))
    argmax(torch.zeros(151_936))


CALLS: dict[str, Callable[[torch.dtype], None]] = {
    "windows_80": lambda dtype: _segments(80, 64, dtype),
    "frames_80": lambda dtype: _segments(80, 1024, dtype),
    "frames_72": lambda dtype: _segments(72, 1024, dtype),
    "frames_64": lambda dtype: _segments(64, 1024, dtype),
    "prefill": _prefill,
    "decode": _decode,
    "decode_250": lambda dtype: _decode(dtype, 250),
    "rest": _rest,
}


def _resources(kernel: Any) -> dict[str, int]:
    """What the machine code takes; a stack holds what found no place in registers."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as code:
        code.write(kernel.asm["cubin"])
        code.flush()
        said = subprocess.run([CUOBJDUMP, "--dump-resource-usage", code.name], capture_output=True, text=True, check=True).stdout
    words = dict(word.split(":") for line in said.splitlines() if "REG:" in line for word in line.split())
    return {"registers": int(words["REG"]), "stack": int(words["STACK"]), "shared": kernel.metadata.shared}


def main(capability: int, card: str, names: list[str], *, every_launch: bool) -> dict[str, Any]:
    compiled: list[dict[str, Any]] = []
    measured: list[float] = []
    call = ""

    def note(function: JITFunction, kernel: Any, options: dict[str, Any]) -> None:
        instructions = [name for name in ("wgmma", "mma.sync", "tcgen05.mma") if name in kernel.asm["ptx"]]
        launch = {"num_warps": kernel.metadata.num_warps, "block_k": options.get("block_k")}
        compiled.append({"call": call, "kernel": function.__name__, **launch, **_resources(kernel), "uses": instructions})

    def measure(launch: Callable[[], Any]) -> float:
        launch()
        measured.append(-len(measured))
        return measured[-1]

    compile_only(capability, note, measure, card, every_launch=every_launch)
    for name in names:
        for dtype in (torch.bfloat16, torch.float32) if name == "rest" else (torch.bfloat16,):
            call = f"{name} {dtype}"
            CALLS[name](dtype)
    return {"compiled": compiled, "measured": len(measured)}


if __name__ == "__main__":
    capability, _, card = sys.argv[1].partition(",")
    names = [name for name in sys.argv[2:] if name in CALLS]
    every_launch = "--every-launch" in sys.argv
    print(json.dumps(main(int(capability), card or f"a card of {capability}", names, every_launch=every_launch)))
