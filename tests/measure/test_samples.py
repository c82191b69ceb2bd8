"""Samples: interleaving, pairing by round, and intervals that hold the median as often as they say."""

from __future__ import annotations

import math

import numpy as np
import pytest

from fastvl_lab.measure.samples import (
    Interval,
    Samples,
    StageSample,
    _rank_of_pairs,
    as_row,
    gains,
    median_interval,
    saves,
    time_rounds,
    unpaired_difference,
    unpaired_ratio,
)


def test_rounds_are_interleaved_and_warm_up_is_not_kept() -> None:
    seen: list[str] = []
    tasks = {name: (lambda name=name: seen.append(name) or {"a": 1.0, "b": 2.0}) for name in "xyz"}
    rounds = time_rounds(tasks, repeats=4, warm_up=2, seed=1)
    assert [sorted(seen[i : i + 3]) for i in range(0, 18, 3)] == [["x", "y", "z"]] * 6
    assert len({tuple(seen[i : i + 3]) for i in range(0, 18, 3)}) > 1
    assert rounds.engines == ("x", "y", "z")
    assert rounds.seconds("y") == [3.0] * 4
    assert rounds.seconds("y", "b") == [2.0] * 4


def test_ratios_are_paired_by_round_whatever_the_order_of_timings() -> None:
    times = {"a": [1.0, 2.0, 4.0, 8.0, 100.0, 6.0, 8.0], "b": [0.5, 1.0, 1.0, 8.0, 10.0, 3.0, 4.0]}
    timings = [StageSample(engine=label, round=i, steps={"s": t}) for label, ts in times.items() for i, t in enumerate(ts)]
    rounds = Samples(samples=tuple(reversed(timings)))
    ratio = rounds.ratio("b", "a")
    assert ratio == (2, 1, 10)  # of 2, 2, 4, 1, 10, 2, 2
    assert math.isnan(Samples(samples=tuple(t for t in timings if t.round < 3)).ratio("b", "a").low)


def test_intervals_come_from_samples_and_few_samples_give_none() -> None:
    assert median_interval([3.0]) == pytest.approx((3.0, float("nan"), float("nan")), nan_ok=True)
    # Ranks as tables of intervals of a median have them, for 95% or just above.
    for n, low, high in ((6, 1, 6), (8, 1, 8), (9, 2, 8), (10, 2, 9), (15, 4, 12), (20, 6, 15), (101, 41, 61)):
        values = [float((7 * x) % n + 1) if n % 7 else float(x + 1) for x in range(n)]  # 1 to n, in no order
        assert median_interval(values) == ((n + 1) / 2, low, high)
    assert median_interval(range(5))[1:] == pytest.approx((float("nan"),) * 2, nan_ok=True)


def test_intervals_hold_the_median_as_often_as_they_say() -> None:
    """Of samples as skewed as times are."""
    draws = np.exp(0.3 * np.random.default_rng(0).standard_normal((2000, 20)))
    for n in (6, 7, 10, 20):
        held = [interval.low <= 1 <= interval.high for interval in map(median_interval, draws[:, :n])]
        assert sum(held) / len(held) > 0.94


def test_unpaired_intervals_have_the_ranks_of_mann_and_whitney_and_hold_what_they_say() -> None:
    # Of n and m: one more than the critical U at 5%, two-sided, as tables have it.
    for n, m, critical in ((4, 4, 0), (5, 5, 2), (6, 6, 5), (8, 8, 13), (10, 8, 17), (20, 20, 127), (3, 3, -1)):
        assert _rank_of_pairs(n, m) == _rank_of_pairs(m, n) == critical + 1
    assert _rank_of_pairs(101, 100) == pytest.approx(_rank_of_pairs(100, 100) * 1.01, rel=0.01), "exact meets its limit"
    assert unpaired_ratio([2.0, 4.0], [1.0])[:1] == (3.0,)
    assert math.isnan(unpaired_ratio([2.0] * 3, [1.0] * 3).low)
    assert unpaired_difference([5.0] * 4, [3.0] * 4) == (2, 2, 2)
    draws = np.exp(0.2 * np.random.default_rng(1).standard_normal((1000, 24)))
    held = [
        found.low <= 1.1 <= found.high
        for found in (unpaired_ratio([1.1 * x for x in row[:12]], row[12:]) for row in draws.tolist())
    ]
    assert 0.94 < sum(held) / len(held) < 0.98


def test_ratios_in_words() -> None:
    assert Interval(1.624, 1.5, 1.75).times() == "1.62× (95% CI 1.50 to 1.75)"
    assert median_interval([2.0, 3.0]).times() == "2.50× (too few rounds for an interval)"


@pytest.mark.parametrize(
    ("ours", "theirs", "ratio", "saving"),
    [
        ({0: 1.0, 1: 2.0, 2: 4.0}, {0: 2.0, 1: 2.0, 2: 12.0}, 2.0, 1.0),
        ({0: 1.0, 2: 4.0}, {0: 2.0, 1: 2.0, 2: 2.0}, 1.25, -0.5),  # round 1 has no pair
        ({-1: 100.0, 3: 5.0}, {-1: 1.0, 3: 4.0}, 0.8, -1.0),  # a warm-up is no sample
    ],
)
def test_ratios_and_savings_pair_what_ran_in_the_same_round(
    ours: dict[int, float], theirs: dict[int, float], ratio: float, saving: float
) -> None:
    made = [StageSample(engine=name, round=n, steps={"s": t}) for name, of in (("a", ours), ("b", theirs)) for n, t in of.items()]
    samples = Samples(samples=tuple(made))
    found = samples.ratio("a", "b"), samples.saving("a", "b", "s")
    assert [interval.median for interval in found if interval] == pytest.approx([ratio, saving])
    assert samples.ratio("a", "nobody") is samples.saving("nobody", "b") is None
    assert samples.only(lambda sample: sample.engine == "b").engines == ("b",)


def test_a_row_has_an_interval_or_none() -> None:
    assert as_row("ratio", Interval(2.0, 1.5, 2.5)) == {"ratio": 2.0, "ratio_low": 1.5, "ratio_high": 2.5}
    assert as_row("speedup", None) == {"speedup": None, "speedup_low": None, "speedup_high": None}
    assert gains(Interval(1.2, 1.1, 1.3))
    assert saves(Interval(0.2, 0.1, 0.3))
    for nothing in (None, Interval(5.0, math.nan, math.nan), Interval(1.2, -0.1, 1.4)):
        assert not gains(nothing)
        assert not saves(nothing)
