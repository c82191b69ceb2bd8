"""The search for the best recipe: what is tried, in which order, and when a recipe is given up. It knows costs, and no model.

A race runs recipes that differ in little from the best so far against it, in interleaved rounds. A hopeless one is dropped after
few of them, by its paired ratios; one that is shown to be faster, by the whole of its interval, becomes the best. First run whole
recipes, then each toggle alone, then pairs of toggles that act on one another, then what takes long to make ready, then the
neighbours of what was found. Whoever picks the best of many has been lucky with some: so the best meets the start once more, and
stays only where samples taken for that alone show it to be faster.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from itertools import product
from statistics import median
from typing import Literal, NamedTuple, Protocol

from fastvl_lab.catalogue import OptionValue
from fastvl_lab.errors import FastvlError, RecipeError
from fastvl_lab.measure.recipes import Changes, changed
from fastvl_lab.measure.samples import Interval, Samples, StageSample, gains, times_as_fast
from fastvl_lab.recipe import Recipe

ROUNDS = 12  # of a race at most
CONFIRMING = 12  # rounds in which the best meets the start, where there is time
KEPT = 8  # of these, for which time is kept: six give an interval, and runs of a later minute may be slower

# Rounds of a race in which a recipe was not faster: after so many, none of those that are left could show it to be, since the
# interval of at most `ROUNDS` begins at the third smallest ratio (`samples.median_interval`). One that is far behind goes at once.
LOST = 3
_FAR, _FAR_ROUNDS = 0.8, 2

# Of an earlier race, a ratio from which an option is tried again beside what was found since.
_NEAR = 0.95

# Toggles that act on one another.
PAIRS = (
    ("attention.prefill", "cache.kv"),
    ("attention.decode", "cache.kv"),
    ("capture.vit", "capture.shapes"),
    ("capture.prefill", "capture.shapes"),
    ("capture.decode", "capture.shapes"),
    ("capture.first_token", "capture.shapes"),
)

COST = "cost"  # the step of a sample that counts
_BEST = "the best so far"

Verdict = Literal["taken", "slower", "no faster", "never warm", "no time"]


class CastOutError(FastvlError):
    """A recipe that may not be timed: the sentence says why. ends: after it nothing more can be timed."""

    def __init__(self, why: str, *, ends: bool = False) -> None:
        super().__init__(why)
        self.ends = ends


class EndOfSearchError(Exception):
    """Nothing more can be measured, or somebody wants no more; the sentence says why. again: another process could go on."""

    def __init__(self, why: str, *, again: bool = False) -> None:
        super().__init__(why)
        self.again = again


@dataclass(frozen=True, kw_only=True, eq=False)
class Tried:
    """One recipe in one race.

    label: what it changes of the recipe `over`. ratio: how many times as fast as that it is, None where no round of both was timed.
    """

    label: str
    recipe: Recipe
    over: Recipe
    phase: str
    rounds: int
    ratio: Interval | None
    verdict: Verdict


@dataclass(frozen=True, kw_only=True, eq=False)
class CastOut:
    """A recipe that was not timed to the end, or an option that cannot run here (without a recipe), and why."""

    label: str
    why: str
    recipe: Recipe | None = None


@dataclass(frozen=True, kw_only=True)
class Progress:
    """How far a search is. ratio: the product of the medians by which the best has improved on the start."""

    phase: str
    trying: str
    best: Recipe
    ratio: float
    n_tried: int


class Bench(Protocol):
    """What a search runs on."""

    def admit(self, recipe: Recipe) -> None:
        """Make a recipe warm and hold it against its oracle; raises `CastOutError`, and `EndOfSearchError`."""

    def measure(self, recipe: Recipe, label: str, number: int) -> Iterable[StageSample]:
        """The samples of one round, with a step `COST`; none where it was not warm. Raises as `admit`."""

    def hold(self, recipes: Iterable[Recipe]) -> AbstractContextManager[None]:
        """Keep them ready."""

    def left(self) -> float:
        """Seconds; what is negative is over."""


@dataclass(frozen=True, kw_only=True)
class Space:
    """What is searched.

    values: toggle -> the values that may be chosen, in the order in which toggles are tried. late: "slot.toggle=value" of what
    takes long to make ready. allowed: why a recipe cannot be chosen at all, None where it can.
    """

    values: Mapping[str, Sequence[OptionValue]]
    late: frozenset[str]
    allowed: Callable[[Recipe], str | None]


class Raced(NamedTuple):
    """One sample of a race. race: its number, from 0; tried: what its recipe changes, or `_BEST`; cost: in seconds, or infinite."""

    race: int
    phase: str
    tried: str
    round: int
    cost: float
    disturbed: bool | None


@dataclass(frozen=True, kw_only=True, eq=False)
class Found:
    """What a search came to. ratio: of `recipe` over `start`, by samples taken for that alone; None where there are none.

    gained: the product of the medians by which the search came to the recipe, confirmed or not. untried: labels for which time was
    too short. samples: raw, of races that were run to their end. cut_off: it was stopped, or could time nothing more in this
    process, so another may go on with it.
    """

    recipe: Recipe
    start: Recipe
    ratio: Interval | None
    gained: float
    confirmed: bool
    tried: tuple[Tried, ...]
    cast_out: tuple[CastOut, ...]
    untried: tuple[str, ...]
    samples: tuple[Raced, ...]
    ended: str
    cut_off: bool = False


def search(
    starts: Mapping[str, Recipe],
    space: Space,
    bench: Bench,
    *,
    seeds: Mapping[str, Recipe] | None = None,
    order: Callable[[Recipe], Sequence[str]] = lambda _: (),
    seed: int = 0,
    on_progress: Callable[[Progress], object] | None = None,
) -> Found:
    """The recipe of least cost that a bench lets pass.

    starts: label -> recipe; the first that passes is what the result is held against. seeds: whole recipes to try first. order: the
    toggles as they are to be tried, those of most of the time first, once the start has run; toggles it does not name come after.
    Raises `RecipeError` where no start passes, `EndOfSearchError` where it ends before one has,
    and nothing else for a fault of a recipe.
    """
    return _Search(starts, space, bench, seed, on_progress).run(seeds or {}, order)


def told(recipe: Recipe, over: Recipe, first: Sequence[str] = ()) -> str:
    """What a recipe changes of another: the toggles `first`, then what goes with them."""
    changed = [path for path in {**over.changes(), **recipe.changes()} if recipe.value(path) != over.value(path)]
    changed.sort(key=lambda path: (path not in first, [*first, path].index(path)))
    return ", ".join(f"{path}={recipe.value(path)}" for path in changed) or "nothing"


class _Search:
    def __init__(
        self,
        starts: Mapping[str, Recipe],
        space: Space,
        bench: Bench,
        seed: int,
        on_progress: Callable[[Progress], object] | None,
    ) -> None:
        self._space, self._bench, self._on_progress = space, bench, on_progress
        self._shuffled = random.Random(seed)
        self._tried: list[Tried] = []
        self._cast_out: list[CastOut] = []
        self._untried: dict[str, None] = {}
        self._raced: list[Raced] = []
        self._bests: list[tuple[Recipe, float]] = []  # the start, then each that was taken, with the product of medians up to it
        self._blamed: list[Changes] = []  # choices that, all together, took a recipe out
        self._seen: set[Recipe] = set()
        self._rounds_took: list[float] = []  # seconds of each round of one recipe
        self._looks_took: list[float] = []  # and of each that was let in, or not
        self._phase = "start"
        self._bests = [(self._first(starts), 1.0)]

    @property
    def _best(self) -> Recipe:
        return self._bests[-1][0]

    def _first(self, starts: Mapping[str, Recipe]) -> Recipe:
        for label, recipe in starts.items():
            self._tell(label, recipe)
            try:
                self._admit(recipe)
            except CastOutError as error:
                self._cast_out.append(CastOut(label=label, recipe=recipe, why=str(error)))
                if error.ends:
                    break
            else:
                return recipe
        raise RecipeError(f"no recipe passes here: {'; '.join(f'{one.label}: {one.why}' for one in self._cast_out)}")

    def run(self, seeds: Mapping[str, Recipe], order: Callable[[Recipe], Sequence[str]]) -> Found:
        start, ratio, confirmed = self._best, None, False
        ended = "everything was tried"
        try:
            self._race_all("whole recipes", seeds)
            named = [path for path in order(start) if path in self._space.values]
            paths = [*named, *(path for path in self._space.values if path not in named)]
            self._race_all("one at a time", *map(self._alone, paths))
            self._race_all("together", *(self._both(*pair) for pair in PAIRS if set(pair) <= set(paths)))
            self._race_all("what is compiled", *(self._alone(path, late=True) for path in paths))
            self._race_all("neighbours", *map(self._again, paths))
            if self._untried:
                ended = f"the time was over before {len(self._untried)} were tried"
        except EndOfSearchError as error:
            return self._found(start, None, False, str(error), cut_off=error.again)
        if self._best != start:
            self._phase = "against the start"
            try:
                ratio = self._confirm(start)
                confirmed = True
            except EndOfSearchError as error:
                return self._found(start, None, False, str(error), cut_off=error.again)
            if ratio is None or not gains(ratio):
                self._bests = self._bests[:1]
        return self._found(start, ratio, confirmed, ended)

    def _found(self, start: Recipe, ratio: Interval | None, confirmed: bool, ended: str, *, cut_off: bool = False) -> Found:
        return Found(
            recipe=self._best,
            start=start,
            ratio=ratio,
            gained=self._bests[-1][1],
            confirmed=confirmed,
            tried=tuple(self._tried),
            cast_out=tuple(self._cast_out),
            untried=tuple(self._untried),
            samples=tuple(self._raced),
            ended=ended,
            cut_off=cut_off,
        )

    # What is tried; each gives label -> recipe against the best as it is then.

    def _alone(self, path: str, *, late: bool = False) -> Callable[[], dict[str, Recipe]]:
        """Each value of a toggle, with what it requires."""

        def entrants() -> dict[str, Recipe]:
            values = [value for value in self._space.values[path] if (f"{path}={value}" in self._space.late) is late]
            return self._changed([{path: value} for value in values])

        return entrants

    def _both(self, one: str, other: str) -> Callable[[], dict[str, Recipe]]:
        """Each two values of two toggles of which neither is what the best has."""

        def entrants() -> dict[str, Recipe]:
            values = ([value for value in self._space.values[path] if value != self._best.value(path)] for path in (one, other))
            pairs = [dict(zip((one, other), pair, strict=True)) for pair in product(*values)]
            return self._changed([pair for pair in pairs if not self._space.late & {f"{p}={v}" for p, v in pair.items()}])

        return entrants

    def _again(self, path: str) -> Callable[[], dict[str, Recipe]]:
        """The values of a toggle that were near in their last race, or in none."""

        def entrants() -> dict[str, Recipe]:
            known = {}
            for tried in self._tried:
                if tried.ratio is not None:
                    known[tried.label.partition(",")[0]] = tried.ratio.median
            near = [value for value in self._space.values[path] if known.get(f"{path}={value}", 1.0) >= _NEAR]
            return self._changed([{path: value} for value in near if f"{path}={value}" not in self._space.late])

        return entrants

    def _changed(self, several: Iterable[Changes]) -> dict[str, Recipe]:
        """The best with these changes, where they can be made at once, and what they require."""
        found = {}
        for changes in several:
            try:
                recipe = changed(self._best, changes)
            except RecipeError:  # a combination without meaning
                continue
            if recipe != self._best and all(recipe.value(path) == value for path, value in changes.items()):
                found[told(recipe, self._best, list(changes))] = recipe
        return found

    def _race_all(self, phase: str, *races: Mapping[str, Recipe] | Callable[[], Mapping[str, Recipe]]) -> None:
        self._phase = phase
        for entrants in races:
            self._race(entrants() if callable(entrants) else entrants)

    # How it is tried.

    def _race(self, entrants: Mapping[str, Recipe]) -> None:
        """Those that pass against the best, in rounds; the fastest of those that are shown to be faster is taken."""
        over = self._best
        running = dict(self._passed(entrants))
        racing = dict(running)
        made: list[StageSample] = []
        with self._bench.hold([over, *running.values()]):
            for number in range(ROUNDS):
                if not running or (self._short() and number):
                    break
                made += self._round({_BEST: over, **running}, number)
                if self._best != over:  # it has failed
                    return
                running = {label: recipe for label, recipe in running.items() if recipe in self._seen}
                for label in [label for label in running if self._settled(Samples(samples=tuple(made)), label)]:
                    del running[label]
        self._write_down(made)
        self._judge(Samples(samples=tuple(made)), racing, over)

    def _judge(self, samples: Samples[StageSample], racing: Mapping[str, Recipe], over: Recipe) -> None:
        """Write down what became of each, and take the best."""
        racing = {label: recipe for label, recipe in racing.items() if recipe in self._seen}
        ratios = {label: samples.ratio(label, _BEST, COST) for label in racing}
        faster = {label: ratio for label, ratio in ratios.items() if ratio is not None and gains(ratio)}
        taken = max(faster, key=lambda label: faster[label].median, default=None)
        for label, recipe in racing.items():
            ratio, rounds = ratios[label], len(samples.seconds(label, COST))
            verdict: Verdict = "taken" if label == taken else "no faster"
            if ratio is None:
                verdict = "never warm" if samples.samples else "no time"
            elif max(_paired(samples, label)) < 1:
                verdict = "slower"
            row = Tried(label=label, recipe=recipe, over=over, phase=self._phase, rounds=rounds, ratio=ratio, verdict=verdict)
            self._tried.append(row)
        if taken is not None:
            self._bests.append((racing[taken], self._bests[-1][1] * faster[taken].median))
            self._tell(taken, self._best)

    def _passed(self, entrants: Mapping[str, Recipe]) -> Iterator[tuple[str, Recipe]]:
        """Those that have not been tried, can run, and compute what they should, for as long as there is time."""
        for label, recipe in entrants.items():
            if recipe in self._seen or any(all(recipe.value(p) == v for p, v in blamed.items()) for blamed in self._blamed):
                continue
            if self._space.allowed(recipe) is not None:
                continue
            if self._short():
                self._untried[label] = None
                continue
            self._untried.pop(label, None)
            self._tell(label, recipe)
            before = self._bench.left()
            try:
                self._admit(recipe)
            except CastOutError as error:
                self._blame(label, recipe, self._best, error)
            else:
                yield label, recipe
            self._looks_took.append(before - self._bench.left())

    def _admit(self, recipe: Recipe) -> None:
        """Let the bench look at it; what passes has been seen."""
        self._bench.admit(recipe)
        self._seen.add(recipe)

    def _round(self, recipes: Mapping[str, Recipe], number: int) -> list[StageSample]:
        """One round, in shuffled order. A recipe that fails in it is seen no more; where the best does, the one before it is."""
        made: list[StageSample] = []
        order = list(recipes)
        self._shuffled.shuffle(order)
        for label in order:
            before = self._bench.left()
            try:
                made += self._bench.measure(recipes[label], label, number)
            except CastOutError as error:
                if label == _BEST:
                    self._fall_back(error)
                    return []
                self._blame(label, recipes[label], self._best, error)
            self._rounds_took.append(before - self._bench.left())
        return made

    def _fall_back(self, error: CastOutError) -> None:
        """The best so far failed after it had passed: the one before it is the best again."""
        if len(self._bests) == 1:
            raise EndOfSearchError(f"the start itself failed: {error}")
        failed, _ = self._bests.pop()  # which of its choices is to blame nobody knows: it alone is not tried again
        self._cast_out.append(CastOut(label=told(failed, self._best), recipe=failed, why=str(error)))
        if error.ends:
            raise EndOfSearchError(f"{error}; nothing more can be timed in this process", again=True)

    def _blame(self, label: str, recipe: Recipe, over: Recipe, error: CastOutError) -> None:
        """Take a recipe out, and with it all that has the same choices."""
        self._cast_out.append(CastOut(label=label, recipe=recipe, why=str(error)))
        self._seen.discard(recipe)
        changed = {**over.changes(), **recipe.changes()}
        self._blamed.append({path: recipe.value(path) for path in changed if recipe.value(path) != over.value(path)})
        if error.ends:
            raise EndOfSearchError(f"{label}: {error}; nothing more can be timed in this process", again=True)

    def _settled(self, samples: Samples[StageSample], label: str) -> bool:
        """Whether more rounds would say no more of it: it is shown to be faster, or can no longer be."""
        ratios = _paired(samples, label)
        far = len(ratios) >= _FAR_ROUNDS and max(ratios) < _FAR
        return far or sum(ratio <= 1 for ratio in ratios) >= LOST or gains(samples.ratio(label, _BEST, COST))

    def _confirm(self, start: Recipe) -> Interval | None:
        """The best against the start, on samples of their own.

        So are its rounds' numbers, by which a bench draws a load: the best may have been lucky with those of the races.
        """
        best = self._best
        label = told(best, start)
        self._tell(label, best)
        made: list[StageSample] = []
        with self._bench.hold([start, best]):
            for number in range(ROUNDS, ROUNDS + CONFIRMING):
                if self._bench.left() < 0:
                    break
                order = {label: best, _BEST: start}
                names = list(order)
                self._shuffled.shuffle(names)
                for name in names:
                    try:
                        made += self._bench.measure(order[name], name, number)
                    except CastOutError as error:
                        if name == _BEST:
                            raise EndOfSearchError(f"the start itself failed: {error}") from None
                        self._bests = self._bests[:1]
                        self._blame(label, best, start, error)
                        return None
        self._write_down(made)
        return Samples(samples=tuple(made)).ratio(label, _BEST, COST)

    def _write_down(self, made: Iterable[StageSample]) -> None:
        """Keep the samples of a race, raw."""
        race = self._raced[-1].race + 1 if self._raced else 0
        self._raced += [Raced(race, self._phase, s.engine, s.round, s.steps[COST], s.disturbed) for s in made]

    def _short(self) -> bool:
        """Whether what is left is needed for one more look at a recipe, and for the end, when the best meets the start."""
        a_round, a_look = (median(took) if took else 0.0 for took in (self._rounds_took, self._looks_took))
        return self._bench.left() < 2 * KEPT * a_round + a_look

    def _tell(self, trying: str, recipe: Recipe) -> None:
        if self._on_progress is not None:
            best, gained = self._bests[-1] if self._bests else (recipe, 1.0)
            self._on_progress(Progress(phase=self._phase, trying=trying, best=best, ratio=gained, n_tried=len(self._tried)))


def _paired(samples: Samples[StageSample], label: str) -> list[float]:
    """The ratio of each round in which both were timed."""
    ours, theirs = samples.by_round(label, COST), samples.by_round(_BEST, COST)
    return [times_as_fast(ours[number], theirs[number]) for number in ours if number in theirs]
