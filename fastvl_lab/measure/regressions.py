"""Whether anything has become slower between two records of this machine: a ratio with its interval for each engine and size.

    python -m fastvl_lab.measure.regressions BASE [HEAD] [--bound 1.05]

BASE, HEAD: folders that `save` wrote, of a comparison, an attribution or a sweep, or the output folders of sweeps. Where HEAD is
not given, or not there yet, the sweep of BASE is measured again, and kept at HEAD. The exit status is 1 where the whole interval of
a slow-down lies above the bound; else 2 where something cannot be compared; else 0.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastvl_lab import lasting, shown
from fastvl_lab.errors import FastvlError, RequestError, is_number
from fastvl_lab.measure.compare import Attribution, Comparison, by_size, stage_seconds, telling_lane
from fastvl_lab.measure.samples import Interval, json_row, median_interval, unpaired_difference, unpaired_ratio
from fastvl_lab.measure.sweep import SweepResult, size_label, sweep, told_failure
from fastvl_lab.run import Run

BOUND = 1.05  # times: what two sessions on one machine may differ by, though nothing was changed

# What must be the same of where two records were measured.
_SAME = ("device", "processor", "dtype", "power_limit", "sm_clock_limit")


@dataclass(frozen=True, kw_only=True)
class Change:
    """One engine at one checkpoint and image, before and after.

    before, after: seconds of TTFT, medians with intervals; None where it was not timed. ratio: how many times as long it takes
    after; None where they are not compared, and then why. stages: milliseconds that each stage takes more, those that are shown and
    largest first.
    """

    checkpoint: str
    image: str
    engine: str
    before: Interval | None = None
    after: Interval | None = None
    ratio: Interval | None = None
    stages: Mapping[str, Interval] = dataclasses.field(default_factory=dict)
    why: str = ""

    @property
    def label(self) -> str:
        return f"{self.checkpoint} · {self.image} · {self.engine}"

    @property
    def stage(self) -> str | None:
        """The stage that is shown to take most of a difference in TTFT; None where there is none to explain."""
        if self.ratio is None or self.ratio.low <= 1 <= self.ratio.high or self.ratio.low != self.ratio.low:
            return None
        slower = self.ratio.median > 1
        told = (name for name, more in self.stages.items() if (more.low > 0 if slower else more.high < 0))
        return next(told, None)


@dataclass(frozen=True, kw_only=True)
class Regressions:
    """What `regressions` found. apart: why the two cannot be compared at all, in sentences; notes: what else is not the same."""

    changes: tuple[Change, ...]
    bound: float
    apart: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def slower(self) -> tuple[Change, ...]:
        """Those whose whole interval lies above the bound."""
        return tuple(change for change in self.changes if change.ratio is not None and change.ratio.low > self.bound)

    @property
    def status(self) -> int:
        """As an exit status: 1, something is slower; 2, something cannot be compared; 0."""
        unknown = self.apart or not self.changes or any(change.ratio is None for change in self.changes)
        return 1 if self.slower else 2 if unknown else 0

    def findings(self) -> list[str]:
        """In sentences: what cannot be compared, what is slower, and where; then what else is not the same."""
        lines = list(self.apart)
        for change in self.changes:
            if change.ratio is None:
                lines.append(f"{change.label}: {change.why}")
            elif change in self.slower:
                where = f", most of it in {change.stage}" if change.stage else ""
                lines.append(f"{change.label} is slower: {change.ratio.times()} of its TTFT before{where}")
        if not self.slower:
            lines.append(f"nothing is shown to be more than {self.bound:g} times as slow as before")
        return [*lines, *self.notes]

    def rows(self) -> list[dict[str, Any]]:
        """One row an engine and size, ready for JSON; times in ms."""
        return [
            {
                "checkpoint": change.checkpoint,
                "image": change.image,
                "engine": change.engine,
                **json_row("before_ms", change.before and change.before.ms),
                **json_row("after_ms", change.after and change.after.ms),
                **json_row("ratio", change.ratio),
                "slower": change in self.slower,
                "stage": change.stage,
                "why": change.why or None,
            }
            for change in self.changes
        ]

    def __repr__(self) -> str:
        lines = [f"  {change.label}: {change.ratio.times()}" for change in self.changes if change.ratio is not None]
        return "\n".join(["times as long as before:", *lines, *self.findings()])

    def frame(self) -> Any:
        """A row an engine and size, as a pandas DataFrame; raises `MissingExtraError` without pandas."""
        return shown.frame(self)


def regressions(before: Any, after: Any, *, bound: float = BOUND) -> Regressions:
    """What became of each engine's warm TTFT between two measurements on one machine.

    before, after: `Comparison`, `Attribution` or `SweepResult`, or folders of these. bound: how many times as slow is no regression
    yet: two sessions differ by more than the runs of one, and no interval of one session knows it. Runs of the two are not paired,
    so a ratio is of all pairs (`unpaired_ratio`); disturbed ones are left out. What fails parity is not compared, nor what had a
    prompt of another length, or runs of another kind. Raises `RequestError` for what is neither, or a folder that cannot be read.
    """
    _check_bound(bound)
    before, after = _opened(before), _opened(after)
    there, here = dict(_timed(before)), dict(_timed(after))
    apart = tuple(_apart(_environment(before), _environment(after)))
    changes = [] if apart else [_change(key, timed, here.get(key)) for key, timed in there.items()]
    notes = [f"{' · '.join(key)} is new, and is held against nothing" for key in here if key not in there]
    if isinstance(before, SweepResult):
        notes += [f"{point.label}: what is under a load is not compared" for point in before.loaded]
    return Regressions(
        changes=tuple(changes), bound=bound, apart=apart, notes=(*notes, *_other(_environment(before), _environment(after)))
    )


def _check_bound(bound: object) -> None:
    if not is_number(bound) or bound < 1:
        raise RequestError(f"bound is {bound!r}; it must be a number from 1 up")


@dataclass(frozen=True, kw_only=True)
class _Timed:
    """runs: those that are `compared`, which nobody disturbed. holds: whether it came through its parity check; why: if not."""

    runs: Sequence[Run]
    holds: bool
    why: str


def _opened(given: Any) -> Any:
    if isinstance(given, str | Path):
        inside = Path(given).expanduser() / "record"  # where a sweep keeps its own
        given = lasting.open(inside if inside.is_dir() else given)
    if not isinstance(given, Comparison | Attribution | SweepResult):
        raise RequestError(f"a {type(given).__name__} is not compared; the choices are Comparison, Attribution, SweepResult")
    if isinstance(given, SweepResult) and any([*(p.environment for p in given.points), *(p.environment for p in given.loaded)]):
        raise RequestError("a grid's points were measured in many places; compare sweeps of one machine")
    return given


def _environment(result: Comparison | Attribution | SweepResult) -> Mapping[str, str]:
    return result.comparison.environment if isinstance(result, Attribution) else result.environment


def _apart(before: Mapping[str, str], after: Mapping[str, str]) -> Iterator[str]:
    """Why times of these two places are not compared."""
    if not before or not after:
        yield f"where the {'after' if before else 'before'} was measured is not known, so it is not compared"
        return
    for name in _SAME:
        if before.get(name) != after.get(name):
            was, now = before.get(name, "not known"), after.get(name, "not known")
            yield f"the {name.replace('_', ' ')} was {was}, and is {now}: they are not compared"


def _other(before: Mapping[str, str], after: Mapping[str, str]) -> list[str]:
    """What else was not the same, but for the day."""
    names = [name for name in {**before, **after} if name not in (*_SAME, "date", "sm_clock", "temperature")]
    return [f"{name} was {before.get(name)}, and is {after.get(name)}" for name in names if before.get(name) != after.get(name)]


def _timed(result: Comparison | Attribution | SweepResult) -> Iterator[tuple[tuple[str, str, str], _Timed]]:
    """(checkpoint, image, engine) -> what was timed there."""
    if isinstance(result, SweepResult):
        points = [(point.checkpoint, size_label(point.size), point.comparison) for point in result.points]
        failed = [error for error in result.errors if error["engine"]]
    else:
        comparison = result.comparison if isinstance(result, Attribution) else result
        points = [(*_point(comparison), comparison)]
        failed = [
            {"checkpoint": points[0][0], "image": points[0][1], "engine": e, "error": w} for e, w in comparison.failures.items()
        ]
    for checkpoint, image, comparison in points:
        for engine in comparison.engines:
            checked, runs = comparison.checks[engine], comparison.runs(engine, comparison.compared(engine))
            yield (checkpoint, image, engine), _Timed(runs=runs, holds=checked.holds, why=checked.why)
    for error in failed:
        yield (
            (error["checkpoint"], error["image"], error["engine"]),
            _Timed(runs=(), holds=False, why=f"it failed: {error['error']}"),
        )


def _point(comparison: Comparison) -> tuple[str, str]:
    """The checkpoint and the images of a comparison."""
    runs = [sample.run for sample in comparison.samples]
    shapes = next((run.shapes for run in runs if run.shapes), ())
    return runs[0].checkpoint if runs else "", ", ".join(size_label((s.width, s.height)) for s in shapes) or "no image"


def _change(key: tuple[str, str, str], before: _Timed, after: _Timed | None) -> Change:
    change = Change(checkpoint=key[0], image=key[1], engine=key[2], before=_median(before))
    if after is None:
        return dataclasses.replace(change, why="it was not measured again")
    change = dataclasses.replace(change, after=_median(after))
    for timed, when in ((before, "before"), (after, "after")):
        if not timed.holds:
            return dataclasses.replace(change, why=f"{timed.why} ({when}), so its time is not compared")
        if not timed.runs:
            return dataclasses.replace(change, why=f"{when}, no run of it was warm and undisturbed")
    was, now = before.runs[0], after.runs[0]
    if was.kind != now.kind:  # those of unknown kind may be cache hits
        return dataclasses.replace(change, why=f"its runs were {was.kind}, and are {now.kind}, so its time is not compared")
    if was.n_prompt != now.n_prompt and was.n_prompt and now.n_prompt:  # 0: an endpoint did not count
        why = f"its prompt had {was.n_prompt} tokens, and has {now.n_prompt}, so its time is not compared"
        return dataclasses.replace(change, why=why)
    ratio = unpaired_ratio(*([run.ttft for run in timed.runs] for timed in (after, before)))
    if ratio.low != ratio.low:
        why = f"{len(before.runs)} runs before and {len(after.runs)} after are too few for an interval"
        return dataclasses.replace(change, why=why)
    lane = telling_lane(before.runs)
    steps = [[stage_seconds(run, lane) for run in timed.runs] for timed in (after, before)]
    names = dict.fromkeys(name for side in steps for of_one in side for name in of_one)
    more = {name: unpaired_difference(*([of_one.get(name, 0.0) for of_one in side] for side in steps)).ms for name in names}
    return dataclasses.replace(change, ratio=ratio, stages=by_size(more))


def _median(timed: _Timed) -> Interval | None:
    return median_interval([run.ttft for run in timed.runs]) if timed.runs else None


def main(arguments: Sequence[str] | None = None) -> int:
    """Say what was found, and give the exit status; arguments: by default the process's."""
    parser = argparse.ArgumentParser(
        prog="python -m fastvl_lab.measure.regressions", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("base", type=Path, help="a record, or the output folder of a sweep")
    parser.add_argument("head", type=Path, nargs="?", help="another; where there is none, the sweep of BASE is measured again")
    parser.add_argument("--bound", type=float, default=BOUND, help=f"times as slow that is no regression yet (default {BOUND})")
    given = parser.parse_args(arguments)
    try:
        _check_bound(given.bound)  # before what may take hours
        base = _opened(given.base)
        head = given.head if given.head is not None and given.head.exists() else _again(base)
        found = regressions(base, head, bound=given.bound)
        print(found)
        if isinstance(head, SweepResult) and given.head is not None:
            head.save(given.head)
    except FastvlError as error:
        print(error, file=sys.stderr)
        return 2
    return found.status


def _again(base: Comparison | Attribution | SweepResult) -> SweepResult:
    if not isinstance(base, SweepResult):
        raise RequestError(f"a {type(base).__name__} does not say what was asked, so it cannot be measured again; give HEAD too")
    made = sweep(dataclasses.replace(base.settings, output_dir=""))
    for error in made.errors:
        print(told_failure(error), file=sys.stderr)
    return made


if __name__ == "__main__":
    sys.exit(main())
