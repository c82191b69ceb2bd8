"""Serves requests on the host as a GPU would be asked to, and prints as JSON which Triton kernels each had to compile.

    python tests/kernels/dry_run.py CHECKPOINT [SLOT.TOGGLE=OPTION...]

Every kernel that a request comes to is compiled for a GPU that need not be there, and not launched: what it would write is zero.
All else is done, so shapes, strides and addresses are those of real requests. What a compiled stage is to torch.compile is read by
it, and the graph of it is run as it is.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from typing import Any

import torch
import torch._inductor.compile_fx as inductor
from native import NoDevice
from torch.utils import _triton
from triton.runtime import driver
from triton.runtime.autotuner import Autotuner
from triton.runtime.jit import JITFunction

from fastvl_lab import Lab, Recipe, Request, photo
from fastvl_lab.measure.gpu_engines import changed, fused
from fastvl_lab.recipe import Option

# Sizes of which each differs from those before in what a kernel could take for special: multiples of 16, windows cut off, one tile.
SIZES = ((640, 480), (448, 448), (330, 250), (97, 310), (56, 56))


class Kernels:
    """What was compiled since it was last asked."""

    def __init__(self) -> None:
        self._known: set[int] = set()
        self._fresh: list[str] = []
        self._compile_and_launch = JITFunction.run

    def compile_only(self, function: JITFunction, *arguments: Any, **options: Any) -> Any:
        kernel = self._compile_and_launch(function, *arguments, **(options | {"warmup": True}))
        if id(kernel) not in self._known:  # Triton keeps each, so none has the identity of another
            self._known.add(id(kernel))
            self._fresh.append(function.__name__)
        return kernel

    def fresh(self) -> list[str]:
        fresh, self._fresh = self._fresh, []
        return fresh


def pretend() -> Kernels:
    """Let this process take itself for one with a GPU of compute capability 9.0, as far as Triton and recipes are concerned."""
    kernels = Kernels()
    driver.set_active(NoDevice(90))
    JITFunction.run = lambda function, *arguments, **options: kernels.compile_only(function, *arguments, **options)
    Autotuner.do_bench = property(lambda _: lambda launch, quantiles: [float(launch() is not None)] * len(quantiles))
    _triton.has_triton = lambda: True
    Option.unavailable = lambda option, device: None  # type: ignore[method-assign]
    inductor.compile_fx = lambda graph, inputs: graph  # type: ignore[assignment]
    for name in ("empty", "empty_like"):
        make: Callable[..., torch.Tensor] = getattr(torch, name)
        setattr(torch, name, lambda *a, make=make, **k: _zero(make(*a, **k)))
    return kernels


def _zero(tensor: torch.Tensor) -> torch.Tensor:
    return tensor if torch.compiler.is_compiling() else tensor.zero_()


def main(checkpoint: str, choices: list[str]) -> list[dict[str, Any]]:
    """Of each request: its image sizes, the kernels it compiled, and the stages that torch.compile compiled for it."""
    kernels = pretend()
    lab = Lab(checkpoint, device="cpu", dtype="bfloat16")
    changes = {"preprocessor.upload": "pageable", "preprocessor.patchify": "triton"}
    changes |= dict(choice.split("=") for choice in choices)
    recipe = changed(fused(Recipe.fastest("cpu"), "triton"), changes)
    found = []
    for sizes in [*((size,) for size in SIZES), SIZES[1:4]]:
        images = [photo("coffee", size) for size in sizes]
        run = lab.run(Request(images=images, prompt="What is this?" * len(sizes), max_new_tokens=9, ignore_eos=True), recipe)
        found.append({"sizes": sizes, "kernels": kernels.fresh(), "stages": [capture.stage for capture in run.captures]})
    return found


if __name__ == "__main__":
    print(json.dumps(main(sys.argv[1], sys.argv[2:])))
