"""Many requests at once on one engine: a closed loop, arrivals at random, or those of a recorded trace."""

from __future__ import annotations

import dataclasses
import io
import random
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import accumulate, cycle, islice, pairwise
from math import gcd, log, log1p, nan
from typing import Any, Literal, get_args

import numpy as np
from PIL import Image

from fastvl_lab import shown
from fastvl_lab.engine import EngineLike
from fastvl_lab.errors import FastvlError, RequestError, check_whole_number, is_number, quoted, require, sentence
from fastvl_lab.lab import Lab
from fastvl_lab.lasting import About, Lasting
from fastvl_lab.measure.environment import environment
from fastvl_lab.measure.samples import Interval, json_row
from fastvl_lab.preprocessor.decode_image import rgb_of
from fastvl_lab.request import ImageInput, Request, check_request
from fastvl_lab.run import Run
from fastvl_lab.schedule.inbox import Inbox
from fastvl_lab.schedule.loop import Step

# Of one request, in seconds: to its first token, for a token after it, to its last, and until it was admitted. "gap" is each time
# between two chunks, of which a request has many.
Measure = Literal["ttft", "tpot", "end_to_end", "queued", "gap"]
MEASURES: tuple[Measure, ...] = get_args(Measure)

# What they are called.
NAMES: dict[Measure, str] = {
    "ttft": "TTFT",
    "tpot": "TPOT",
    "end_to_end": "time to the last token",
    "queued": "time until admitted",
    "gap": "time between chunks",
}

PERCENTILES = (50, 90, 99)

# Seconds between two looks at whether the load has been given up.
_LOOK_UP = 0.1


@dataclass(frozen=True, kw_only=True, eq=False)
class Load(Lasting):
    """What `load` measured.

    concurrency: how many were at once; rate: how many came a second; neither, where arrivals were recorded. begun: of each request,
    when it arrived, in seconds from the first; runs: what became of it, None where it failed; failures: by its number, why. steps:
    of the lab's own engines, with times from the first arrival (ns). seconds: from the first arrival to the last end. environment:
    as `measure.environment` tells it; empty where nobody asked.
    """

    engine: str
    begun: tuple[float, ...]
    runs: tuple[Run | None, ...]
    failures: Mapping[int, str]
    steps: tuple[Step, ...]
    seconds: float
    concurrency: int | None = None
    rate: float | None = None
    environment: Mapping[str, str] = field(default_factory=dict)

    @property
    def how(self) -> str:
        """The arrivals in words."""
        if self.concurrency is not None:
            return f"{self.concurrency} at once"
        return "as recorded" if self.rate is None else f"{self.rate:.4g} a second"

    @property
    def finished(self) -> tuple[Run, ...]:
        return tuple(run for run in self.runs if run is not None)

    @property
    def tokens_per_second(self) -> float:
        """Of all answers together."""
        return sum(len(run.tokens) for run in self.finished) / self.seconds

    @property
    def requests_per_second(self) -> float:
        return len(self.finished) / self.seconds

    def values(self, of: Measure) -> list[float]:
        """Seconds, of each request that finished and has such a time; raises `RequestError` naming the choices."""
        if of not in MEASURES:
            raise RequestError(f"no {of!r} is measured of a load; the choices are {', '.join(MEASURES)}")
        return [value for run in self.finished for value in _values(run, of)]

    def percentile(self, of: Measure, percent: float) -> Interval | None:
        """Seconds, with the 95% interval of requests that came and went independently; None where there is no such time.

        percent: from 0 to 100; raises `RequestError` for another.
        """
        if not is_number(percent) or not 0 <= percent <= 100:
            raise RequestError(f"percent is {percent!r}; it must be a number from 0 to 100")
        values = self.values(of)
        return quantile_interval(values, percent / 100) if values else None

    def goodput(self, *, ttft: float | None = None, tpot: float | None = None, end_to_end: float | None = None) -> float:
        """Requests a second that kept these limits, in seconds (DistServe, arXiv 2401.09670)."""
        limits: dict[Measure, float | None] = {"ttft": ttft, "tpot": tpot, "end_to_end": end_to_end}
        given = [(of, most) for of, most in limits.items() if most is not None]
        kept = [run for run in self.finished if all(value <= most for of, most in given for value in _values(run, of))]
        return len(kept) / self.seconds

    def summary(self) -> dict[str, Any]:
        """One row: tokens and requests a second, then percentiles in milliseconds with their intervals."""
        row: dict[str, Any] = {
            "engine": self.engine,
            "arrivals": self.how,
            "requests": len(self.runs),
            "failed": len(self.failures),
            "tokens_per_second": self.tokens_per_second,
            "requests_per_second": self.requests_per_second,
        }
        return row | percentile_columns(self.values)

    def frame(self) -> Any:
        """The summary as a pandas DataFrame; needs the extra "notebooks"."""
        return require("pandas", "notebooks").DataFrame([self.summary()])

    def about(self) -> About:
        runs = [(number, run) for number, run in enumerate(self.runs) if run is not None]
        return About(
            title=repr(self).splitlines()[0],
            findings=repr(self).splitlines()[1:],
            environment=self.environment,
            samples=[{"engine": self.engine, "request": n, "begun_s": self.begun[n], **run.row()} for n, run in runs],
            traces=[run.traced(f"request {n}", round(self.begun[n] * 1e9)) for n, run in runs],
        )

    def to_record(self) -> dict[str, Any]:
        """As JSON-ready data; `from_record` reads it back."""
        return {
            "engine": self.engine,
            "begun": list(self.begun),
            "runs": [None if run is None else run.to_record() for run in self.runs],
            "failures": {str(number): why for number, why in self.failures.items()},
            "steps": [dataclasses.asdict(step) for step in self.steps],
            "seconds": self.seconds,
            "concurrency": self.concurrency,
            "rate": self.rate,
            "environment": dict(self.environment),
        }

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> Load:
        """Read `to_record`'s form; logits are empty."""
        return cls(
            engine=record["engine"],
            begun=tuple(record["begun"]),
            runs=tuple(None if run is None else Run.from_record(run) for run in record["runs"]),
            failures={int(number): why for number, why in record["failures"].items()},
            steps=tuple(_step(step) for step in record["steps"]),
            seconds=record["seconds"],
            concurrency=record["concurrency"],
            rate=record["rate"],
            environment=record.get("environment", {}),  # absent in older records
        )

    def _repr_mimebundle_(self, include: Any = None, exclude: Any = None) -> dict[str, Any]:
        """The requests over time as a figure where plotly can be shown, else text."""
        return shown.bundle(self)

    def __repr__(self) -> str:
        lines = [
            f"{self.engine}, {self.how}: {len(self.finished)} of {len(self.runs)} requests in {self.seconds:.2f} s, "
            f"{self.tokens_per_second:.1f} tokens a second"
        ]
        for of in MEASURES:
            found = [(percent, self.percentile(of, percent)) for percent in PERCENTILES]
            known = ", ".join(f"p{percent} {value.median * 1e3:.1f} ms" for percent, value in found if value is not None)
            few = ", ".join(f"p{percent}" for percent, value in found if value is not None and value.low != value.low)
            lines += [f"{of:<10} {known}{f' (too few for an interval of {few})' if few else ''}"] if known else []
        if cold := sum(run.kind == "cold" for run in self.finished):
            lines.append(f"{cold} of {len(self.finished)} requests were cold, and are in these numbers")
        return "\n".join([*lines, *(f"request {number} failed: {why}" for number, why in self.failures.items())])


def _values(run: Run, of: Measure) -> Iterator[float]:
    if of == "gap":
        yield from (later.time - earlier.time for earlier, later in pairwise(run.chunks))
    elif of == "queued":
        if "queued" in (stages := run.trace.stages()):
            yield stages["queued"] / 1e9
    elif of == "end_to_end":
        yield run.chunks[-1].time
    elif (value := run.ttft if of == "ttft" else run.tpot) is not None:
        yield value


def _step(data: Mapping[str, Any]) -> Step:
    if "encoded" not in data:  # older records have patches with who was admitted
        data = {
            **data,
            "admitted": [number for number, _ in data["admitted"]],
            "encoded": [pair for pair in data["admitted"] if pair[1]],
        }
    pairs = {name: tuple((number, n) for number, n in data[name]) for name in ("encoded", "prefilled")}
    numbers = {name: tuple(data.get(name, ())) for name in ("admitted", "decoded", "preempted")}  # and nobody who gave way
    return Step(**{**data, **pairs, **numbers})


def quantile_interval(samples: Sequence[float], quantile: float) -> Interval:
    """A quantile of at least one sample, between two samples that hold the true one with a probability of at least 95%.

    How many samples are under the true quantile is binomial, whatever the distribution; NaN where no two samples hold it.
    """
    values, n = np.sort(np.asarray(samples, dtype=np.float64)), len(samples)
    if not 0 < quantile < 1:
        return Interval(float(np.quantile(values, quantile)), nan, nan)
    k = np.arange(n + 1)
    # Logarithms: the factorials of thousands are no floats.
    factorials = np.concatenate([[0.0], np.cumsum(np.log(k[1:]))])
    ways = factorials[n] - factorials - factorials[::-1]
    under = np.cumsum(np.exp(ways + k * log(quantile) + (n - k) * log1p(-quantile)))
    low = max((rank for rank in range(1, n + 1) if under[rank - 1] <= 0.025), default=0)
    high = min((rank for rank in range(1, n + 1) if under[rank - 1] >= 0.975), default=0)
    ends = (float(values[low - 1]), float(values[high - 1])) if low and high else (nan, nan)
    return Interval(float(np.quantile(values, quantile)), *ends)


def percentile_columns(values: Callable[[Measure], Sequence[float]]) -> dict[str, Any]:
    """Of a row: each percentile of each measure in milliseconds with its interval, None where there is no such time."""
    row: dict[str, Any] = {}
    for of in MEASURES:
        mine = values(of)
        for percent in PERCENTILES:
            row |= json_row(f"{of}_p{percent}_ms", quantile_interval(mine, percent / 100).ms if mine else None)
    return row


def findings(loads: Mapping[str, Load], reference: str, of: Measure = "ttft", percent: float = 50) -> list[str]:
    """What each load shows beside the reference, in a sentence: how many times the tokens a second, and a percentile of a measure.

    One percentile is called longer or shorter than the other only where their 95% intervals lie apart.
    """
    than, sentences = loads[reference], []
    for label, made in loads.items():
        if label == reference:
            continue
        said = f"{label} makes {made.tokens_per_second / than.tokens_per_second:.2f} times the tokens a second of {reference}"
        mine, theirs = made.percentile(of, percent), than.percentile(of, percent)
        if mine is not None and theirs is not None:
            found = "no difference is shown"
            if mine.high < theirs.low or theirs.high < mine.low:
                found = f"{'shorter' if mine.median < theirs.median else 'longer'}, {mine.median / theirs.median:.2f} times"
            said += f"; its {NAMES[of]} p{percent:g} is {_in_ms(mine)} against {_in_ms(theirs)}: {found}"
        sentences.append(said)
    return sentences


def _in_ms(found: Interval) -> str:
    median, low, high = found.ms
    return f"{median:.1f} ms" + (f" [{low:.1f}, {high:.1f}]" if low == low and high == high else " (too few for an interval)")


def load(
    lab: Lab,
    requests: Request | Iterable[Request],
    engine: EngineLike,
    *,
    concurrency: int | None = None,
    rate: float | None = None,
    arrivals: Sequence[float] | None = None,
    n: int | None = None,
    seed: int = 0,
    warm_up: int = 1,
    on_run: Callable[[int, Run | Exception], object] | None = None,
    stop: threading.Event | None = None,
) -> Load:
    """Have many requests served by one engine, and time each from its arrival.

    engine: a recipe, whose slot `schedule` says who shares a step, or a peer. requests: one, of which each that is sent has
    pictures of its own (`varied`), so that no cache flatters; or several, sent as they are, in turn. One of these says when they
    arrive: concurrency, so many at once, the next when one ends; rate, so many a second on average, at random by `seed` (Poisson);
    arrivals, the seconds of each from the first. n: how many; by default as many as there are requests or arrivals, and of one
    request 4 times `concurrency`, or 32. warm_up: how many are served before, one at a time, once decode steps are ready
    (`Lab.warm_up`); of one request, with pictures that are not sent again. on_run: given each request's number and its run or error
    as it ends; what it raises is raised, and ends the load as `stop` does. stop: once set, what has not ended fails. Raises
    `FastvlError`s.
    """
    check_arrivals(concurrency=concurrency, rate=rate, arrivals=arrivals, n=n)
    check_whole_number("warm_up", warm_up, least=0)
    several = () if isinstance(requests, Request) else tuple(requests) if isinstance(requests, Iterable) else (requests,)
    for request in several:
        check_request(request)
    if not several and not isinstance(requests, Request):
        raise RequestError("requests is empty; give at least one")
    count = n or (len(arrivals) if arrivals is not None else len(several) or usual_number(concurrency))
    if arrivals is not None and count > len(arrivals):
        raise RequestError(f"n is {count}, and arrivals has {len(arrivals)}; give one for each request")
    if isinstance(requests, Request):
        source = [varied(requests, number) for number in range(count)]
        before = [varied(requests, number) for number in range(count, count + warm_up)]
    else:
        source = list(islice(cycle(several), count))
        before = source[:warm_up]
    sent = _Sent(lab, source, engine, stop or threading.Event(), on_run)
    with lab.hold([engine]):
        if before:
            lab.warm_up(engine, [], progress=False)
        for request in before:
            lab.run(request, engine, stop=sent.stop)
        if concurrency is not None:
            return sent.closed_loop(concurrency)
        if arrivals is not None:
            return sent.at(list(arrivals[:count]), None)
        assert rate is not None
        drawn = random.Random(seed)
        return sent.at(list(accumulate((drawn.expovariate(rate) for _ in range(count - 1)), initial=0.0)), rate)


def check_arrivals(
    *,
    concurrency: int | None = None,
    rate: float | None = None,
    arrivals: Sequence[float] | None = None,
    n: int | None = None,
) -> None:
    """Raise `RequestError` unless one of these says when requests arrive, and each is what it can be."""
    given = {
        name: value for name, value in (("concurrency", concurrency), ("rate", rate), ("arrivals", arrivals)) if value is not None
    }
    if len(given) != 1:
        says = f"{' and '.join(given)} say" if given else "nothing says"
        raise RequestError(f"{says} when requests arrive; give one of concurrency, rate, arrivals")
    for name, value in (("concurrency", concurrency), ("n", n)):
        if value is not None:
            check_whole_number(name, value)
    if rate is not None and not (is_number(rate) and rate > 0):
        raise RequestError(f"rate is {quoted(rate)}; it must be a finite number of requests a second above 0")
    if arrivals is not None:
        times = list(arrivals) if isinstance(arrivals, Iterable) else []
        if not times or not all(map(is_number, times)) or times != sorted(times) or times[0] < 0:
            raise RequestError(f"arrivals is {quoted(arrivals)}; it must be seconds from 0 on, in order, at least one")


def usual_number(concurrency: int | None) -> int:
    """How many are sent of one request, where nobody says so: 4 times as many as are at once, or 32."""
    return 32 if concurrency is None else 4 * concurrency


def varied(request: Request, number: int) -> Request:
    """The request with pictures of its own: each turned by so many rows and columns, and written as JPEG again.

    Number 0 is the request itself.
    """
    if number == 0 or not request.image_inputs:
        return request
    pictures = iter([_rolled(image, number) for image in request.image_inputs])

    def part(one: Any) -> Any:
        return {"type": "image", "image": next(pictures)} if one["type"] == "image" else one

    messages = [
        {**message, "content": [part(one) for one in message["content"]]}
        if isinstance(message["content"], tuple)
        else dict(message)
        for message in request.conversation
    ]
    return Request(messages=messages, **request.settings())


def _rolled(image: ImageInput, number: int) -> ImageInput:
    pixels = np.asarray(rgb_of(image))
    again, at = divmod(number, pixels.shape[1] // gcd(7, pixels.shape[1]))  # how often the columns are back where they were
    pixels = np.roll(pixels, (3 * at + again, 7 * number), axis=(0, 1))
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=95)
    return dataclasses.replace(image, data=buffer.getvalue())


class _Sent:
    """The requests of a load on their way."""

    def __init__(
        self,
        lab: Lab,
        requests: list[Request],
        engine: EngineLike,
        stop: threading.Event,
        on_run: Callable[[int, Run | Exception], object] | None,
    ) -> None:
        self._lab, self.requests, self._engine, self.stop, self._on_run = lab, requests, engine, stop, on_run
        self._engine_name = engine if isinstance(engine, str) else lab.engine(engine).text(lab.device, fastest=lab.fastest)
        self._inbox = Inbox()
        self._next: Callable[[], None] = _nothing  # what is done when one has ended
        self._began_ns = [0] * len(requests)
        self._ended: dict[int, Run | str] = {}  # errors as sentences: their tracebacks hold what was computed
        self._fault: Exception | None = None  # of `on_run`
        self._last_ns = 0

    def closed_loop(self, concurrency: int) -> Load:
        """So many at once; the next is sent when one has ended."""
        left = iter(range(len(self.requests)))

        def next_one() -> None:
            if (number := next(left, None)) is not None:
                self._send(number)
            else:
                self._inbox.close()

        self._next = next_one
        for _ in range(min(concurrency, len(self.requests))):
            next_one()
        return self._served(concurrency=concurrency)

    def at(self, seconds: list[float], rate: float | None) -> Load:
        """Each at its time, which were drawn at that rate if they were."""
        over = threading.Event()

        def send() -> None:
            began = time.perf_counter()
            for number, when in enumerate(seconds):
                while (left := began + when - time.perf_counter()) > 0 and not over.is_set() and not self.stop.is_set():
                    over.wait(min(left, _LOOK_UP))
                if over.is_set() or self.stop.is_set():
                    break
                self._send(number)
            self._inbox.close()

        sender = threading.Thread(target=send, name="fastvl-load", daemon=True)
        sender.start()
        try:
            return self._served(rate=rate)
        finally:
            over.set()
            sender.join()

    def _send(self, number: int) -> None:
        job = self._lab.job(self.requests[number], self._engine, number=number, on_end=partial(self._end, number), stop=self.stop)
        self._began_ns[number] = job.since_ns
        self._inbox.put(job)

    def _end(self, number: int, run: Run | Exception) -> None:
        self._ended[number] = run.without_logits() if isinstance(run, Run) else sentence(run)
        self._last_ns = time.perf_counter_ns()
        if self._on_run is not None and self._fault is None:
            try:
                self._on_run(number, run)
            except Exception as error:  # raised where the load ends: this may be any thread
                self._fault = error
                self.stop.set()
        self._next()

    def _served(self, *, concurrency: int | None = None, rate: float | None = None) -> Load:
        steps: list[Step] = []
        self._lab.serve(self._engine, self._inbox, steps.append)
        if self._fault is not None:
            raise self._fault
        sent = sorted(self._ended)
        first_ns = min((self._began_ns[number] for number in sent), default=0)
        failures = {number: why for number in sent if isinstance(why := self._ended[number], str)}
        if len(failures) == len(sent):
            raise FastvlError(f"no request of the load was served: {next(iter(failures.values()), 'it was stopped at once')}")
        runs = (self._ended[number] for number in sent)
        return Load(
            engine=self._engine_name,
            begun=tuple((self._began_ns[number] - first_ns) / 1e9 for number in sent),
            runs=tuple(run if isinstance(run, Run) else None for run in runs),
            failures=failures,
            steps=tuple(
                dataclasses.replace(step, start_ns=step.start_ns - first_ns, end_ns=step.end_ns - first_ns) for step in steps
            ),
            seconds=(self._last_ns - first_ns) / 1e9,
            concurrency=concurrency,
            rate=rate,
            environment=environment(self._lab),
        )


def _nothing() -> None:
    """What comes next comes by itself."""
