"""The best exact recipe for a workload on this machine, found by measuring: what cannot run, fails or disagrees is never timed."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import hashlib
import json
import math
import random
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from tqdm.auto import tqdm

from fastvl_lab import shown
from fastvl_lab.catalogue import Option, OptionValue, Toggle, toggles
from fastvl_lab.engine import find_recipe
from fastvl_lab.errors import (
    FastvlError,
    RecipeError,
    RequestCancelledError,
    RequestError,
    TimeLimitError,
    check_whole_number,
    is_number,
    sentence,
    shortened,
)
from fastvl_lab.lab import Lab, is_lasting
from fastvl_lab.lasting import About, Lasting
from fastvl_lab.learnt import Record, Site, best_under_load, folder, versions
from fastvl_lab.measure.environment import environment
from fastvl_lab.measure.journal import Journalled
from fastvl_lab.measure.load import Load, load, varied
from fastvl_lab.measure.parity import Oracles, Parity, check
from fastvl_lab.measure.publish import photo, picture
from fastvl_lab.measure.quiet import QUIET, Quiet, Watch
from fastvl_lab.measure.recipes import START, named, of_a_load, of_a_request, stages_of
from fastvl_lab.measure.samples import Interval, StageSample, as_row, interval_of, json_row, json_value
from fastvl_lab.measure.search import (
    CONFIRMING,
    COST,
    CastOut,
    CastOutError,
    EndOfSearchError,
    Found,
    Progress,
    Raced,
    Space,
    Tried,
    search,
    told,
)
from fastvl_lab.measure.under_load import Goodput
from fastvl_lab.preprocessor.decode_image import rgb_of
from fastvl_lab.recipe import Recipe
from fastvl_lab.request import Request
from fastvl_lab.run import Run

GOALS = ("ttft", "tpot")

# One request, or several with what each weighs.
Workload = Request | Sequence[tuple[Request, float]]
Goal = str | Mapping[str, float] | Goodput

# What one recipe's cold run and check may take, unless said otherwise: so much of all the time, so many times what Transformers
# took, or so many seconds, whichever is most. A whole recipe of Triton kernels may compile for a minute where none is kept.
_SHARE_OF_A_LOOK, _TIMES_STOCK, _LEAST = 0.5, 10, 30.0
_SHARE_OF_QUIET = 0.2  # and what waiting for quiet may


@dataclass(frozen=True, kw_only=True, eq=False)
class Tuned(Lasting):
    """What `tune` found.

    recipe: the best, or `start` where nothing is shown to be faster. ratio: how many times as fast as `start` it is by the goal, on
    samples taken for that alone; where the search was cut short before those, the product of its races' medians without an
    interval; of the start itself, 1; infinite over one without a good request. over: what the start is called, and where it is
    from. goal: what each part weighs; of goodput, each request of `workload` has its "load". tried: a row a recipe and race;
    cast_out: what was not timed, with the reason; untried: what time was too short for. samples: of all races, raw. checks: the
    recipe's parity, a request each. seconds: that it took. kept: the file of the record, None where none was written.
    """

    recipe: Recipe
    start: Recipe
    over: str
    ratio: Interval
    confirmed: bool
    goal: Mapping[str, float]
    workload: tuple[Mapping[str, Any], ...]
    tried: tuple[Tried, ...]
    cast_out: tuple[CastOut, ...]
    untried: tuple[str, ...]
    samples: tuple[Raced, ...]
    checks: tuple[Parity, ...]
    ended: str
    seconds: float
    environment: Mapping[str, str]
    notes: tuple[str, ...] = ()
    kept: Path | None = None

    @property
    def load(self) -> Goodput | None:
        """Under what load, and within which limits, goodput was the goal; None of another goal."""
        return Goodput(**self.workload[0]["load"]) if "goodput" in self.goal else None

    @property
    def times_what(self) -> str:
        """What stands between a ratio and the other's name."""
        return "as fast as" if self.load is None else "the goodput of"

    def findings(self) -> list[str]:
        """What was found, in sentences."""
        weighed = " + ".join(f"{weight:g}·{name.upper()}" if weight != 1 else name.upper() for name, weight in self.goal.items())
        by = f"by {weighed}" if self.load is None else f"with {self.load.label}"
        if self.recipe == self.start:
            better = "be faster than" if self.load is None else "have more goodput than"
            lines = [f"nothing was shown to {better} {self.over} {by}: it stays"]
        else:
            lines = [f"{told(self.recipe, self.start)}: {self.ratio.times()} {self.times_what} {self.over} {by}"]
            lines += [] if self.confirmed else ["the search was cut short before this met the start once more, so it is not kept"]
        if self.samples and all(math.isinf(sample.cost) for sample in self.samples):
            lines.append("no request of any load kept the limits: nothing can be told apart by them")
        lines += [f"parity: {checked.sentence}" for checked in self.checks]
        failed = [one for one in self.cast_out if one.recipe is not None]
        lines += [f"{one.label} was cast out: {one.why}" for one in failed]
        if unable := len(self.cast_out) - len(failed):
            lines.append(f"{unable} options cannot run here or do not count (see cast_out)")
        lines.append(f"{self.ended}, after {self.seconds:.0f} s and {len(self.tried)} races")
        return [*lines, *self.notes, *([f"kept in {self.kept}"] if self.kept else [])]

    def rows(self) -> list[dict[str, Any]]:
        """One row a recipe and race, then one for each that was cast out, ready for JSON."""
        made = [
            {
                "phase": tried.phase,
                "tried": tried.label,
                "verdict": tried.verdict,
                **json_row("ratio", tried.ratio),
                "rounds": tried.rounds,
                "why": None,
            }
            for tried in self.tried
        ]
        empty = {"phase": None, **as_row("ratio", None), "rounds": None}
        return made + [{**empty, "tried": one.label, "verdict": "cast out", "why": one.why} for one in self.cast_out]

    def about(self) -> About:
        return About(
            title=f"{told(self.recipe, self.start)}: {self.ratio.times()} {self.times_what} {self.over}",
            findings=self.findings(),
            environment=self.environment,
            samples=[sample._asdict() for sample in self.samples],
        )

    def to_record(self) -> dict[str, Any]:
        """Everything as JSON-ready data; `from_record` reads it back. rows, findings and texts are for those who do not."""
        return {
            "recipe": self.recipe.to_dict(),
            "recipe_text": str(self.recipe),
            "origin": self.recipe.origin,
            "start": self.start.to_dict(),
            "start_text": str(self.start),
            "over": self.over,
            **json_row("ratio", self.ratio),
            "confirmed": self.confirmed,
            "goal": dict(self.goal),
            "workload": [dict(one) for one in self.workload],
            "parity": [checked.says for checked in self.checks],
            "checks": [dataclasses.asdict(checked) for checked in self.checks],
            "tried": [_tried_record(tried) for tried in self.tried],
            "cast_out": [{**vars(one), "recipe": one.recipe and one.recipe.to_dict()} for one in self.cast_out],
            "rows": self.rows(),
            "untried": list(self.untried),
            "samples": [list(map(json_value, sample)) for sample in self.samples],
            "ended": self.ended,
            "seconds": self.seconds,
            "environment": dict(self.environment),
            "notes": list(self.notes),
            "kept": self.kept and str(self.kept),
            "findings": self.findings(),
        }

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> Tuned:
        """Read `to_record`'s form."""
        tried = [
            Tried(**{**one, "recipe": Recipe.from_dict(one["recipe"]), "over": Recipe.from_dict(one["over"]), "ratio": ratio})
            for one in record["tried"]
            for ratio in [one["ratio"] and interval_of(one["ratio"])]
        ]
        cast_out = [CastOut(**{**one, "recipe": one["recipe"] and Recipe.from_dict(one["recipe"])}) for one in record["cast_out"]]
        return cls(
            recipe=dataclasses.replace(Recipe.from_dict(record["recipe"]), origin=record["origin"]),
            start=Recipe.from_dict(record["start"]),
            over=record["over"],
            ratio=interval_of([record[name] for name in ("ratio", "ratio_low", "ratio_high")]),
            confirmed=record["confirmed"],
            goal=record["goal"],
            workload=tuple(record["workload"]),
            tried=tuple(tried),
            cast_out=tuple(cast_out),
            untried=tuple(record["untried"]),
            samples=tuple(raced._replace(cost=float(raced.cost)) for raced in (Raced(*sample) for sample in record["samples"])),
            checks=tuple(map(Parity.from_record, record["checks"])),
            ended=record["ended"],
            seconds=record["seconds"],
            environment=record["environment"],
            notes=tuple(record["notes"]),
            kept=record["kept"] and Path(record["kept"]),
        )

    def __repr__(self) -> str:
        return "\n".join([f"Tuned: {self.recipe}", *self.findings(), *self.lines()])

    def lines(self) -> list[str]:
        """The recipes that were raced, a line each."""
        labels = [shortened(tried.label, 60) for tried in self.tried]
        width = max(map(len, labels), default=0)
        rows = zip(labels, self.tried, strict=True)
        return [f"  {label:<{width}}  {t.verdict:<10}  {t.ratio.times() if t.ratio else '–'}" for label, t in rows]

    def frame(self) -> Any:
        """The rows as a pandas DataFrame; raises `MissingExtraError` without pandas."""
        return shown.frame(self)

    def figure(self) -> Any:
        """The recipes that were raced by their ratios, as a plotly figure; raises `MissingExtraError` without plotly."""
        return shown.figure(self)

    def _repr_mimebundle_(self, include: Any = None, exclude: Any = None) -> dict[str, Any]:
        """What was found and tried as a table, where pandas can be had, else text."""
        return shown.bundle(self)


def _tried_record(tried: Tried) -> dict[str, Any]:
    ratio = None if tried.ratio is None else [json_value(end) for end in tried.ratio]
    return {**vars(tried), "recipe": tried.recipe.to_dict(), "over": tried.over.to_dict(), "ratio": ratio}


def tune(
    lab: Lab,
    workload: Workload,
    seconds: float = 120,
    *,
    goal: Goal = "ttft",
    only: Sequence[str] = (),
    seed: int = 0,
    keep: bool = True,
    limit: float | None = None,
    quiet: Quiet | None = QUIET,
    on_progress: Callable[[Progress], object] | None = None,
    progress: bool = True,
    stop: threading.Event | None = None,
) -> Tuned:
    """Find the best exact recipe for a workload on this machine, and keep it: from then on it is what "fastest" means on this lab.

    One that was found for goodput is kept beside it: "fastest" is of one request alone.

    workload: a request, or requests with what each weighs; each is run to its end, so a few new tokens leave time for more recipes.
    seconds: that it may take; beyond them goes at most one recipe's cold run and check. goal: "ttft", "tpot", or what each weighs,
    such as {"ttft": 1, "tpot": 32} for an answer of 33 tokens; or `Goodput(concurrency=8, ttft=0.5)`: requests a second that keep
    its limits, where so many come at once, each drawn from the workload by its weight. only: slots or toggles that are searched,
    such as "vit" or "attention.prefill"; all, if none is named. keep: write a record (`learnt`), once the best has been confirmed
    to be faster than the start. limit: seconds that one recipe's cold run and check, or one timed run, may take; by default half of
    `seconds`, ten times what Transformers takes, or 30, whichever is most. quiet: as `compare` has it, within a fifth of `seconds`.
    on_progress: called before each recipe; progress: without it, whether to show a bar. stop: once it is set, the best so far is
    returned, unconfirmed where it was not yet held against the start.

    Unless `keep` is off, samples are written down as they come (`measure.journal`): where a tune was killed or stopped, the same
    call goes on with it, and `seconds` count what that one took.

    For goodput a sample is a load. In a round all recipes are sent the same load, and each round of a race has pictures and
    arrivals of its own. A request that fails, or makes wrong tokens beside others, casts its recipe out. A load without a good
    request costs infinitely much: it is worse than any with one, and as good as another such.

    Not searched: approximate options; what is kept between requests, since every request here comes again, or has pictures of its
    own; and, but for goodput, the schedule, which counts among many requests alone. These stay as the start has them. A recipe that
    fails, whose tokens or logits are not its oracle's, whose runs differ, or that takes too long is cast out and named, and raises
    nothing.

    Raises `RequestError` for a workload, goal or time that cannot be, and what a request's own fault raises; `RecipeError` where
    not even the baseline passes, or what an earlier call found fails now; `RequestCancelledError` where it was stopped before any
    recipe had passed.
    """
    requests, weights = _read(workload), _weights(goal)
    if not _is_above_zero(seconds):
        raise RequestError(f"seconds is {seconds!r}; it must be a number above 0")
    if limit is not None and not _is_above_zero(limit):
        raise RequestError(f"limit is {limit!r}; it must be a number of seconds above 0, or None")
    check_whole_number("seed", seed, least=0)
    goodput = goal if isinstance(goal, Goodput) else None
    if weights.get("tpot") or (goodput and goodput.tpot is not None):
        for request, _ in requests:
            if request.max_new_tokens < 2:
                raise RequestError(f"max_new_tokens is {request.max_new_tokens}; a goal with tpot takes at least 2")
    if goodput and goodput.rate is not None:
        lasts, most = (goodput.count - 1) / goodput.rate, min(seconds / (2 * CONFIRMING), math.inf if limit is None else limit)
        if lasts > most:
            raise RequestError(
                f"{goodput.count} requests at {goodput.rate:g} a second come for {lasts:.3g} s, and a load may take {most:.3g} s: "
                f"seconds has to hold {2 * CONFIRMING} of them, and limit one; lower n, or raise seconds, limit or rate"
            )
    bench = _Bench(lab, requests, weights, goodput, seconds=seconds, limit=limit, quiet=quiet, stop=stop)
    space, fallen = _space(lab, requests, weights, named(only))
    starts = {"fastest": lab.fastest, "the hand-chosen fastest": Recipe.fastest(lab.checkpoint.target), START: Recipe.baseline()}
    if goodput and (best := best_under_load(lab.checkpoint)) is not None:
        starts = {"the best under load": best, **starts}
    starts = {label: recipe for label, recipe in starts.items() if space.allowed(recipe) is None}
    listed = of_a_request(lab.checkpoint.target).items()
    seeds = {label: find_recipe(engine) for label, engine in listed if label.startswith("all: ")}
    seeds = {} if only else {**(of_a_load(lab.fastest) if goodput else {}), **seeds, **starts}
    bar = tqdm(total=round(seconds), unit="s", disable=not progress or on_progress is not None)

    def show(now: Progress) -> None:
        bar.n = min(round(bench.spent), bar.total or 0)
        bar.set_description(f"{now.ratio:.2f}× {now.phase}: {now.trying}"[:80])

    key = _key(lab, requests, weights, seconds=seconds, only=only, seed=seed, starts=starts, load=bench.load)
    journal = Journalled(bench, _unfinished(key), key) if keep else None
    order = bench.order if journal is None else journal.ordered(bench.order)
    with bar:
        try:
            found = search(starts, space, journal or bench, seeds=seeds, order=order, seed=seed, on_progress=on_progress or show)
            bench.know(found.start, found.recipe)
        except EndOfSearchError as error:
            raise RequestCancelledError(f"{error} before any recipe had passed") from None
        except CastOutError as error:
            if journal is not None and not error.ends:
                journal.finish()  # nobody can go on with it
            raise RecipeError(f"what an earlier process found does not pass in this one: {error}") from None
    made = _result(lab, bench, found, fallen, weights, starts, journal=journal)
    if journal is not None and not found.cut_off:
        journal.finish()
    return made


def _key(
    lab: Lab,
    requests: Sequence[tuple[Request, float]],
    weights: Mapping[str, float],
    *,
    starts: Mapping[str, Recipe],
    **asked: Any,
) -> dict[str, Any]:
    """What tells one tune from another, ready for JSON."""
    return {
        "site": dataclasses.asdict(Site.of(lab.checkpoint)),
        "versions": versions(),
        "checkpoint": lab.checkpoint.name,
        "workload": [[_digest(request), weight] for request, weight in requests],
        "goal": dict(weights),
        "starts": {label: recipe.to_dict() for label, recipe in starts.items()},
        **{name: list(value) if name == "only" else value for name, value in asked.items()},
    }


def _digest(request: Request) -> str:
    """SHA-256 of all that a request is."""
    digest = hashlib.sha256(repr([request.conversation, request.settings()]).encode())
    for image in request.image_inputs:
        digest.update(repr((image.min_pixels, image.max_pixels, image.asked)).encode())
        if isinstance(image.data, bytes):
            digest.update(image.data)
        else:
            rgb = np.asarray(rgb_of(image))
            digest.update(repr(rgb.shape).encode() + rgb.tobytes())
    return digest.hexdigest()


def _unfinished(key: Mapping[str, Any]) -> Path:
    """Where the samples of a tune are while it is under way."""
    return folder() / "unfinished" / f"{hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:16]}.jsonl"


def _result(
    lab: Lab,
    bench: _Bench,
    found: Found,
    fallen: Sequence[CastOut],
    weights: Mapping[str, float],
    starts: Mapping[str, Recipe],
    *,
    journal: Journalled | None,
) -> Tuned:
    called = next(label for label, recipe in starts.items() if recipe == found.start)
    stays = found.recipe == found.start
    ratio = Interval(1.0, 1.0, 1.0) if stays else found.ratio or Interval(found.gained, math.nan, math.nan)
    made = Tuned(
        recipe=found.recipe,
        start=found.start,
        over=f"{called} ({found.start.origin})" if found.start.origin else called,
        ratio=ratio,
        confirmed=found.confirmed and not stays,
        goal=weights,
        workload=bench.described(found.start),
        tried=found.tried,
        cast_out=(*found.cast_out, *fallen),
        untried=found.untried,
        samples=found.samples,
        checks=bench.checks[found.recipe],
        ended=found.ended,
        seconds=bench.spent if journal is None else bench.allowed - journal.left(),
        environment=environment(lab),
        notes=(*bench.notes(), *(journal.notes() if journal else ())),
    )
    if not made.confirmed:
        return made
    record = Record(
        site=Site.of(lab.checkpoint),
        versions=versions(),
        checkpoint=lab.checkpoint.name,
        recipe=made.recipe,
        over=made.start,
        ratio=(ratio.median, ratio.low, ratio.high),
        goal=made.goal,
        workload=made.workload,
        parity=[checked.says for checked in made.checks],
        date=date.today().isoformat(),
    )
    made = dataclasses.replace(made, recipe=dataclasses.replace(made.recipe, origin=record.origin))
    if journal is None:
        return made
    try:
        kept = record.write()
    except OSError as error:
        return dataclasses.replace(made, notes=(*made.notes, f"what was found could not be kept: {sentence(error)}"))
    lab.relearn()
    return dataclasses.replace(made, kept=kept)


def _read(workload: Workload) -> tuple[tuple[Request, float], ...]:
    """Requests with their shares, which add up to 1."""
    if isinstance(workload, Request):
        return ((workload, 1.0),)
    if isinstance(workload, str | bytes) or not isinstance(workload, Sequence) or not workload:
        raise RequestError(f"workload is {type(workload).__name__}; give a Request, or a list of (Request, weight)")
    for pair in workload:
        if not isinstance(pair, Sequence) or len(pair) != 2 or not isinstance(pair[0], Request) or not _is_above_zero(pair[1]):
            raise RequestError("workload has what is no (Request, weight); a weight is a number above 0")
    total = sum(weight for _, weight in workload)
    return tuple((request, weight / total) for request, weight in workload)


def _weights(goal: Goal) -> dict[str, float]:
    if isinstance(goal, Goodput):
        return {"goodput": 1.0}
    given = {goal: 1.0} if isinstance(goal, str) else goal
    known = isinstance(given, Mapping) and given and all(name in GOALS and _is_above_zero(weight) for name, weight in given.items())
    if not known:
        choices = (*GOALS, "a mapping from them to weights above 0, or a fastvl_lab.Goodput")
        raise RequestError(f"goal is {goal!r}; the choices are {', '.join(choices)}")
    return {name: float(weight) for name, weight in given.items()}


def _is_above_zero(value: object) -> bool:
    return is_number(value) and value > 0


def _space(
    lab: Lab, requests: Sequence[tuple[Request, float]], weights: Mapping[str, float], searched: frozenset[str]
) -> tuple[Space, list[CastOut]]:
    """What there is to choose for these requests on this lab, and what falls away, with the reason."""
    target = lab.checkpoint.target
    values: dict[str, list[OptionValue]] = {}
    fallen, late = [], set()

    def allowed(recipe: Recipe) -> str | None:
        try:
            recipe.check(target)
        except RecipeError as error:
            return sentence(error)
        return None if recipe.exact else "it is approximate"

    for toggle in [toggle for toggle in toggles() if toggle.path in searched]:
        if (why := _out_of_scope(toggle, requests, weights)) is not None:
            fallen.append(CastOut(label=toggle.path, why=why))
            continue
        for option in toggle.options:
            label = f"{toggle.path}={option.value}"
            if (why := _unfit(lab, toggle, option)) is not None:
                fallen.append(CastOut(label=label, why=why))
                continue
            values.setdefault(toggle.path, []).append(option.value)
            if option.needs.compiler:
                late.add(label)
    return Space(values=values, late=frozenset(late), allowed=allowed), fallen


def _out_of_scope(toggle: Toggle, requests: Sequence[tuple[Request, float]], weights: Mapping[str, float]) -> str | None:
    """Why a toggle does not count for this workload and goal, or None."""
    goodput = "goodput" in weights
    if toggle.slot == "schedule" and toggle.path != "schedule.overlap" and not goodput:
        return "it counts among many requests alone"
    if toggle.path in ("cache.image_reuse", "cache.prefix_reuse"):
        again = "every request comes again here, and would find what the one before it left"
        return "what requests have in common is not known here" if goodput else again
    works_in = set(stages_of(toggle.path))
    if not works_in:
        return None
    if works_in <= {"decode_image", "preprocess", "await_image", "upload", "vit", "merge"} and not any(
        r.image_inputs for r, _ in requests
    ):
        return "the workload has no image"
    if works_in <= {"decode", "emit"} and "tpot" not in weights and not goodput:
        return "it works after the first token, and the goal is ttft"
    return None


def _unfit(lab: Lab, toggle: Toggle, option: Option) -> str | None:
    """Why an option is not searched, or None."""
    if not option.exact:
        return "it is approximate: such are asked for by name"
    if (why := option.needs.unmet(lab.checkpoint.target)) is not None:
        return why
    idle = lab.checkpoint.family.idle if toggle.slot == "vit" else ()
    return "it does nothing in this family's tower" if f"{toggle.name}={option.value}" in idle else None


def costs(times: Sequence[tuple[float, float | None]], shares: Sequence[float], goal: Mapping[str, float]) -> dict[str, float]:
    """The seconds of each part of a goal, over requests by their shares, and as `COST` all together, as they weigh.

    times: TTFT and TPOT of each request. Raises `CastOutError` where a part of the goal has no time.
    """
    parts = {}
    for name in goal:
        of_each = [of_one[GOALS.index(name)] for of_one in times]
        if None in of_each:
            raise CastOutError("it has no TPOT: all of an answer came at once, or was one token")
        parts[name] = sum(share * (seconds or 0.0) for share, seconds in zip(shares, of_each, strict=True))
    return {**parts, COST: sum(weight * parts[name] for name, weight in goal.items())}


def read_goal(text: str) -> Goal:
    """A goal from a text: "ttft", "tpot", weights such as "ttft=1,tpot=32", or "goodput,concurrency=8,n=32,ttft=0.5".

    Behind "goodput" come fields of `Goodput`. Raises `RequestError`.
    """
    name, _, rest = text.partition(",")
    try:
        if name.strip() != "goodput":
            return _numbers(text) if "=" in text else text
        given, fields = _numbers(rest), [field.name for field in dataclasses.fields(Goodput)]
    except ValueError:
        raise RequestError(f"{text!r} is no goal; write ttft, tpot, ttft=1,tpot=32, or goodput,concurrency=8,ttft=0.5") from None
    if not given.keys() <= set(fields):
        raise RequestError(f"{text!r} is no goal; behind goodput, the choices are {', '.join(fields)}")
    return Goodput(**given)


def _numbers(text: str) -> dict[str, Any]:
    """Of "one=1,other=0.5", whole numbers as such."""
    pairs = [part.partition("=") for part in text.split(",")]
    return {name.strip(): int(value) if value.strip().isdigit() else float(value) for name, _, value in pairs}


class _Bench:
    """What a search of recipes over a lab runs on: `search.Bench`."""

    def __init__(
        self,
        lab: Lab,
        requests: Sequence[tuple[Request, float]],
        weights: Mapping[str, float],
        goodput: Goodput | None = None,
        *,
        seconds: float,
        limit: float | None,
        quiet: Quiet | None,
        stop: threading.Event | None,
    ) -> None:
        self._lab, self._requests, self._weights, self._stop = lab, requests, weights, stop
        self._began, self.allowed = time.perf_counter(), seconds
        if quiet is not None:
            most = _SHARE_OF_QUIET * seconds
            quiet = dataclasses.replace(quiet, total=min(quiet.total, most), wait=min(quiet.wait, most / 4))
        self._watch = Watch(quiet, lab.device)
        self._oracles = [Oracles(lab, request, stop=stop) for request, _ in requests]
        for oracles in self._oracles:  # a request's own fault is found here, and raised
            oracles.run("transformers")
        took = time.perf_counter() - self._began
        self._limit = max(_SHARE_OF_A_LOOK * seconds, _TIMES_STOCK * took, _LEAST) if limit is None else limit
        self._goodput, self._load_took = goodput, 0.0
        self.load = None if goodput is None else dataclasses.asdict(dataclasses.replace(goodput, n=goodput.count))
        self._sent: tuple[int, list[tuple[int, Request]]] = (-1, [])  # what `_loaded` made of a round
        self._bases: list[str] = []
        self._runs: dict[Recipe, list[Run]] = {}  # the last one of each request
        self.checks: dict[Recipe, tuple[Parity, ...]] = {}

    @property
    def spent(self) -> float:
        """Seconds so far."""
        return time.perf_counter() - self._began

    def left(self) -> float:
        return self.allowed - self.spent

    def hold(self, recipes: Iterable[Recipe]) -> AbstractContextManager[None]:
        return self._lab.hold(recipes)

    def notes(self) -> tuple[str, ...]:
        took = f"the first load took {self._load_took:.3g} s, and the last meeting with the start has up to {2 * CONFIRMING} loads"
        return (*self._watch.notes(), *([took] if self._goodput else []))

    def admit(self, recipe: Recipe) -> None:
        """Two runs of each request, which must be alike, then the parity check; for goodput, of a load too."""
        with self._in_words():
            self._lab.compute(partial(self._look_at, recipe), limit=self._limit)

    def know(self, *recipes: Recipe) -> None:
        """Look at those that were looked at in another process alone."""
        for recipe in recipes:
            if recipe not in self._runs:
                self.admit(recipe)

    def _look_at(self, recipe: Recipe) -> None:
        found, last = [], []
        for number, ((request, _), oracles) in enumerate(zip(self._requests, self._oracles, strict=True)):
            runs = [self._lab.run(request, recipe, stop=self._stop) for _ in range(2)]
            if len(self._bases) == number:
                self._bases.append(oracles.of(recipe))
            if runs[0].tokens != runs[1].tokens:
                raise CastOutError("it is unstable: its tokens differ from one run to the next")
            checked = check(oracles, recipe, runs, runs[0].logits, self._bases[number])
            if not checked.holds:
                raise CastOutError(f"parity: {checked.why}")
            found.append(checked)
            last.append(runs[-1])
        if self._goodput is not None:
            self._lab.warm_up(recipe, [], progress=False)
            sent, made = self._loaded(recipe, -1)
            for number, oracles in enumerate(self._oracles):
                mine = [run for (whose, _), run in zip(sent, made.finished, strict=True) if whose == number]
                others = [run for run in mine if run.tokens != last[number].tokens]
                if others and not (checked := check(oracles, recipe, others, last[number].logits, self._bases[number])).holds:
                    raise CastOutError(f"parity under load: {checked.why}")
            self._load_took = self._load_took or made.seconds
        self._runs[recipe], self.checks[recipe] = last, tuple(found)

    def _loaded(self, recipe: Recipe, number: int) -> tuple[list[tuple[int, Request]], Load]:
        """A round's load, and its requests, each with its number in the workload; in round -1 their pictures are as they are.

        Raises `FastvlError` where one of them failed.
        """
        goal, before = self._goodput, number + 1
        assert goal is not None
        if number < 0 or self._sent[0] != number:
            shares = [share for _, share in self._requests]
            drawn = random.Random(goal.seed + before).choices(range(len(shares)), shares, k=goal.count)
            numbers = range(before * goal.count, (before + 1) * goal.count) if before else [0] * goal.count
            pairs = zip(drawn, numbers, strict=True)
            self._sent = number, [(whose, varied(self._requests[whose][0], picture)) for whose, picture in pairs]
        sent = self._sent[1]
        made = load(
            self._lab,
            [request for _, request in sent],
            recipe,
            concurrency=goal.concurrency,
            rate=goal.rate,
            seed=goal.seed + before,
            warm_up=0,
            stop=self._stop,
        )
        if made.failures or len(made.runs) < goal.count:  # of one that is stopped, not all may have been sent
            why = next(iter(made.failures.values()), "it was stopped")
            raise FastvlError(f"under load, {why}") from RuntimeError(why)  # of a request's error, a load keeps the words alone
        return sent, made

    def measure(self, recipe: Recipe, label: str, number: int) -> Iterator[StageSample]:
        self.know(recipe)
        with self._in_words():
            work = partial(self._costs, recipe) if self._goodput is None else partial(self._cost_under_load, recipe, number)
            once = partial(self._lab.compute, work, limit=self._limit)
            for steps, use in self._watch.measured(once, stop=self._stop):
                if steps is not None:
                    yield StageSample(engine=label, round=number, steps=steps, use=use)

    def _costs(self, recipe: Recipe) -> dict[str, float] | None:
        """The cost of one round; None where a run was not warm."""
        runs = [self._lab.run(request, recipe, stop=self._stop) for request, _ in self._requests]
        if any(run.tokens != before.tokens for run, before in zip(runs, self._runs[recipe], strict=True)):
            raise CastOutError("it is unstable: its tokens differ from one run to the next")
        self._runs[recipe] = runs
        if any(run.kind != "warm" for run in runs):
            return None
        return costs([(run.ttft, run.tpot) for run in runs], [weight for _, weight in self._requests], self._weights)

    def _cost_under_load(self, recipe: Recipe, number: int) -> dict[str, float] | None:
        """The seconds to each good request of a load; None where something was compiled or captured in it."""
        assert self._goodput is not None
        _, made = self._loaded(recipe, number)
        if any(run.captures for run in made.finished):
            return None
        good = made.goodput(**self._goodput.limits)
        return {COST: 1 / good if good else math.inf}

    @contextlib.contextmanager
    def _in_words(self) -> Iterator[None]:
        """Whatever a recipe raises takes it out; what is asked of outside ends the search."""
        try:
            if self._stop is not None and self._stop.is_set():
                raise EndOfSearchError("it was stopped", again=True)
            yield
        except (CastOutError, EndOfSearchError, GeneratorExit):
            raise
        except TimeLimitError as error:
            raise CastOutError(sentence(error), ends=error.stuck) from None
        except Exception as error:
            if self._stop is not None and self._stop.is_set():  # of a load that is stopped, many requests fail at once
                raise EndOfSearchError("it was stopped", again=True) from None
            raise CastOutError(f"it failed: {sentence(error)}", ends=is_lasting(error.__cause__ or error)) from error

    def order(self, recipe: Recipe) -> Sequence[str]:
        """Toggles by the share that their stages have of the goal, the largest first; for goodput, behind those of the schedule."""
        self.know(recipe)
        spent: dict[str, float] = {}
        for run, (_, weight) in zip(self._runs[recipe], self._requests, strict=True):
            of = self._weights if self._goodput is None else {"ttft": 1.0, "tpot": len(run.tokens) - 1.0}
            host, device = run.trace.stages(), run.trace.stages("device")
            for stage in {**host, **device}:
                within = weight * of.get("ttft", 0.0) * max(host.get(stage, 0), device.get(stage, 0)) / 1e9
                spent[stage] = spent.get(stage, 0.0) + within
            spent["decode"] = spent.get("decode", 0.0) + weight * of.get("tpot", 0.0) * (run.tpot or 0.0)
        paths = [toggle.path for toggle in toggles()]
        paths.sort(key=lambda path: -sum(spent.get(stage, 0.0) for stage in stages_of(path)))
        return sorted(paths, key=lambda path: self._goodput is None or not path.startswith("schedule."))

    def described(self, recipe: Recipe) -> tuple[dict[str, Any], ...]:
        """Each request in a few numbers."""
        return tuple(
            {
                "images": [[shape.width, shape.height] for shape in run.shapes],
                "visual_tokens": run.visual_tokens,
                "prompt_tokens": run.n_prompt,
                "new_tokens": len(run.tokens),
                "weight": weight,
                **({"load": self.load} if self.load else {}),
            }
            for run, (_, weight) in zip(self._runs[recipe], self._requests, strict=True)
        )


# The command line, for a box without a notebook.


def _size(text: str) -> tuple[int, int]:
    width, by, height = text.partition("x")
    if not (by and width.isdigit() and height.isdigit() and int(width) and int(height)):
        raise argparse.ArgumentTypeError(f"{text!r} is no size; write WIDTHxHEIGHT, such as 448x448")
    return int(width), int(height)


@contextlib.contextmanager
def _interruption() -> Iterator[threading.Event]:
    """Set by the first Ctrl-C; a second one interrupts as ever."""
    stop, before = threading.Event(), signal.getsignal(signal.SIGINT)

    def first(*_: object) -> None:
        stop.set()
        signal.signal(signal.SIGINT, before)

    signal.signal(signal.SIGINT, first)
    try:
        yield stop
    finally:
        signal.signal(signal.SIGINT, before)


def main(arguments: Sequence[str] | None = None) -> None:
    """Progress and the table to the terminal, all of it to a file; arguments: by default the process's."""
    parser = argparse.ArgumentParser(prog="python -m fastvl_lab.measure.tune", description=__doc__)
    parser.add_argument("--checkpoint", required=True, help="a folder, a hub id, a built-in name, or random:<hub id>")
    parser.add_argument("--image", help="a path or a built-in photograph (default: one that is drawn)")
    parser.add_argument("--image-size", type=_size, nargs="+", default=[(448, 448)], help="WxH; of several each counts alike")
    parser.add_argument("--prompt", default="What is in this picture?", help="the text after the image")
    parser.add_argument(
        "--max-new-tokens", type=int, default=8, help="tokens to make; the end-of-text token is ignored (default 8)"
    )
    parser.add_argument("--seconds", type=float, default=120, help="that it may take (default 120)")
    goals = "ttft, tpot, weights such as ttft=1,tpot=32, or goodput,concurrency=8,n=32,ttft=0.5,tpot=0.05 (default ttft)"
    parser.add_argument("--goal", default="ttft", help=goals)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", help="cpu, cuda, cuda:1 (default: CUDA where present)")
    parser.add_argument("--dtype", help="float32, bfloat16, float16")
    parser.add_argument("--no-keep", action="store_true", help='leave what "fastest" means here as it is')
    parser.add_argument("--out", type=Path, help="a file for all of it as JSON")
    given = parser.parse_args(arguments)
    if given.out is not None and not given.out.parent.is_dir():
        parser.error(f"--out is {given.out}, and there is no folder {given.out.parent}")

    def say(now: Progress) -> None:
        print(f"{now.ratio:5.2f}×  {now.phase}: {now.trying}", flush=True)

    try:
        lab = Lab(given.checkpoint, device=given.device, dtype=given.dtype)
        images = [photo(given.image, size) if given.image else picture(*size) for size in given.image_size]
        asked = {"prompt": given.prompt, "max_new_tokens": given.max_new_tokens, "ignore_eos": True}
        workload = [(Request(images=[image], **asked), 1.0) for image in images]
        with _interruption() as stop:
            found = tune(
                lab,
                workload,
                given.seconds,
                goal=read_goal(given.goal),
                seed=given.seed,
                keep=not given.no_keep,
                on_progress=say,
                stop=stop,
            )
    except FastvlError as error:
        sys.exit(str(error))
    print(f"\n{found!r}")
    if given.out is not None:
        given.out.write_text(json.dumps(found.to_record(), indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
