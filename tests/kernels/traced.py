"""Has torch.compile read the calls of Triton kernels in `native.py`, down to the graph it makes of them, and prints the kernels."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import torch
from native import CALLS, NoDevice, driver
from torch._higher_order_ops.triton_kernel_wrap import kernel_side_table
from torch.utils import _triton


def main() -> dict[str, list[str]]:
    """By call, the functions of the kernels in its graph; raises where torch would leave anything out of the graph."""
    driver.set_active(NoDevice(90))
    _triton.has_triton = lambda: True  # as it is with a device
    found: dict[str, list[str]] = {}
    call = ""

    def backend(graph: torch.fx.GraphModule, _: Any) -> Callable[..., Any]:
        numbers = [node.kwargs["kernel_idx"] for node in graph.graph.nodes if "kernel_idx" in node.kwargs]
        found[call] = [kernel_side_table.get_kernel(number).fn.__name__ for number in numbers]
        return lambda *inputs: ()

    for call in CALLS:
        torch.compile(CALLS[call], backend=backend, fullgraph=True)(torch.bfloat16)
    return found


if __name__ == "__main__":
    print(json.dumps(main()))
