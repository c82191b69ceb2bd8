"""The search for the best recipe, over costs that are written down: what it finds, gives up, casts out, and when it ends."""

from __future__ import annotations

import math
import os
import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from statistics import median

import pytest

from fastvl_lab.catalogue import OptionValue
from fastvl_lab.errors import RecipeError
from fastvl_lab.measure.journal import MOST_UNFINISHED, Journalled
from fastvl_lab.measure.samples import StageSample, gains, median_interval
from fastvl_lab.measure.search import (
    CONFIRMING,
    COST,
    LOST,
    ROUNDS,
    CastOutError,
    EndOfSearchError,
    Found,
    Progress,
    Space,
    search,
)
from fastvl_lab.recipe import Recipe

LEAN = Recipe.baseline().replace("vit.tower", "lean")
VALUES: dict[str, Sequence[OptionValue]] = {
    "vit.patch_embed": ("conv3d", "linear"),
    "vit.norms": ("eager", "native"),
    "vit.rope": ("eager", "halves"),
    "attention.last_layer": ("all_tokens", "last_token"),
    "cache.kv": ("concat", "static", "paged"),
    "attention.projections": ("separate", "fused"),
}
SPACE = Space(values=VALUES, late=frozenset(), allowed=lambda _: None)

Cost = Callable[[Recipe], float]


class Bench:
    """A clock that moves by what is measured: costs in seconds, times log-normal noise."""

    def __init__(self, cost: Cost, *, seconds: float = math.inf, noise: float = 0.02, seed: int = 0, look: float = 0.1) -> None:
        self.cost, self.time, self.seconds, self.noise, self.look = cost, 0.0, seconds, noise, look
        self.random = random.Random(seed)
        self.admitted: list[Recipe] = []
        self.measured: list[Recipe] = []

    def admit(self, recipe: Recipe) -> None:
        self.admitted.append(recipe)
        self.time += self.look

    def measure(self, recipe: Recipe, label: str, number: int) -> Iterator[StageSample]:
        self.measured.append(recipe)
        took = self.cost(recipe) * math.exp(self.random.gauss(0, self.noise))
        self.time += took
        yield StageSample(engine=label, round=number, steps={COST: took})

    def hold(self, recipes: Iterable[Recipe]) -> AbstractContextManager[None]:
        return nullcontext()

    def left(self) -> float:
        return self.seconds - self.time


def _saves(changes: Mapping[str, tuple[OptionValue, float]], start: float = 1.0) -> Cost:
    """A cost to which each of these choices adds, or, where negative, of which it takes."""
    return lambda recipe: start + sum(by for path, (value, by) in changes.items() if recipe.value(path) == value)


def _run(bench: Bench, **more: object) -> Found:
    return search({"start": LEAN}, SPACE, bench, **more)  # type: ignore[arg-type]


COSTS: dict[str, tuple[OptionValue, float]] = {
    "vit.rope": ("halves", -0.1),
    "vit.norms": ("native", 0.2),
    "cache.kv": ("static", -0.2),
    "attention.projections": ("fused", -0.05),
}
BEST = LEAN.replace({"vit.rope": "halves", "cache.kv": "static", "attention.projections": "fused"})


@pytest.mark.parametrize("seed", range(10))
def test_it_finds_what_saves_and_leaves_what_does_not(seed: int) -> None:
    found = _run(Bench(_saves(COSTS), seed=seed), seed=seed)
    assert {path: found.recipe.value(path) for path in COSTS} == {path: BEST.value(path) for path in COSTS} | {"vit.norms": "eager"}
    assert found.confirmed
    assert found.ratio is not None
    assert found.ratio.low <= 1 / 0.65 <= found.ratio.high or abs(found.ratio.median * 0.65 - 1) < 0.03
    assert found.ended == "everything was tried"
    assert {tried.label for tried in found.tried if tried.verdict == "slower"} >= {"vit.norms=native"}


def test_a_difference_that_is_not_there_is_taken_rarely_and_confirmed_never_worse() -> None:
    """Of recipes that cost the same, the start stays in nearly all searches."""
    moved = 0
    for seed in range(40):
        found = _run(Bench(lambda _: 1.0, noise=0.05, seed=seed), seed=seed)
        assert found.recipe == LEAN or (found.ratio is not None and gains(found.ratio))
        moved += found.recipe != LEAN
    assert moved <= 4


def test_what_only_pays_together_is_found_among_the_pairs() -> None:
    """Either alone costs; both together save."""

    def cost(recipe: Recipe) -> float:
        eager, sdpa = recipe.value("attention.decode") == "eager", recipe.value("attention.decode") == "sdpa"
        concat = recipe.value("cache.kv") == "concat"
        return 1.0 if eager and concat else 0.7 if sdpa and recipe.value("cache.kv") == "static" else 1.3

    space = Space(values={**VALUES, "attention.decode": ("eager", "sdpa")}, late=frozenset(), allowed=lambda _: None)
    found = search({"start": LEAN}, space, Bench(cost))
    assert (found.recipe.value("attention.decode"), found.recipe.value("cache.kv")) == ("sdpa", "static")
    assert [tried.phase for tried in found.tried if tried.verdict == "taken"] == ["together"]


def test_a_hopeless_one_costs_few_rounds() -> None:
    bench = Bench(_saves({"vit.norms": ("native", 1.0), "vit.rope": ("halves", 0.05)}))
    found = _run(bench)
    rounds = {tried.label: tried.rounds for tried in found.tried}
    assert rounds["vit.norms=native"] == 2
    assert rounds["vit.rope=halves"] <= LOST + 1


def test_after_so_many_lost_rounds_no_interval_could_show_a_gain() -> None:
    lost = [0.99] * LOST + [2.0] * (ROUNDS - LOST)
    assert not gains(median_interval(lost))
    assert gains(median_interval([0.99] * (LOST - 1) + [2.0] * (ROUNDS - LOST + 1)))


def test_toggles_are_tried_in_the_order_that_is_asked_for_and_then_the_rest() -> None:
    asked: list[Progress] = []
    _run(Bench(lambda _: 1.0), order=lambda _: ("cache.kv", "vit.rope", "no.such"), on_progress=asked.append)
    alone = [now.trying.partition("=")[0] for now in asked if now.phase == "one at a time"]
    assert list(dict.fromkeys(alone)) == [
        "cache.kv",
        "vit.rope",
        *(path for path in VALUES if path not in ("cache.kv", "vit.rope")),
    ]


class Faulty(Bench):
    """One that takes some recipes out, when they are let in or in a later round."""

    def __init__(self, cost: Cost, at_the_door: dict[str, OptionValue], later: dict[str, OptionValue], **more: float) -> None:
        super().__init__(cost, **more)  # type: ignore[arg-type]
        self.at_the_door, self.later, self.ends = at_the_door, later, False

    def admit(self, recipe: Recipe) -> None:
        super().admit(recipe)
        for path, value in self.at_the_door.items():
            if recipe.value(path) == value:
                raise CastOutError(f"{path} is wrong", ends=self.ends)

    def measure(self, recipe: Recipe, label: str, number: int) -> Iterator[StageSample]:
        yield from super().measure(recipe, label, number)
        if number >= 1 and any(recipe.value(path) == value for path, value in self.later.items()):
            raise CastOutError("it crashed")


def test_what_is_wrong_is_named_and_never_asked_again() -> None:
    bench = Faulty(_saves(COSTS), {"cache.kv": "static"}, {"vit.rope": "halves"})
    found = _run(bench)
    assert {one.label: one.why for one in found.cast_out} == {
        "cache.kv=static": "cache.kv is wrong",
        "vit.rope=halves": "it crashed",
    }
    assert sum(recipe.value("cache.kv") == "static" for recipe in bench.admitted) == 1
    assert sum(recipe.value("vit.rope") == "halves" for recipe in bench.admitted) == 1
    assert not {tried.label for tried in found.tried} & {"cache.kv=static", "vit.rope=halves"}
    assert found.recipe.value("attention.projections") == "fused"
    assert (found.recipe.value("cache.kv"), found.recipe.value("vit.rope")) == ("concat", "eager")


def test_a_best_that_fails_later_makes_room_for_the_one_before_it() -> None:
    class Late(Bench):
        def measure(self, recipe: Recipe, label: str, number: int) -> Iterator[StageSample]:
            if recipe.value("vit.rope") == "halves" and len(self.measured) > 60:
                raise CastOutError("it has become unstable")
            yield from super().measure(recipe, label, number)

    found = _run(Late(_saves(COSTS)), order=lambda _: ("vit.rope", "cache.kv", "attention.projections"))
    assert found.recipe.value("vit.rope") == "eager"
    assert {one.why for one in found.cast_out} == {"it has become unstable"}
    assert found.cast_out[0].recipe is not None
    assert found.recipe == LEAN or gains(found.ratio)


def test_a_start_that_does_not_pass_makes_room_for_the_next() -> None:
    bench = Faulty(_saves(COSTS), {"cache.kv": "static"}, {})
    found = search({"fastest": BEST, "baseline": LEAN}, SPACE, bench)
    assert found.start == LEAN
    assert found.cast_out[0].label == "fastest"
    with pytest.raises(RecipeError, match=r"no recipe passes here: fastest: cache\.kv is wrong"):
        search({"fastest": BEST}, SPACE, bench)


def test_what_leaves_nothing_behind_to_run_on_ends_the_search_and_is_named() -> None:
    bench = Faulty(_saves(COSTS), {"cache.kv": "static"}, {})
    bench.ends = True
    found = _run(bench, order=lambda _: ("vit.rope", "cache.kv"))
    assert found.ended.startswith("cache.kv=static: cache.kv is wrong; nothing more can be timed")
    assert found.cast_out[-1].label == "cache.kv=static"
    assert (found.recipe.value("vit.rope"), found.confirmed, found.ratio) == ("halves", False, None)
    assert found.gained == pytest.approx(1 / 0.9, rel=0.05)


def test_stopping_gives_the_best_so_far() -> None:
    class Stopped(Bench):
        def admit(self, recipe: Recipe) -> None:
            if len(self.admitted) == 4:
                raise EndOfSearchError("it was stopped")
            super().admit(recipe)

    found = _run(Stopped(_saves(COSTS)), order=lambda _: ("vit.rope",))
    assert (found.recipe.value("vit.rope"), found.confirmed, found.ended) == ("halves", False, "it was stopped")


@pytest.mark.parametrize("seconds", [5.0, 20.0, 60.0])
def test_time_is_kept_and_what_it_was_too_short_for_is_named(seconds: float) -> None:
    bench = Bench(_saves(COSTS), seconds=seconds)
    found = _run(bench)
    assert bench.time <= seconds + bench.look + 2 * max(map(bench.cost, bench.measured)) * 1.1
    assert found.untried
    assert f"before {len(found.untried)} were tried" in found.ended
    assert found.recipe == LEAN or found.confirmed


def test_no_more_time_is_kept_than_the_end_needs() -> None:
    """Time for some 40 runs is enough to find what saves a tenth, and to confirm it by an interval."""
    found = [_run(Bench(_saves(COSTS), seconds=40, seed=seed), seed=seed) for seed in range(40)]
    confirmed = [one for one in found if one.confirmed]
    assert len(confirmed) >= 5
    assert all(one.ratio is not None for one in confirmed)


def test_a_best_that_was_lucky_does_not_outlive_the_end() -> None:
    """Its races say faster, its last meeting with the start does not: the start stays."""

    class Lucky(Bench):
        def measure(self, recipe: Recipe, label: str, number: int) -> Iterator[StageSample]:
            lucky = recipe != LEAN and self.measured.count(recipe) < ROUNDS // 2
            for sample in super().measure(recipe, label, number):
                yield StageSample(engine=label, round=number, steps={COST: sample.steps[COST] * (0.8 if lucky else 1.0)})

    space = Space(values={"vit.rope": VALUES["vit.rope"]}, late=frozenset(), allowed=lambda _: None)
    found = search({"start": LEAN}, space, Lucky(_flat))
    assert [tried.verdict for tried in found.tried] == ["taken"]
    assert found.recipe == LEAN
    assert found.ratio is not None
    assert not gains(found.ratio)


def _flat(_: Recipe) -> float:
    return 1.0


# Goodput: a load without a good request costs infinitely much.

LOADS = Space(
    values={"schedule.batching": ("one_at_a_time", "continuous"), "schedule.max_batch": (8, 32), "vit.rope": ("eager", "halves")},
    late=frozenset(),
    allowed=lambda _: None,
)


def _goodput_of_batches(recipe: Recipe) -> float:
    """None alone, 4 a second in batches of 8, and 8 in those of 32."""
    return math.inf if recipe.schedule.batching == "one_at_a_time" else 1 / 4 if recipe.schedule.max_batch == 8 else 1 / 8


def test_any_good_request_is_better_than_none_and_more_are_better_yet(tmp_path: Path) -> None:
    class Steadily(Bench):
        def measure(self, recipe: Recipe, label: str, number: int) -> Iterator[StageSample]:
            self.measured.append(recipe)
            if len(self.measured) == self.killed_at:
                raise KeyboardInterrupt
            self.time += 1.0
            yield StageSample(engine=label, round=number, steps={COST: self.cost(recipe)})

        killed_at = -1

    found = search({"start": LEAN}, LOADS, Steadily(_goodput_of_batches))
    assert (found.recipe.schedule.batching, found.recipe.schedule.max_batch) == ("continuous", 32)
    assert found.ratio is not None
    assert (tuple(found.ratio), found.confirmed) == ((math.inf,) * 3, True)
    assert {tried.label.partition(",")[0]: tried.verdict for tried in found.tried if tried.phase == "one at a time"} == {
        "schedule.batching=continuous": "taken",
        "schedule.max_batch=32": "taken",
        "vit.rope=halves": "no faster",
    }
    back = search({"start": found.recipe}, LOADS, Steadily(_goodput_of_batches))
    assert back.recipe == found.recipe
    assert {(tried.verdict, tried.rounds) for tried in back.tried if "one_at_a_time" in tried.label} == {("slower", 2)}
    killed = Steadily(_goodput_of_batches)
    killed.killed_at = 20
    with pytest.raises(KeyboardInterrupt):
        search({"start": LEAN}, LOADS, Journalled(killed, tmp_path / "killed", {}))
    journal = Journalled(Steadily(_goodput_of_batches), tmp_path / "killed", {})
    assert _told(search({"start": LEAN}, LOADS, journal)) == _told(found)
    assert journal.found > 19


def test_where_no_load_has_a_good_request_the_start_stays() -> None:
    found = search({"start": LEAN}, LOADS, Bench(lambda _: math.inf))
    assert (found.recipe, found.confirmed) == (LEAN, False)
    assert {(tried.verdict, tried.ratio and tried.ratio.median, tried.rounds) for tried in found.tried} == {
        ("no faster", 1.0, LOST)
    }


def test_what_takes_long_to_make_ready_comes_last_but_for_the_neighbours() -> None:
    space = Space(
        values=VALUES, late=frozenset({"vit.rope=halves"}), allowed=lambda r: "not so" if r.value("cache.kv") == "paged" else None
    )
    asked: list[Progress] = []
    found = search({"start": LEAN}, space, Bench(_saves(COSTS)), on_progress=asked.append)
    phases = {now.trying: now.phase for now in asked if now.trying == "vit.rope=halves"}
    assert "what is compiled" in {tried.phase for tried in found.tried if tried.label == "vit.rope=halves"}
    assert set(phases.values()) == {"what is compiled"}
    assert not any("cache.kv=paged" in now.trying for now in asked)
    assert found.recipe.value("vit.rope") == "halves"


def test_the_last_meeting_has_rounds_of_its_own() -> None:
    bench = Bench(_saves(COSTS))
    found = _run(bench)
    assert found.ratio is not None
    last = bench.measured[-2 * CONFIRMING :]
    assert last.count(found.recipe) == last.count(LEAN) == CONFIRMING
    of_races = {one.round for one in found.samples if one.phase != "against the start"}
    of_the_last = {one.round for one in found.samples if one.phase == "against the start"}
    assert len(of_the_last) == CONFIRMING
    assert not of_races & of_the_last, "a round's number draws its load: the best was chosen on those of the races"
    assert median([bench.cost(LEAN)]) / bench.cost(found.recipe) == pytest.approx(found.ratio.median, rel=0.03)


def test_a_best_that_hangs_when_it_meets_the_start_is_not_what_was_found() -> None:
    class Hangs(Bench):
        def measure(self, recipe: Recipe, label: str, number: int) -> Iterator[StageSample]:
            if phases[-1] == "against the start" and recipe == BEST:
                raise CastOutError("it hangs", ends=True)
            return super().measure(recipe, label, number)

    phases: list[str] = []
    found = _run(Hangs(_saves(COSTS)), on_progress=lambda now: phases.append(now.phase))
    assert found.cast_out[-1].recipe == BEST
    assert (found.recipe, found.confirmed, found.cut_off) == (LEAN, False, True)


# A search that is killed.


class Steady(Bench):
    """Its noise is one of the recipe and the round, so that two processes measure the same; it is killed at some call."""

    def __init__(self, *, killed_at: int = -1, seconds: float = math.inf) -> None:
        super().__init__(_saves(COSTS), seconds=seconds)
        self.calls, self.killed_at = 0, killed_at

    def _called(self) -> None:
        self.calls += 1
        if self.calls == self.killed_at:
            raise KeyboardInterrupt

    def admit(self, recipe: Recipe) -> None:
        super().admit(recipe)
        self._called()
        if recipe.value("cache.kv") == "paged":
            raise CastOutError("planted")

    def measure(self, recipe: Recipe, label: str, number: int) -> Iterator[StageSample]:
        self.random = random.Random(f"{recipe} {label} {number}")
        yield from super().measure(recipe, label, number)
        self._called()

    def order(self, recipe: Recipe) -> Sequence[str]:
        self._called()
        return list(reversed(VALUES))


def _told(found: Found) -> tuple[object, ...]:
    tried = [(one.label, one.verdict, one.rounds, one.ratio) for one in found.tried]
    return found.recipe, found.ratio, found.ended, found.untried, tried, [(one.label, one.why) for one in found.cast_out]


def _journalled(bench: Steady, path: Path, key: Mapping[str, object] | None = None) -> tuple[Found, Journalled]:
    journal = Journalled(bench, path, key or {"seed": 0})
    return search({"start": LEAN}, SPACE, journal, order=journal.ordered(bench.order)), journal


@pytest.mark.parametrize("seconds", [40.0, pytest.param(math.inf, marks=pytest.mark.nightly)])
def test_killed_at_any_moment_it_loses_what_was_in_flight_and_finds_the_same(tmp_path: Path, seconds: float) -> None:
    bench = Steady(seconds=seconds)
    whole, journal = _journalled(bench, tmp_path / "whole")
    assert journal.found == 0
    journal.finish()
    assert list(tmp_path.iterdir()) == []
    moments = random.Random(0).sample(range(1, bench.calls), 20)
    for moment in moments:
        path = tmp_path / f"{moment}"
        with pytest.raises(KeyboardInterrupt):
            _journalled(Steady(killed_at=moment, seconds=seconds), path)
        second = Steady(seconds=seconds)
        found, journal = _journalled(second, path)
        assert journal.found == moment - 1, "but for the call in flight, all is there"
        assert second.calls == bench.calls - moment + 1
        assert _told(found) == _told(whole)
        assert journal.notes()[0].startswith("it went on with an earlier search that was cut off, and its ")


def test_a_line_that_is_half_written_and_one_of_another_search_are_left_out(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        _journalled(Steady(killed_at=30), tmp_path / "killed")
    text = (tmp_path / "killed").read_bytes()
    whole, _ = _journalled(Steady(), tmp_path / "whole")
    for damage, left in (
        (text[:-10], 28),  # half of the last line
        (text.replace(b'"asked": "measure"', b'"asked"', 1), 3),
        (b"", 0),
        (b"[]\n", 0),
        (b"\xff\n", 0),
        (text.replace(b'"seed": 0', b'"seed": 1'), 0),  # another search
    ):
        (tmp_path / "again").write_bytes(damage)
        found, journal = _journalled(Steady(), tmp_path / "again")
        assert (journal.found, _told(found)) == (left, _told(whole))
        _, journal = _journalled(Steady(), tmp_path / "again")
        assert journal.found > 30, "what came after is written behind what was whole"


def test_a_search_that_asks_otherwise_than_the_file_goes_on_from_there(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        _journalled(Steady(killed_at=40), tmp_path / "killed")
    bench = Steady()
    journal = Journalled(bench, tmp_path / "killed", {"seed": 0})
    assert journal.found == 39
    found = search({"start": LEAN}, SPACE, journal, order=journal.ordered(bench.order), seed=7)
    assert found.recipe == BEST
    assert journal.found < 39


def test_what_ended_one_process_ends_no_other_and_no_disk_ends_none(tmp_path: Path) -> None:
    class Stuck(Steady):
        def admit(self, recipe: Recipe) -> None:
            if recipe.value("vit.rope") == "halves":
                raise CastOutError("it hangs", ends=True)
            super().admit(recipe)

    first, _ = _journalled(Stuck(), tmp_path / "stuck")
    assert first.cut_off
    second, journal = _journalled(Steady(), tmp_path / "stuck")
    assert not second.cut_off
    assert ("vit.rope=halves", "it hangs") in [(one.label, one.why) for one in second.cast_out]
    (tmp_path / "file").write_text("")
    found, journal = _journalled(Steady(), tmp_path / "file" / "journal")
    assert found.recipe == BEST
    assert journal.notes()[0].startswith("samples were not kept as they came: ")


def test_searches_that_nobody_went_on_with_are_kept_in_bounded_number(tmp_path: Path) -> None:
    for number in range(MOST_UNFINISHED + 5):
        (tmp_path / f"{number}.jsonl").touch()
        os.utime(tmp_path / f"{number}.jsonl", (number, number))
    Journalled(Steady(), tmp_path / "new.jsonl", {"seed": 0})
    left = {path.name for path in tmp_path.iterdir()}
    assert len(left) == MOST_UNFINISHED
    assert {"new.jsonl", f"{MOST_UNFINISHED + 4}.jsonl"} <= left
    assert "0.jsonl" not in left
