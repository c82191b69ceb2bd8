"""Serves requests on the host as a GPU would be asked to, and prints as JSON which Triton kernels each had to compile.

    PYTHONPATH=tests python tests/kernels/dry_run.py CHECKPOINT [SLOT.TOGGLE=OPTION...]

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
from native import compile_only
from shallow import shallow_lab
from torch.utils import _triton
from triton.runtime.jit import JITFunction

from fastvl_lab import Recipe, Request, photo
from fastvl_lab.catalogue import Needs
from fastvl_lab.measure.recipes import changed, fused

# Sizes of which each differs from those before in what a kernel could take for special: multiples of 16, windows cut off, one tile.
SIZES = ((640, 480), (448, 448), (330, 250), (97, 310), (56, 56))


def pretend() -> list[str]:
    """Let this process take itself for one with a GPU, as far as Triton and recipes are concerned: the functions newly compiled."""
    known: set[int] = set()
    fresh: list[str] = []

    def note(function: JITFunction, kernel: Any, _: dict[str, Any]) -> None:
        if id(kernel) not in known:  # Triton keeps each, so none has the identity of another
            known.add(id(kernel))
            fresh.append(function.__name__)

    def measure(launch: Callable[[], Any]) -> float:
        launch()
        return 1.0

    compile_only(90, note, measure)
    _triton.has_triton = lambda: True
    Needs.unmet = lambda needs, target: None  # type: ignore[method-assign]
    inductor.compile_fx = lambda graph, inputs: graph  # type: ignore[assignment]
    for name in ("empty", "empty_like"):
        make: Callable[..., torch.Tensor] = getattr(torch, name)
        setattr(torch, name, lambda *a, make=make, **k: _zero(make(*a, **k)))
    return fresh


def _zero(tensor: torch.Tensor) -> torch.Tensor:
    return tensor if torch.compiler.is_compiling() else tensor.zero_()


def main(checkpoint: str, choices: list[str]) -> list[dict[str, Any]]:
    """Of each request: its image sizes, the kernels it compiled, and the stages that torch.compile compiled for it."""
    fresh = pretend()
    lab = shallow_lab(checkpoint, device="cpu", dtype="bfloat16")
    changes = {"preprocessor.upload": "pageable", "preprocessor.patchify": "triton"}
    changes |= {"vit.weights": "plain", "attention.weights": "plain"}  # packed ones are a CPU's alone
    changes |= dict(choice.split("=") for choice in choices)
    recipe = changed(fused(Recipe.fastest("cpu"), "triton"), changes)
    found = []
    for sizes in [*((size,) for size in SIZES), SIZES[1:4]]:
        images = [photo("coffee", size) for size in sizes]
        run = lab.run(Request(images=images, prompt="What is this?" * len(sizes), max_new_tokens=9, ignore_eos=True), recipe)
        found.append({"sizes": sizes, "kernels": fresh.copy(), "stages": [capture.stage for capture in run.captures]})
        fresh.clear()
    return found


if __name__ == "__main__":
    print(json.dumps(main(sys.argv[1], sys.argv[2:])))
