"""The lab on a GPU, in one command: its ceilings, parity, TTFT by stage, TPOT and memory by engine, and ways to execute by size.

    python -m fastvl_lab.measure.gpu_report [--part main|sizes] [--checkpoint NAME] [--minutes 9] [--out gpu.json] [--tiny]

Without `--tiny` it needs a GPU: the published 3B and 4B geometries with random weights in bfloat16. Part "main" takes images of
448x448, 1280x960 and 1920x1080 through every engine of `gpu_engines.engines`; part "sizes" takes squares of 224 to 2048 through one
recipe, executed eagerly, compiled and from CUDA graphs. Prompts have 32 tokens of text. torch, transformers and triton are enough.

Nothing is timed before its logits, of the prompt and of forced decode steps, are within twice Transformers' own error. First runs
come before and apart. TTFT is of requests for one token, so that it ends with it; TPOT of requests for 64.
"""

from __future__ import annotations

import dataclasses
import gc
import platform
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
import transformers

from fastvl_lab.engine import EngineLike
from fastvl_lab.errors import sentence
from fastvl_lab.lab import Lab, device_name
from fastvl_lab.measure.compare import compare
from fastvl_lab.measure.floors import Ceilings, floor
from fastvl_lab.measure.gpu_engines import MODES, STOCK, cannot_run, engines, fused, modes, same_steps
from fastvl_lab.measure.gpu_rows import Deadline, capture_row, kernels_row, memory_row, pays_after, timed_row, tuned_launches
from fastvl_lab.measure.gpu_tables import text
from fastvl_lab.measure.parity import Truth, forced_tokens, oracle_of, truth_along, within_budget
from fastvl_lab.measure.slot_report import Row, command, picture
from fastvl_lab.measure.statistics import median_interval
from fastvl_lab.recipe import Recipe
from fastvl_lab.request import Request

FULL: dict[str, Any] = {
    "checkpoints": ("random:Qwen/Qwen2.5-VL-3B-Instruct", "random:Qwen/Qwen3-VL-4B-Instruct"),
    "sizes": ((448, 448), (1280, 960), (1920, 1080)),
    "sides": (224, 448, 672, 896, 1280, 1536, 2048),
    "ways": tuple(MODES),
    "new_tokens": 64,
    "steps": 8,
    "device": "cuda",
    "dtype": "bfloat16",
}
TINY: dict[str, Any] = {
    "checkpoints": ("tiny-qwen2.5-vl", "tiny-qwen3-vl"),
    "sizes": ((56, 56), (168, 140)),
    "sides": (56, 112),
    "ways": tuple(way for way in MODES if way != "compile"),  # which takes longer on a CPU than all the rest
    "new_tokens": 8,
    "steps": 3,
    "device": None,
    "dtype": "float32",
}
MORE: dict[str, dict[str, Any]] = {
    "part": {"choices": ("main", "sizes", "all"), "default": "all", "help": "what to measure (default all)"},
    "checkpoint": {"help": "this one instead of both"},
    "recipe": {"help": "what part sizes executes (default: on CUDA the fastest with fused kernels, elsewhere the fastest)"},
    "without": {"default": "", "help": "engines to leave out: parts of their labels, separated by commas"},
    "minutes": {"type": float, "default": 9.0, "help": "what does not fit is skipped, and named (default 9)"},
}

# Room for the longest prompt here, and for the graphs of all recipes at one size.
_SESSION_LEN, _GRAPH_BUDGET = 8192, 20 * 2**30

# Rounds: with fewer for TTFT there is no interval; each for TPOT is a mean of many steps already.
_WARM_UP, _LEAST_ROUNDS, _DECODE_ROUNDS = 2, 5, 3


@dataclasses.dataclass(frozen=True, kw_only=True)
class Point:
    """One image size of one part of the report, "main" or "sizes": what is compared there, on which request for one token."""

    part: str
    image: str
    request: Request
    engines: Mapping[str, EngineLike]

    @classmethod
    def of(cls, part: str, width: int, height: int, engines: Mapping[str, EngineLike]) -> Point:
        """An image with 32 tokens of text where a byte is one: those of the template, and a question mark."""
        content = [{"type": "image", "image": picture(width, height)}, {"type": "text", "text": "?"}]
        messages: list[Row] = [{"role": "system", "content": ""}, {"role": "user", "content": content}]
        request = Request(messages=messages, max_new_tokens=1, ignore_eos=True)
        return cls(part=part, image=f"{width}x{height}", request=request, engines=engines)


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Bench:
    """A lab, what its device was seen to do, and until when there is time."""

    lab: Lab
    ceilings: Ceilings
    deadline: Deadline

    def row(self, part: str, found: Row, label: str = "") -> Row:
        """What was found, and what every row has; "parity" is None where nothing was checked."""
        place = {"part": part, "checkpoint": self.lab.checkpoint.name, "device": device_name(self.lab.device)}
        return place | {"dtype": str(self.lab.dtype).removeprefix("torch."), "recipe": label, "parity": None, "error": None} | found


def report(
    checkpoints: Sequence[str],
    sizes: Sequence[tuple[int, int]],
    sides: Sequence[int],
    ways: Sequence[str],
    new_tokens: int,
    steps: int,
    device: str | None,
    dtype: str,
    *,
    repeats: int = 20,
    part: str = "all",
    checkpoint: str | None = None,
    recipe: str | None = None,
    without: str = "",
    minutes: float = 9.0,
    on_rows: Callable[[list[Row]], object] = lambda rows: None,
) -> list[Row]:
    """Rows whose "part" says what they are: "ceilings" of a device, "floors" of an image, "main" and "sizes" of an engine there.

    Those of "decode" are of engines with decode steps of their own; "same_steps" names the others. Those of "kernels", of the last
    checkpoint, and of "launches" come last, on CUDA. ways: of `gpu_engines.MODES`. new_tokens: of the runs for TPOT. steps: forced
    in those for parity. on_rows is called with all rows so far whenever there are more.
    """
    rows: list[Row] = []
    deadline, ceilings = Deadline.after(minutes), None
    names = [checkpoint] if checkpoint else list(checkpoints)
    for name in names:
        lab = Lab(name, device=device, dtype=dtype, session_len=_SESSION_LEN, graph_budget=_GRAPH_BUDGET)
        ceilings = ceilings or Ceilings.measure(lab.device, lab.dtype)
        bench = Bench(lab=lab, ceilings=ceilings, deadline=deadline)
        points = [] if part == "sizes" else _main_points(lab, sizes)
        points += [] if part == "main" else _size_points(lab, sides, ways, recipe)
        points = [_without(point, [word.strip() for word in without.split(",") if word.strip()]) for point in points]
        for more in _measured(bench, points, steps=steps, repeats=repeats, new_tokens=new_tokens, kernels=name == names[-1]):
            rows += more
            on_rows(rows)
        del lab, bench  # before the next is loaded
        torch._dynamo.reset()  # compiled programs hold the weights
        _free()
    return rows


def _main_points(lab: Lab, sizes: Sequence[tuple[int, int]]) -> list[Point]:
    compared = engines(lab.device, lab.dtype)
    return [Point.of("main", width, height, compared) for width, height in sizes]


def _size_points(lab: Lab, sides: Sequence[int], ways: Sequence[str], recipe: str | None) -> list[Point]:
    fastest = Recipe.fastest(lab.device)
    default = fused(fastest) if lab.device.type == "cuda" else fastest
    executed = modes(default if recipe is None else Recipe.parse(recipe, lab.device))
    compared = {STOCK: STOCK} | {way: executed[way] for way in ways}
    return [Point.of("sizes", side, side, compared) for side in sides]


def _without(point: Point, words: Sequence[str]) -> Point:
    kept = {label: engine for label, engine in point.engines.items() if not any(word in label for word in words)}
    return dataclasses.replace(point, engines=kept)


def _free() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _measured(
    bench: Bench, points: Sequence[Point], *, steps: int, repeats: int, new_tokens: int, kernels: bool
) -> Iterator[list[Row]]:
    """All rows of a checkpoint, a few at a time: TTFT at every size before TPOT at any."""
    floors = {point.image: _floors_row(bench, point) for point in points}
    yield [_ceilings_row(bench), *floors.values()]
    known = [_truths(bench, point, steps) for point in points]
    _free()
    right: list[frozenset[str]] = []
    for point, truth in zip(points, known, strict=True):
        rows = _first_token_rows(bench, point, truth, repeats, floors[point.image]["patches_floor_ms"])
        right.append(frozenset(row["recipe"] for row in rows if row["parity"]))
        yield rows
    for point, labels in zip(points, right, strict=True):
        if point.part == "main" and labels:
            yield _decode_rows(bench, point, labels, new_tokens, floors[point.image]["tokens_per_second"])
    for point, labels in zip(points, right, strict=True):
        if kernels and bench.lab.device.type == "cuda":
            yield _kernel_rows(bench, point, labels)
    if kernels and bench.lab.device.type == "cuda":
        yield [bench.row("launches", found) for found in tuned_launches()]


def _ceilings_row(bench: Bench) -> Row:
    found = bench.ceilings
    row: Row = {"matmul_tflops": found.matmul / 1e12, "copy_gb_s": found.copied / 1e9}
    row["upload_gb_s"] = None if found.uploaded is None else found.uploaded / 1e9
    versions = {"python": platform.python_version(), "torch": str(torch.__version__), "transformers": transformers.__version__}
    return bench.row("ceilings", row | versions)


def _floors_row(bench: Bench, point: Point) -> Row:
    """By stage the operations, the bytes and the floor; from patches to the first token the floors of what must be done in turn."""
    found = floor(bench.lab, point.request, ceilings=bench.ceilings)
    row: Row = {
        "image": point.image,
        "visual_tokens": found.n_visual,
        "prompt_tokens": found.n_prompt,
        "gflop": {stage: work.flops / 1e9 for stage, work in found.works.items()},
        "mb": {stage: (work.moved + work.uploaded) / 1e6 for stage, work in found.works.items()},
        "floor_ms": {stage: seconds * 1e3 for stage, seconds in found.seconds.items()},
        "patches_floor_ms": found.patches * 1e3,
        "tokens_per_second": found.tokens_per_second,
    }
    return bench.row("floors", row)


def _truths(bench: Bench, point: Point, steps: int) -> dict[str, Truth] | str:
    """The truth of everyone who answers for one of the point's engines; or why there is none."""
    if bench.deadline.passed:
        return bench.deadline.skipped()
    lab, device, dtype = bench.lab, bench.lab.device, bench.lab.dtype
    able = [engine for engine in point.engines.values() if cannot_run(engine, device, dtype) is None]
    tokens, oracles = forced_tokens(lab, steps), dict.fromkeys(oracle_of(lab, engine) for engine in able)
    try:
        return {oracle: truth_along(lab, point.request, oracle, tokens) for oracle in oracles}
    except Exception as error:  # an image too large for the wider dtype must not cost the others their rows
        return f"nothing to hold it against: {sentence(error)}"


def _first_token_rows(bench: Bench, point: Point, known: dict[str, Truth] | str, repeats: int, floor_ms: float) -> list[Row]:
    """Parity of every engine first, with its first run and its memory; then those that are right side by side."""
    found = {label: _checked_in_time(bench, point, engine, known) for label, engine in point.engines.items()}
    good = {label: engine for label, engine in point.engines.items() if found[label].get("parity")}
    a_round = sum(found[label]["warm_s"] for label in good)
    rounds = bench.deadline.rounds(repeats, min(repeats, _LEAST_ROUNDS), a_round, warm_up=_WARM_UP)
    if good and rounds:
        comparison = compare(bench.lab, point.request, good, repeats=rounds, warm_up=_WARM_UP, keep_going=True)
        for label in good:
            found[label] |= timed_row(comparison, label, STOCK, floor_ms)
        for label in good:
            found[label]["break_even"] = pays_after(found[label], found.get("eager", {}))
    else:
        for label in good:
            found[label] |= {"parity": None, "error": f"within its budget of errors; {bench.deadline.skipped()}"}
    place = {label: {"image": point.image, "settings": str(engine)} for label, engine in point.engines.items()}
    return [bench.row(point.part, place[label] | row, label) for label, row in found.items()]


def _checked_in_time(bench: Bench, point: Point, engine: EngineLike, known: dict[str, Truth] | str) -> Row:
    lab, deadline = bench.lab, bench.deadline
    if (reason := cannot_run(engine, lab.device, lab.dtype)) is not None:
        return {"error": reason}
    if deadline.passed:
        return {"error": deadline.skipped()}
    if isinstance(known, str):
        return {"error": known, "parity": False}
    return _checked(lab, engine, point.request, known[oracle_of(lab, engine)])


def _checked(lab: Lab, engine: EngineLike, request: Request, truth: Truth) -> Row:
    """An engine's first run and what was captured for it, its error against the truth, its memory, and seconds of a warm run."""
    if lab.graphs is not None:
        lab.graphs.forget()  # so that what an engine's graphs take is what they take alone
    try:
        cold = lab.run(request, engine)
        row: Row = {"cold_ttft_ms": cold.ttft * 1e3 if cold.kind == "cold" else None}  # else another part has had it first
        row |= capture_row(cold.captures, lab.captures(engine))
        error = truth.error(lab.logits_along(truth.request, engine, truth.tokens))
        row |= {"warm_s": lab.run(request, engine).trace.end_ns / 1e9} | memory_row(lab, request, engine)
    except Exception as error:  # one engine that a device cannot run must not cost the others their rows
        return {"error": sentence(error), "parity": False}
    right = within_budget({"own": truth.own_error, "engine": error}, "own", lab.dtype)
    return row | {"error": error, "own_error": truth.own_error, "parity": "engine" in right}


def _decode_rows(bench: Bench, point: Point, right: frozenset[str], new_tokens: int, ceiling: float) -> list[Row]:
    """TPOT of the engines that were right, once for those whose decode steps are the same; ceiling: tokens a second at most."""
    lab, deadline, request = bench.lab, bench.deadline, dataclasses.replace(point.request, max_new_tokens=new_tokens)
    same = same_steps({label: engine for label, engine in point.engines.items() if label in right})
    found: dict[str, Row] = {label: {"error": deadline.skipped()} for label in same.values()}
    seconds: dict[str, float] = {}
    for label in found:
        try:  # what is captured for so many tokens is captured here
            if not deadline.passed:
                seconds[label] = lab.run(request, point.engines[label], trace="off").trace.end_ns / 1e9
        except Exception as error:
            found[label] = {"error": sentence(error), "parity": False}
    rounds = deadline.rounds(_DECODE_ROUNDS, 1, sum(seconds.values()), warm_up=1)
    if seconds and rounds:
        good = {label: point.engines[label] for label in seconds}
        comparison = compare(lab, request, good, repeats=rounds, warm_up=1, keep_going=True)
        for label in good:
            tpots = [run.tpot for run in comparison.runs(label) if run.tpot is not None]
            if label in comparison.failures or not tpots:
                failure = comparison.failures.get(label)
                found[label] = {"error": failure or "no run was warm", "parity": None if failure is None else False}
            else:
                tpot = median_interval(tpots).median
                found[label] = {"parity": True, "rounds": len(tpots), "tpot_ms": tpot * 1e3, "tokens_per_second": 1 / tpot}
                found[label] |= {"ceiling": ceiling, "share": 1 / tpot / ceiling}
    place = {"image": point.image, "new_tokens": new_tokens}
    of_same = {label: {"same_steps": [other for other, first in same.items() if first == label]} for label in found}
    return [bench.row("decode", place | of_same[label] | row, label) for label, row in found.items()]


def _kernel_rows(bench: Bench, point: Point, right: frozenset[str]) -> list[Row]:
    """In how much of a request the device does anything, and with what; a box that forbids profiling says so."""
    rows = []
    for label in [label for label in point.engines if label in right]:
        found: Row = {"error": bench.deadline.skipped()}
        if not bench.deadline.passed:
            try:
                found = kernels_row(bench.lab, point.request, point.engines[label])
            except Exception as error:
                found = {"error": sentence(error)}
        rows.append(bench.row("kernels", {"of": point.part, "image": point.image} | found, label))
    return rows


def main(arguments: Sequence[str] | None = None) -> None:
    command(report, text, full=FULL, tiny=TINY, about=__doc__, repeats=20, arguments=arguments, more=MORE)


if __name__ == "__main__":
    main()
