"""What numbers of a request say about one another and about the device they came from, one verdict a function."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from statistics import median
from typing import Literal, NamedTuple

from fastvl_lab.checkpoint import Checkpoint
from fastvl_lab.checkpoint.memory import gigabytes
from fastvl_lab.measure.floors import decode_bytes
from fastvl_lab.run import Run

Verdict = Literal[
    "decode_faster_than_memory",
    "ttft_is_the_answer",
    "bursts",
    "faster_than_compute",
    "stages_do_not_add_up",
    "logits_not_finite",
    "cold_among_warm",
    "too_few_samples",
]
Severity = Literal["impossible", "suspect", "note"]

# Gravest first.
SEVERITIES: tuple[Severity, ...] = ("impossible", "suspect", "note")

FEW = 8  # tokens; of fewer, neither a rate nor a share says much
_A_CHARACTER = 4  # tokens that may leave together because they are one character, which UTF-8 writes in up to four bytes
_WHOLE = 0.9  # of the whole time; a TTFT above it is that of the answer
_CACHED = 10**9  # bytes; of a smaller model a good part may stay in the device's caches, and memory is no limit
_OFF = 0.01  # of TTFT, by which stages may differ from it
_LARGE = 0.2  # of TTFT, spent in no stage

_KNOWN_CAUSE = (
    "a known cause is LMDeploy 0.9.0 to 0.11.1, which holds tokens of Qwen-VL models by a gate for each round of 16 steps and a "
    "host sync in each step; there the cure is prefill_interval=1 or 2, or LMDeploy 0.12.3 or later (PRs 4265 and 4393)"
)


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One thing that is wrong or worth knowing: what it is and what it means in a sentence, and the arithmetic behind it.

    severity: "impossible" cannot be what it is called on this device; "suspect" is not what it is usually taken for; "note" is
    worth knowing, and no fault.
    """

    verdict: Verdict
    severity: Severity
    sentence: str
    arithmetic: str


class Cleared(NamedTuple):
    """A verdict that was looked for and not found, with its arithmetic."""

    verdict: Verdict
    arithmetic: str


class Unchecked(NamedTuple):
    """A verdict that nothing could be said about, and what it would have needed."""

    verdict: Verdict
    needs: str


Outcome = Finding | Cleared | Unchecked


class Device(NamedTuple):
    """What runs the model: bytes and operations a second, None where they are not known."""

    name: str
    memory_bandwidth: float | None
    peak_flops: float | None


@dataclass(frozen=True, kw_only=True, eq=False)
class Seen:
    """What is known of one request: seconds, tokens, tokens a second after the first chunk, arrivals as (seconds, tokens).

    work: floating-point operations that its first token takes at least. run: its run, if it is one of the lab's.
    """

    device: Device
    model: Checkpoint | None
    ttft: float | None = None
    total: float | None = None
    n_tokens: int | None = None
    rate: float | None = None
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


def logits_not_finite(run: Run) -> Outcome:
    verdict: Verdict = "logits_not_finite"
    if run.finite:
        return Cleared(verdict, "all logits of the last prompt token are finite, as far as they are shown")
    return Finding(
        verdict=verdict,
        severity="impossible",
        sentence="its logits are not finite, so its tokens are no answer; half precision has overflowed, or weights are broken",
        arithmetic="some logit of the last prompt token is infinite or not a number",
    )


def decode_faster_than_memory(seen: Seen) -> Outcome:
    verdict: Verdict = "decode_faster_than_memory"
    rate, bandwidth, weights, limit = seen.rate, seen.device.memory_bandwidth, seen.weights, seen.fastest
    if rate is None or bandwidth is None or seen.model is None or weights is None:
        return Unchecked(
            verdict, missing({"tokens_per_second": rate, "model": seen.model, "hardware or memory_bandwidth": bandwidth})
        )
    if limit is None:
        return Unchecked(verdict, f"weights that no cache holds; these are {gigabytes(weights)}")
    shown = (
        f"{bandwidth / 1e9:.0f} GB/s ({seen.device.name}) / {weights / 1e9:.2f} GB of weights a token "
        f"({str(seen.model.dtype).removeprefix('torch.')}) = {limit:.0f} tokens/s at most; "
    )
    if rate <= limit:
        return Cleared(verdict, f"{shown}{rate:.0f} is {rate / limit:.0%} of that")
    within = (
        "" if seen.ttft is None else f"; up to {limit * seen.ttft:.0f} tokens can be made within the TTFT of {seconds(seen.ttft)}"
    )
    return Finding(
        verdict=verdict,
        severity="impossible",
        sentence=f"{rate:.0f} tokens/s is more than memory allows one request, so it is the speed of delivery: the tokens were "
        f"made before the first chunk left, and their time is inside TTFT{seen.cause}",
        arithmetic=f"{shown}{rate:.0f} is {rate / limit:.1f} times that{within}",
    )


def ttft_is_the_answer(seen: Seen) -> Outcome:
    verdict: Verdict = "ttft_is_the_answer"
    ttft, total, n, run = seen.ttft, seen.total, seen.n_tokens, seen.run
    if ttft is None or total is None or n is None:
        return Unchecked(verdict, missing({"ttft": ttft, "total": total, "output_tokens": n}))
    if n <= FEW:
        return Unchecked(verdict, f"more than {FEW} output tokens; there are {n}")
    shown, steps = f"{seconds(ttft)} of {seconds(total)} is {ttft / total:.0%}, with {n} output tokens", []
    if run is not None:
        lane = "device" if run.trace.has_device_lane else "host"
        steps = [span.start_ns < run.trace.first_chunk_ns for span in run.trace.spans if (span.name, span.lane) == ("decode", lane)]
        shown += f", and {sum(steps)} of {len(steps)} decode steps begun before the first chunk left" if steps else ""
    if ttft <= _WHOLE * total or (steps and 2 * sum(steps) < len(steps)):
        return Cleared(verdict, shown)
    if not steps and seen.rate is not None and seen.fastest is not None and seen.rate <= seen.fastest:
        return Cleared(verdict, f"{shown}; those after the first chunk came no faster than memory allows")
    if run is not None and not steps and run.kind == "cold":
        return Unchecked(verdict, "a warm run, or a trace: the TTFT of a cold one may be spent on compiling")
    doubt = "" if steps else "unless the prompt takes so long, "
    return Finding(
        verdict=verdict,
        severity="suspect",
        sentence=f"TTFT is nearly the time of the whole answer: {doubt}it says when that was done, not when it began{seen.cause}",
        arithmetic=shown,
    )


def bursts(seen: Seen) -> Outcome:
    verdict: Verdict = "bursts"
    if not seen.arrivals:
        return Unchecked(verdict, "chunks")
    n = sum(count for _, count in seen.arrivals)
    if n <= FEW:
        return Unchecked(verdict, f"more than {FEW} output tokens; there are {n}")
    chunks = _together(seen.arrivals)
    counts, gaps = [count for _, count in chunks], [later - time for (time, _), (later, _) in pairwise(chunks)]
    shown = f"{n} tokens in {len(chunks)} chunks, median {median(counts):g} and at most {max(counts)} a chunk"
    if gaps:
        times = f", {max(gaps) / median(gaps):.1f} times the median" if len(gaps) > 1 and median(gaps) else ""
        shown += f"; the longest gap is {seconds(max(gaps))}{times}"
    held = sum(count for count in counts if count > _A_CHARACTER)
    if held > n / 10:
        return Finding(
            verdict=verdict,
            severity="suspect",
            sentence=f"{held} of {n} tokens left in bursts, so they were held back after they had been made, and gaps between "
            f"chunks are not the engine's own{seen.cause}",
            arithmetic=shown,
        )
    if median(counts) > 1 and len(chunks) >= FEW:
        sentence = f"tokens leave {median(counts):g} at a time, so a gap between chunks is not the time of one token"
        return Finding(verdict=verdict, severity="note", sentence=sentence, arithmetic=shown)
    return Cleared(verdict, shown)


def _together(arrivals: tuple[tuple[float, int], ...]) -> list[tuple[float, int]]:
    """Chunks that came within a tenth of the mean gap as one, if that happened time and again; a single stall is no rhythm."""
    mean = (arrivals[-1][0] - arrivals[0][0]) / max(len(arrivals) - 1, 1)
    joined = [arrivals[0]]
    for (before, _), (time, count) in pairwise(arrivals):
        if time - before < mean / 10:
            joined[-1] = (joined[-1][0], joined[-1][1] + count)
        else:
            joined.append((time, count))
    return joined if len(joined) > 3 else list(arrivals)


def faster_than_compute(seen: Seen) -> Outcome:
    verdict: Verdict = "faster_than_compute"
    ttft, peak, work = seen.ttft, seen.device.peak_flops, seen.work
    hit = seen.run is not None and seen.run.kind == "cache_hit"
    if ttft is None or peak is None or work is None:
        outcome: Outcome = Unchecked(
            verdict, missing({"ttft": ttft, "model": seen.model, "image": work, "hardware or peak_flops": peak})
        )
        shown = "no limit is known here"
    else:
        least = work / peak
        tokens = f" ({seen.n_visual} visual tokens)" if seen.n_visual else ""
        shown = (
            f"{work / 1e12:.2f} TFLOP{tokens} / {peak / 1e12:.0f} TFLOP/s ({seen.device.name}) = {seconds(least)} at least; "
            f"{seconds(ttft)} is {ttft / least:.2f} times that"
        )
        too_fast = Finding(
            verdict=verdict,
            severity="impossible",
            sentence="this TTFT is shorter than its work takes, so some of that was not done: a cache hit, or a smaller image",
            arithmetic=shown,
        )
        outcome = Cleared(verdict, shown) if ttft >= least else too_fast
    if not hit:
        return outcome
    sentence = "this run reused something of an earlier request, so its TTFT is a cache hit's and no whole request's"
    return Finding(verdict=verdict, severity="note", sentence=sentence, arithmetic=shown)


def stages_do_not_add_up(seen: Seen) -> Outcome:
    verdict: Verdict = "stages_do_not_add_up"
    if seen.run is None or not seen.run.trace.spans:
        return Unchecked(verdict, "a run traced with its stages")
    trace = seen.run.trace
    ttft, stages, unaccounted = (ns / 1e9 for ns in (trace.first_chunk_ns, sum(trace.stages().values()), trace.unaccounted_ns))
    share = (stages + unaccounted) / ttft
    shown = f"stages {seconds(stages)} + unaccounted {seconds(unaccounted)} = {seconds(stages + unaccounted)}; TTFT {seconds(ttft)}"
    if abs(share - 1) > _OFF:
        return Finding(
            verdict=verdict,
            severity="suspect",
            sentence=f"stages and unaccounted are {share:.0%} of TTFT, so spans overlap and no stage's share is its own",
            arithmetic=shown,
        )
    if unaccounted > _LARGE * ttft:
        sentence = f"{unaccounted / ttft:.0%} of TTFT is in no stage, so the stages do not explain it"
        return Finding(verdict=verdict, severity="note", sentence=sentence, arithmetic=shown)
    return Cleared(verdict, shown)


def missing(needed: Mapping[str, object]) -> str:
    """The names of what is None."""
    return ", ".join(name for name, value in needed.items() if value is None)


def seconds(value: float) -> str:
    """A time as a person reads it: seconds, and milliseconds below one."""
    return f"{value:.3f} s" if value >= 1 else f"{value * 1e3:.1f} ms"
