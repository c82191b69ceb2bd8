"""From one recipe to another a toggle at a time: what each change takes off the time to first token, measured side by side."""

from __future__ import annotations

import threading
from dataclasses import dataclass

from fastvl_lab.catalogue import toggles
from fastvl_lab.engine import EngineLike, find_recipe
from fastvl_lab.errors import RecipeError
from fastvl_lab.lab import Lab
from fastvl_lab.measure.compare import Comparison, compare
from fastvl_lab.measure.statistics import Interval, median_interval
from fastvl_lab.recipe import Recipe
from fastvl_lab.request import Request

STOCK = "transformers"
START = "baseline"


@dataclass(frozen=True, kw_only=True, eq=False)
class Attribution:
    """What was measured. steps: the labels of the recipes on the way, the first being that of the recipe it starts from."""

    comparison: Comparison
    steps: tuple[str, ...]

    def saved(self, step: str) -> Interval | None:
        """Milliseconds of TTFT that a step takes off the step before it, paired by round.

        None for the first, and where either fails its parity check or nothing is warm in both. Raises `RecipeError` for no step.
        """
        if step not in self.steps:
            raise RecipeError(f"step {step!r} is unknown; the steps are {', '.join(map(repr, self.steps))}")
        if step == self.steps[0]:
            return None
        before = self.steps[self.steps.index(step) - 1]
        if not (self.comparison.parity(before) and self.comparison.parity(step)):
            return None
        warm = {(s.engine, s.round): s.run.ttft for s in self.comparison.samples if s.round >= 0 and s.run.kind == "warm"}
        pairs = [(warm[before, n], ttft) for (name, n), ttft in warm.items() if name == step and (before, n) in warm]
        return median_interval([(earlier - later) * 1e3 for earlier, later in pairs]) if pairs else None


def attribute(
    lab: Lab,
    request: Request,
    recipe: Recipe | str,
    *,
    start: Recipe | str | None = None,
    repeats: int = 6,
    stop: threading.Event | None = None,
) -> Attribution:
    """Measure Transformers, the recipe `start` (the baseline, if none is given), and every step from it to `recipe`.

    A step's saving depends on the steps before it: in another order it would be another one. Runs (steps + 2) engines. Raises what
    `compare` raises.
    """
    ways = steps_between(find_recipe(START if start is None else start, lab.device), find_recipe(recipe, lab.device))
    engines: dict[str, EngineLike] = {STOCK: STOCK, **ways}
    comparison = compare(lab, request, engines, repeats=repeats, stop=stop)
    return Attribution(comparison=comparison, steps=tuple(step for step in ways if step in comparison.engines))


def steps_between(start: Recipe, end: Recipe) -> dict[str, Recipe]:
    """Recipes from `start` to `end` by what each changes, in the order of the corridor.

    A toggle that is not allowed without another waits for it; what is only allowed together changes in one step.
    """
    found, current = {START if start == Recipe.baseline() else "start": start}, start
    pending = [toggle.path for toggle in toggles() if start.value(toggle.path) != end.value(toggle.path)]
    while pending:
        for path in pending:
            try:
                current, taken = current.replace(path, end.value(path)), [path]
            except RecipeError:
                continue
            break
        else:
            current, taken = end, list(pending)
        found[", ".join(f"{path}={end.value(path)}" for path in taken)] = current
        pending = [path for path in pending if path not in taken]
    assert current == end
    return found
