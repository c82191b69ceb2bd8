"""Samples of engines side by side: interleaved rounds, and the medians, paired ratios and savings that are read from them."""

from __future__ import annotations

import dataclasses
import math
import random
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import accumulate
from math import comb, nan
from typing import Any, Generic, NamedTuple, TypeVar

import numpy as np
import torch

from fastvl_lab.errors import RequestError
from fastvl_lab.measure.quiet import QUIET, Quiet, Use, Watch
from fastvl_lab.run import Kind, Run
from fastvl_lab.trace import Trace

FOR_AN_INTERVAL = 6  # samples: all of fewer lie on one side of the median with a probability of over 5%

# Does its work once, and says how many seconds each of its steps took.
Timed = Callable[[], Mapping[str, float]]


class Interval(NamedTuple):
    """A median and its 95% confidence interval; of fewer than `FOR_AN_INTERVAL` samples there is none, and it is NaN."""

    median: float
    low: float
    high: float

    @property
    def ms(self) -> Interval:
        """The same of seconds, in milliseconds."""
        return Interval(*(end * 1e3 for end in self))

    @property
    def known(self) -> str:
        """The interval in words."""
        return f"95% CI {self.low:.2f} to {self.high:.2f}" if self.low == self.low else "too few rounds for an interval"

    def times(self) -> str:
        """A ratio in words, such as "1.62× (95% CI 1.59 to 1.66)"."""
        return f"{self.median:.2f}× ({self.known})" if self.median == self.median else "not shown (no undisturbed rounds of both)"


UNKNOWN = Interval(nan, nan, nan)  # in the place of a ratio that no round bears


def median_interval(samples: Sequence[float]) -> Interval:
    """The median of at least one sample, between two samples that hold the true one with a probability of at least 95%.

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


def unpaired_ratio(after: Sequence[float], before: Sequence[float]) -> Interval:
    """How many times as much `after` is as `before`, of samples that nothing pairs: see `_unpaired`."""
    return _unpaired(np.divide, after, before)


def unpaired_difference(after: Sequence[float], before: Sequence[float]) -> Interval:
    """By how much `after` is more than `before`, of samples that nothing pairs: see `_unpaired`."""
    return _unpaired(np.subtract, after, before)


def _unpaired(by: np.ufunc, after: Sequence[float], before: Sequence[float]) -> Interval:
    """The median over all pairs of one of `after` and one of `before`, and the 95% interval whose ends are such pairs too.

    Whatever the distribution, if the two differ by a factor or a shift alone (Hodges and Lehmann, Ann. Math. Stat. 34, 1963). Of
    too few, such as three and three, there is no interval.
    """
    assert after
    assert before
    values = np.sort(by.outer(np.asarray(after, dtype=np.float64), np.asarray(before, dtype=np.float64)).ravel())
    rank = _rank_of_pairs(len(after), len(before))
    low, high = (values[rank - 1], values[-rank]) if rank else (nan, nan)
    return Interval(float(np.median(values)), float(low), float(high))


@cache
def _rank_of_pairs(n: int, m: int) -> int:
    """Of n times m pairs in order, which from each end bounds the 95% interval; 0 where none does.

    How many pairs lie under the true value is distributed as Mann and Whitney's U: exact up to 100 samples each, beyond by its
    normal limit (Ann. Math. Stat. 18, 1947).
    """
    if max(n, m) > 100:
        return max(math.floor(n * m / 2 - 1.96 * math.sqrt(n * m * (n + m + 1) / 12)), 0)
    row = [np.ones(1) for _ in range(m + 1)]  # of no sample and j: the probability of each U; then of one more, and so on
    for i in range(1, n + 1):
        row[0] = np.ones(1)
        for j in range(1, m + 1):
            made = np.zeros(i * j + 1)
            made[j:] += row[j] * (i / (i + j))  # the largest of all is one of the n, and has all m under it
            made[: len(row[j - 1])] += row[j - 1] * (j / (i + j))
            row[j] = made
    return int((np.cumsum(row[m]) <= 0.025).sum())


def json_value(value: object) -> object:
    """NaN and infinity have no JSON form: an interval that does not exist is null, and what has no bound is "inf"."""
    return value if not isinstance(value, float) or math.isfinite(value) else None if value != value else str(value)


def as_row(name: str, interval: Interval | None) -> dict[str, float | None]:
    """A row's entries of that name, "…_low" and "…_high"; None where there is no interval."""
    return dict(zip((name, f"{name}_low", f"{name}_high"), interval or (None, None, None), strict=True))


def json_row(name: str, interval: Interval | None) -> dict[str, object]:
    """The same, ready for JSON."""
    return {key: json_value(value) for key, value in as_row(name, interval).items()}


def interval_of(ends: Sequence[float | str | None]) -> Interval:
    """An interval as JSON has it, by `json_value`."""
    return Interval(*(nan if end is None else float(end) for end in ends))


def times_as_fast(ours: float, theirs: float) -> float:
    """How many times as fast as `theirs` seconds `ours` are; what takes for ever is as fast as what does."""
    return 1.0 if ours == theirs else theirs / ours


def gains(ratio: Interval | None) -> bool:
    """Whether a ratio is shown to be above 1: the whole of its interval, which takes six rounds."""
    return ratio is not None and ratio.low > 1


def saves(saved: Interval | None) -> bool:
    """Whether a saving is shown to be one: the whole of its interval, which takes six rounds, is above zero."""
    return saved is not None and saved.low > 0


@dataclass(frozen=True, kw_only=True, eq=False)
class Sample:
    """What one engine took in one round; rounds of warm-up have negative numbers, and kinds are never pooled.

    use: what others used of the machine meanwhile, None where nobody watched. A disturbed sample is kept, and is in no median.
    """

    engine: str
    round: int
    use: Use | None = None

    @property
    def disturbed(self) -> bool | None:
        """Whether others used too much of the machine; None where that is not known."""
        return None if self.use is None else self.use.disturbed

    @property
    def others(self) -> float | None:
        """How many cores others used; None where that is not known."""
        return None if self.use is None else self.use.others


@dataclass(frozen=True, kw_only=True, eq=False)
class StageSample(Sample):
    """One run of one stage alone. steps: the seconds of each."""

    steps: Mapping[str, float]
    kind: Kind = "warm"

    def seconds(self, *names: str) -> float:
        """The sum of these steps; of all, if none is named."""
        return sum(self.steps[name] for name in names or self.steps)


@dataclass(frozen=True, kw_only=True, eq=False)
class RunSample(Sample):
    """One run of a whole request. turn: which of a chat's it is, from 0."""

    run: Run
    turn: int = 0

    @property
    def kind(self) -> Kind:
        return self.run.kind

    @property
    def disturbed(self) -> bool | None:
        """As `Sample` has it; None of a cold run, whose compilers are processes of their own and are not told from others."""
        return None if self.kind == "cold" else super().disturbed

    def seconds(self, *names: str) -> float | None:
        """Its "ttft", its "tpot" if it has one, or "patches", which begin where the upload ends."""
        (name,) = names
        return since_upload(self.run.trace) / 1e9 if name == "patches" else getattr(self.run, name)

    def to_record(self) -> dict[str, Any]:
        """Everything but the logits as JSON-ready data; `from_record` reads it back."""
        own = {"engine": self.engine, "round": self.round, "turn": self.turn, "disturbed": self.disturbed, "others": self.others}
        return own | {"use": None if self.use is None else dataclasses.asdict(self.use), "run": self.run.to_record()}

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> RunSample:
        """Read `to_record`'s form; of one that says nothing of others, what they used is not known."""
        use, run = record.get("use"), Run.from_record(record["run"])
        return cls(engine=record["engine"], round=record["round"], turn=record["turn"], use=use and Use(**use), run=run)


def since_upload(trace: Trace) -> int:
    """Nanoseconds to the first token from the end of the host's last upload, when the patches are there or on their way."""
    return trace.first_chunk_ns - max(s.end_ns for s in trace.within_ttft() if s.name == "upload")


S = TypeVar("S", StageSample, RunSample)


@dataclass(frozen=True, kw_only=True, eq=False)
class Samples(Generic[S]):
    """Every sample of a measurement; what is derived is of timed ones, whose round is not negative, that were not disturbed.

    names: as a sample's.
    """

    samples: tuple[S, ...]

    @property
    def engines(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(sample.engine for sample in self.samples))

    def only(self, keep: Callable[[S], bool]) -> Samples[S]:
        """Those of which `keep` says so."""
        return Samples(samples=tuple(filter(keep, self.samples)))

    @property
    def busy(self) -> str | None:
        """What others did to the timed samples, in words; None where none was disturbed."""
        judged = [s for s in self.samples if s.round >= 0 and s.disturbed is not None]
        uses = [s.use for s in judged if s.disturbed and s.use]
        if not uses:
            return None
        typical = sorted(uses, key=lambda use: (use.others or 0.0, use.gpu or 0.0))[len(uses) // 2]
        return f"the machine was busy: {typical.why}, during {len(uses)} of {len(judged)} runs, which are in no median"

    def by_round(self, engine: str, *names: str) -> dict[int, float]:
        """Round -> seconds, in order of rounds; without those that have no such time."""
        mine = [s for s in self.samples if s.engine == engine and s.round >= 0 and not s.disturbed]
        mine.sort(key=lambda sample: sample.round)
        return {sample.round: value for sample in mine if (value := sample.seconds(*names)) is not None}

    def seconds(self, engine: str, *names: str) -> list[float]:
        """The seconds of every timed round, in order of rounds."""
        return list(self.by_round(engine, *names).values())

    def median(self, engine: str, *names: str) -> Interval:
        """Seconds, with the interval of the median; NaN where every sample was disturbed."""
        seconds = self.seconds(engine, *names)
        return median_interval(seconds) if seconds else UNKNOWN

    def ratio(self, engine: str, over: str, *names: str) -> Interval | None:
        """How many times as fast as `over` the engine is, paired by round; None without a round of both."""
        return self._paired(times_as_fast, engine, over, *names)

    def saving(self, engine: str, over: str, *names: str) -> Interval | None:
        """The seconds that the engine takes less than `over`, paired in the same way."""
        return self._paired(lambda ours, theirs: theirs - ours, engine, over, *names)

    def _paired(self, by: Callable[[float, float], float], engine: str, over: str, *names: str) -> Interval | None:
        ours, theirs = self.by_round(engine, *names), self.by_round(over, *names)
        values = [by(ours[number], theirs[number]) for number in ours if number in theirs]
        return median_interval(values) if values else None


def now(device: torch.device) -> float:
    """Seconds on the host's clock once the device has done all it was given; between requests only, never inside one."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def interleaved(
    engines: Iterable[str], *, repeats: int, warm_up: int, seed: int, turns: int = 1
) -> Iterator[tuple[int, int, list[str]]]:
    """Who runs when: the round's number, the turn in it, and the engines in an order shuffled by `seed`, anew for each turn."""
    order, shuffled = list(engines), random.Random(seed)
    for number in range(-warm_up, repeats):
        for turn in range(turns):
            shuffled.shuffle(order)
            yield number, turn, list(order)


def check_rounds(repeats: int, warm_up: int) -> None:
    """Raise `RequestError` for no timed round, or for fewer rounds of warm-up than none."""
    if repeats < 1 or warm_up < 0:
        raise RequestError(f"repeats is {repeats} and warm_up {warm_up}; repeats must be at least 1, and warm_up at least 0")


def time_rounds(
    timed: Mapping[str, Timed],
    *,
    repeats: int = 10,
    warm_up: int = 2,
    seed: int = 0,
    quiet: Quiet | None = QUIET,
    device: torch.device | None = None,
) -> Samples[StageSample]:
    """Run each `warm_up + repeats` times in interleaved rounds; those of warm-up are not kept.

    quiet: waited for before each timed run, and a disturbed one is measured again; None does neither. device: where they compute.
    Raises as `check_rounds`.
    """
    check_rounds(repeats, warm_up)
    watch, samples = Watch(quiet, device), []
    for number, _, order in interleaved(timed, repeats=repeats, warm_up=warm_up, seed=seed):
        for label in order:
            if number < 0:
                timed[label]()
                continue
            made = watch.measured(timed[label])
            samples += [StageSample(engine=label, round=number, steps=steps, use=use) for steps, use in made]
    return Samples(samples=tuple(s for label in timed for s in samples if s.engine == label))
