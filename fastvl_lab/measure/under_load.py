"""Engines under the same load, side by side: interleaved rounds of `load`, of which times and tokens are kept, and no trace."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from statistics import median
from typing import Any

from fastvl_lab.engine import EngineLike
from fastvl_lab.errors import RequestError, check_whole_number, counted, is_number, quoted, sentence
from fastvl_lab.lab import Lab
from fastvl_lab.measure.compare import Comparison, compare, computing
from fastvl_lab.measure.load import (
    MEASURES,
    NAMES,
    Measure,
    check_arrivals,
    load,
    percentile_columns,
    usual_number,
    varied,
)
from fastvl_lab.measure.quiet import QUIET, Quiet, Watch
from fastvl_lab.measure.samples import Interval, check_rounds, interleaved, json_row, median_interval
from fastvl_lab.request import Request


@dataclass(frozen=True, kw_only=True)
class Arrivals:
    """When the requests of a load come: `concurrency` at once, or `rate` a second at random by `seed`, `n` in all.

    n: None is as `load` has it. Raises `RequestError` for what cannot be.
    """

    concurrency: int | None = None
    rate: float | None = None
    n: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        check_arrivals(concurrency=self.concurrency, rate=self.rate, n=self.n)
        check_whole_number("seed", self.seed, least=0)

    @classmethod
    def of(cls, given: Any) -> Arrivals | None:
        """What an entry of a plan's `loads` spells: a mapping of these fields, or none, the request alone."""
        if given is None or given == "none":
            return None
        names = [own.name for own in dataclasses.fields(cls)]
        if not isinstance(given, Mapping):
            raise RequestError(f"loads has {given!r}; each is none, or a mapping with concurrency or rate, and n, seed")
        for name in given:
            if name not in names:
                raise RequestError(f"loads has the key {name!r}; the choices are {', '.join(names)}")
        return cls(**given)

    @property
    def count(self) -> int:
        return self.n or usual_number(self.concurrency)

    @property
    def label(self) -> str:
        how = f"{self.concurrency} at once" if self.concurrency is not None else f"{self.rate:.4g} a second"
        return f"{how}, {counted(self.count, 'request')}" + (f", seed {self.seed}" if self.seed else "")


_LIMITED: tuple[Measure, ...] = ("ttft", "tpot", "end_to_end")


@dataclass(frozen=True, kw_only=True)
class Goodput(Arrivals):
    """A goal of `tune`: how many requests a second keep the limits, where requests come as `Arrivals` says.

    ttft, tpot, end_to_end: seconds that a request may take (`Load.goodput`), at least one of them. Raises `RequestError` for what
    cannot be.
    """

    ttft: float | None = None
    tpot: float | None = None
    end_to_end: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.limits:
            raise RequestError(f"nothing limits what counts as goodput; give at least one of {', '.join(_LIMITED)}, in seconds")
        for name, most in self.limits.items():
            if not (is_number(most) and most > 0):
                raise RequestError(f"{name} is {quoted(most)}; it must be a number of seconds above 0")

    @property
    def limits(self) -> dict[Measure, float]:
        """Those that are given, by their names."""
        return {name: most for name in _LIMITED if (most := getattr(self, name)) is not None}

    @property
    def label(self) -> str:
        return ", ".join([super().label, *(f"{NAMES[name]} within {most:g} s" for name, most in self.limits.items())])


@dataclass(frozen=True, kw_only=True)
class LoadRound:
    """One load of one engine. values: seconds of each measure; disturbed: whether others were, None where it is not known."""

    engine: str
    round: int
    values: Mapping[Measure, Sequence[float]]
    requests: int
    failed: int
    tokens: int
    seconds: float
    disturbed: bool | None = None


@dataclass(frozen=True, kw_only=True, eq=False)
class UnderLoad:
    """What `under_load` measured.

    comparison: a run of each engine alone, and its parity. failures: by engine, the error that took it out. What is derived is of
    rounds that were not disturbed.
    """

    comparison: Comparison
    rounds: tuple[LoadRound, ...]
    failures: Mapping[str, str]

    @property
    def engines(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(made.engine for made in self.rounds))

    def of(self, engine: str) -> list[LoadRound]:
        """Its rounds that count."""
        return [made for made in self.rounds if made.engine == engine and not made.disturbed]

    def values(self, engine: str, of: Measure) -> list[float]:
        """Seconds, of every request (of gaps: of every gap) of the rounds that count."""
        return [value for made in self.of(engine) for value in made.values[of]]

    def throughput(self, engine: str) -> Interval | None:
        """Tokens a second of all answers together: the median over rounds; None where none counts."""
        return median_interval(found) if (found := [_tokens_per_second(made) for made in self.of(engine)]) else None

    def times(self, engine: str, over: str, value: Callable[[LoadRound], float | None]) -> Interval | None:
        """How many times as much of a value an engine's rounds have as another's, paired by round; None without a round of both.

        value: of a round, None where it has none.
        """
        theirs = {made.round: value(made) for made in self.of(over)}
        pairs = [(value(made), theirs.get(made.round)) for made in self.of(engine)]
        ratios = [mine / other for mine, other in pairs if mine is not None and other]
        return median_interval(ratios) if ratios else None

    def summary(self) -> list[dict[str, Any]]:
        """One row an engine: throughput over rounds, then percentiles over requests in milliseconds, with their intervals.

        A throughput's interval takes six rounds. Requests of one round wait for each other: a percentile's interval, which takes
        them for independent, is too narrow by as much, and `findings` pairs rounds. `ttft_ms` is the TTFT's p50.
        """
        rows = []
        alone = {row["engine"]: row for row in self.comparison.summary()}
        for engine in self.engines:
            counted = self.of(engine)
            answered = [(made.requests - made.failed) / made.seconds for made in counted]
            columns = percentile_columns(partial(self.values, engine))
            rows.append(
                {
                    "engine": engine,
                    **{name: alone[engine][name] for name in ("visual_tokens", "parity", "parity_says", "tokens_equal")},
                    "requests": sum(made.requests for made in counted),
                    "failed": sum(made.failed for made in counted),
                    "rounds": len(counted),
                    "disturbed_rounds": sum(bool(made.disturbed) for made in self.rounds if made.engine == engine),
                    **json_row("tokens_per_second", self.throughput(engine)),
                    "requests_per_second": median_interval(answered).median if answered else None,
                    **columns,
                    **{f"ttft{end}_ms": columns[f"ttft_p50_ms{end}"] for end in ("", "_low", "_high")},
                }
            )
        return rows

    def findings(self) -> list[str]:
        """One sentence an engine: its throughput and its TTFT over the reference's, where both computed what they must."""
        than, lines = self.comparison.reference, []
        for engine in self.engines:
            if engine == than or than not in self.engines:
                continue
            if not self.comparison.parity(engine, than):
                lines.append(f"{engine} is not compared with {than}: {self.comparison.checks[engine].says}")
                continue
            faster, later = self.times(engine, than, _tokens_per_second), self.times(engine, than, _middle_ttft)
            if faster is None:
                lines.append(f"{engine} has no undisturbed load to compare with {than}")
                continue
            said = f"{engine} makes {faster.times()} the tokens a second of {than}"
            if later is not None:
                found = "no difference is shown"
                if later.high < 1 or later.low > 1:
                    found = "shorter" if later.median < 1 else "longer"
                said += f"; its TTFT p50 is {later.times()} as long: {found}"
            lines.append(said)
        busy = sum(bool(made.disturbed) for made in self.rounds)
        return [*lines, *([f"others disturbed {busy} of {len(self.rounds)} loads, which are in no number"] if busy else [])]

    def to_record(self) -> dict[str, Any]:
        """As JSON-ready data; `from_record` reads it back."""
        rounds = [dataclasses.asdict(made) for made in self.rounds]
        return {"comparison": self.comparison.to_record(), "rounds": rounds, "failures": dict(self.failures)}

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> UnderLoad:
        """Read `to_record`'s form."""
        return cls(
            comparison=Comparison.from_record(record["comparison"]),
            rounds=tuple(LoadRound(**made) for made in record["rounds"]),
            failures=record["failures"],
        )


def _tokens_per_second(made: LoadRound) -> float:
    return made.tokens / made.seconds


def _middle_ttft(made: LoadRound) -> float | None:
    return median(values) if (values := made.values["ttft"]) else None


def requests_of(engines: int, arrivals: Arrivals, *, repeats: int, warm_up: int) -> int:
    """How many requests `under_load` sends to so many engines, at least: as many times it calls `on_run`."""
    return engines * (1 + (warm_up + repeats) * arrivals.count)


def under_load(
    lab: Lab,
    request: Request,
    engines: Mapping[str, EngineLike],
    arrivals: Arrivals,
    *,
    repeats: int = 6,
    warm_up: int = 1,
    seed: int = 0,
    quiet: Quiet | None = QUIET,
    on_run: Callable[[], object] | None = None,
) -> UnderLoad:
    """Send every engine the same load `warm_up + repeats` times, in rounds whose order is shuffled by `seed`.

    Parity is checked first, of one run alone. Each round has pictures of its own, so that no cache flatters the later ones, and
    arrivals of its own, which are the same for every engine. A disturbed load is not sent again, and quiet is waited for before
    each. on_run is called after each request. An engine that fails is recorded in `failures`. Raises as `check_rounds`.
    """
    check_rounds(repeats, warm_up)

    def ran(*_: object) -> None:
        if on_run is not None:
            on_run()

    comparison = compare(lab, request, engines, repeats=0, warm_up=1, seed=seed, quiet=quiet, on_run=ran, keep_going=True)
    failures, watch, made, count = dict(comparison.failures), Watch(quiet, lab.device), [], arrivals.count
    for label in [name for name in engines if name not in failures]:
        try:
            lab.warm_up(engines[label], [], progress=False)  # once, and not in each round
        except Exception as error:
            failures[label] = sentence(error)
    for number, _, order in interleaved(engines, repeats=repeats, warm_up=warm_up, seed=seed):
        before = number + warm_up  # rounds that were sent
        requests = [varied(request, before * count + one) for one in range(count)]
        for label in [name for name in order if name not in failures]:
            once = partial(
                load,
                lab,
                requests,
                engines[label],
                concurrency=arrivals.concurrency,
                rate=arrivals.rate,
                n=count,
                seed=arrivals.seed + before,
                warm_up=0,
                on_run=ran,
            )
            try:
                ((found, use),) = watch.measured(once, computing(lab, lab.engine(engines[label])), again=False)
            except Exception as error:
                failures[label] = sentence(error)
                continue
            if number >= 0:
                made.append(
                    LoadRound(
                        engine=label,
                        round=number,
                        values={of: found.values(of) for of in MEASURES},
                        requests=len(found.runs),
                        failed=len(found.failures),
                        tokens=sum(len(run.tokens) for run in found.finished),
                        seconds=found.seconds,
                        disturbed=None if use is None else use.disturbed,
                    )
                )
    kept = [one for label in engines for one in made if one.engine == label]
    return UnderLoad(comparison=comparison, rounds=tuple(kept), failures=failures)
