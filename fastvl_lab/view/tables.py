"""The tables that stand beside the figures, as pandas DataFrames of text ready to read."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from operator import attrgetter, itemgetter
from typing import Any, TypeVar

from fastvl_lab import shown
from fastvl_lab.capture.execute import Capture
from fastvl_lab.catalogue import toggles
from fastvl_lab.engine import PeerInfo, Peers
from fastvl_lab.errors import counted, require
from fastvl_lab.measure.audit import Audit
from fastvl_lab.measure.compare import Attribution, Comparison, Conversation, break_even
from fastvl_lab.measure.load import MEASURES, NAMES, PERCENTILES, Load, Measure
from fastvl_lab.measure.profile import Profile
from fastvl_lab.measure.recipes import STOCK
from fastvl_lab.measure.samples import Interval, Samples, StageSample, gains
from fastvl_lab.measure.sweep import SweepSettings, load_label
from fastvl_lab.measure.under_load import Arrivals
from fastvl_lab.run import Run, in_words
from fastvl_lab.trace import STAGES, Lane

T = TypeVar("T")


def frame(rows: Iterable[T], columns: Mapping[str, Callable[[T], object]]) -> Any:
    """A line for each row. columns: heading -> what stands below it of a row; None is a dash."""
    table = [["–" if (shown := cell(row)) is None else shown for cell in columns.values()] for row in rows]
    return require("pandas", "notebooks").DataFrame(table, columns=list(columns))


# Notebooks put text to the right of its cell, and break it within words.
_LOOK = "<style>table.fl-frame :is(th, td) { text-align: left !important; overflow-wrap: normal; word-break: normal; }</style>"


def show(frame: Any) -> Any:
    """The whole frame as an HTML table: pandas' own display cuts long texts and long tables."""
    return require("IPython.display", "notebooks").HTML(_LOOK + html_of(frame))


def html_of(frame: Any) -> str:
    """The whole frame as an HTML table, without a look of its own."""
    text: str = frame.to_html(index=False, border=0, max_rows=None, classes="fl-frame", justify="left")
    return text


def times(ratio: Interval | None) -> str | None:
    """A ratio with its interval where there is one, such as "1.62× [1.59, 1.66]"."""
    return None if ratio is None else _interval(*ratio, ".2f", "×")


def saves_ms(saved: Interval | None) -> str | None:
    """Milliseconds with their interval where there is one, such as "1.62 [1.59, 1.66]"."""
    return None if saved is None else _interval(*saved, ".2f")


def _number(value: float | None, spec: str) -> str | None:
    return None if value is None or value != value else format(value, spec)


def _interval(median: float | None, low: float | None, high: float | None, spec: str, unit: str = "") -> str | None:
    if median is None:
        return None
    text = f"{median:{spec}}{unit}"
    return text if low is None or low != low else f"{text} [{low:{spec}}, {high:{spec}}]"


def _yes(good: bool) -> str:
    return "yes" if good else "NO"


def catalogue_frame() -> Any:
    """Every option of every toggle, the baseline first."""
    columns: dict[str, Callable[[Any], object]] = {
        "toggle": lambda pair: pair[0].path,
        "option": lambda pair: pair[1].value,
        "exact": lambda pair: pair[1].exactness,
        "needs": lambda pair: ", ".join(pair[1].needs.words) or None,
        "what it does; who does it": lambda pair: pair[1].does,
    }
    return frame([(toggle, option) for toggle in toggles() for option in toggle.options], columns)


@shown.frame.register(Peers)
def peers_frame(peers: Peers) -> Any:
    """Every peer: whether it runs here or what is missing, its version, and its options."""
    columns: dict[str, Callable[[PeerInfo], object]] = {
        "peer": attrgetter("word"),
        "version": attrgetter("version"),
        "here": lambda peer: peer.missing or "runs here",
        "options": lambda peer: "; ".join(map(str, peer.options)) or None,
        "what it is": attrgetter("does"),
    }
    return frame(peers, columns)


# Runs and comparisons


def summary_frame(rows: Sequence[Mapping[str, Any]]) -> Any:
    """One line an engine and point: times, intervals, parity and speed-up.

    A speed-up stands only beside a parity check that held; an interval needs at least six warm runs. Runs of an endpoint that does
    not say whether it reused anything are counted as such, and so are those that others disturbed, which are in no median.
    """

    def speedup(row: Mapping[str, Any]) -> str | None:
        return (
            "reference" if row["is_reference"] else _interval(row["speedup"], row["speedup_low"], row["speedup_high"], ".2f", "×")
        )

    columns: dict[str, Callable[[Mapping[str, Any]], object]] = {
        "checkpoint": itemgetter("checkpoint"),
        "image": itemgetter("image"),
        "engine": itemgetter("engine"),
        "visual tokens": itemgetter("visual_tokens"),
        "TTFT ms (95% CI)": lambda row: _interval(row["ttft_ms"], row["ttft_low_ms"], row["ttft_high_ms"], ".1f"),
        "cold TTFT ms": lambda row: _number(row["cold_ttft_ms"], ".0f"),
        "cache-hit TTFT ms": lambda row: _number(row["hit_ttft_ms"], ".1f"),
        "TPOT ms": lambda row: _number(row["tpot_ms"], ".3g" if (row["tpot_ms"] or 1) < 1 else ".2f"),
        "parity": itemgetter("parity_says"),
        "speed-up (95% CI)": speedup,
        "warm runs": lambda row: f"{row['unknown_runs']} (reuse unknown)" if row["unknown_runs"] else row["warm_runs"],
        "disturbed runs": lambda row: row.get("disturbed_runs"),  # absent in older results
    }
    without = {key for key in ("checkpoint", "image") if not any(key in row for row in rows)}
    without |= set() if any(row["hit_runs"] for row in rows) else {"cache-hit TTFT ms"}
    without |= set() if any(row.get("disturbed_runs") for row in rows) else {"disturbed runs"}
    return frame(rows, {heading: cell for heading, cell in columns.items() if heading not in without})


def loaded_frame(rows: Sequence[Mapping[str, Any]]) -> Any:
    """One line an engine and point under a load: throughput, percentiles of TTFT and TPOT, and parity.

    rows: as `SweepResult.load_rows` gives them.
    """

    def percentiles(of: str) -> Callable[[Mapping[str, Any]], str | None]:
        def cell(row: Mapping[str, Any]) -> str | None:
            found = [_number(row[f"{of}_p{percent}_ms"], ".1f") for percent in PERCENTILES]
            return " / ".join(map(str, found)) if None not in found else None

        return cell

    def throughput(row: Mapping[str, Any]) -> str | None:
        return _interval(row["tokens_per_second"], row["tokens_per_second_low"], row["tokens_per_second_high"], ".1f")

    ranks = " / ".join(f"p{percent}" for percent in PERCENTILES)
    columns: dict[str, Callable[[Mapping[str, Any]], object]] = {
        "checkpoint": itemgetter("checkpoint"),
        "image": itemgetter("image"),
        "load": itemgetter("load"),
        "engine": itemgetter("engine"),
        "tokens a second (95% CI)": throughput,
        "requests a second": lambda row: _number(row["requests_per_second"], ".2f"),
        f"TTFT ms, {ranks}": percentiles("ttft"),
        f"TPOT ms, {ranks}": percentiles("tpot"),
        "parity": itemgetter("parity_says"),
        "requests": itemgetter("requests"),
        "failed": itemgetter("failed"),
        "rounds": itemgetter("rounds"),
        "disturbed rounds": itemgetter("disturbed_rounds"),
    }
    return frame(rows, columns)


def stage_frame(runs: Sequence[Run]) -> Any:
    """Host milliseconds a stage, one column a run; stages add up to TTFT with `unaccounted`, and "wait: …" to `wait`.

    Then a column a run after the first: what it takes more or less than that one, and as a share of it. They are of these runs
    alone, so they have no interval.
    """
    columns: dict[str, dict[str, float]] = {}
    for run in runs:
        name, same = run.engine, 2
        while name in columns:
            name, same = f"{run.engine} ({same})", same + 1
        columns[name] = {row["stage"]: row["host_ms"] for row in run.stage_table()}
    seen = dict.fromkeys(name for column in columns.values() for name in column)
    known = [name for name in (*STAGES, "unaccounted", "TTFT") if name in seen]
    order = [*(name for name in seen if name not in known), *known]  # what an endpoint lets us see has names of its own

    def of(column: Mapping[str, float]) -> Callable[[str], str | None]:
        return lambda stage: _number(column.get(stage), ".3f")

    first, *others = columns

    def against(column: Mapping[str, float]) -> Callable[[str], str | None]:
        def cell(stage: str) -> str | None:
            ours, theirs = column.get(stage), columns[first].get(stage)
            if ours is None or not theirs:
                return None
            return f"{ours - theirs:+.3f} ms ({ours / theirs:.0%})".replace("-", "−")

        return cell

    shown: dict[str, Callable[[str], str | None]] = {"stage": str}
    shown |= {f"{engine}, ms": of(column) for engine, column in columns.items()}
    shown |= {f"{engine} against {first}": against(columns[engine]) for engine in others}
    return frame(order, shown)


def made_of_frame(runs: Sequence[Run]) -> Any:
    """What each run's engine is: a recipe's choices beyond the baseline, by slot."""

    def made_of(run: Run) -> str:
        if run.recipe is None:
            return "as it is" if not run.remote else "as its server has it"
        changes = ", ".join(f"{path}={value}" for path, value in run.recipe.changes().items())
        return changes or "the baseline: every toggle at its first option"

    return frame(runs, {"engine": attrgetter("engine"), "what it is": made_of})


def settings_frame(settings: SweepSettings) -> Any:
    """The settings of a sweep in words."""

    def said(name: str) -> str | None:
        value = getattr(settings, name)
        if name == "image_sizes":
            return ", ".join(f"{width}×{height}" for width, height in value) or "as it is"
        if name == "loads":
            return "; ".join(load_label(Arrivals.of(load)) for load in value) or "alone"
        return ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value) if value != "" else None

    names = [field.name for field in dataclasses.fields(settings)]
    return frame(names, {"setting": lambda name: name.replace("_", " "), "value": said})


def layer_frame(run: Run) -> Any:
    """Host milliseconds of every ViT block and decoder layer inside TTFT; the run must have been traced with "layers"."""
    inside = [s for s in run.trace.spans if s.lane == "host" and s.depth > 0 and s.end_ns <= run.trace.first_chunk_ns]
    return frame(
        inside,
        {
            "block or layer": attrgetter("name"),
            "ms": lambda span: f"{span.duration_ns / 1e6:.3f}",
            "share of TTFT": lambda span: f"{span.duration_ns / 1e9 / run.ttft:.1%}",
        },
    )


def attribution_frame(found: Attribution) -> Any:
    """What each step saves, with intervals, and whether the tokens stayed what they must be."""
    comparison = found.comparison
    columns: dict[str, Callable[[str], object]] = {
        "step": str,
        "TTFT ms": lambda step: f"{comparison.representative(step).ttft * 1e3:.2f}",
        "saves ms (95% CI)": lambda step: saves_ms(found.saved(step) if step in found.steps[1:] else None),
        "times as fast as Transformers (95% CI)": lambda step: "reference" if step == STOCK else times(comparison.speedup(step)),
        "parity": lambda step: comparison.checks[step].says,
    }
    return frame(dict.fromkeys((STOCK, *found.steps)), columns)


def turn_frame(chat: Conversation, over: str) -> Any:
    """One line a turn and engine: what the turn found, its TTFT, and how many times as fast it is as the engine `over`."""

    def ratio(row: Mapping[str, Any]) -> str | None:
        return "reference" if row["engine"] == over else times(chat.speedup(row["engine"], row["turn"] - 1, over))

    columns: dict[str, Callable[[Mapping[str, Any]], object]] = {
        "turn": itemgetter("turn"),
        "engine": itemgetter("engine"),
        "kind": lambda row: in_words(row["kind"]),
        "prompt tokens": itemgetter("prompt_tokens"),
        "found in the cache": itemgetter("tokens_found"),
        "images found": itemgetter("images_found"),
        "TTFT ms": lambda row: _number(row["ttft_ms"], ".1f"),
        "tokens equal": lambda row: _yes(row["tokens_equal"]),
        f"times as fast as {over} (95% CI)": ratio,
    }
    return frame(chat.summary(over), columns)


def streaming_frame(runs: Mapping[str, Run], expected: Run, audits: Mapping[str, Audit]) -> Any:
    """A line a setting: TTFT, the whole answer, chunks, whether its tokens are those of `expected`, and what its audit says."""

    def wrong(label: str) -> str:
        said = [finding.named for finding in audits[label].findings if finding.severity != "note"]
        return ", ".join(said) or "clear"

    columns: dict[str, Callable[[str], object]] = {
        "setting": str,
        "TTFT ms": lambda label: f"{runs[label].ttft * 1e3:.1f}",
        "answer ms": lambda label: f"{runs[label].chunks[-1].time * 1e3:.1f}",
        "TTFT of the answer": lambda label: f"{runs[label].ttft / runs[label].chunks[-1].time:.0%}",
        "chunks": lambda label: len(runs[label].chunks),
        "largest chunk": lambda label: max(len(chunk.tokens) for chunk in runs[label].chunks),
        "same tokens": lambda label: _yes(runs[label].made(expected.tokens, expected.text)),
        "audit": wrong,
    }
    return frame(runs, columns)


def reported_frame(rows: Sequence[Mapping[str, Any]], audits: Sequence[Audit]) -> Any:
    """The numbers of `reported_rates`, the verdict on each, and the arithmetic behind it."""
    found = [(row, (one.cleared if one.ok else one.findings)[0]) for row, one in zip(rows, audits, strict=True)]
    columns: dict[str, Callable[[Any], object]] = {
        "engine": lambda pair: pair[0]["engine"],
        "model": lambda pair: pair[0]["model"],
        "TTFT s": lambda pair: f"{pair[0]['ttft']:.3f}",
        "tokens/s": lambda pair: f"{pair[0]['tokens_per_second']:.0f}",
        "audit": lambda pair: pair[1].severity,
        "arithmetic": lambda pair: pair[1].arithmetic,
    }
    return frame(found, columns)


def load_frame(loads: Mapping[str, Load]) -> Any:
    """One line a load: what was asked and answered, and times in ms (95% CI); columns that say nothing are left out."""

    def percentile(of: Measure, percent: int, spec: str = ".1f") -> Callable[[tuple[str, Load]], object]:
        def cell(pair: tuple[str, Load]) -> str | None:
            found = pair[1].percentile(of, percent)
            return found and _interval(*found.ms, spec)

        return cell

    columns: dict[str, Callable[[tuple[str, Load]], object]] = {
        "engine": lambda pair: pair[0],
        "arrivals": lambda pair: pair[1].how,
        "requests": lambda pair: len(pair[1].runs),
        "failed": lambda pair: len(pair[1].failures) or None,
        "tokens/s": lambda pair: f"{pair[1].tokens_per_second:.1f}",
        "requests/s": lambda pair: f"{pair[1].requests_per_second:.2f}",
        **{f"TTFT p{percent} ms": percentile("ttft", percent) for percent in PERCENTILES},
        "TPOT p50 ms": percentile("tpot", 50, ".2f"),
        "gap p99 ms": percentile("gap", 99),
        "queued p50 ms": percentile("queued", 50),
    }
    made = frame(loads.items(), columns)
    return made.loc[:, (made != "–").any()]


def load_percentile_frame(loads: Mapping[str, Load]) -> Any:
    """One line a measure and load: percentiles in ms (95% CI), but of the whole answer; what no load has a time of is left out."""
    known = [of for of in MEASURES if of != "end_to_end" and any(load.values(of) for load in loads.values())]
    first = next(iter(loads))

    def percentile(percent: int) -> Callable[[tuple[Measure, str]], object]:
        def cell(line: tuple[Measure, str]) -> str | None:
            found = loads[line[1]].percentile(line[0], percent)
            return found and _interval(*found.ms, ".1f" if found.ms.median < 100 else ".0f")

        return cell

    columns: dict[str, Callable[[tuple[Measure, str]], object]] = {
        "ms (95% CI)": lambda line: NAMES[line[0]] if line[1] == first else "",
        "of": lambda line: line[1],
    }
    return frame(
        [(of, label) for of in known for label in loads], columns | {f"p{percent}": percentile(percent) for percent in PERCENTILES}
    )


# One stage alone


def rounds_frame(rounds: Samples[StageSample], reference: str, *steps: str) -> Any:
    """One line a variant: median ms of each step and in all, and how many times as fast as the reference it is.

    steps: what the ratio is over; all, if none is named.
    """
    every = tuple(rounds.samples[0].steps)
    columns = {"variant": str} | {f"{step} ms": _median(rounds, step) for step in every}
    columns |= {"in all ms": _median(rounds)} if every[1:] else {}
    return frame(rounds.engines, columns | _ratio(rounds, reference, " + ".join(steps) or "all", *steps))


def step_frame(rounds: Samples[StageSample], reference: str) -> Any:
    """One line a variant: of every step the median ms, and how many times as fast as the reference's it is."""
    columns = {"variant": str}
    for step in rounds.samples[0].steps:
        columns |= {f"{step} ms": _median(rounds, step)} | _ratio(rounds, reference, step, step)
    return frame(rounds.engines, columns)


def _median(rounds: Samples[StageSample], *steps: str) -> Any:
    return lambda label: _number(rounds.median(label, *steps).median * 1e3, ".2f")


def _ratio(rounds: Samples[StageSample], reference: str, of: str, *steps: str) -> Any:
    def ratio(label: str) -> str | None:
        return "reference" if label == reference else times(rounds.ratio(label, reference, *steps))

    return {f"{of}, times as fast as {reference} (95% CI)": ratio}


def operation_frame(ways: Mapping[str, Profile]) -> Any:
    """How many operations each way of executing has, and the share of the time in which none was under way."""

    def number(lane: Lane) -> Callable[[str], object]:
        return lambda label: str(ways[label].number(lane)) if ways[label].number(lane) else None

    def between(lane: Lane) -> Callable[[str], object]:
        return lambda label: f"{1 - ways[label].covered(lane) / ways[label].seconds:.0%}" if ways[label].number(lane) else None

    columns: dict[str, Callable[[str], object]] = {"executed": str}
    columns["ms under the profiler"] = lambda label: f"{ways[label].seconds * 1e3:.2f}"
    lanes: tuple[Lane, ...] = ("host", "device")
    for lane in lanes:
        if any(seen.number(lane) for seen in ways.values()):
            columns |= {f"{lane} operations": number(lane), f"{lane}: between them": between(lane)}
    return frame(ways, columns)


def called_frame(seen: Profile) -> Any:
    """One line a stage, lane and operation, those that took longest first: how often, and the sum of ms."""
    spent: dict[tuple[str, Lane, str], list[float]] = {}
    for one in seen.operations:
        spent.setdefault((one.stage, one.lane, one.name), []).append((one.end_us - one.start_us) / 1e3)
    columns: dict[str, Callable[[tuple[tuple[str, Lane, str], list[float]]], object]] = {
        "stage": lambda item: item[0][0] or None,
        "lane": lambda item: item[0][1],
        "operation": lambda item: item[0][2],
        "times": lambda item: len(item[1]),
        "ms": lambda item: f"{sum(item[1]):.3f}",
    }
    return frame(sorted(spent.items(), key=lambda item: -sum(item[1])), columns)


# What captures cost


# Inputs whose length says for what a program was made: the last part of their name in `Capture.shape` -> what is counted, and
# along which axis.
_COUNTED = {
    "patches": ("patches", 0),
    "input_ids": ("prompt tokens", 0),
    "hidden": ("prompt tokens", 0),
    "visual_index": ("visual tokens", 0),
    "slot_of": ("keys", -1),
}


def _sizes(shape: str) -> str:
    """What a program was made for, in words; its inputs as they are where none of them is known."""
    counts = {}
    for name, lengths in (one.rsplit(" ", 1) for one in shape.split(", ") if " " in one):
        if (known := _COUNTED.get(name.rpartition(".")[2])) is not None:
            counts[known[0]] = lengths.split("x")[known[1]]
    return ", ".join(f"{int(n):,} {what}" for what, n in counts.items()) or shape


def capture_frame(runs: Mapping[str, Run]) -> Any:
    """One line a program that a run compiled or captured: what for, seconds, MB, and the run's TTFT with it."""
    columns: dict[str, Callable[[tuple[str, Run, Capture]], object]] = {
        "executed": lambda row: row[0],
        "stage": lambda row: row[2].stage,
        "how": lambda row: row[2].how,
        "made for": lambda row: _sizes(row[2].shape),
        "seconds": lambda row: f"{row[2].seconds:.2f}",
        "MB held": lambda row: f"{row[2].n_bytes / 1e6:.1f}",
        "run": lambda row: f"{row[1].kind}, TTFT {row[1].ttft * 1e3:.0f} ms",
    }
    return frame([(label, run, capture) for label, run in runs.items() for capture in run.captures], columns)


def break_even_frame(points: Mapping[str, Comparison], captures: Mapping[str, Sequence[Capture]], eager: str = "eager") -> Any:
    """One line a size and way of executing: its TTFT against eager, and after how many such requests its captures have paid.

    captures: way -> what was made for it, of stages before the first token. A way whose interval does not lie above 1 is not shown
    to gain anything.
    """

    def ttft(size: str, way: str) -> float:
        return points[size].representative(way).ttft

    def paid(row: tuple[str, str]) -> str:
        size, way = row
        gain = gains(points[size].speedup(way, eager))
        pays = break_even(captures[way], eager=ttft(size, eager), captured=ttft(size, way)) if gain else None
        return "never: no gain is shown" if pays is None else counted(pays, "request")

    columns: dict[str, Callable[[tuple[str, str]], object]] = {
        "image": lambda row: row[0],
        "executed": lambda row: row[1],
        "eager TTFT ms": lambda row: f"{ttft(row[0], eager) * 1e3:.1f}",
        "TTFT ms": lambda row: f"{ttft(*row) * 1e3:.1f}",
        "times as fast as eager (95% CI)": lambda row: times(points[row[0]].speedup(row[1], eager)),
        "captures cost s": lambda row: f"{sum(capture.seconds for capture in captures[row[1]]):.1f}",
        "have paid after": paid,
    }
    return frame([(size, way) for size in points for way in captures], columns)


# Floors and memory


def spent_ms(run: Run, stage: str) -> float:
    """What a stage took before the first text, on the device where that has a lane; of "decode" a step's mean."""
    if stage == "decode":
        return 0.0 if run.tpot is None else run.tpot * 1e3
    lane = run.trace.stages("device") or run.trace.stages()
    return lane.get(stage, 0) / 1e6


def floored(stage: str) -> str:
    """What a stage with a floor is called."""
    return "a decode step" if stage == "decode" else stage


def share_of(floor: float, ms: float) -> str:
    """The floor's share of the time."""
    return "–" if not ms else f"{floor * 1e3 / ms:.0%}"


def floor_frame(runs: Mapping[str, Run], floors: Mapping[str, float]) -> Any:
    """Each stage's floor (floors: seconds), and what each run took."""

    def took(run: Run) -> Callable[[str], object]:
        def cell(stage: str) -> str | None:
            ms = spent_ms(run, stage)
            return f"{ms:.3f} (the floor is {share_of(floors[stage], ms)} of it)" if ms else None

        return cell

    columns = {"stage": floored, "floor ms": lambda stage: f"{floors[stage] * 1e3:.3f}"}
    return frame(floors, columns | {f"{label}: ms": took(run) for label, run in runs.items()})


def memory_frame(held: Mapping[str, int]) -> Any:
    """Megabytes that are held, by what holds them."""
    return frame(held, {"held by": str, "MB": lambda name: f"{held[name] / 1e6:.2f}"})
