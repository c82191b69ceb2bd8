"""Numbers held against what a device can do, and against one another: which cannot be what they are called, and why."""

from __future__ import annotations

import html
import math
import operator
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import pairwise
from statistics import median
from typing import Any, Literal, NamedTuple, get_args

from fastvl_lab.account import Begins, PartName
from fastvl_lab.checkpoint import Checkpoint
from fastvl_lab.checkpoint.memory import gigabytes
from fastvl_lab.checkpoint.shape import without_weights
from fastvl_lab.errors import FastvlError, is_number
from fastvl_lab.lab import dtype_name
from fastvl_lab.measure.floors import decode_bytes, prefill_flops, vit_flops
from fastvl_lab.measure.hardware import find_hardware
from fastvl_lab.measure.load import Load
from fastvl_lab.measure.samples import FOR_AN_INTERVAL
from fastvl_lab.preprocessor.layout import AreaLimits, shapes_of
from fastvl_lab.request import Grid
from fastvl_lab.run import ELSEWHERE, Run

Severity = Literal["impossible", "suspect", "note", "clear", "not checked"]

# Gravest first.
SEVERITIES: tuple[Severity, ...] = get_args(Severity)

FOR_A_P95 = 20  # samples: of fewer, the highest 5% are less than one
FEW = 8  # tokens; of fewer, neither a rate nor a share says much
_A_CHARACTER = 4  # tokens that may leave together because they are one character, which UTF-8 writes in up to four bytes
_WHOLE = 0.9  # of the whole time; a TTFT above it is that of the answer
_CACHED = 10**9  # bytes; of a smaller model a good part may stay in the device's caches, and memory is no limit
_OFF = 0.01  # of TTFT, by which stages may differ from it
_LARGE = 0.2  # of TTFT, spent in no stage
_HTTP = 0.01  # seconds that a server may take to read a body and send a first text, whatever it serves

# What an engine's own TTFT leaves out, by what it begins with: parts of its account, and in words.
_BEFORE: dict[Begins, tuple[PartName, ...]] = {"arrival": (), "preprocessed": ("preprocess",), "scheduled": ("preprocess", "queue")}
_TRAPS: dict[Begins, str] = {
    "arrival": "reading the body and sending the first text are outside",
    "preprocessed": "fetching and unpacking images, the processor and tokenizing are outside",
    "scheduled": "fetching and unpacking images, the processor, tokenizing and the queue are outside (as in vLLM's issue 41267)",
}

_KNOWN_CAUSE = (
    "a known cause is LMDeploy 0.9.0 to 0.11.1, which holds tokens of Qwen-VL models by a gate for each round of 16 steps and a "
    "host sync in each step; there the cure is prefill_interval=1 or 2, or LMDeploy 0.12.3 or later (PRs 4265 and 4393)"
)


class Finding(NamedTuple):
    """What one verdict, a function of its name below, says, with the arithmetic behind it.

    severity: "impossible" cannot be what it is called on this device; "suspect" is not what it is usually taken for; "note" is
    worth knowing, and no fault. sentence: what that is; where nothing could be said, what it would have needed.
    """

    severity: Severity
    sentence: str
    arithmetic: str = ""
    verdict: str = ""

    @property
    def named(self) -> str:
        """The verdict in words."""
        return self.verdict.replace("_", " ").replace("ttft", "TTFT")


def _judged(arithmetic: str, *cases: tuple[object, Severity, str]) -> Finding:
    """The first case that holds, of (whether it holds, how grave it is, the sentence); clear where none does."""
    found: Iterator[tuple[Severity, str]] = ((severity, sentence) for holds, severity, sentence in cases if holds)
    return Finding(*next(found, ("clear", "")), arithmetic)


def _needs(what: str | Mapping[str, object]) -> Finding:
    """What a verdict lacks: a text, or the names of values that are None."""
    lacking = what if isinstance(what, str) else ", ".join(name for name, value in what.items() if value is None)
    return Finding("not checked", lacking)


class Device(NamedTuple):
    """What runs the model: bytes and operations a second, None where they are not known."""

    name: str
    memory_bandwidth: float | None
    peak_flops: float | None


@dataclass(frozen=True, kw_only=True, eq=False)
class Seen:
    """What is known of one request: seconds, tokens, tokens a second after the first chunk, arrivals as (seconds, tokens).

    queued: of its TTFT, seconds in which it waited for its turn. loaded: whether others were under way beside it; throughput:
    tokens a second of all together, under_way: how many there were on average, past the queue. work: floating-point operations
    that its first token takes at least. run: its run, if it is one of the lab's.
    """

    device: Device
    model: Checkpoint | None
    ttft: float | None = None
    queued: float | None = None
    total: float | None = None
    n_tokens: int | None = None
    rate: float | None = None
    loaded: bool = False
    throughput: float | None = None
    under_way: float | None = None
    arrivals: tuple[tuple[float, int], ...] = ()
    n_visual: int = 0
    work: int | None = None
    run: Run | None = None

    @property
    def weights(self) -> int | None:
        """Bytes that one decode step reads at least: keys and values would only add to them."""
        return None if self.model is None else decode_bytes(self.model, 0)

    @property
    def fastest(self) -> float | None:
        """Tokens a second that memory allows, where it is known and no cache holds the weights."""
        bandwidth, weights = self.device.memory_bandwidth, self.weights
        return None if bandwidth is None or weights is None or weights < _CACHED else bandwidth / weights

    @property
    def cause(self) -> str:
        """Why tokens were held, and the cure, where that is known; else ""."""
        if self.run is None:
            return f"; {_KNOWN_CAUSE}"
        changes = {} if self.run.recipe is None else self.run.recipe.changes()
        if changes.get("streaming.gate") != "round":
            return ""
        steps, lockstep = changes.get("streaming.steps_per_round", 1), changes.get("streaming.positions") == "host_sync"
        return (
            f"; tokens are held by streaming.gate=round until a round of {steps} steps is launched"
            f"{', and positions=host_sync keeps the launches in lockstep with the device' if lockstep else ''}; the cure is "
            f"streaming.gate=open, or steps_per_round=1 or 2"
        )


@dataclass(frozen=True, kw_only=True, repr=False)
class Audit:
    """What an audit found, what it cleared, and what it could not look at."""

    said: tuple[Finding, ...]

    @property
    def findings(self) -> tuple[Finding, ...]:
        """What is impossible, suspect or worth a note, gravest first."""
        return self._of("impossible", "suspect", "note")

    @property
    def cleared(self) -> tuple[Finding, ...]:
        return self._of("clear")

    @property
    def unchecked(self) -> tuple[Finding, ...]:
        return self._of("not checked")

    def _of(self, *severities: Severity) -> tuple[Finding, ...]:
        return tuple(one for one in self.said if one.severity in severities)

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
            "findings": [finding._asdict() for finding in self.findings],
            "cleared": [{"verdict": one.verdict, "arithmetic": one.arithmetic} for one in self.cleared],
            "unchecked": [{"verdict": one.verdict, "needs": one.sentence} for one in self.unchecked],
        }

    def _rows(self) -> Iterator[tuple[str, ...]]:
        """A label, a verdict, and what is said of it, in one or two parts."""
        for one in self.said:
            needs = f"needs {one.sentence}" if one.severity == "not checked" else one.sentence
            yield (one.severity, one.verdict, *filter(None, (needs, one.arithmetic)))


def audit(
    run: Run | Sequence[Run] | Load | None = None,
    *,
    ttft: float | None = None,
    queued: float | None = None,
    tokens_per_second: float | None = None,
    concurrency: float | None = None,
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
    """Say which numbers cannot be what they are called, and why; a decode step makes one token of a request.

    run: a run, several as samples of one engine, or a load. For anybody's numbers instead: `ttft` and `total`, seconds from the
    request to its first and last chunk; `queued`, seconds of them in a queue; `tokens_per_second` after the first chunk;
    `output_tokens`; or, in place of these, `chunks`, (seconds since the request, tokens) each. concurrency: requests at once, where
    there were others; then `tokens_per_second` is that of all together. image: its (width, height). model: a published hub id or
    its last part, a built-in checkpoint or a folder; dtype: of its weights, by default bfloat16.

    hardware: a GPU's name (`measure.hardware`), by default the run's own device; memory_bandwidth (bytes a second) and peak_flops
    (operations a second), of all GPUs together, stand in for its figures. Raises `FastvlError` for unknown names, and for too
    little to say anything.
    """
    given: dict[str, Any] = {"ttft": ttft, "tokens_per_second": tokens_per_second, "output_tokens": output_tokens, "total": total}
    beside = {"queued": queued, "concurrency": concurrency}
    for name, value in {**given, **beside, "memory_bandwidth": memory_bandwidth, "peak_flops": peak_flops}.items():
        if value is not None and not (is_number(value) and value > 0):
            raise FastvlError(f"{name} is {value!r}; it must be a finite number above 0")
    device = _device(hardware, memory_bandwidth, peak_flops)
    if run is not None:
        given |= {**beside, "chunks": chunks, "image": image, "model": model, "dtype": dtype}
        if extra := [name for name, value in given.items() if value is not None]:
            raise FastvlError(f"a run brings its own {', '.join(extra)}; beside one, only hardware and its figures are given")
        if isinstance(run, Load):
            return _audit_of(_verdicts_on_load(run, device))
        return _audit_of(_verdicts_on_runs([run] if isinstance(run, Run) else run, device))
    shape = None if model is None else without_weights(model, dtype or "bfloat16")
    seen = Seen(device=device, model=shape, queued=queued)
    if concurrency is not None:
        seen = replace(seen, loaded=True, throughput=tokens_per_second, under_way=concurrency)
        given["tokens_per_second"] = None
    seen = _of_numbers(seen, given, chunks)
    found = _verdicts(seen if image is None else _with_image(seen, image), queued=queued is not None)
    return _audit_of([_finding(load_faster_than_memory, seen), *found] if seen.loaded else found)


# What one RTX A6000 gave one request at a time, as the report has it that this project began with (InternLM/lmdeploy, issue 4114).
REPORTED: tuple[Mapping[str, Any], ...] = (
    {"engine": "LMDeploy, PyTorch", "model": "Qwen3-VL-4B-Instruct", "ttft": 4.147556, "tokens_per_second": 665.927719},
    {"engine": "LMDeploy, PyTorch", "model": "Qwen2.5-VL-3B-Instruct", "ttft": 1.761191, "tokens_per_second": 624.012348},
    {"engine": "LMDeploy, TurboMind", "model": "Qwen2.5-VL-3B-Instruct", "ttft": 0.165004, "tokens_per_second": 90.837745},
    {"engine": "vLLM", "model": "Qwen2.5-VL-3B-Instruct", "ttft": 0.063613, "tokens_per_second": 85.994672},
    {"engine": "vLLM", "model": "Qwen3-VL-4B-Instruct", "ttft": 0.083626, "tokens_per_second": 59.783212},
)
REPORTED_ON = "RTX A6000"


def audit_reported(rows: Iterable[Mapping[str, Any]], hardware: str) -> list[Audit]:
    """An audit of each of others' numbers: "ttft" (seconds), "tokens_per_second" and "model"."""
    return [audit(hardware=hardware, **{name: row[name] for name in ("ttft", "tokens_per_second", "model")}) for row in rows]


def _audit_of(said: Iterable[Finding]) -> Audit:
    """Raises `FastvlError` if they say nothing."""
    found = Audit(said=tuple(sorted(said, key=_gravity)))
    if len(found.unchecked) == len(found.said):
        lacking = "; ".join(f"{one.verdict} needs {one.sentence}" for one in found.unchecked)
        raise FastvlError(f"too little is given to say anything: {lacking}")
    return found


def _gravity(finding: Finding) -> int:
    return SEVERITIES.index(finding.severity)


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
    in_order = all(one <= other for one, other in pairwise(times))  # which NaN is not
    if not arrivals or not in_order or not 0 < times[0] <= times[-1] < math.inf or min(counts) < 0 or sum(counts) == 0:
        raise FastvlError("chunks must have times above 0 in order, and some tokens, none of them fewer than 0")
    return arrivals


def _with_arrivals(seen: Seen, arrivals: tuple[tuple[float, int], ...]) -> Seen:
    (ttft, first), (total, _), n = arrivals[0], arrivals[-1], sum(count for _, count in arrivals)
    rate = (n - first) / (total - ttft) if n - first >= FEW and total > ttft else None
    return replace(seen, ttft=ttft, total=total, n_tokens=n, rate=rate, arrivals=arrivals)


def _with_image(seen: Seen, image: tuple[int, int]) -> Seen:
    if seen.model is None:
        raise FastvlError("image is given without model; what an image costs depends on the model")
    sides = image if isinstance(image, list | tuple) else ()
    if len(sides) != 2 or not all(isinstance(side, int) and side > 0 for side in sides):
        raise FastvlError(f"image is {image!r}; give its (width, height) in whole pixels")
    settings = seen.model.image_settings
    (shape,) = shapes_of([image], [AreaLimits(settings.min_pixels, settings.max_pixels)], seen.model)
    return replace(seen, n_visual=shape.visual_tokens, work=_work(seen.model, [shape.grid], shape.visual_tokens))


def _work(model: Checkpoint, grids: Sequence[Grid], n_prompt: int) -> int:
    """The least operations of a first token: each image once in its clip, and of the last layer the last token alone."""
    return vit_flops(model, grids, frames=1).total + prefill_flops(model, n_prompt, last_token_alone=True).total


def _verdicts(seen: Seen, *, served: bool = False, queued: bool = False) -> list[Finding]:
    """Every verdict on one request. served: by an engine behind an address, which may tell of itself; queued: after others."""
    of_all = (decode_faster_than_memory, ttft_is_the_answer, bursts, faster_than_compute)
    of_runs = (stages_do_not_add_up, logits_not_finite) if seen.run is not None else ()
    of_some = (*((own_ttft_leaves_out,) if served else ()), *((ttft_shorter_than_queue,) if queued else ()))
    return [_finding(judge, seen) for judge in (*of_all, *of_runs, *of_some)]


def _finding(judge: Callable[[Any], Finding], about: Any) -> Finding:
    return judge(about)._replace(verdict=judge.__name__)


def _verdicts_on_load(load: Load, device: Device) -> list[Finding]:
    runs = load.finished
    if not runs:
        raise FastvlError("no request of the load was answered, so it has no numbers")
    found = _verdicts_on_runs(runs, device, loaded=True)
    under_way = sum(run.chunks[-1].time - (_queued(run) or 0) for run in runs) / load.seconds
    seen = Seen(
        device=_device_of(runs[0], device), model=_model_of(runs[0]), throughput=load.tokens_per_second, under_way=under_way
    )
    return [_finding(load_faster_than_memory, seen), *found]


def _queued(run: Run) -> float | None:
    """Seconds until it was admitted, by its own trace or by the engine's account; None where neither tells."""
    spans = [span.duration_ns for span in run.trace.spans if (span.name, span.lane, span.depth) == ("queued", "host", 0)]
    if spans:
        return sum(spans) / 1e9
    return None if run.account is None else run.account.seconds("queue")


def _device_of(run: Run, device: Device) -> Device:
    """The device given, or else the run's own, where it is known: it may be a CPU, or a GPU that is not in the table."""
    if device.memory_bandwidth is None and device.peak_flops is None:
        with suppress(FastvlError):
            return _device(run.device, None, None)
    return device


def _model_of(run: Run) -> Checkpoint | None:
    """None of which nothing is known without its weights."""
    with suppress(FastvlError):
        return without_weights(run.checkpoint, run.dtype)
    return None


def _verdicts_on_runs(runs: Sequence[Run], device: Device, *, loaded: bool = False) -> list[Finding]:
    if not isinstance(runs, list | tuple) or not runs or not all(isinstance(run, Run) for run in runs):
        raise FastvlError("give a run, or a list of at least one")
    first, *others = (f"{run.engine} · {run.checkpoint} · {run.device} {run.dtype}" for run in runs)
    if other := next((name for name in others if name != first), None):
        raise FastvlError(f"the runs are not samples of one engine: {first}, and {other}; audit each engine's by themselves")
    device, model = _device_of(runs[0], device), _model_of(runs[0])
    waits = [_queued(run) for run in runs]
    served = any(run.device == ELSEWHERE or run.account is not None for run in runs)
    found = []
    for run, waited in zip(runs, waits, strict=True):
        seen = _with_arrivals(Seen(device=device, model=model), tuple((chunk.time, len(chunk.tokens)) for chunk in run.chunks))
        work = None if model is None else _work(model, [shape.grid for shape in run.shapes], run.n_prompt)
        seen = replace(seen, ttft=run.ttft, queued=waited, loaded=loaded, n_visual=run.visual_tokens, work=work, run=run)
        found.append(_verdicts(seen, served=served, queued=any(wait is not None for wait in waits)))
    of_samples = (too_few_samples,) if len(runs) == 1 else (cold_among_warm, too_few_samples)
    return [*_over_runs(found), *(_finding(judge, runs) for judge in of_samples)]


def _over_runs(per_run: Sequence[Sequence[Finding]]) -> list[Finding]:
    """Each verdict once: its gravest, with the first run that has it and the number of such runs."""
    merged: list[Finding] = []
    for of_runs in zip(*per_run, strict=True):  # one verdict's, run by run
        gravest = min(of_runs, key=_gravity)
        same = [number for number, finding in enumerate(of_runs) if finding.severity == gravest.severity]
        if gravest.severity not in ("clear", "not checked") and len(per_run) > 1:
            share = f"{len(same)} of {len(per_run)} runs, first in run {same[0]}, whose arithmetic this is"
            gravest = gravest._replace(sentence=f"{gravest.sentence}; in {share}")
        merged.append(gravest)
    return merged


# Verdicts, one a function: of a request, and then of all runs together.


def logits_not_finite(seen: Seen) -> Finding:
    finite = seen.run is None or seen.run.finite
    shown = "all logits of the last prompt token are finite, as far as they are shown" if finite else "some logit is not a number"
    why = "its logits are not finite, so its tokens are no answer; half precision has overflowed, or weights are broken"
    return _judged(shown, (not finite, "impossible", why))


def _by_memory(seen: Seen, made: str) -> str:
    """How many of what is made in a decode step a second allows; its device, model and limit are known."""
    assert seen.device.memory_bandwidth is not None
    assert seen.model is not None
    assert seen.weights is not None
    return (
        f"{seen.device.memory_bandwidth / 1e9:.0f} GB/s ({seen.device.name}) / {seen.weights / 1e9:.2f} GB of weights a {made} "
        f"({dtype_name(seen.model.dtype)}) = {seen.fastest:.0f} {made}s/s at most"
    )


def decode_faster_than_memory(seen: Seen) -> Finding:
    rate, bandwidth, model, weights, limit = seen.rate, seen.device.memory_bandwidth, seen.model, seen.weights, seen.fastest
    if rate is None or bandwidth is None or model is None or weights is None:
        return _needs(
            {
                f"tokens_per_second{' of one request alone' if seen.loaded else ''}": rate,
                "model": model,
                "hardware or memory_bandwidth": bandwidth,
            }
        )
    if limit is None:
        return _needs(f"weights that no cache holds; these are {gigabytes(weights)}")
    made = f"; up to {limit * seen.ttft:.0f} tokens can be made within the TTFT of {seconds(seen.ttft)}" if seen.ttft else ""
    of_limit = f"{rate / limit:.0%} of that" if rate <= limit else f"{rate / limit:.1f} times that{made}"
    shown = f"{_by_memory(seen, 'token')}; {rate:.0f} is {of_limit}"
    why = (
        f"{rate:.0f} tokens/s is more than memory allows one request, so it is the speed of delivery: the tokens were made before "
        f"the first chunk left, and their time is inside TTFT{seen.cause}"
    )
    return _judged(shown, (rate > limit, "impossible", why))


def load_faster_than_memory(seen: Seen) -> Finding:
    rate, rows, bandwidth, model, weights = seen.throughput, seen.under_way, seen.device.memory_bandwidth, seen.model, seen.weights
    if rate is None or rows is None or bandwidth is None or model is None or weights is None:
        return _needs({"tokens_per_second": rate, "model": model, "hardware or memory_bandwidth": bandwidth})
    if seen.fastest is None:
        return _needs(f"weights that no cache holds; these are {gigabytes(weights)}")
    most = seen.fastest * rows
    shown = (
        f"{_by_memory(seen, 'step')}, times {rows:.3g} requests under way = {most:.0f} tokens/s; {rate:.0f} is "
        f"{f'{rate / most:.0%} of' if rate <= most else f'{rate / most:.1f} times'} that"
    )
    why = (
        f"{rate:.0f} tokens/s is more than memory allows {rows:.3g} requests: a step reads all weights and makes a token of each; "
        f"so more were under way than that, or tokens were counted that were not made in this time"
    )
    return _judged(shown, (rate > most, "impossible", why))


def ttft_is_the_answer(seen: Seen) -> Finding:
    ttft, total, n, run = seen.ttft, seen.total, seen.n_tokens, seen.run
    if ttft is None or total is None or n is None:
        return _needs({"ttft": ttft, "total": total, "output_tokens": n})
    if n <= FEW:
        return _needs(f"more than {FEW} output tokens; there are {n}")
    shown, steps = f"{seconds(ttft)} of {seconds(total)} is {ttft / total:.0%}, with {n} output tokens", []
    if run is not None:
        lane = "device" if run.trace.has_device_lane else "host"
        steps = [span.start_ns < run.trace.first_chunk_ns for span in run.trace.spans if (span.name, span.lane) == ("decode", lane)]
        shown += f", and {sum(steps)} of {len(steps)} decode steps begun before the first chunk left" if steps else ""
    waited = seen.queued or 0
    late = ttft - waited > _WHOLE * (total - waited) and (not steps or 2 * sum(steps) >= len(steps))
    if late and not steps and seen.loaded and seen.queued is None:
        return _needs("a trace, or the time in the queue: among others, a TTFT may be spent there")
    if late and not steps and seen.rate is not None and seen.fastest is not None and seen.rate <= seen.fastest:
        return _judged(f"{shown}; those after the first chunk came no faster than memory allows")
    if late and not steps and run is not None and run.kind == "cold":
        return _needs("a warm run, or a trace: the TTFT of a cold one may be spent on compiling")
    doubt = "" if steps else "unless the prompt takes so long, "
    why = f"TTFT is nearly the time of the whole answer: {doubt}it says when that was done, not when it began{seen.cause}"
    return _judged(shown, (late, "suspect", why))


def bursts(seen: Seen) -> Finding:
    n = sum(count for _, count in seen.arrivals)
    if n <= FEW:
        return _needs(f"more than {FEW} output tokens; there are {n}" if seen.arrivals else "chunks")
    chunks = _together(seen.arrivals, [] if seen.run is None else _steps(seen.run))
    counts, gaps = [count for _, count in chunks], [later - time for (time, _), (later, _) in pairwise(chunks)]
    shown = f"{n} tokens in {len(chunks)} chunks, median {median(counts):g} and at most {max(counts)} a chunk"
    if gaps:
        times = f", {max(gaps) / median(gaps):.1f} times the median" if len(gaps) > 1 and median(gaps) else ""
        shown += f"; the longest gap is {seconds(max(gaps))}{times}"
    held = sum(count for count in counts if count > _A_CHARACTER)
    why = f"{held} of {n} tokens left in bursts, so they were held back after they had been made, and gaps between chunks are not "
    several = f"tokens leave {median(counts):g} at a time, so a gap between chunks is not the time of one token"
    return _judged(
        shown,
        (held > n / 10, "suspect", f"{why}the engine's own{seen.cause}"),
        (median(counts) > 1 and len(chunks) >= FEW, "note", several),
    )


def _steps(run: Run) -> list[float]:
    """When each decode step had ended, in seconds, where the trace says so."""
    lane = "device" if run.trace.has_device_lane else "host"
    return sorted(span.end_ns / 1e9 for span in run.trace.spans if (span.name, span.lane) == ("decode", lane))


def _together(arrivals: tuple[tuple[float, int], ...], steps: Sequence[float]) -> list[tuple[float, int]]:
    """Chunks that came within a tenth of the mean gap as one, if that happened time and again; a single stall is no rhythm.

    One that came after a step had ended since the chunk before was not held back, however near it is beside a stall elsewhere.
    """
    mean = (arrivals[-1][0] - arrivals[0][0]) / max(len(arrivals) - 1, 1)
    joined = [arrivals[0]]
    for (before, _), (time, count) in pairwise(arrivals):
        if time - before < mean / 10 and bisect_right(steps, before) == bisect_right(steps, time):
            joined[-1] = (joined[-1][0], joined[-1][1] + count)
        else:
            joined.append((time, count))
    return joined if len(joined) > 3 else list(arrivals)


def faster_than_compute(seen: Seen) -> Finding:
    ttft, peak, work = seen.ttft, seen.device.peak_flops, seen.work
    if ttft is None or peak is None or work is None:
        said = _needs({"ttft": ttft, "model": seen.model, "image": work, "hardware or peak_flops": peak})
    else:
        least = work / peak
        tokens = f" ({seen.n_visual} visual tokens)" if seen.n_visual else ""
        shown = (
            f"{work / 1e12:.2f} TFLOP{tokens} / {peak / 1e12:.0f} TFLOP/s ({seen.device.name}) = {seconds(least)} at least; "
            f"{seconds(ttft)} is {ttft / least:.2f} times that"
        )
        too_fast = "this TTFT is shorter than its work takes, so some of that was not done: a cache hit, or a smaller image"
        said = _judged(shown, (ttft < least, "impossible", too_fast))
    if seen.run is None or seen.run.kind != "cache_hit":
        return said
    sentence = "this run reused something of an earlier request, so its TTFT is a cache hit's and no whole request's"
    return Finding("note", sentence, said.arithmetic or "no limit is known here")


def stages_do_not_add_up(seen: Seen) -> Finding:
    if seen.run is None or not seen.run.trace.spans:
        return _needs("a run traced with its stages")
    trace = seen.run.trace
    ttft, stages, unaccounted = (ns / 1e9 for ns in (trace.first_chunk_ns, sum(trace.stages().values()), trace.unaccounted_ns))
    whole = stages + unaccounted
    overlap = f"stages and unaccounted are {whole / ttft:.0%} of TTFT, so spans overlap and no stage's share is its own"
    unexplained = f"{unaccounted / ttft:.0%} of TTFT is in no stage, so the stages do not explain it"
    return _judged(
        f"stages {seconds(stages)} + unaccounted {seconds(unaccounted)} = {seconds(whole)}; TTFT {seconds(ttft)}",
        (abs(whole / ttft - 1) > _OFF, "suspect", overlap),
        (unaccounted > _LARGE * ttft, "note", unexplained),
    )


def own_ttft_leaves_out(seen: Seen) -> Finding:
    run = seen.run
    if run is None or run.account is None or (run.account.ttft is None and not run.account.notes):
        return _needs("the engine's own TTFT (vLLM: --enable-per-request-metrics; SGLang: --enable-metrics)")
    account, trace = run.account, run.trace
    dropped = f"figures of {account.source} cannot be this request's, and are left out: {'; '.join(account.notes)}"
    if account.ttft is None:
        return Finding("note", dropped)
    sent = max((span.end_ns for span in trace.within_ttft() if span.name == "upload"), default=0) / 1e9
    waited, outside = run.ttft - sent, run.ttft - sent - account.ttft
    before = [f"{part.name} {seconds(part.seconds)}" for part in account.parts if part.name in _BEFORE[account.begins]]
    since = "the upload's end" if sent else "the request's bytes"
    told = f"; of it the engine tells {' and '.join(before)}" if before else ""
    shown = (
        f"{seconds(waited)} from {since} to the first text - {seconds(account.ttft)} by {account.source} = "
        f"{seconds(outside)} outside, {outside / waited:.0%}{told}"
    )
    why = (
        f"the engine's own TTFT, {seconds(account.ttft)}, is not what a client waits for: it runs from {account.begins} to first "
        f"token; {_TRAPS[account.begins]}"
    )
    return _judged(shown, (outside > max(_LARGE * waited, _HTTP), "suspect", why), (account.notes, "note", dropped))


def ttft_shorter_than_queue(seen: Seen) -> Finding:
    if seen.ttft is None or seen.queued is None:
        return _needs({"ttft": seen.ttft, "queued": seen.queued})
    name, least = "TTFT", seen.ttft
    account = None if seen.run is None else seen.run.account
    if account is not None and account.ttft is not None and account.begins == "arrival" and account.ttft < least:
        name, least = "the engine's own TTFT", account.ttft
    shown = f"{seconds(seen.queued)} in the queue; {name} is {seconds(least)}"
    why = f"{name} is shorter than the wait for its turn alone, so its clock began after the request had come"
    return _judged(shown, (least < seen.queued, "impossible", why))


def cold_among_warm(runs: Sequence[Run]) -> Finding:
    numbers: dict[str, list[int]] = {}
    for number, run in enumerate(runs):
        numbers.setdefault(run.kind, []).append(number)
    usual = max(numbers, key=lambda kind: len(numbers[kind]))
    odd = ", ".join(f"{kind}: {', '.join(map(str, which))}" for kind, which in numbers.items() if kind != usual)
    medians = (f"{len(n)} {kind} {seconds(median(runs[i].ttft for i in n))}" for kind, n in numbers.items())
    why = f"most runs are {usual} and some are not (run numbers of {odd}), so a statistic of all of them describes none"
    return _judged(f"median TTFT of {', '.join(medians)}" if odd else f"all {len(runs)} runs are {usual}", (odd, "suspect", why))


def too_few_samples(runs: Sequence[Run]) -> Finding:
    n = len(runs)
    if n == 1:
        return Finding("note", f"one {runs[0].kind} run shows what happens, and not how much it varies", "1 sample")
    if n < FOR_AN_INTERVAL:
        shown = f"all {n} lie on one side of it with a probability of 2 × 0.5^{n} = {2 * 0.5**n:.1%}, which is over 5%"
        return Finding("note", "too few runs for an interval of their median", shown)
    few = n < FOR_A_P95
    return _judged(
        f"5% of {n} runs is less than one; of {FOR_A_P95} it is one" if few else f"{n} runs, enough for an interval and a p95",
        (few, "note", "enough runs for an interval of their median, too few for a p95, which would be their maximum"),
    )


def seconds(value: float) -> str:
    """A time as a person reads it: seconds, and milliseconds below one."""
    return f"{value:.3f} s" if value >= 1 else f"{value * 1e3:.1f} ms"
