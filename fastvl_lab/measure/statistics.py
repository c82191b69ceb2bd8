"""Medians with confidence intervals, from raw samples."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from math import comb, nan
from typing import NamedTuple

import numpy as np

FOR_AN_INTERVAL = 6  # samples: all of fewer lie on one side of the median with a probability of over 5%


class Interval(NamedTuple):
    """A median and its 95% confidence interval; of fewer than `FOR_AN_INTERVAL` samples there is none, and it is NaN."""

    median: float
    low: float
    high: float

    def times(self) -> str:
        """A ratio in words, such as "1.62× (95% CI 1.59 to 1.66)"."""
        known = f"95% CI {self.low:.2f} to {self.high:.2f}" if self.low == self.low else "too few rounds for an interval"
        return f"{self.median:.2f}× ({known})"


def median_interval(samples: Sequence[float]) -> Interval:
    """The median of samples, between two of them that hold the true one with a probability of at least 95%.

    Each sample is under the true median with a probability of one half, whatever the distribution, so how many are is binomial.
    A bootstrap of so few is too narrow: of 5 to 20 log-normal samples it holds the median in 88% to 94% of cases.
    """
    values = np.sort(np.asarray(samples, dtype=np.float64))
    n = len(values)
    assert n > 0
    outside = accumulate(2 * comb(n, below) / 2**n for below in range(n // 2))  # with the 1st, 2nd, ... from each end as limits
    rank = sum(probability <= 0.05 for probability in outside)
    low, high = (values[rank - 1], values[-rank]) if rank else (nan, nan)
    return Interval(float(np.median(values)), float(low), float(high))
