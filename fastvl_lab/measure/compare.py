"""Several engines on one request, side by side: interleaved rounds, paired ratios, and parity before any speed-up."""

from __future__ import annotations

import dataclasses
import random
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch

from fastvl_lab.errors import RequestCancelledError, RequestError, require, sentence
from fastvl_lab.lab import EngineName, Lab
from fastvl_lab.measure.preprocessing import model_pictures, pixel_differences
from fastvl_lab.measure.statistics import Interval, median_interval
from fastvl_lab.peers import is_remote
from fastvl_lab.recipe import Recipe
from fastvl_lab.request import Request, check_whole_number
from fastvl_lab.run import Kind, Run
from fastvl_lab.trace import Lane


@dataclass(frozen=True, kw_only=True, eq=False)
class Sample:
    """One run of one engine; warm-up rounds have negative numbers."""

    engine: str
    round: int
    run: Run


@dataclass(frozen=True, kw_only=True, eq=False)
class Oracle:
    """Who answers for an engine whose pixels are not the reference's: Transformers' model on the engine's own pixels.

    logit_difference: the largest difference of a last-prompt-token logit that these pixels make in Transformers' model, against
    the reference's. in_bounds: whether the pixels are as near to the stock ones as the recipe promises, if it promises anything.
    text: of the tokens, for endpoints that do not name theirs.
    """

    engine: str
    tokens: tuple[int, ...]
    logit_difference: float
    in_bounds: bool
    text: str = ""


@dataclass(frozen=True, kw_only=True, eq=False)
class Comparison:
    """What `compare` measured.

    reference: the label that parity and speed-ups refer to (a peer where one ran, else the first engine). oracles: label -> who
    answers for its tokens, for engines whose pixels are not the reference's (`Recipe.oracle`). failures: label -> the sentence of
    the error that took an engine out.
    """

    samples: tuple[Sample, ...]
    reference: str
    oracles: Mapping[str, Oracle]
    failures: Mapping[str, str]

    @property
    def engines(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(sample.engine for sample in self.samples))

    def __repr__(self) -> str:
        failed = [f"{label} failed: {error}" for label, error in self.failures.items()]
        return f"Comparison({len(self.samples)} runs: {'; '.join([*self.findings(), *failed])})"

    def runs(self, engine: str, kind: Kind = "warm") -> list[Run]:
        """The timed runs of an engine that were of that kind; of "cold" ones those of warm-up rounds too."""
        return [s.run for s in self.samples if s.engine == engine and s.run.kind == kind and (s.round >= 0 or kind == "cold")]

    def compared(self, engine: str) -> Kind:
        """The kind of the engine's runs that are compared: warm, or unknown where an endpoint does not say it of any."""
        return "unknown" if self.runs(engine, "unknown") and not self.runs(engine) else "warm"

    def representative(self, engine: str) -> Run:
        """The run whose TTFT is the (lower) median of those compared; of all its runs where there are none."""
        everything = [sample.run for sample in self.samples if sample.engine == engine]
        runs = sorted(self.runs(engine, self.compared(engine)) or everything, key=lambda run: run.ttft)
        return runs[(len(runs) - 1) // 2]

    def expected(self, engine: str) -> tuple[int, ...]:
        """The tokens that an engine must make: the reference's, or on other pixels those of its oracle."""
        own = self.oracles.get(engine)
        return own.tokens if own else next(s.run.tokens for s in self.samples if s.engine == self.reference)

    def as_expected(self, sample: Sample) -> bool:
        """Whether a run made the tokens that it must."""
        own = self.oracles.get(sample.engine)
        text = own.text if own else next(s.run.text for s in self.samples if s.engine == self.reference)
        return sample.run.made(self.expected(sample.engine), text)

    def parity(self, engine: str) -> bool:
        """Whether every run of the engine made the tokens that it must, on the pixels that it may."""
        own = self.oracles.get(engine)
        return (own is None or own.in_bounds) and all(self.as_expected(s) for s in self.samples if s.engine == engine)

    def speedup(self, engine: str, over: str | None = None, *, of: Literal["ttft", "tpot"] = "ttft") -> Interval | None:
        """TTFT (or TPOT) of the reference, or of the engine `over`, over the engine's, paired by round.

        None where either fails parity or no round has a run of each that is `compared`.
        """
        over = self.reference if over is None else over
        timed = [s for s in self.samples if s.round >= 0 and s.engine in (engine, over) and getattr(s.run, of) is not None]
        timed = [s for s in timed if s.run.kind == self.compared(s.engine)]
        warm: dict[tuple[str, int], float] = {(s.engine, s.round): getattr(s.run, of) for s in timed}
        rounds = [number for name, number in warm if name == engine and (over, number) in warm]
        if not rounds or not (self.parity(engine) and self.parity(over)):
            return None
        return median_interval([warm[over, number] / warm[engine, number] for number in rounds])

    def summary(self) -> list[dict[str, Any]]:
        """One row an engine: TTFT and TPOT medians over its `compared` runs (ms), cold and cache-hit TTFT, parity, the speed-up."""
        rows = []
        for engine in self.engines:
            kind, cold, hits = self.compared(engine), self.runs(engine, "cold"), self.runs(engine, "cache_hit")
            timed = self.runs(engine, kind)
            shown = self.representative(engine)
            ttft = median_interval([run.ttft * 1e3 for run in timed]) if timed else None
            tpots = [run.tpot * 1e3 for run in timed or hits if run.tpot is not None]
            speedup = self.speedup(engine)
            row = {
                "engine": engine,
                "is_reference": engine == self.reference,
                "visual_tokens": shown.visual_tokens,
                "warm_runs": len(timed) if kind == "warm" else 0,
                "unknown_runs": len(timed) if kind == "unknown" else 0,
                "ttft_ms": ttft.median if ttft else None,
                "ttft_low_ms": ttft.low if ttft else None,
                "ttft_high_ms": ttft.high if ttft else None,
                "cold_ttft_ms": cold[0].ttft * 1e3 if cold else None,
                "hit_runs": len(hits),
                "hit_ttft_ms": median_interval([run.ttft * 1e3 for run in hits]).median if hits else None,
                "tpot_ms": median_interval(tpots).median if tpots else None,
                "tokens_equal": self.parity(engine),
                "oracle": self.oracles[engine].engine if engine in self.oracles else self.reference,
                "logit_difference": self.oracles[engine].logit_difference if engine in self.oracles else None,
                "speedup": speedup.median if speedup else None,
                "speedup_low": speedup.low if speedup else None,
                "speedup_high": speedup.high if speedup else None,
            }
            rows.append(row)
        return rows

    def findings(self) -> list[str]:
        """One sentence an engine: where its TTFT goes, and how it stands against the reference."""
        lines = []
        for engine in self.engines:
            run = self.representative(engine)
            # On CUDA the host only waits, in `sample`, for what the device does in its stages.
            # A device that a thread plays on a CPU has only steps after the first token to do, which is rarely most of it.
            lane: Lane = "device" if 2 * sum(run.trace.stages("device").values()) > run.trace.first_chunk_ns else "host"
            stages = run.trace.stages(lane)
            largest = max(stages, key=lambda stage: stages[stage])
            line = f"{engine} spends {stages[largest] / 1e9 / run.ttft:.0%} of its TTFT in {largest} ({lane})"
            if hits := self.runs(engine, "cache_hit"):
                ttft = median_interval([run.ttft * 1e3 for run in hits]).median
                line += f"; {len(hits)} runs were cache hits, with a TTFT of {ttft:.1f} ms, and are compared with nothing"
            if self.compared(engine) == "unknown":
                line += "; the endpoint does not say whether it reused anything of earlier requests, so its runs may be cache hits"
            if engine != self.reference:
                line += f"; {self._against(engine)}"
            lines.append(line)
        return lines

    def _against(self, engine: str) -> str:
        """A speed-up in words, and no claim that its interval does not bear."""
        speedup, oracle, reference = self.speedup(engine), self.oracles.get(engine), self.reference
        if not self.parity(reference):
            other = f"those of {self.oracles[reference].engine}" if reference in self.oracles else "one run to the next"
            return f"the tokens of {reference} differ from {other}, so no time is compared with it"
        if oracle is not None and not oracle.in_bounds:
            return "its pixels are further from the stock ones than it promises, so its time is not compared"
        if not self.parity(engine):
            return f"its tokens differ from those of {oracle.engine if oracle else reference}, so its time is not compared"
        if speedup is None:
            return f"no warm rounds to compare with {reference}"
        text = f"{speedup.median:.2f}× as fast as {reference}"
        if speedup.low != speedup.low:
            text += " (too few rounds for an interval)"
        elif speedup.low <= 1 <= speedup.high:
            text = f"no difference from {reference} shown ({text}, 95% CI {speedup.low:.2f} to {speedup.high:.2f})"
        else:
            text += f" (95% CI {speedup.low:.2f} to {speedup.high:.2f})"
        if oracle is None:
            return text
        if oracle.logit_difference == 0:
            return f"{text}, on pixels made another way, which leave Transformers' logits as they are"
        text += f", on other pixels than {reference}, which move Transformers' logits by up to {oracle.logit_difference:.2g}"
        return text if oracle.tokens == self.expected(reference) else f"{text} and change its answer"

    def frame(self) -> Any:
        """The summary as a pandas DataFrame; needs the extra "notebooks"."""
        return require("pandas", "notebooks").DataFrame(self.summary())

    def waterfall(self) -> Any:
        """The representative runs under one another on one axis, as a plotly figure; needs the extra "notebooks"."""
        from fastvl_lab.view import waterfall

        if not self.engines:
            raise RequestError(f"no engine has run, so there is no waterfall; what failed: {dict(self.failures)}")
        return waterfall([self.representative(engine) for engine in self.engines])


def compare(
    lab: Lab,
    request: Request,
    engines: Mapping[str, EngineName],
    *,
    repeats: int = 20,
    warm_up: int = 1,
    seed: int = 0,
    on_run: Callable[[str], object] | None = None,
    keep_going: bool = False,
    stop: threading.Event | None = None,
) -> Comparison:
    """Run every engine on the request `warm_up + repeats` times, in rounds whose order is shuffled by `seed`.

    engines: label -> recipe, recipe text, or peer. on_run is called after each run with its label. keep_going records any error of
    an engine in `failures` and goes on without it; otherwise errors are raised. stop: as `Lab.run` has it.
    """
    if not isinstance(engines, Mapping) or not engines:
        raise RequestError(f"engines is {engines!r}; give at least one recipe or peer, as label -> engine")
    for name, value in (("repeats", repeats), ("warm_up", warm_up)):
        check_whole_number(name, value, least=0)
    if repeats + warm_up < 1:
        raise RequestError(f"repeats is {repeats} and warm_up {warm_up}; one of them must be at least 1")
    keys = {label: lab.engine(engine) for label, engine in engines.items()}
    order, samples, failures = list(engines), [], {}
    logits: dict[str, torch.Tensor] = {}
    shuffled = random.Random(seed)
    for number in range(-warm_up, repeats):
        shuffled.shuffle(order)
        for label in [name for name in order if name not in failures]:
            try:
                run = lab.run(request, keys[label], stop=stop)
                logits.setdefault(label, run.logits)
                # A run's logits may be half a megabyte, and a comparison holds many runs.
                run = dataclasses.replace(run, engine=label, logits=run.logits[:0])
                samples.append(Sample(engine=label, round=number, run=run))
            except Exception as error:
                if not keep_going or isinstance(error, RequestCancelledError):
                    raise
                failures[label] = sentence(error)
            if on_run is not None:
                on_run(label)
    alive = [label for label in engines if any(s.engine == label for s in samples)]
    samples = [s for label in alive for s in samples if s.engine == label]
    peers = [label for label in alive if isinstance(keys[label], str)]
    reference = next(iter(peers + alive), "")
    oracles: dict[str, Oracle] = {}
    asked: dict[str, Run] = {}  # each oracle runs once, whoever it answers for

    def ask(name: str) -> Run:
        if name not in asked:
            asked[name] = lab.run(request, name, stop=stop)
        return asked[name]

    names = {label: _oracle(lab, keys[label]) for label in alive if request.image_inputs}
    base = names.get(reference, "")
    # An endpoint that others are compared with, but whose pixels are not theirs, must make Transformers' tokens itself.
    unseen = is_remote(keys.get(reference)) and set(names.values()) != {base}
    for label, name in names.items():
        if name == base and not (unseen and is_remote(keys[label])):
            continue
        try:
            base_logits = logits[reference] if keys[reference] == base else ask(base).logits
            oracles[label] = Oracle(
                engine=name,
                tokens=ask(name).tokens,
                text=ask(name).text,
                logit_difference=float((ask(name).logits - base_logits).abs().max()),
                in_bounds=_in_bounds(lab, request, keys[label]),
            )
        except Exception as error:
            if not keep_going or isinstance(error, RequestCancelledError):
                raise
            failures[label] = f"its oracle failed: {sentence(error)}"
            oracles[label] = Oracle(engine=name, tokens=(), logit_difference=float("nan"), in_bounds=False)
    return Comparison(samples=tuple(samples), reference=reference, oracles=oracles, failures=failures)


def _oracle(lab: Lab, key: EngineName) -> str:
    """Who answers for an engine's tokens: a peer for itself, but Transformers for an endpoint, which shows no pixels or logits."""
    if isinstance(key, Recipe):
        return key.oracle(lab.checkpoint.image_backend)
    return "transformers" if is_remote(key) else key


def _in_bounds(lab: Lab, request: Request, key: EngineName) -> bool:
    """Whether a recipe's pixels are as near to the stock ones as it promises; one that promises nothing keeps its word."""
    within = None if isinstance(key, str) else key.within(lab.checkpoint.image_backend)
    if isinstance(key, str) or within is None:
        return True
    pictures = (model_pictures(lab, request, recipe) for recipe in (key, Recipe.baseline()))
    return max(difference.largest for difference in pixel_differences(*pictures)) <= within
