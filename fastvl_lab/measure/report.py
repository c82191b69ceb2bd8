"""What every engine does on this device, in one command: parity first, then times beside Transformers and the floor.

    python -m fastvl_lab.measure.report [--task request|decoder|tower] [--tiny] [--out rows.json]

request: TTFT by stage, TPOT and memory by engine, and one recipe executed in every way by image size. decoder, tower: each option
of that slot. Without `--tiny` it needs a GPU: the published 3B and 4B geometries with random weights in bfloat16. Of packages it
needs torch, Transformers and Triton alone.

Nothing is timed before its check held: logits, or visual tokens, are within twice Transformers' own error in the same dtype. First
runs come before and apart. TTFT is of requests for one token, with 32 tokens of text; TPOT of requests for 64.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import json
import math
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from fastvl_lab.capture.execute import Capture
from fastvl_lab.catalogue import Target
from fastvl_lab.engine import EngineLike
from fastvl_lab.errors import DeviceError, FastvlError, sentence
from fastvl_lab.lab import Lab
from fastvl_lab.measure import recipes
from fastvl_lab.measure.compare import Comparison, compare
from fastvl_lab.measure.environment import environment
from fastvl_lab.measure.floors import Ceilings, decode_bytes, floor, prefill_flops, vit_flops
from fastvl_lab.measure.parity import Oracles, Parity, StageCheck, check, check_decoder, check_tower, within_budget
from fastvl_lab.measure.profile import device_idle, kernels_of_request, memory_of_request, tuned_launches
from fastvl_lab.measure.publish import picture
from fastvl_lab.measure.quiet import Quiet
from fastvl_lab.measure.recipes import STOCK, cannot_run
from fastvl_lab.measure.samples import FOR_AN_INTERVAL, as_row, json_value, median_interval, since_upload
from fastvl_lab.measure.tables import Row, text
from fastvl_lab.measure.tasks import Decoding, Tower, grids_of, text_tokens, time_task
from fastvl_lab.recipe import Recipe
from fastvl_lab.request import Grid, Request
from fastvl_lab.run import Run
from fastvl_lab.trace import Lane

_SIZES = ((448, 448), (1280, 960), (1920, 1080))
_PUBLISHED: dict[str, Any] = {
    "checkpoints": ("random:Qwen/Qwen2.5-VL-3B-Instruct", "random:Qwen/Qwen3-VL-4B-Instruct"),
    "device": "cuda",
    "dtype": "bfloat16",
}
_BUILT_IN: dict[str, Any] = {"checkpoints": ("tiny-qwen2.5-vl", "tiny-qwen3-vl"), "device": None, "dtype": "float32"}

# Task -> what `report` is given without and with `--tiny`. ways: of `recipes.MODES`; new_tokens: of the runs for TPOT; steps: those
# forced for parity, and of the decoder those timed.
_REQUEST: dict[str, Any] = {"ways": tuple(recipes.MODES), "new_tokens": 64, "steps": 8}
FULL: dict[str, dict[str, Any]] = {
    "request": _PUBLISHED | _REQUEST | {"sizes": _SIZES, "sides": (224, 448, 672, 896, 1280, 1536, 2048)},
    "decoder": _PUBLISHED | {"lengths": (300, 1600, 8000), "steps": 32},
    "tower": _PUBLISHED | {"sizes": _SIZES},
}
_FAST_WAYS = tuple(way for way in recipes.MODES if way != "compile")  # which takes longer on a CPU than all the rest
TINY: dict[str, dict[str, Any]] = {
    "request": _BUILT_IN | {"sizes": ((56, 56), (168, 140)), "sides": (56, 112), "ways": _FAST_WAYS, "new_tokens": 8, "steps": 3},
    "decoder": _BUILT_IN | {"lengths": (40, 130), "steps": 8},
    "tower": _BUILT_IN | {"sizes": ((168, 140), (336, 280))},
}
REPEATS = {"request": 20, "decoder": 10, "tower": 20}
MINUTES = 9.0

# Room for the longest prompt here, and for the graphs of all recipes at one size.
_SESSION_LEN, _GRAPH_BUDGET = 8192, 20 * 2**30

# The box is ours while it reports, and its minutes are few.
_QUIET = Quiet(window=0.02, wait=2.0, total=10.0)

# Rounds: with fewer for TTFT there is no interval; each for TPOT is a mean of many steps already.
_WARM_UP, _LEAST_ROUNDS, _DECODE_ROUNDS = 2, FOR_AN_INTERVAL, 3


@dataclasses.dataclass(frozen=True, kw_only=True)
class Deadline:
    """Until when work may begin; `minutes` is the limit in words, `ends` a reading of `time.monotonic`."""

    minutes: float
    ends: float

    @classmethod
    def after(cls, minutes: float) -> Deadline:
        return cls(minutes=minutes, ends=time.monotonic() + 60 * minutes)

    @property
    def passed(self) -> bool:
        return time.monotonic() >= self.ends

    def rounds(self, wanted: int, least: int, seconds: float, *, warm_up: int) -> int:
        """How many rounds of so many seconds each there is time for besides those of warm-up; 0 if they are fewer than `least`."""
        fitting = int((self.ends - time.monotonic()) / max(seconds, 1e-9)) - warm_up
        return min(wanted, fitting) if fitting >= least else 0

    def skipped(self) -> str:
        return f"skipped: no time left of the {self.minutes:g} minutes"


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Bench:
    """A lab, what its device was seen to do, how often to measure, and until when there is time; last: of the checkpoints."""

    lab: Lab
    ceilings: Ceilings
    repeats: int
    deadline: Deadline
    without: tuple[str, ...]
    last: bool

    def row(self, found: Row, label: str = "") -> Row:
        """What was found, and what every row has; "parity" is None where nothing was checked."""
        where = environment(self.lab)
        place: Row = {"checkpoint": self.lab.checkpoint.name, "device": where["device"], "dtype": where["dtype"]}
        return place | {"recipe": label, "parity": None, "error": None} | found

    def kept(self, engines: Mapping[str, EngineLike], *, always: str | None = None) -> dict[str, EngineLike]:
        """Those that are not to be left out."""
        return {k: e for k, e in engines.items() if k == always or not any(word in k for word in self.without)}

    def attempt(self, work: Callable[[], Row], *, parity: bool | None = False) -> Row:
        """What was found while there is time; parity: what a failure says of it.

        One engine that a device cannot run must not cost the others their rows.
        """
        try:
            return {"error": self.deadline.skipped()} if self.deadline.passed else work()
        except Exception as error:
            return {"error": sentence(error), "parity": parity}


def report(
    task: str,
    checkpoints: Sequence[str],
    device: str | None,
    dtype: str,
    *,
    repeats: int | None = None,
    checkpoint: str | None = None,
    without: str = "",
    minutes: float = MINUTES,
    ceilings: Ceilings | None = None,
    on_rows: Callable[[list[Row]], object] = lambda rows: None,
    **settings: Any,
) -> list[Row]:
    """The rows of a task of `TINY` and `FULL`, whose settings it takes; on_rows is called with all so far whenever there are more.

    checkpoint: this one instead of all. without: parts of labels, separated by commas, of engines to leave out. minutes: after
    which whole requests are skipped, and named. ceilings: measured before.
    """
    rows: list[Row] = []
    deadline, names = Deadline.after(minutes), [checkpoint] if checkpoint else list(checkpoints)
    words = tuple(word.strip() for word in without.split(",") if word.strip())
    room: dict[str, Any] = {"session_len": _SESSION_LEN, "graph_budget": _GRAPH_BUDGET} if task == "request" else {}
    for name in names:
        lab = Lab(name, device=device, dtype=dtype, **room)
        ceilings = ceilings or Ceilings.measure(lab.device, lab.dtype)
        bench = Bench(
            lab=lab,
            ceilings=ceilings,
            repeats=REPEATS[task] if repeats is None else repeats,
            deadline=deadline,
            without=words,
            last=name == names[-1],
        )
        for more in _OF_TASK[task](bench, **settings):
            rows += more
            on_rows(rows)
        del lab, bench  # before the next is loaded
        torch._dynamo.reset()  # compiled programs hold the weights
        _free()
    return rows


def _free() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


# One stage alone


def _tower_rows(bench: Bench, sizes: Sequence[tuple[int, int]]) -> Iterator[list[Row]]:
    """A row a size and recipe."""
    lab = bench.lab
    engines = bench.kept(recipes.of_the_tower(Target(device=lab.device, dtype=lab.dtype), lab.checkpoint.family), always="stock")
    for width, height in sizes:
        task = Tower(Request(images=[picture(width, height)], prompt="?"))
        grids = grids_of(lab, task.request)

        def floors(recipe: Recipe | None, grids: Sequence[Grid] = grids) -> dict[str, float]:
            frames = 1 if recipe is not None and recipe.preprocessor.temporal == "folded" else None
            return {"": vit_flops(lab.checkpoint, grids, frames=frames).total / bench.ceilings.matmul}

        place = {"image": f"{width}x{height}"}
        yield _stage_rows(bench, task, engines, check_tower(lab, task, engines), place, floors)


def _decoder_rows(bench: Bench, lengths: Sequence[int], steps: int) -> Iterator[list[Row]]:
    """A row a length and engine."""
    lab = bench.lab
    engines = bench.kept(recipes.of_the_decoder(Target(device=lab.device, dtype=lab.dtype)), always=STOCK)
    for length in lengths:
        task = Decoding(length, steps)

        def floors(recipe: Recipe | None, length: int = length) -> dict[str, float]:
            alone = recipe is not None and recipe.attention.last_layer == "last_token"
            flops = prefill_flops(lab.checkpoint, length, last_token_alone=alone).total
            read = decode_bytes(lab.checkpoint, length + (steps + 1) // 2)  # by the step in the middle
            return {"prefill": flops / bench.ceilings.matmul, "decode": read / bench.ceilings.copied}

        place = {"length": length, "steps": steps}
        rows = _stage_rows(bench, task, engines, check_decoder(lab, task, engines), place, floors)
        yield [row | ({"tokens_per_second": 1e3 / row["decode_ms"]} if "decode_ms" in row else {}) for row in rows]


def _stage_rows(
    bench: Bench,
    task: Tower | Decoding,
    engines: Mapping[str, EngineLike],
    found: Mapping[str, StageCheck],
    place: Row,
    floors: Callable[[Recipe | None], Mapping[str, float]],
) -> list[Row]:
    """A row an engine: its error, and where that is within twice the first engine's, times, ratios to that one, and floors.

    Where others disturbed all of its runs, it has what they did in place of its error, and no time.

    floors: by step, "" where there is one, the seconds that the device's ceilings allow a recipe.
    """
    reference = next(iter(engines))
    right = within_budget({label: checked.error for label, checked in found.items()}, reference, bench.lab.dtype)
    good = {label: engine for label, engine in engines.items() if label in right}
    samples = time_task(bench.lab, task, good, repeats=bench.repeats, quiet=_QUIET)
    rows = []
    for label, engine in engines.items():
        known = bench.lab.engine(engine)
        row = place | {"settings": str(known), "parity": label in good, **vars(found[label])}
        timed = bool(samples.seconds(label))
        if label in good and not timed:
            row["error"] = samples.busy
        for step, least in floors(known.recipe).items() if timed else ():
            name, steps = (f"{step}_", [step]) if step else ("", [])
            seconds, ratio = samples.median(label, *steps).median, samples.ratio(label, reference, *steps)
            row |= {f"{name}ms": seconds * 1e3, **as_row(f"{name}ratio", ratio)}
            row |= {f"{name}floor_ms": least * 1e3, f"{name}share": least / seconds}
        rows.append(bench.row(row, label))
    return rows


# Whole requests


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """One image size of one part of the report, "main" or "sizes": what is compared there, on which request for one token."""

    part: str
    image: str
    request: Request
    engines: Mapping[str, EngineLike]

    @classmethod
    def of(cls, part: str, width: int, height: int, engines: Mapping[str, EngineLike]) -> Case:
        """An image with 32 tokens of text where a byte is one: those of the template, and a question mark."""
        content = [{"type": "image", "image": picture(width, height)}, {"type": "text", "text": "?"}]
        messages: list[Row] = [{"role": "system", "content": ""}, {"role": "user", "content": content}]
        request = Request(messages=messages, max_new_tokens=1, ignore_eos=True)
        return cls(part=part, image=f"{width}x{height}", request=request, engines=engines)


def _request_rows(
    bench: Bench,
    sizes: Sequence[tuple[int, int]],
    sides: Sequence[int],
    ways: Sequence[str],
    new_tokens: int,
    steps: int,
    part: str = "all",
    recipe: str | None = None,
) -> Iterator[list[Row]]:
    """Rows whose "part" says what they are: "ceilings" of a device, "floors" of an image, "main" and "sizes" of an engine there.

    Those of "decode" are of engines with decode steps of their own; "same_steps" names the others. Those of "kernels", of the last
    checkpoint, and of "launches" come last, on CUDA. TTFT at every size comes before TPOT at any.
    """
    lab, on_cuda = bench.lab, bench.lab.device.type == "cuda"
    compared = bench.kept(recipes.of_a_request(lab.checkpoint.target))
    cases = [] if part == "sizes" else [Case.of("main", width, height, compared) for width, height in sizes]
    if part != "main":
        fastest = Recipe.fastest(lab.checkpoint.target)
        default = recipes.fused(fastest) if on_cuda else fastest
        executed = recipes.modes(default if recipe is None else Recipe.parse(recipe, lab.device))
        compared = bench.kept({STOCK: STOCK} | {way: executed[way] for way in ways})
        cases += [Case.of("sizes", side, side, compared) for side in sides]
    floors = {case.image: _floors_row(bench, case) for case in cases}
    yield [_ceilings_row(bench), *floors.values()]
    known = [_oracles(bench, case, steps) for case in cases]
    _free()
    checks: list[dict[str, Parity]] = []
    for case, oracles in zip(cases, known, strict=True):
        rows, right = _first_token_rows(bench, case, oracles, steps, floors[case.image]["patches_floor_ms"])
        checks.append(right)
        yield rows
    for case, right in zip(cases, checks, strict=True):
        if case.part == "main" and right:
            yield _decode_rows(bench, case, right, new_tokens, floors[case.image]["tokens_per_second"])
    if bench.last and on_cuda:
        for case, right in zip(cases, checks, strict=True):  # a box that forbids profiling says so
            place: Row = {"part": "kernels", "of": case.part, "image": case.image}
            engines = {label: engine for label, engine in case.engines.items() if label in right}
            kernels = {label: partial(kernels_of_request, lab, case.request, engine) for label, engine in engines.items()}
            yield [bench.row(place | bench.attempt(work, parity=None), label) for label, work in kernels.items()]
        yield [bench.row({"part": "launches"} | found) for found in tuned_launches()]


def _ceilings_row(bench: Bench) -> Row:
    found = bench.ceilings
    row: Row = {"part": "ceilings", "matmul_tflops": found.matmul / 1e12, "copy_gb_s": found.copied / 1e9}
    row["upload_gb_s"] = None if found.uploaded is None else found.uploaded / 1e9
    return bench.row(row | environment(bench.lab))


def _floors_row(bench: Bench, case: Case) -> Row:
    """By stage the operations, the bytes and the floor; from patches to the first token the floors of what must be done in turn."""
    found = floor(bench.lab, case.request, ceilings=bench.ceilings)
    row: Row = {
        "part": "floors",
        "image": case.image,
        "visual_tokens": found.n_visual,
        "prompt_tokens": found.n_prompt,
        "gflop": {stage: work.flops / 1e9 for stage, work in found.works.items()},
        "mb": {stage: (work.moved + work.uploaded) / 1e6 for stage, work in found.works.items()},
        "floor_ms": {stage: seconds * 1e3 for stage, seconds in found.seconds.items()},
        "patches_floor_ms": found.patches * 1e3,
        "tokens_per_second": found.tokens_per_second,
    }
    return bench.row(row)


def _oracles(bench: Bench, case: Case, steps: int) -> Oracles | str:
    """Everyone who answers for one of the case's engines, asked for the truth; or why there is none."""
    if bench.deadline.passed:
        return bench.deadline.skipped()
    lab, oracles = bench.lab, Oracles(bench.lab, case.request)
    able = [engine for engine in case.engines.values() if cannot_run(engine, lab.checkpoint.target) is None]
    try:
        for oracle in dict.fromkeys(map(oracles.of, able)):
            oracles.truth(oracle, text_tokens(lab, steps))
    except Exception as error:  # an image too large for the wider dtype must not cost the others their rows
        return f"nothing to hold it against: {sentence(error)}"
    return oracles


def _first_token_rows(
    bench: Bench, case: Case, oracles: Oracles | str, steps: int, floor_ms: float
) -> tuple[list[Row], dict[str, Parity]]:
    """Parity of every engine first, with its first run and its memory; then those that are right side by side.

    Returns the checks of those that were right to the end, too.
    """
    found: dict[str, Row] = {}
    checks: dict[str, Parity] = {}

    def checked(label: str) -> Row:
        if isinstance(oracles, str):
            return {"error": oracles, "parity": False}
        row, checks[label] = _checked(bench.lab, case.engines[label], oracles, steps)
        return row

    for label, engine in case.engines.items():
        reason = cannot_run(engine, bench.lab.checkpoint.target)
        found[label] = bench.attempt(partial(checked, label)) if reason is None else {"error": reason}
    good = {label: engine for label, engine in case.engines.items() if found[label].get("parity")}
    a_round = sum(found[label]["warm_s"] + _QUIET.window for label in good)
    rounds = bench.deadline.rounds(bench.repeats, min(bench.repeats, _LEAST_ROUNDS), a_round, warm_up=_WARM_UP)
    if good and rounds:
        more: dict[str, Any] = {"warm_up": _WARM_UP, "keep_going": True, "checks": checks, "quiet": _QUIET}
        comparison = compare(bench.lab, case.request, good, repeats=rounds, **more)
        for label in good:
            found[label] |= _timed_row(comparison, label, floor_ms)
        for label in good:
            found[label]["break_even"] = pays_after(found[label], found.get("eager", {}))
    else:
        for label in good:
            found[label] |= {"parity": None, "error": f"within its budget of errors; {bench.deadline.skipped()}"}
    place: Row = {"part": case.part, "image": case.image}
    rows = [bench.row(place | {"settings": str(case.engines[label])} | row, label) for label, row in found.items()]
    return rows, {label: checks[label] for label in good if found[label]["parity"]}


def _checked(lab: Lab, engine: EngineLike, oracles: Oracles, steps: int) -> tuple[Row, Parity]:
    """An engine's first run and what was captured for it, seconds of a warm run, its parity, and its memory."""
    if lab.graphs is not None:
        lab.graphs.forget()  # so that what an engine's graphs take is what they take alone
    request = oracles.request
    cold = lab.run(request, engine)
    row: Row = {"cold_ttft_ms": cold.ttft * 1e3 if cold.kind == "cold" else None}  # else another part has had it first
    row |= capture_row(cold.captures, lab.captures(engine))
    warm = lab.run(request, engine)
    row["warm_s"] = warm.trace.end_ns / 1e9
    parity = check(oracles, engine, [cold, warm], cold.logits, STOCK, steps=steps)
    row |= memory_of_request(lab, request, engine)
    truth = oracles.truth(parity.oracle, text_tokens(lab, steps))
    over_budget = parity.by == "logits" and parity.error is not None and not parity.error <= (parity.budget or 0.0)
    row["error"] = parity.error if parity.holds or over_budget else parity.why
    return row | {"own_error": truth.own_error, "parity": parity.holds}, parity


def _timed_row(comparison: Comparison, label: str, floor_ms: float) -> Row:
    """An engine's times out of a comparison, or why it has none after all; floor_ms: from patches to the first token."""
    if label in comparison.failures:
        return {"parity": False, "error": comparison.failures[label]}
    runs = comparison.runs(label)
    if not runs:
        busy = comparison.busy(label)
        return {"parity": None, "error": busy or "no run was warm: its graphs were given up for want of room"}
    ttft, patches = median_interval([run.ttft * 1e3 for run in runs]), _median([since_upload(run.trace) for run in runs])
    row: Row = {"rounds": len(runs), "ttft_ms": ttft.median, "ttft_low_ms": ttft.low, "ttft_high_ms": ttft.high}
    row |= {"patches_ms": patches, "floor_ms": floor_ms, "floor_share": floor_ms / patches}
    row |= {"host_ms": _stages(runs, "host"), "device_ms": _stages(runs, "device")}
    row |= {"unaccounted_ms": _median([run.trace.unaccounted_ns for run in runs])}
    shares = [ns / run.trace.first_chunk_ns for run in runs if (ns := device_idle(run.trace)) is not None]
    row["idle_share"] = median_interval(shares).median if shares else None
    row |= as_row("ratio", comparison.speedup(label, STOCK))
    return row | as_row("patches_ratio", comparison.speedup(label, STOCK, of="patches"))


def _stages(runs: Sequence[Run], lane: Lane) -> dict[str, float]:
    """The median ms of each stage in TTFT, in order of first start."""
    of_each = [run.trace.stages(lane) for run in runs]
    return {stage: _median([stages.get(stage, 0) for stages in of_each]) for stage in of_each[0]}


def _median(ns: Sequence[int]) -> float:
    """Nanoseconds to a median in ms."""
    return median_interval([x / 1e6 for x in ns]).median


def capture_row(fresh: Sequence[Capture], kept: Sequence[Capture]) -> Row:
    """What was captured for a run, or for earlier ones where nothing new was needed: each program, and the sums of s and MB."""
    captures = [capture for capture in fresh or kept if capture.stage != "decode"]
    return {
        "captures": [vars(capture) for capture in captures],
        "captured_before": bool(captures) and not fresh,
        "capture_s": sum(capture.seconds for capture in captures),
        "capture_mb": sum(capture.n_bytes for capture in captures) / 1e6,
    }


def pays_after(row: Row, eager: Row) -> int | None:
    """After how many requests a row's captures have paid; None where it has none, or is not shown to be faster than eager."""
    if not row.get("captures") or "ttft_ms" not in row or "ttft_ms" not in eager:
        return None
    shown = row["ttft_high_ms"] < eager["ttft_low_ms"]  # never where NaN says that rounds were too few for an interval
    return math.ceil(1e3 * row["capture_s"] / (eager["ttft_ms"] - row["ttft_ms"])) if shown else None


def _decode_rows(bench: Bench, case: Case, right: Mapping[str, Parity], new_tokens: int, ceiling: float) -> list[Row]:
    """TPOT of the engines that were right along forced steps, once for those whose steps are the same; ceiling: tokens a second."""
    request = dataclasses.replace(case.request, max_new_tokens=new_tokens)
    same = recipes.same_steps({label: engine for label, engine in case.engines.items() if label in right})

    def warmed_up(engine: EngineLike) -> Row:
        """Seconds of a run; what is captured for so many tokens is captured here."""
        return {"seconds": bench.lab.run(request, engine, trace="off").trace.end_ns / 1e9}

    found = {label: bench.attempt(partial(warmed_up, case.engines[label])) for label in dict.fromkeys(same.values())}
    good = {label: case.engines[label] for label, row in found.items() if "error" not in row}
    rounds = bench.deadline.rounds(_DECODE_ROUNDS, 1, sum(found[label].pop("seconds") for label in good), warm_up=1)
    if good and rounds:
        comparison = compare(bench.lab, request, good, repeats=rounds, warm_up=1, keep_going=True, checks=right, quiet=_QUIET)
    for label in good:
        if not rounds:
            found[label] = {"error": bench.deadline.skipped()}
        elif label in comparison.failures:
            found[label] = {"error": comparison.failures[label], "parity": False}
        elif not (tpots := [run.tpot for run in comparison.runs(label) if run.tpot is not None]):
            found[label] = {"error": comparison.busy(label) or "no run was warm"}
        else:
            rate = 1 / median_interval(tpots).median
            found[label] = {"parity": True, "rounds": len(tpots), "tpot_ms": 1e3 / rate, "tokens_per_second": rate}
            found[label] |= {"ceiling": ceiling, "share": rate / ceiling}
    place: Row = {"part": "decode", "image": case.image, "new_tokens": new_tokens}
    of_same = {label: {"same_steps": [other for other, first in same.items() if first == label]} for label in found}
    return [bench.row(place | of_same[label] | row, label) for label, row in found.items()]


_OF_TASK: dict[str, Callable[..., Iterator[list[Row]]]] = {
    "request": _request_rows,
    "decoder": _decoder_rows,
    "tower": _tower_rows,
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Rows to a file as they come, tables to the terminal, status 1 if a check failed; arguments: by default the process's."""
    parser = argparse.ArgumentParser(
        prog="python -m fastvl_lab.measure.report", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--task", choices=tuple(_OF_TASK), default="request", help="what is timed (default request)")
    parser.add_argument("--tiny", action="store_true", help="the built-in checkpoints and small inputs, on any device")
    parser.add_argument("--out", type=Path, help="a file for the rows as JSON")
    parser.add_argument("--repeats", type=int, help=f"timed rounds (default {', '.join(f'{k} {n}' for k, n in REPEATS.items())})")
    parser.add_argument("--checkpoint", help="this one instead of both")
    parser.add_argument("--without", default="", help="engines to leave out: parts of their labels, separated by commas")
    whole = parser.add_argument_group("of whole requests alone")
    whole.add_argument("--part", choices=("main", "sizes", "all"), help="what to measure (default all)")
    whole.add_argument(
        "--recipe", help="what part sizes executes (default: on CUDA the fastest with fused kernels, else the fastest)"
    )
    whole.add_argument("--minutes", type=float, help=f"what does not fit is skipped, and named (default {MINUTES:g})")
    given = parser.parse_args(arguments)
    own = {name: getattr(given, name) for name in ("part", "recipe", "minutes") if getattr(given, name) is not None}
    if own and given.task != "request":
        parser.error(f"--{next(iter(own))} is of --task request, and the task is {given.task}")
    if given.repeats is not None and given.repeats < 1:
        parser.error(f"--repeats is {given.repeats}; it must be at least 1")
    if given.out is not None and not given.out.parent.is_dir():
        parser.error(f"--out is {given.out}, and there is no folder {given.out.parent}")

    def keep(rows: list[Row]) -> None:
        if given.out is not None:
            plain = [{key: json_value(value) for key, value in row.items()} for row in rows]
            given.out.write_text(json.dumps(plain, indent=1) + "\n", encoding="utf-8")

    common = {"repeats": given.repeats, "checkpoint": given.checkpoint, "without": given.without, "on_rows": keep}
    try:
        rows = report(given.task, **(TINY if given.tiny else FULL)[given.task], **common, **own)
    except FastvlError as error:
        without_gpu = isinstance(error, DeviceError) and not torch.cuda.is_available() and not given.tiny
        sys.exit(f"{error}{'; on a CPU there is --tiny' if without_gpu else ''}")
    print(text(rows))
    if any(row["parity"] is False for row in rows):  # None: nothing was checked
        sys.exit(1)


if __name__ == "__main__":
    main()
