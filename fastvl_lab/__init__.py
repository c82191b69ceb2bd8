"""fastvl_lab: see, explain and close the time-to-first-token gap of Qwen2.5-VL and Qwen3-VL in PyTorch and Triton.

`import fastvl_lab as fl`, then `fl.Lab`, `fl.Request`, `fl.Recipe`; names are loaded when first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from fastvl_lab import shown

if TYPE_CHECKING:
    from fastvl_lab.catalogue import toggles as toggles
    from fastvl_lab.engine import PeerInfo as PeerInfo, Peers as Peers, peers as peers
    from fastvl_lab.equivalents import Flags as Flags, flags as flags
    from fastvl_lab.errors import (
        CheckpointError as CheckpointError,
        DeviceError as DeviceError,
        EndpointError as EndpointError,
        FastvlError as FastvlError,
        ImageError as ImageError,
        MissingExtraError as MissingExtraError,
        RecipeError as RecipeError,
        RequestCancelledError as RequestCancelledError,
        RequestError as RequestError,
        TimeLimitError as TimeLimitError,
    )
    from fastvl_lab.grid.run import sweep as sweep
    from fastvl_lab.lab import Lab as Lab
    from fastvl_lab.lasting import Records as Records, open as open, records as records
    from fastvl_lab.measure.audit import Audit as Audit, audit as audit
    from fastvl_lab.measure.compare import (
        Attribution as Attribution,
        Comparison as Comparison,
        attribute as attribute,
        compare as compare,
    )
    from fastvl_lab.measure.floors import Floor as Floor, floor as floor
    from fastvl_lab.measure.load import Load as Load, load as load
    from fastvl_lab.measure.publish import photo as photo
    from fastvl_lab.measure.quiet import Quiet as Quiet
    from fastvl_lab.measure.regressions import Regressions as Regressions, regressions as regressions
    from fastvl_lab.measure.shares import Shares as Shares, shares as shares
    from fastvl_lab.measure.sweep import SweepSettings as SweepSettings
    from fastvl_lab.measure.tune import Tuned as Tuned, tune as tune
    from fastvl_lab.measure.under_load import Goodput as Goodput
    from fastvl_lab.recipe import Recipe as Recipe
    from fastvl_lab.request import Chunk as Chunk, Request as Request
    from fastvl_lab.run import Run as Run
    from fastvl_lab.sampling import Sampling as Sampling
    from fastvl_lab.trace import Trace as Trace
    from fastvl_lab.view.workbench import workbench as workbench

# Public name -> the module that defines it.
_PUBLIC = {
    "Lab": "lab",
    "Request": "request",
    "Sampling": "sampling",
    "Chunk": "request",
    "Recipe": "recipe",
    "toggles": "catalogue",
    "peers": "engine",
    "Peers": "engine",
    "PeerInfo": "engine",
    "flags": "equivalents",
    "Flags": "equivalents",
    "Run": "run",
    "Trace": "trace",
    "compare": "measure.compare",
    "Comparison": "measure.compare",
    "sweep": "grid.run",
    "SweepSettings": "measure.sweep",
    "attribute": "measure.compare",
    "Attribution": "measure.compare",
    "audit": "measure.audit",
    "Audit": "measure.audit",
    "floor": "measure.floors",
    "Floor": "measure.floors",
    "load": "measure.load",
    "Load": "measure.load",
    "tune": "measure.tune",
    "Tuned": "measure.tune",
    "Goodput": "measure.under_load",
    "shares": "measure.shares",
    "Shares": "measure.shares",
    "regressions": "measure.regressions",
    "Regressions": "measure.regressions",
    "open": "lasting",
    "records": "lasting",
    "Records": "lasting",
    "photo": "measure.publish",
    "Quiet": "measure.quiet",
    "workbench": "view.workbench",
    "FastvlError": "errors",
    "RequestError": "errors",
    "ImageError": "errors",
    "RecipeError": "errors",
    "CheckpointError": "errors",
    "DeviceError": "errors",
    "EndpointError": "errors",
    "RequestCancelledError": "errors",
    "TimeLimitError": "errors",
    "MissingExtraError": "errors",
}

__all__ = list(_PUBLIC)


shown.drawn_by(lambda: importlib.import_module("fastvl_lab.view"))  # when a result is first shown


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'fastvl_lab' has no attribute {name!r}; the public names are {', '.join(_PUBLIC)}")
    return getattr(importlib.import_module(f"fastvl_lab.{_PUBLIC[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
