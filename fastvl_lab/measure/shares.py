"""What each choice of a recipe is worth beside the others: alone, left out of all, and as its Shapley share; and who acts on whom.

A step's saving depends on the steps before it (`compare.attribute`). A Shapley share is the mean of what a choice takes off over
all orders of steps, so no order is preferred, and the shares add up to what all choices take off together (Shapley, 1953). The
functions over costs are pure; `shares` measures the costs.
"""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, combinations, pairwise
from math import factorial
from statistics import mean, median, stdev
from typing import Any, Literal

from fastvl_lab import shown
from fastvl_lab.catalogue import Target, toggles
from fastvl_lab.errors import RecipeError, RequestError, check_whole_number
from fastvl_lab.lab import Lab
from fastvl_lab.lasting import About, Lasting
from fastvl_lab.measure.compare import Comparison, compare
from fastvl_lab.measure.quiet import QUIET, Quiet
from fastvl_lab.measure.recipes import START, Changes, named
from fastvl_lab.measure.samples import FOR_AN_INTERVAL, Interval, RunSample, json_row, json_value, median_interval
from fastvl_lab.recipe import Recipe
from fastvl_lab.request import Request

EXACT = 8  # choices of which every combination is measured: 256 at most; beyond, orders are sampled

# Some of the choices, in any order; and what a combination of them costs.
Some = frozenset[str]
Cost = Callable[[Some], float]
Pair = tuple[str, str]


# Over costs that are known.


def every(choices: Sequence[str]) -> tuple[Some, ...]:
    """All combinations, from none to all."""
    return tuple(map(frozenset, chain.from_iterable(combinations(choices, n) for n in range(len(choices) + 1))))


def shapley(choices: Sequence[str], cost: Cost) -> dict[str, float]:
    """What each choice takes off the cost, as the mean over all orders in which they may be made; they add up to what all take off.

    It asks for the cost of every combination.
    """
    return {
        one: sum(
            _weight(len(some), len(choices)) * (cost(some) - cost(some | {one}))
            for some in every([other for other in choices if other != one])
        )
        for one in choices
    }


def interactions(choices: Sequence[str], cost: Cost) -> dict[Pair, float]:
    """What each two take off together beyond what each takes off by itself, as the mean over all orders; negative: they overlap.

    The interaction index of Grabisch and Roubens (Int. J. Game Theory 28, 1999).
    """

    def both(some: Some, one: str, other: str) -> float:
        return cost(some | {one}) + cost(some | {other}) - cost(some | {one, other}) - cost(some)

    return {
        (one, other): sum(
            _weight(len(some), len(choices) - 1) * both(some, one, other)
            for some in every([third for third in choices if third not in (one, other)])
        )
        for one, other in combinations(choices, 2)
    }


def _weight(before: int, n: int) -> float:
    """The share of all orders of n in which just these are made before one of them."""
    return factorial(before) * factorial(n - before - 1) / factorial(n)


def sampled_orders(choices: Sequence[str], n: int, seed: int) -> tuple[tuple[str, ...], ...]:
    """Orders at random in pairs, each with its reverse: at least n, which is two or more.

    What is made early in one is made late in the other, so that their mean varies less (Mitchell et al., JMLR 23, 2022).
    """
    shuffled, found = random.Random(seed), []
    for _ in range((n + 1) // 2):
        order = tuple(shuffled.sample(choices, len(choices)))
        found += [order, order[::-1]]
    return tuple(found)


def along(order: Sequence[str]) -> tuple[Some, ...]:
    """The combinations on the way from none to all."""
    return tuple(frozenset(order[:n]) for n in range(len(order) + 1))


def sampled_shapley(orders: Sequence[Sequence[str]], cost: Cost) -> dict[str, tuple[float, float]]:
    """Of each choice its share as the mean over these orders, and that mean's standard error.

    The error is over pairs of orders, NaN of one pair. The shares add up to what all take off, as each order's do.
    """
    taken: dict[str, list[float]] = {one: [] for one in orders[0]}
    for order in orders:
        for one, (before, after) in zip(order, pairwise(along(order)), strict=True):
            taken[one].append(cost(before) - cost(after))
    found = {}
    for one, each in taken.items():
        pairs = [mean(two) for two in zip(each[::2], each[1::2], strict=True)]
        found[one] = (mean(pairs), stdev(pairs) / len(pairs) ** 0.5 if len(pairs) > 1 else float("nan"))
    return found


# Over costs that are measured.


@dataclass(frozen=True, kw_only=True, eq=False)
class Shares(Lasting):
    """What `shares` measured.

    choices: from the start to the recipe. engines: a combination of choices -> the label of its recipe in the comparison; two
    combinations may be one recipe. orders: those that were sampled, none where every combination was measured. notes: which choices
    do not stand alone, in sentences.
    """

    comparison: Comparison
    choices: tuple[str, ...]
    engines: Mapping[Some, str]
    orders: tuple[tuple[str, ...], ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def start(self) -> str:
        """The label of the recipe without any of the choices."""
        return self.engines[frozenset()]

    @property
    def end(self) -> str:
        """The label of the recipe with all of them."""
        return self.engines[frozenset(self.choices)]

    @property
    def saved(self) -> float | None:
        """Milliseconds of TTFT that all choices take off together, of medians; None where they are not compared."""
        costs = self._medians()
        return None if costs is None else costs[self.start] - costs[self.end]

    def alone(self, choice: str) -> Interval | None:
        """Milliseconds that the choice takes off the start by itself, paired by round; None as `Comparison.saving`."""
        return self.comparison.saving(self.engines[frozenset([choice])], self.start)

    def left_out(self, choice: str) -> Interval | None:
        """Milliseconds that are lost where all choices but this one are made, paired by round; None as `Comparison.saving`."""
        return self.comparison.saving(self.end, self.engines[frozenset(self.choices) - {choice}])

    def shares(self) -> dict[str, Interval]:
        """Milliseconds of TTFT that are each choice's, of medians, which add up to `saved`; empty where they are not compared.

        The interval is that of the rounds in which all recipes were undisturbed, a share each; NaN where there are too few.
        """
        if self.orders:
            return self._estimated(lambda cost: {one: share for one, (share, _) in sampled_shapley(self.orders, cost).items()})
        return self._estimated(lambda cost: shapley(self.choices, cost))

    def errors(self) -> dict[str, float]:
        """Milliseconds: the standard error of each share that comes of sampling orders; empty where none were sampled."""
        costs = self._medians()
        if not self.orders or costs is None:
            return {}
        return {one: error for one, (_, error) in sampled_shapley(self.orders, lambda some: costs[self.engines[some]]).items()}

    def interactions(self) -> dict[Pair, Interval]:
        """Milliseconds that each two take off together beyond what each does, intervals as `shares` has them.

        Empty where orders were sampled, since these do not have all pairs.
        """
        return {} if self.orders else self._estimated(lambda cost: interactions(self.choices, cost))

    def _estimated(self, of: Callable[[Cost], Mapping[Any, float]]) -> dict[Any, Interval]:
        costs = self._medians()
        if costs is None:
            return {}
        by_round = [of(lambda some, one=one: one[self.engines[some]]) for one in self._rounds()]  # type: ignore[misc]
        found = {}
        for key, value in of(lambda some: costs[self.engines[some]]).items():
            low = high = float("nan")
            if len(by_round) >= FOR_AN_INTERVAL:
                _, low, high = median_interval([each[key] for each in by_round])
                low, high = min(low, value), max(high, value)
            found[key] = Interval(value, low, high)
        return found

    def _medians(self) -> dict[str, float] | None:
        """Milliseconds of each recipe; None where one fails parity or was never warm and undisturbed."""
        labels = set(self.engines.values())
        times = {label: self.comparison.by_round(label) for label in labels}
        if not self.comparison.parity(*labels) or not all(times.values()):
            return None
        return {label: median(each.values()) * 1e3 for label, each in times.items()}

    def _rounds(self) -> list[dict[str, float]]:
        """Milliseconds of each recipe, of each round that has all of them."""
        times = {label: self.comparison.by_round(label) for label in set(self.engines.values())}
        whole = set.intersection(*(set(each) for each in times.values()))
        return [{label: each[number] * 1e3 for label, each in times.items()} for number in sorted(whole)]

    def findings(self) -> list[str]:
        """In sentences: what all take off, whose it is, who acts on whom, and what does not stand alone."""
        saved, found = self.saved, self.shares()
        if saved is None:
            wrong = [label for label in set(self.engines.values()) if not self.comparison.parity(label)]
            why = f"{wrong[0]} fails parity" if wrong else "some recipe was never warm and undisturbed"
            return [f"no share is told: {why}", *self.notes]
        lines = [f"{self.end} takes {saved:.2f} ms of TTFT off {self.start}"]
        errors = self.errors()
        for one, share in sorted(found.items(), key=lambda item: -abs(item[1].median)):
            by_chance = f", ± {errors[one]:.2f} by the choice of orders" if errors else ""
            lines.append(f"{one} has {share.median:.2f} ms of it ({share.known}{by_chance})")
        for (one, other), more in self.interactions().items():
            if more.low > 0 or more.high < 0:
                how = "more together than each alone" if more.median > 0 else "less together: they overlap"
                lines.append(f"{one} and {other} take off {abs(more.median):.2f} ms {how} ({more.known})")
        return [*lines, *self.notes, *self.comparison.quietness()]

    def rows(self) -> list[dict[str, Any]]:
        """One row a choice, ready for JSON, in ms."""
        found, errors = self.shares(), self.errors()
        return [
            {
                "choice": one,
                **json_row("alone_ms", self.alone(one)),
                **json_row("share_ms", found.get(one)),
                "share_error_ms": json_value(errors.get(one)),
                **json_row("left_out_ms", self.left_out(one)),
            }
            for one in self.choices
        ]

    def __repr__(self) -> str:
        return "\n".join(self.findings())

    def frame(self) -> Any:
        """A row a choice, as a pandas DataFrame; raises `MissingExtraError` without pandas."""
        return shown.frame(self)

    def figure(self) -> Any:
        """What each is worth, as a plotly figure; raises `MissingExtraError` without plotly."""
        return shown.figure(self)

    def about(self) -> About:
        about = self.comparison.about()
        ends = [self.comparison.representative(label).traced(label) for label in (self.start, self.end)]
        title = f"{about.title.partition(':')[0]}: shares of {', '.join(self.choices)}"
        return About(title=title, findings=self.findings(), environment=about.environment, samples=about.samples, traces=ends)

    def to_record(self) -> dict[str, Any]:
        """As JSON-ready data; `from_record` reads it back."""
        return {
            "comparison": self.comparison.to_record(),
            "choices": list(self.choices),
            "engines": [[sorted(some), label] for some, label in self.engines.items()],
            "orders": [list(order) for order in self.orders],
            "notes": list(self.notes),
        }

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> Shares:
        """Read `to_record`'s form."""
        return cls(
            comparison=Comparison.from_record(record["comparison"]),
            choices=tuple(record["choices"]),
            engines={frozenset(some): label for some, label in record["engines"]},
            orders=tuple(map(tuple, record["orders"])),
            notes=tuple(record["notes"]),
        )


def shares(
    lab: Lab,
    request: Request,
    recipe: Recipe | str,
    *,
    start: Recipe | str | None = None,
    of: Literal["slots", "toggles"] = "slots",
    only: Sequence[str] = (),
    repeats: int = 6,
    orders: int = 16,
    seed: int = 0,
    on_sample: Callable[[RunSample], object] | None = None,
    quiet: Quiet | None = QUIET,
    stop: threading.Event | None = None,
) -> Shares:
    """Measure what each choice that a recipe makes beyond `start` (by default the baseline) is worth, in interleaved rounds.

    of: a choice is all that changes in a slot, or each toggle. only: slots or toggles that are told apart; what else the recipe
    changes is made beforehand. Of up to `EXACT` choices every combination is measured; of more, those along so many `orders` at
    random, and each alone and left out. A choice that does not stand alone brings what it needs with it (`Recipe.choose`), and is
    worth both; one that cannot run or means nothing beside the others waits for them; notes say which. repeats, quiet, on_sample,
    stop: as `compare` has them. Raises `RequestError` where there is nothing to tell apart, and as `compare`.
    """
    check_whole_number("orders", orders, least=2)
    end, begin = lab.recipe(recipe), lab.recipe(START if start is None else start)
    grouped = _choices(begin, end, of, only)
    told = {path for changes in grouped.values() for path in changes}
    others = {path: end.value(path) for path in _changed_paths(begin, end) if path not in told}
    begin, _ = _combined(begin, [others], lab.checkpoint.target)
    names = tuple(grouped)
    sampled = sampled_orders(names, orders, seed) if len(names) > EXACT else ()
    ends = [frozenset(), *(frozenset([name]) for name in names), *(frozenset(names) - {name} for name in names), frozenset(names)]
    wanted = dict.fromkeys([*ends, *(some for order in sampled for some in along(order))] if sampled else every(names))
    recipes, notes = {}, []
    for some in wanted:
        recipes[some], waits = _combined(begin, [grouped[name] for name in names if name in some], lab.checkpoint.target)
        if some == frozenset(names):
            recipes[some] = end
        for name in some if len(some) == 1 else ():
            notes += _told(name, begin, recipes[some], grouped, waits)
    labels: dict[Recipe, str] = {}
    for some, made in recipes.items():
        label = START if made == Recipe.baseline() else " + ".join(name for name in names if name in some) or "start"
        labels.setdefault(made, label)
    labels |= {end: "all of them"} if labels[end] != START else {}
    engines = {label: made for made, label in labels.items()}
    comparison = compare(lab, request, engines, repeats=repeats, seed=seed, on_sample=on_sample, quiet=quiet, stop=stop)
    return Shares(
        comparison=comparison,
        choices=names,
        engines={some: labels[made] for some, made in recipes.items()},
        orders=sampled,
        notes=tuple(notes),
    )


def _changed_paths(start: Recipe, end: Recipe) -> list[str]:
    return [toggle.path for toggle in toggles() if start.value(toggle.path) != end.value(toggle.path)]


def _choices(start: Recipe, end: Recipe, of: str, only: Sequence[str]) -> dict[str, Changes]:
    """Name -> what is changed by that choice; raises `RequestError`."""
    if of not in ("slots", "toggles"):
        raise RequestError(f"of is {of!r}; the choices are slots, toggles")
    found: dict[str, dict[str, Any]] = {}
    wanted = named(only)
    for path in [path for path in _changed_paths(start, end) if path in wanted]:
        slot, value = path.partition(".")[0], end.value(path)
        found.setdefault(slot if of == "slots" else f"{path}={value}", {})[path] = value
    if not found:
        raise RequestError(f"the recipe changes nothing{' of these' if only else ''} beyond the start, so there are no shares")
    return dict(found)


def _combined(start: Recipe, choices: Iterable[Changes], target: Target) -> tuple[Recipe, list[str]]:
    """The start with these choices, and what waits for others: it means nothing, or cannot run, beside what is chosen."""
    recipe, pending = start, [change for changes in choices for change in changes.items()]
    while pending:
        waits = []
        for path, value in pending:
            try:
                made = recipe.choose(path, value)
                made.check(target)
            except RecipeError:
                waits.append((path, value))
            else:
                recipe = made
        if len(waits) == len(pending):
            break
        pending = waits
    return recipe, [f"{path}={value}" for path, value in pending]


def _told(name: str, start: Recipe, made: Recipe, grouped: Mapping[str, Changes], waits: Sequence[str]) -> list[str]:
    """What does not stand alone, in sentences."""
    brought = [f"{path}={made.value(path)}" for path in _changed_paths(start, made) if path not in grouped[name]]
    said = [f"{name} brings {', '.join(brought)} with it, and is worth both"] if brought else []
    return said + ([f"{', '.join(waits)} waits for other choices"] if waits else [])
