"""Several engines on one request, side by side: interleaved rounds, paired ratios, and parity before any speed-up."""

from __future__ import annotations

import dataclasses
import random
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch

from fastvl_lab.engine import EngineLike
from fastvl_lab.errors import RequestCancelledError, RequestError, require, sentence
from fastvl_lab.lab import Lab
from fastvl_lab.measure.parity import Oracles, Parity, check
from fastvl_lab.measure.statistics import Interval, median_interval
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
class Comparison:
    """What `compare` measured.

    reference: the label that speed-ups refer to (a peer where one ran, else the first engine). checks: label -> how the engine came
    through its parity check. failures: label -> the sentence of the error that took an engine out.
    """

    samples: tuple[Sample, ...]
    reference: str
    checks: Mapping[str, Parity]
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

    def parity(self, engine: str) -> bool:
        """Whether the engine computes what Transformers computes, on the pixels that it may make (`measure.parity`)."""
        return self.checks[engine].holds

    def as_expected(self, sample: Sample) -> bool:
        """Whether a run made the tokens of who answers for its engine."""
        checked = self.checks[sample.engine]
        return sample.run.made(checked.expected, checked.expected_text)

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
            shown, checked = self.representative(engine), self.checks[engine]
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
                "parity": checked.holds,
                "parity_says": checked.says,
                "tokens_equal": checked.other_from is None,
                "error": checked.error,
                "error_budget": checked.budget,
                "oracle": checked.oracle,
                "logit_difference": checked.moved,
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
        speedup, checked, reference = self.speedup(engine), self.checks[engine], self.reference
        if not self.parity(reference):
            return f"no time is compared with {reference}: {self.checks[reference].why}"
        if not checked.holds:
            return f"{checked.why}, so its time is not compared"
        if speedup is None:
            return f"no warm rounds to compare with {reference}"
        text = f"{speedup.median:.2f}× as fast as {reference}"
        if speedup.low != speedup.low:
            text += " (too few rounds for an interval)"
        elif speedup.low <= 1 <= speedup.high:
            text = f"no difference from {reference} shown ({text}, 95% CI {speedup.low:.2f} to {speedup.high:.2f})"
        else:
            text += f" (95% CI {speedup.low:.2f} to {speedup.high:.2f})"
        if checked.moved is None:
            return text
        if checked.moved == 0:
            return f"{text}, on pixels made another way, which leave Transformers' logits as they are"
        text += f", on other pixels than {reference}, which move Transformers' logits by up to {checked.moved:.2g}"
        return text if checked.expected == self.checks[reference].expected else f"{text} and change its answer"

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
    engines: Mapping[str, EngineLike],
    *,
    repeats: int = 20,
    warm_up: int = 1,
    seed: int = 0,
    on_run: Callable[[str], object] | None = None,
    keep_going: bool = False,
    stop: threading.Event | None = None,
) -> Comparison:
    """Run every engine on the request `warm_up + repeats` times, in rounds whose order is shuffled by `seed`; then check parity.

    engines: label -> recipe, recipe text, or peer. Transformers answers for all of them, and runs for that where it is none of
    them. on_run is called after each run with its label. keep_going records any error of
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
    with lab.hold(keys.values()):
        for number in range(-warm_up, repeats):
            shuffled.shuffle(order)
            for label in [name for name in order if name not in failures]:
                try:
                    run = lab.run(request, keys[label], stop=stop)
                    if label not in logits or not run.finite:
                        logits[label] = run.logits
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
        peers = [label for label in alive if keys[label].recipe is None]
        reference = next(iter(peers + alive), "")
        runs = {label: [s.run for s in samples if s.engine == label] for label in alive}
        known = {keys[label].name: dataclasses.replace(runs[label][0], logits=logits[label]) for label in peers}
        oracles, checks = Oracles(lab, request, known=known, stop=stop), {}
        for label in alive:
            try:
                base = oracles.of(keys[reference])
                checks[label] = check(oracles, keys[label], runs[label], logits[label], base)
            except Exception as error:
                if not keep_going or isinstance(error, RequestCancelledError):
                    raise
                failures[label] = why = f"its parity check failed: {sentence(error)}"
                checks[label] = Parity(oracle=oracles.of(keys[label]), holds=False, why=why)
    return Comparison(samples=tuple(samples), reference=reference, checks=checks, failures=failures)
