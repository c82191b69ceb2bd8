"""Numbers held against what a device can do, and against one another: which cannot be what they are called, and why."""

from __future__ import annotations

import html
import math
import operator
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from numbers import Real
from statistics import median
from typing import Any

from fastvl_lab.checkpoint import Checkpoint
from fastvl_lab.errors import FastvlError
from fastvl_lab.measure import verdicts
from fastvl_lab.measure.floors import prefill_flops, vit_flops
from fastvl_lab.measure.hardware import find_hardware
from fastvl_lab.measure.published import without_weights
from fastvl_lab.measure.statistics import FOR_AN_INTERVAL
from fastvl_lab.measure.verdicts import FEW, SEVERITIES, Cleared, Device, Finding, Outcome, Seen, Unchecked, seconds
from fastvl_lab.preprocessor.layout import AreaLimits, shapes_of
from fastvl_lab.request import Grid
from fastvl_lab.run import Run

FOR_A_P95 = 20  # samples: of fewer, the highest 5% are less than one


@dataclass(frozen=True, kw_only=True, repr=False)
class Audit:
    """What an audit found, what it cleared, and what it could not look at."""

    findings: tuple[Finding, ...]
    cleared: tuple[Cleared, ...]
    unchecked: tuple[Unchecked, ...]

    @property
    def ok(self) -> bool:
        """Whether nothing is impossible or suspect; notes are no fault."""
        return all(finding.severity == "note" for finding in self.findings)

    @property
    def text(self) -> str:
        """All of it in lines: findings first, each with its arithmetic, then what is clear, then what was not checked."""
        indented = f"\n{'':<12}"
        return "\n".join(f"{label:<11} {verdict}: {indented.join(said)}" for label, verdict, *said in self._rows())

    def __repr__(self) -> str:
        return self.text

    def _repr_html_(self) -> str:
        rows = (
            f"<tr style='text-align:left; vertical-align:top'><td>{label}</td><td>{verdict}</td>"
            f"<td>{'<br>'.join(map(html.escape, said))}</td></tr>"
            for label, verdict, *said in self._rows()
        )
        return f"<table><tbody>{''.join(rows)}</tbody></table>"

    def to_record(self) -> dict[str, Any]:
        """As JSON-ready data."""
        return {
            "ok": self.ok,
            "findings": [asdict(finding) for finding in self.findings],
            "cleared": [cleared._asdict() for cleared in self.cleared],
            "unchecked": [unchecked._asdict() for unchecked in self.unchecked],
        }

    def _rows(self) -> Iterator[tuple[str, ...]]:
        """A label, a verdict, and what is said of it, in one or two parts."""
        yield from ((f.severity, f.verdict, f.sentence, f.arithmetic) for f in self.findings)
        yield from (("clear", verdict, arithmetic) for verdict, arithmetic in self.cleared)
        yield from (("not checked", verdict, f"needs {needs}") for verdict, needs in self.unchecked)


def audit(
    run: Run | Sequence[Run] | None = None,
    *,
    ttft: float | None = None,
    tokens_per_second: float | None = None,
    output_tokens: int | None = None,
    total: float | None = None,
    chunks: Iterable[tuple[float, int]] | None = None,
    image: tuple[int, int] | None = None,
    model: str | None = None,
    hardware: str | None = None,
    memory_bandwidth: float | None = None,
    peak_flops: float | None = None,
    dtype: str | None = None,
) -> Audit:
    """Say which numbers cannot be what they are called, and why; one request at a time, one token a decode step.

    run: a run, or several as samples of one engine. For anybody's numbers instead: `ttft` and `total`, seconds from the request to
    its first and last chunk; `tokens_per_second` after the first chunk; `output_tokens`; or, in place of these, `chunks`, (seconds
    since the request, tokens) each. image: its (width, height). model: a published hub id or its last part, a built-in checkpoint
    or a folder; dtype: of its weights, by default bfloat16.

    hardware: a GPU's name (`measure.hardware`), by default the run's own device; memory_bandwidth (bytes a second) and peak_flops
    (operations a second), of all GPUs together, stand in for its figures. Raises `FastvlError` for unknown names, and for too
    little to say anything.
    """
    given: dict[str, Any] = {"ttft": ttft, "tokens_per_second": tokens_per_second, "output_tokens": output_tokens, "total": total}
    for name, value in {**given, "memory_bandwidth": memory_bandwidth, "peak_flops": peak_flops}.items():
        good = isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value) and float(value) > 0
        if value is not None and not good:
            raise FastvlError(f"{name} is {value!r}; it must be a finite number above 0")
    device = _device(hardware, memory_bandwidth, peak_flops)
    if run is not None:
        given |= {"chunks": chunks, "image": image, "model": model, "dtype": dtype}
        if extra := [name for name, value in given.items() if value is not None]:
            raise FastvlError(f"a run brings its own {', '.join(extra)}; beside one, only hardware and its figures are given")
        return _audit_of(_outcomes_of_runs([run] if isinstance(run, Run) else run, device))
    shape = None if model is None else without_weights(model, dtype or "bfloat16")
    seen = _of_numbers(Seen(device=device, model=shape), given, chunks)
    return _audit_of(_outcomes(_with_image(seen, image)))


def _audit_of(outcomes: Iterable[Outcome]) -> Audit:
    """Raises `FastvlError` if they say nothing."""
    outcomes = list(outcomes)
    findings = sorted((o for o in outcomes if isinstance(o, Finding)), key=_gravity)
    cleared = tuple(o for o in outcomes if isinstance(o, Cleared))
    unchecked = tuple(o for o in outcomes if isinstance(o, Unchecked))
    if not findings and not cleared:
        missing = "; ".join(f"{verdict} needs {needs}" for verdict, needs in unchecked)
        raise FastvlError(f"too little is given to say anything: {missing}")
    return Audit(findings=tuple(findings), cleared=cleared, unchecked=unchecked)


def _device(hardware: str | None, memory_bandwidth: float | None, peak_flops: float | None) -> Device:
    if hardware is None:
        return Device("the device given", memory_bandwidth, peak_flops)
    known = find_hardware(hardware, instead=", or give memory_bandwidth and peak_flops as numbers")
    return Device(known.name, memory_bandwidth or known.memory_bandwidth, peak_flops or known.peak_flops)


def _of_numbers(seen: Seen, given: dict[str, Any], chunks: Iterable[tuple[float, int]] | None) -> Seen:
    if chunks is not None:
        if extra := [name for name, value in given.items() if value is not None]:
            raise FastvlError(f"chunks bring their own {', '.join(extra)}; give one or the other")
        return _with_arrivals(seen, _arrivals(chunks))
    ttft, rate, n, total = (given[name] for name in ("ttft", "tokens_per_second", "output_tokens", "total"))
    if n is not None and n != int(n):
        raise FastvlError(f"output_tokens is {n!r}; it must be a whole number")
    if None not in (ttft, total) and ttft > total:
        raise FastvlError(f"ttft is {ttft!r} and total {total!r}; the first chunk cannot come after the last")
    if total is None and None not in (ttft, rate, n):
        total = ttft + (n - 1) / rate
    elif rate is None and None not in (ttft, total, n) and n > FEW and total > ttft:
        rate = (n - 1) / (total - ttft)
    return replace(seen, ttft=ttft, total=total, n_tokens=n, rate=rate)


def _arrivals(chunks: Iterable[tuple[float, int]]) -> tuple[tuple[float, int], ...]:
    try:
        arrivals = tuple((float(seconds), operator.index(n)) for seconds, n in chunks)
    except (TypeError, ValueError):
        raise FastvlError("chunks must be (seconds since the request, number of tokens) each") from None
    times, counts = [time for time, _ in arrivals], [n for _, n in arrivals]
    if not arrivals or times != sorted(times) or not 0 < times[0] <= times[-1] < math.inf or min(counts) < 0 or sum(counts) == 0:
        raise FastvlError("chunks must have times above 0 in order, and some tokens, none of them fewer than 0")
    return arrivals


def _with_arrivals(seen: Seen, arrivals: tuple[tuple[float, int], ...]) -> Seen:
    (ttft, first), (total, _), n = arrivals[0], arrivals[-1], sum(count for _, count in arrivals)
    rate = (n - first) / (total - ttft) if n - first >= FEW and total > ttft else None
    return replace(seen, ttft=ttft, total=total, n_tokens=n, rate=rate, arrivals=arrivals)


def _with_image(seen: Seen, image: tuple[int, int] | None) -> Seen:
    if image is None:
        return seen
    if seen.model is None:
        raise FastvlError("image is given without model; what an image costs depends on the model")
    whole = isinstance(image, list | tuple) and all(isinstance(side, int) and side > 0 for side in image)
    if not whole or len(image) != 2:
        raise FastvlError(f"image is {image!r}; give its (width, height) in whole pixels")
    settings = seen.model.image_settings
    (shape,) = shapes_of([image], [AreaLimits(settings.min_pixels, settings.max_pixels)], seen.model)
    return replace(seen, n_visual=shape.visual_tokens, work=_work(seen.model, [shape.grid], shape.visual_tokens))


def _work(model: Checkpoint, grids: Sequence[Grid], n_prompt: int) -> int:
    """The least operations of a first token: each image once in its clip, and of the last layer the last token alone."""
    return vit_flops(model, grids, frames=1).total + prefill_flops(model, n_prompt, last_token_alone=True).total


def _outcomes(seen: Seen) -> list[Outcome]:
    found = [
        verdicts.decode_faster_than_memory(seen),
        verdicts.ttft_is_the_answer(seen),
        verdicts.bursts(seen),
        verdicts.faster_than_compute(seen),
    ]
    if seen.run is None:
        return found
    return [*found, verdicts.stages_do_not_add_up(seen), verdicts.logits_not_finite(seen.run)]


def _outcomes_of_runs(runs: Sequence[Run], device: Device) -> list[Outcome]:
    if not isinstance(runs, list | tuple) or not runs or not all(isinstance(run, Run) for run in runs):
        raise FastvlError("give a run, or a list of at least one")
    first, *others = (f"{run.engine} · {run.checkpoint} · {run.device} {run.dtype}" for run in runs)
    if other := next((name for name in others if name != first), None):
        raise FastvlError(f"the runs are not samples of one engine: {first}, and {other}; audit each engine's by themselves")
    device, model = _where(runs[0], device)
    outcomes = _over_runs([_outcomes(_of_run(Seen(device=device, model=model), run)) for run in runs])
    return [*outcomes, *_kinds(runs), _samples(runs)]


def _where(run: Run, device: Device) -> tuple[Device, Checkpoint | None]:
    """The run's device and the shape of its model; None for what is not known of them."""
    if device.memory_bandwidth is None and device.peak_flops is None:
        try:
            device = _device(run.device, None, None)
        except FastvlError:  # a CPU, or a GPU that is not in the table
            device = Device(run.device, None, None)
    try:
        return device, without_weights(run.checkpoint, run.dtype)
    except FastvlError:
        return device, None


def _of_run(seen: Seen, run: Run) -> Seen:
    seen = _with_arrivals(seen, tuple((chunk.time, len(chunk.tokens)) for chunk in run.chunks))
    work = None if seen.model is None else _work(seen.model, [shape.grid for shape in run.shapes], run.n_prompt)
    return replace(seen, ttft=run.ttft, n_visual=run.visual_tokens, work=work, run=run)


def _over_runs(per_run: Sequence[Sequence[Outcome]]) -> list[Outcome]:
    """Each verdict once: its gravest outcome, with the first run that has it and the number of such runs."""
    merged: list[Outcome] = []
    for outcomes in zip(*per_run, strict=True):  # one verdict's, run by run
        gravest = min(outcomes, key=_gravity)
        same = [number for number, outcome in enumerate(outcomes) if _gravity(outcome) == _gravity(gravest)]
        if isinstance(gravest, Finding) and len(per_run) > 1:
            share = f"{len(same)} of {len(per_run)} runs, first in run {same[0]}, whose arithmetic this is"
            gravest = replace(gravest, sentence=f"{gravest.sentence}; in {share}")
        merged.append(gravest)
    return merged


def _gravity(outcome: Outcome) -> int:
    if isinstance(outcome, Finding):
        return SEVERITIES.index(outcome.severity)
    return len(SEVERITIES) + isinstance(outcome, Unchecked)


def _kinds(runs: Sequence[Run]) -> list[Outcome]:
    numbers: dict[str, list[int]] = {}
    for number, run in enumerate(runs):
        numbers.setdefault(run.kind, []).append(number)
    if len(runs) == 1:
        return []
    if len(numbers) == 1:
        return [Cleared("cold_among_warm", f"all {len(runs)} runs are {runs[0].kind}")]
    usual = max(numbers, key=lambda kind: len(numbers[kind]))
    odd = ", ".join(f"{kind}: {', '.join(map(str, which))}" for kind, which in numbers.items() if kind != usual)
    medians = (f"{len(n)} {kind} {seconds(median(runs[i].ttft for i in n))}" for kind, n in numbers.items())
    return [
        Finding(
            verdict="cold_among_warm",
            severity="suspect",
            sentence=f"most runs are {usual} and some are not (run numbers of {odd}), so a statistic of all of them describes none",
            arithmetic=f"median TTFT of {', '.join(medians)}",
        )
    ]


def _samples(runs: Sequence[Run]) -> Outcome:
    n = len(runs)
    if n >= FOR_A_P95:
        return Cleared("too_few_samples", f"{n} runs, enough for a median's interval and a p95")
    if n == 1:
        sentence, shown = f"one {runs[0].kind} run shows what happens, and not how much it varies", "1 sample"
    elif n < FOR_AN_INTERVAL:
        sentence = "too few runs for an interval of their median"
        shown = f"all {n} lie on one side of it with a probability of 2 × 0.5^{n} = {2 * 0.5**n:.1%}, which is over 5%"
    else:
        sentence = "enough runs for an interval of their median, too few for a p95, which would be their maximum"
        shown = f"5% of {n} runs is less than one; of {FOR_A_P95} it is one"
    return Finding(verdict="too_few_samples", severity="note", sentence=sentence, arithmetic=shown)
