"""Several engines on one request, or turn by turn on a chat: interleaved rounds, paired ratios, parity before any speed-up."""

from __future__ import annotations

import dataclasses
import math
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

import torch

from fastvl_lab import shown
from fastvl_lab.capture.execute import Capture
from fastvl_lab.engine import Engine, EngineLike
from fastvl_lab.errors import RecipeError, RequestCancelledError, RequestError, require, sentence
from fastvl_lab.lab import Lab
from fastvl_lab.lasting import About, Lasting
from fastvl_lab.measure.environment import environment
from fastvl_lab.measure.parity import Oracles, Parity, check, check_greedy
from fastvl_lab.measure.quiet import QUIET, Quiet, Watch
from fastvl_lab.measure.recipes import START, STOCK, steps_between
from fastvl_lab.measure.samples import (
    Interval,
    RunSample,
    Samples,
    StageSample,
    as_row,
    check_rounds,
    interleaved,
    json_value,
    median_interval,
)
from fastvl_lab.recipe import Recipe
from fastvl_lab.request import ImageInput, ImageSource, Request, check_whole_number
from fastvl_lab.run import Kind, Run
from fastvl_lab.trace import Lane


@dataclass(frozen=True, kw_only=True, eq=False)
class Comparison(Lasting):
    """What `compare` measured.

    reference: the label that speed-ups refer to, a peer's where one ran, else the first engine's. checks: by label; failures: by
    label, the error that took the engine out. notes: what came of waiting for quiet, in sentences. environment: as
    `measure.environment` tells it at the end.
    """

    samples: tuple[RunSample, ...]
    reference: str
    checks: Mapping[str, Parity]
    failures: Mapping[str, str]
    notes: tuple[str, ...] = ()
    environment: Mapping[str, str] = field(default_factory=dict)

    @property
    def engines(self) -> tuple[str, ...]:
        return Samples(samples=self.samples).engines

    def __repr__(self) -> str:
        failed = [f"{label} failed: {error}" for label, error in self.failures.items()]
        return f"Comparison({len(self.samples)} runs: {'; '.join([*self.findings(), *failed])})"

    def runs(self, engine: str, kind: Kind = "warm") -> list[Run]:
        """The timed runs of an engine that were of that kind, and not disturbed; of "cold" ones those of warm-up rounds too."""
        mine = [s for s in self.samples if s.engine == engine and s.kind == kind and not s.disturbed]
        return [sample.run for sample in mine if sample.round >= 0 or kind == "cold"]

    def compared(self, engine: str) -> Kind:
        """The kind of the engine's runs that are compared: warm, or unknown where an endpoint does not say it of any."""
        kinds = {sample.kind for sample in self.samples if sample.engine == engine and sample.round >= 0}
        return "unknown" if "unknown" in kinds and "warm" not in kinds else "warm"

    def representative(self, engine: str) -> Run:
        """The run whose TTFT is the (lower) median of those compared; of the disturbed ones, or of all, where there are none."""
        mine, kind = [sample for sample in self.samples if sample.engine == engine], self.compared(engine)
        disturbed = [sample.run for sample in mine if sample.disturbed and sample.kind == kind]
        everything = disturbed or [sample.run for sample in mine]
        runs = sorted(self.runs(engine, kind) or everything, key=lambda run: run.ttft)
        return runs[(len(runs) - 1) // 2]

    def disturbed(self, engine: str) -> bool:
        """Whether others disturbed all runs of an engine that could be compared, its representative one included."""
        kind = self.compared(engine)
        return not self.runs(engine, kind) and any(s.disturbed and s.kind == kind for s in self.samples if s.engine == engine)

    def parity(self, *engines: str) -> bool:
        """Whether these engines compute what Transformers computes, on the pixels that they may make (`measure.parity`)."""
        return all(self.checks[engine].holds for engine in engines)

    def as_expected(self, sample: RunSample) -> bool:
        """Whether a run made its oracle's tokens."""
        checked = self.checks[sample.engine]
        return sample.run.made(checked.expected, checked.expected_text)

    def speedup(self, engine: str, over: str | None = None, *, of: Literal["ttft", "tpot", "patches"] = "ttft") -> Interval | None:
        """The time of `over`, by default the reference, over the engine's, paired by round. of: `RunSample.seconds`.

        None where either fails parity or no round has an undisturbed run of each that is `compared`.
        """
        over = self.reference if over is None else over
        return self._timed(engine, over).ratio(engine, over, of) if self.parity(engine, over) else None

    def saving(self, engine: str, over: str) -> Interval | None:
        """Milliseconds of TTFT that the engine takes less than `over`; None where there is no speed-up."""
        saved = self._timed(engine, over).saving(engine, over, "ttft") if self.parity(engine, over) else None
        return None if saved is None else Interval(*(x * 1e3 for x in saved))

    def by_round(self, engine: str) -> dict[int, float]:
        """Round -> seconds of TTFT, of the engine's runs that are `compared` and were not disturbed."""
        return self._timed(engine).by_round(engine, "ttft")

    def stages_saved(self, engine: str, over: str) -> dict[str, Interval]:
        """Milliseconds of each stage, and of what is in none, that the engine takes less than `over`, paired by round.

        Those that are shown to differ come first, the largest of them at the head. Empty where there is no speed-up.
        """
        timed = self._timed(engine, over).samples if self.parity(engine, over) else ()
        lane = telling_lane([sample.run for sample in timed])
        steps = [stage_seconds(sample.run, lane) for sample in timed]
        names = dict.fromkeys(name for of_one in steps for name in of_one)
        stages = tuple(
            StageSample(
                engine=s.engine, round=s.round, use=s.use, kind=s.kind, steps={name: of_one.get(name, 0.0) for name in names}
            )
            for s, of_one in zip(timed, steps, strict=True)
        )
        found = {name: Samples(samples=stages).saving(engine, over, name) for name in names}
        return by_size({name: saved.ms for name, saved in found.items() if saved is not None})

    def _timed(self, *engines: str) -> Samples[RunSample]:
        kinds = {engine: self.compared(engine) for engine in engines}
        return Samples(samples=self.samples).only(lambda sample: kinds.get(sample.engine) == sample.kind)

    def summary(self) -> list[dict[str, Any]]:
        """One row an engine: TTFT and TPOT medians over its `compared` runs (ms), cold and cache-hit TTFT, parity, the speed-up."""
        rows = []
        for engine in self.engines:
            kind, cold, hits = self.compared(engine), self.runs(engine, "cold"), self.runs(engine, "cache_hit")
            timed, checked = self.runs(engine, kind), self.checks[engine]
            mine = [s for s in self.samples if s.engine == engine and s.round >= 0]
            ttft, low, high = median_interval([run.ttft * 1e3 for run in timed]) if timed else (None, None, None)
            tpots = [run.tpot * 1e3 for run in timed or hits if run.tpot is not None]
            row = {
                "engine": engine,
                "is_reference": engine == self.reference,
                "visual_tokens": self.representative(engine).visual_tokens,
                "warm_runs": len(timed) if kind == "warm" else 0,
                "unknown_runs": len(timed) if kind == "unknown" else 0,
                "disturbed_runs": sum(bool(sample.disturbed) for sample in mine),
                "others_cores": median_interval(others).median
                if (others := [s.others for s in mine if s.others is not None])
                else None,
                "ttft_ms": ttft,
                "ttft_low_ms": low,
                "ttft_high_ms": high,
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
                **as_row("speedup", self.speedup(engine)),
            }
            rows.append(row)
        return rows

    def findings(self) -> list[str]:
        """One sentence an engine: where its TTFT goes, and how it stands against the reference; then how quiet it was."""
        lines = []
        for engine in self.engines:
            run = self.representative(engine)
            lane = telling_lane([run])
            stages = run.trace.stages(lane)
            largest = max(stages, key=lambda stage: stages[stage])
            line = f"{engine} spends {stages[largest] / 1e9 / run.ttft:.0%} of its TTFT in {largest} ({lane})"
            if hits := self.runs(engine, "cache_hit"):
                ttft = median_interval([run.ttft * 1e3 for run in hits]).median
                line += f"; {len(hits)} runs were cache hits, with a TTFT of {ttft:.1f} ms, and are compared with nothing"
            if self.compared(engine) == "unknown":
                line += "; the endpoint does not say whether it reused anything of earlier requests, so its runs may be cache hits"
            lines.append(line if engine == self.reference else f"{line}; {self._against(engine)}")
        return [*lines, *self.quietness()]

    def busy(self, *engines: str) -> str | None:
        """What others did to the runs of these engines, in words; None where none was disturbed."""
        return Samples(samples=self.samples).only(lambda sample: sample.engine in engines).busy

    def quietness(self) -> list[str]:
        """Whether others disturbed it, and of which engines that is not known."""
        watched = [s for s in self.samples if s.round >= 0 and s.use is not None and s.kind != "cold"]
        unknown = dict.fromkeys(s.engine for s in watched if s.disturbed is None)
        lines = [busy] if (busy := self.busy(*self.engines)) else []
        if unknown:
            lines.append(f"what others used of the machine during the runs of {', '.join(unknown)} is not known")
        return [*lines, *self.notes]

    def _against(self, engine: str) -> str:
        """A speed-up in words, and no claim that its interval does not bear."""
        speedup, checked, reference = self.speedup(engine), self.checks[engine], self.reference
        if not self.parity(reference):
            return f"no time is compared with {reference}: {self.checks[reference].why}"
        if not checked.holds:
            return f"{checked.why}, so its time is not compared"
        if speedup is None:
            return f"no {'undisturbed' if self.busy(engine, reference) else 'warm'} rounds to compare with {reference}"
        text = f"{speedup.median:.2f}× as fast as {reference}"
        if speedup.low <= 1 <= speedup.high:
            text = f"no difference from {reference} shown ({text}, {speedup.known})"
        else:
            text += f" ({speedup.known})"
        if checked.moved is None:
            return text
        if checked.moved == 0:
            return f"{text}, on pixels made another way, of which Transformers computes the same logits"
        text += f", on other pixels than {reference}, which move Transformers' logits by up to {checked.moved:.2g}"
        return text if checked.expected == self.checks[reference].expected else f"{text} and change its answer"

    def to_record(self) -> dict[str, Any]:
        """Everything but the logits as JSON-ready data; `from_record` reads it back."""
        return {
            "samples": [sample.to_record() for sample in self.samples],
            "reference": self.reference,
            "checks": {label: dataclasses.asdict(checked) for label, checked in self.checks.items()},
            "failures": dict(self.failures),
            "notes": list(self.notes),
            "environment": dict(self.environment),
        }

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> Comparison:
        """Read `to_record`'s form."""
        return cls(
            samples=tuple(map(RunSample.from_record, record["samples"])),
            reference=record["reference"],
            checks={name: Parity.from_record(checked) for name, checked in record["checks"].items()},
            failures=record["failures"],
            notes=tuple(record["notes"]),
            environment=record.get("environment", {}),  # absent in older records
        )

    def sample_rows(self) -> list[dict[str, Any]]:
        """One row a run, raw: percentiles are derived from these, never stored instead of them.

        disturbed: None where it is not known; others: the cores that others used.
        """
        return [
            {
                "engine": sample.engine,
                "round": sample.round,
                "disturbed": sample.disturbed,
                "others": sample.others,
                **sample.run.row(),
                "tokens_equal": self.as_expected(sample),
            }
            for sample in self.samples
        ]

    def about(self) -> About:
        checkpoints = ", ".join(dict.fromkeys(sample.run.checkpoint for sample in self.samples)) or "nothing"
        return About(
            title=f"{checkpoints}: {' against '.join(self.engines) or ', '.join(self.failures)}",
            findings=[*self.findings(), *(f"{label} failed: {error}" for label, error in self.failures.items())],
            environment=self.environment,
            samples=[{"checkpoint": s.run.checkpoint} | row for s, row in zip(self.samples, self.sample_rows(), strict=True)],
            traces=[self.representative(engine).traced(engine) for engine in self.engines],
        )

    def frame(self) -> Any:
        """The summary as a pandas DataFrame; needs the extra "notebooks"."""
        return require("pandas", "notebooks").DataFrame(self.summary())

    def waterfall(self) -> Any:
        """The representative runs under one another on one axis, as a plotly figure; needs the extra "notebooks"."""
        if not self.engines:
            raise RequestError(f"no engine has run, so there is no waterfall; what failed: {dict(self.failures)}")
        return shown.figure(self)


def telling_lane(runs: Sequence[Run]) -> Lane:
    """The lane whose stages say where the time of these runs goes.

    On CUDA the host only waits, in `sample`, for what the device does in its stages. A device that a thread plays on a CPU has only
    steps after the first token to do, which is rarely most of it.
    """
    told = [2 * sum(run.trace.stages("device").values()) > run.trace.first_chunk_ns for run in runs]
    return "device" if 2 * sum(told) > len(told) else "host"


def stage_seconds(run: Run, lane: Lane) -> dict[str, float]:
    """Seconds of TTFT in each stage of a lane, and in none, as "unaccounted"."""
    stages = {name: ns / 1e9 for name, ns in run.trace.stages(lane).items()}
    return stages | {"unaccounted": sum(end - start for start, end in run.trace.gaps(lane)) / 1e9}


def by_size(found: Mapping[str, Interval]) -> dict[str, Interval]:
    """In order of size, those whose interval does not hold zero before all others."""
    return dict(sorted(found.items(), key=lambda item: (not (item[1].low > 0 or item[1].high < 0), -abs(item[1].median))))


def compare(
    lab: Lab,
    request: Request,
    engines: Mapping[str, EngineLike],
    *,
    repeats: int = 20,
    warm_up: int = 1,
    seed: int = 0,
    on_run: Callable[[str], object] | None = None,
    on_sample: Callable[[RunSample], object] | None = None,
    keep_going: bool = False,
    checks: Mapping[str, Parity] | None = None,
    quiet: Quiet | None = QUIET,
    stop: threading.Event | None = None,
) -> Comparison:
    """Run every engine on the request `warm_up + repeats` times, in rounds whose order is shuffled by `seed`; then check parity.

    engines: label -> recipe, recipe text, or peer. on_run is called after each run with its label, on_sample with what it gave.
    keep_going: record an engine's error in `failures` and go on without it; otherwise errors are raised. checks: by label, those
    that were made before. quiet: what is waited for before each run, and held against each (`measure.quiet`); None watches nothing.
    stop: as `Lab.run` has it. Raises `RequestError` for a request that samples (`parity.check_greedy`).
    """
    if not isinstance(engines, Mapping) or not engines:
        raise RequestError(f"engines is {engines!r}; give at least one recipe or peer, as label -> engine")
    check_greedy(request)
    for name, value in (("repeats", repeats), ("warm_up", warm_up)):
        check_whole_number(name, value, least=0)
    if repeats + warm_up < 1:
        raise RequestError(f"repeats is {repeats} and warm_up {warm_up}; one of them must be at least 1")
    keys: dict[str, Engine] = {}
    made: list[RunSample] = []
    failures: dict[str, str] = {}
    logits: dict[str, torch.Tensor] = {}
    watch = Watch(quiet, lab.device)

    def gave_up(label: str, error: Exception, what: str = "") -> str:
        if not keep_going or isinstance(error, RequestCancelledError):
            raise error
        failures[label] = f"{what}{sentence(error)}"
        return failures[label]

    for label, engine in engines.items():
        try:
            keys[label] = lab.engine(engine)
        except RecipeError as error:
            gave_up(label, error)
    with lab.hold(keys.values()):
        for number, _, order in interleaved(engines, repeats=repeats, warm_up=warm_up, seed=seed):
            for label in [name for name in order if name not in failures]:
                try:
                    once = partial(lab.run, request, keys[label], stop=stop)
                    measured = list(watch.measured(once, computing(lab, keys[label]), again=number >= 0, stop=stop))
                except Exception as error:
                    gave_up(label, error)
                    measured = []
                for run, use in measured:
                    if label not in logits or not run.finite:
                        logits[label] = run.logits
                    made.append(RunSample(engine=label, round=number, run=run.without_logits(engine=label), use=use))
                    if on_sample is not None:
                        on_sample(made[-1])
                if on_run is not None:
                    on_run(label)
        runs = {label: [s.run for s in made if s.engine == label] for label in engines if label in logits}
        peers = [label for label in runs if keys[label].recipe is None]
        reference = next(iter([*peers, *runs]), "")
        known = {keys[label].name: dataclasses.replace(runs[label][0], logits=logits[label]) for label in peers}
        oracles, found = Oracles(lab, request, known=known, stop=stop), dict(checks or {})
        for label in [label for label in runs if label not in found]:
            try:
                base = oracles.of(keys[reference])
                found[label] = check(oracles, keys[label], runs[label], logits[label], base)
            except Exception as error:
                why = gave_up(label, error, "its parity check failed: ")
                found[label] = Parity(oracle=oracles.of(keys[label]), holds=False, why=why)
    checked = {label: found[label] for label in runs}
    samples = _by_label(made, engines)
    return Comparison(
        samples=samples,
        reference=reference,
        checks=checked,
        failures=failures,
        notes=watch.notes(),
        environment=environment(lab),
    )


def computing(lab: Lab, engine: Engine) -> tuple[int, ...] | None:
    """The processes that compute for an engine beside this one; None of an address, behind which they are not known."""
    return None if engine.elsewhere else lab.processes(engine)


def _by_label(made: Sequence[RunSample], engines: Iterable[str]) -> tuple[RunSample, ...]:
    return tuple(sample for label in engines for sample in made if sample.engine == label)


@dataclass(frozen=True, kw_only=True, eq=False)
class Attribution(Lasting):
    """What `attribute` measured. steps: labels of the recipes on the way, first that of the recipe it starts from."""

    comparison: Comparison
    steps: tuple[str, ...]

    def saved(self, step: str) -> Interval | None:
        """Milliseconds of TTFT that a step takes off the step before it; None for the first, and as `Comparison.saving`.

        Raises `RecipeError` for no step.
        """
        if step not in self.steps:
            raise RecipeError(f"step {step!r} is unknown; the steps are {', '.join(map(repr, self.steps))}")
        number = self.steps.index(step)
        return self.comparison.saving(step, self.steps[number - 1]) if number else None

    @property
    def rest(self) -> float | None:
        """Milliseconds by which the steps' medians, which need not add up, miss what the last recipe takes off the first.

        None where some step is not compared.
        """
        whole = self.comparison.saving(self.steps[-1], self.steps[0])
        each = [self.saved(step) for step in self.steps[1:]]
        return None if whole is None or None in each else whole.median - sum(saved.median for saved in each if saved)

    def about(self) -> About:
        about = self.comparison.about()
        return dataclasses.replace(about, title=f"{about.title.partition(':')[0]}: {len(self.steps) - 1} steps to {self.steps[-1]}")

    def to_record(self) -> dict[str, Any]:
        """As `Comparison.to_record`."""
        return {"comparison": self.comparison.to_record(), "steps": list(self.steps)}

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> Attribution:
        """Read `to_record`'s form."""
        return cls(comparison=Comparison.from_record(record["comparison"]), steps=tuple(record["steps"]))


def attribute(
    lab: Lab,
    request: Request,
    recipe: Recipe | str,
    *,
    start: Recipe | str | None = None,
    repeats: int = 6,
    on_sample: Callable[[RunSample], object] | None = None,
    quiet: Quiet | None = QUIET,
    stop: threading.Event | None = None,
) -> Attribution:
    """Measure Transformers, the recipe `start` (by default the baseline), and every step from it to `recipe`, as `compare` does.

    A step's saving depends on the steps before it: in another order it would be another one.
    """
    ways = steps_between(lab.recipe(START if start is None else start), lab.recipe(recipe))
    comparison = compare(lab, request, {STOCK: STOCK, **ways}, repeats=repeats, on_sample=on_sample, quiet=quiet, stop=stop)
    return Attribution(comparison=comparison, steps=tuple(step for step in ways if step in comparison.engines))


@dataclass(frozen=True, kw_only=True, eq=False)
class Conversation:
    """What `converse` measured.

    texts: what the user says, turn by turn; reference: the engine whose answers are in the history; notes: as `Comparison` has it.
    """

    texts: tuple[str, ...]
    reference: str
    samples: tuple[RunSample, ...]
    notes: tuple[str, ...] = ()

    @property
    def engines(self) -> tuple[str, ...]:
        return Samples(samples=self.samples).engines

    def kind(self, engine: str, turn: int) -> Kind:
        """What the engine's last run of a turn was: with a warm-up, what all of its timed ones were."""
        return [s for s in self.samples if s.round >= 0 and (s.engine, s.turn) == (engine, turn)][-1].kind

    def runs(self, engine: str, turn: int) -> list[Run]:
        """The timed runs of a turn that are of its kind: cold ones are not pooled with others. Disturbed only where all are."""
        runs = self._timed(turn, engine).samples
        return [sample.run for sample in runs if not sample.disturbed] or [sample.run for sample in runs]

    def ttft(self, engine: str, turn: int) -> Interval:
        """Seconds; NaN where every run was disturbed."""
        return self._timed(turn, engine).median(engine, "ttft")

    def found(self, engine: str, turn: int) -> tuple[int, int]:
        """How many of a turn's prompt tokens were found in the KV cache, and how many images' visual tokens were known."""
        counts = self.runs(engine, turn)[-1].trace.counts
        return counts.get("cache: prefix tokens found", 0), counts.get("cache: images found", 0)

    def tokens_equal(self, engine: str, turn: int | None = None) -> bool:
        """Whether every run of the engine, at that turn or at all, made the tokens that the reference made at that turn."""
        expected: dict[int, Run] = {}
        for sample in self.samples:
            if sample.engine == self.reference:
                expected.setdefault(sample.turn, sample.run)
        mine = (sample for sample in self.samples if sample.engine == engine and turn in (None, sample.turn))
        return all(s.run.made(expected[s.turn].tokens, expected[s.turn].text) for s in mine)

    def speedup(self, engine: str, turn: int, over: str) -> Interval | None:
        """How many times as fast as `over` a turn's first token comes, paired by round; None where either's tokens are others."""
        equal = self.tokens_equal(engine) and self.tokens_equal(over)
        return self._timed(turn, engine, over).ratio(engine, over, "ttft") if equal else None

    def findings(self) -> list[str]:
        """How quiet it was, where there is something to say."""
        return [*([busy] if (busy := Samples(samples=self.samples).busy) else []), *self.notes]

    def _timed(self, turn: int, *engines: str) -> Samples[RunSample]:
        kinds = {engine: self.kind(engine, turn) for engine in engines}
        of_turn = Samples(samples=self.samples).only(lambda sample: sample.round >= 0 and sample.turn == turn)
        return of_turn.only(lambda sample: kinds.get(sample.engine) == sample.kind)

    def summary(self, over: str) -> list[dict[str, Any]]:
        """One row a turn and engine: TTFT median (ms), what it found, tokens, and the speed-up over the engine of that label."""
        rows = []
        for turn in range(len(self.texts)):
            for engine in self.engines:
                run, speedup = self.runs(engine, turn)[-1], as_row("speedup", self.speedup(engine, turn, over))
                tokens, images = self.found(engine, turn)
                row = {
                    "turn": turn + 1,
                    "engine": engine,
                    "kind": run.kind,
                    "prompt_tokens": run.n_prompt,
                    "tokens_found": tokens,
                    "images_found": images,
                    "ttft_ms": json_value(self.ttft(engine, turn).median * 1e3),
                    "tokens_equal": self.tokens_equal(engine, turn),
                    **{key: json_value(value) for key, value in speedup.items()},
                }
                rows.append(row)
        return rows


def converse(
    lab: Lab,
    image: ImageSource,
    texts: Sequence[str],
    engines: Mapping[str, EngineLike],
    *,
    max_new_tokens: int = 32,
    repeats: int = 6,
    warm_up: int = 1,
    seed: int = 0,
    quiet: Quiet | None = QUIET,
) -> Conversation:
    """Play a chat `warm_up + repeats` times on every engine: the image and the first text, an answer, the next text, and so on.

    engines: label -> recipe, recipe text, or peer. Every turn sends the whole history, with the first engine's answers of the first
    round, so all engines are asked the same; at each turn all of them run, in an order shuffled by `seed`. Every engine has caches
    of its own (`Lab.apart`), which forget everything before a round begins. quiet: as `compare` has it; a disturbed turn is not
    measured again, since it would find what it left. Raises `RequestError` for a turn that no session has room for.
    """
    if not engines or not texts:
        raise RequestError("engines or texts is empty; a conversation takes at least one of each")
    if not isinstance(engines, Mapping) or isinstance(texts, str):
        raise RequestError(f"engines is {engines!r} and texts {texts!r}; give label -> engine, and a list of what the user says")
    check_rounds(repeats, warm_up)
    keys = {label: lab.engine(engine) for label, engine in engines.items()}
    labs, reference = {label: lab.apart() for label in keys}, next(iter(engines))
    first: list[dict[str, Any]] = [{"type": "image", "image": ImageInput.of(image)}, {"type": "text", "text": texts[0]}]
    messages: list[dict[str, Any]] = [{"role": "user", "content": first}]
    requests, made, watch = [Request(messages=messages, max_new_tokens=max_new_tokens)], [], Watch(quiet, lab.device)
    for number, turn, order in interleaved(engines, repeats=repeats, warm_up=warm_up, seed=seed, turns=len(texts)):
        for own in labs.values() if turn == 0 else ():
            own.memory.forget()
        for label in order:
            once = partial(labs[label].run, requests[turn], keys[label])
            ((run, use),) = watch.measured(once, computing(labs[label], keys[label]), again=False)
            made.append(RunSample(engine=label, round=number, turn=turn, run=run.without_logits(engine=label), use=use))
            if label == reference and turn + 1 == len(requests) < len(texts):
                messages += [{"role": "assistant", "content": run.text}, {"role": "user", "content": texts[turn + 1]}]
                requests.append(Request(messages=messages, max_new_tokens=max_new_tokens))
    return Conversation(texts=tuple(texts), reference=reference, samples=_by_label(made, engines), notes=watch.notes())


def break_even(captures: Iterable[Capture], *, eager: float, captured: float) -> int | None:
    """After how many requests, of so many seconds each, captures have paid for themselves; None where a request saves nothing."""
    saved = eager - captured
    return math.ceil(sum(capture.seconds for capture in captures) / saved) if saved > 0 else None
