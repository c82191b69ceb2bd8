"""The decoder's speed against Transformers, side by side in one run: prefill, and tokens a second of decoding."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from fastvl_lab import Lab, Request, compare, photo
from fastvl_lab.measure.samples import Interval, median_interval

pytestmark = pytest.mark.benchmark

Assert = Callable[[Callable[[], Interval], float], None]


@pytest.mark.parametrize(("size", "tokens"), [((448, 336), 33), ((1280, 960), 17)], ids=["448x336", "1280x960"])
@pytest.mark.parametrize("what", ["prefill", "decode"])
def test_prefill_and_decode_reach_their_bars(
    lab: Lab, assert_reaches: Assert, what: str, size: tuple[int, int], tokens: int
) -> None:
    """Paired by round. Bars are what low ends show on two shared cores; medians there are 1.2 to 1.4 and 1.4 to 1.8."""
    request = Request(images=[photo("coffee", size)], prompt="What is this?", max_new_tokens=tokens, ignore_eos=True)

    def measure() -> Interval:
        comparison = compare(lab, request, {"stock": "transformers", "lean": "fastest"}, repeats=9, warm_up=2)
        assert comparison.parity("lean")
        stock, lean = comparison.runs("stock"), comparison.runs("lean")
        if what == "prefill":
            pairs = [(a.trace.stages()["prefill"], b.trace.stages()["prefill"]) for a, b in zip(stock, lean, strict=True)]
        else:
            pairs = [(a.tpot or 0.0, b.tpot or 1.0) for a, b in zip(stock, lean, strict=True)]
        return median_interval([theirs / ours for theirs, ours in pairs])

    assert_reaches(measure, {"prefill": 1.1, "decode": 1.2}[what])
