"""Medians with confidence intervals, from raw samples."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

_RESAMPLES = 2000


class Interval(NamedTuple):
    """A median and its 95% bootstrap percentile interval; with fewer than 5 samples there is no interval, and it is NaN."""

    median: float
    low: float
    high: float

    def times(self) -> str:
        """A ratio in words, such as "1.62× (95% CI 1.59 to 1.66)"."""
        known = f"95% CI {self.low:.2f} to {self.high:.2f}" if self.low == self.low else "too few rounds for an interval"
        return f"{self.median:.2f}× ({known})"


def median_interval(samples: Sequence[float]) -> Interval:
    """The median of samples; the resampling is seeded, so equal samples give equal intervals."""
    values = np.asarray(samples, dtype=np.float64)
    assert len(values) > 0
    if len(values) < 5:
        return Interval(float(np.median(values)), float("nan"), float("nan"))
    drawn = np.random.default_rng(0).integers(len(values), size=(_RESAMPLES, len(values)))
    low, high = np.percentile(np.median(values[drawn], axis=1), [2.5, 97.5])
    return Interval(float(np.median(values)), float(low), float(high))
