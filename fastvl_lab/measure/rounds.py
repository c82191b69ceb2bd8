"""Any functions timed side by side: interleaved rounds in shuffled order, and ratios paired by round."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from fastvl_lab.errors import RequestError
from fastvl_lab.measure.statistics import Interval, median_interval

# Does the work once, and says how many seconds each of its steps took.
Task = Callable[[], Mapping[str, float]]


@dataclass(frozen=True, kw_only=True, eq=False)
class Timing:
    """One run of one task: seconds a step."""

    label: str
    round: int
    steps: Mapping[str, float]


@dataclass(frozen=True, kw_only=True, eq=False)
class Rounds:
    """Every timing of a comparison; what is derived from them is derived when asked for."""

    timings: tuple[Timing, ...]

    @property
    def labels(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(timing.label for timing in self.timings))

    def seconds(self, label: str, *steps: str) -> list[float]:
        """The sum of those steps (of all, if none is named) in every round, in order of rounds."""
        mine = sorted((t for t in self.timings if t.label == label), key=lambda t: t.round)
        return [sum(t.steps[step] for step in steps or t.steps) for t in mine]

    def median(self, label: str, *steps: str) -> Interval:
        """Seconds, with the interval of the median."""
        return median_interval(self.seconds(label, *steps))

    def ratio(self, label: str, reference: str, *steps: str) -> Interval:
        """How many times as fast as the reference: the median of ratios paired by round."""
        pairs = zip(self.seconds(reference, *steps), self.seconds(label, *steps), strict=True)
        return median_interval([theirs / ours for theirs, ours in pairs])


def now(device: torch.device) -> float:
    """Seconds on the host's clock once the device has done all it was given; between requests only, never inside one."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def time_rounds(tasks: Mapping[str, Task], *, repeats: int = 10, warm_up: int = 2, seed: int = 0) -> Rounds:
    """Run every task `warm_up + repeats` times, each round in an order shuffled by `seed`; warm-up rounds are not kept."""
    if repeats < 1 or warm_up < 0:
        raise RequestError(f"repeats is {repeats} and warm_up {warm_up}; repeats must be at least 1, and warm_up at least 0")
    order, timings = list(tasks), []
    shuffled = random.Random(seed)
    for number in range(-warm_up, repeats):
        shuffled.shuffle(order)
        timings += [Timing(label=label, round=number, steps=tasks[label]()) for label in order]
    kept = [timing for label in tasks for timing in timings if timing.label == label and timing.round >= 0]
    return Rounds(timings=tuple(kept))
