"""When what was compiled or captured has paid."""

from __future__ import annotations

import math
from collections.abc import Iterable

from fastvl_lab.capture.execute import Capture


def break_even(captures: Iterable[Capture], *, eager: float, captured: float) -> int | None:
    """After how many requests the captures' own seconds have been saved; None where a request saves nothing.

    eager, captured: seconds a request takes without and with them, medians of runs side by side.
    """
    saved = eager - captured
    return math.ceil(sum(capture.seconds for capture in captures) / saved) if saved > 0 else None
