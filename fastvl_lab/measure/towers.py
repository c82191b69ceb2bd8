"""The vision tower alone: variants timed side by side on the same image, and cost as a line plus a parabola."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch

from fastvl_lab import preprocessor, vit
from fastvl_lab.errors import RequestError
from fastvl_lab.lab import Lab
from fastvl_lab.measure.rounds import Rounds, Task, now, time_rounds
from fastvl_lab.recipe import Recipe
from fastvl_lab.request import Grid, Request
from fastvl_lab.trace import Tracer


def time_towers(
    lab: Lab, request: Request, recipes: Mapping[str, Recipe], *, repeats: int = 10, warm_up: int = 2, seed: int = 0
) -> Rounds:
    """Seconds from uploaded patches to visual tokens, the step "vit", for every recipe; the device is waited for."""
    tasks = {label: _task(lab, request, recipe) for label, recipe in recipes.items()}
    return time_rounds(tasks, repeats=repeats, warm_up=warm_up, seed=seed)


def _task(lab: Lab, request: Request, recipe: Recipe) -> Task:
    if not request.image_inputs:
        raise RequestError("the request has no images; the vision tower has nothing to do")
    recipe.check(lab.checkpoint.target)
    images = preprocessor.bind(recipe.preprocessor, lab.checkpoint)
    encode = vit.bind(recipe.vit, lab.checkpoint, images.patch_format)
    off = Tracer(lab.device, "off")
    pixels = lab.compute(torch.inference_mode()(lambda: images.pixels(request)))

    @torch.inference_mode()
    def run() -> dict[str, float]:
        started = now(lab.device)
        encode(pixels, off)
        return {"vit": now(lab.device) - started}

    return partial(lab.compute, run)


def grids_of(lab: Lab, request: Request) -> tuple[Grid, ...]:
    """The patch grids that the request's images become, from their headers."""
    return preprocessor.open_images(request, lab.checkpoint).grids


@dataclass(frozen=True, kw_only=True)
class Cost:
    """seconds = fixed + per_patch * n + per_pair * n**2, none of them negative."""

    fixed: float
    per_patch: float
    per_pair: float

    def parts(self, n: float) -> tuple[float, float, float]:
        """The seconds of each term at n patches."""
        return self.fixed, self.per_patch * n, self.per_pair * n * n


def fit_cost(patches: Sequence[int], seconds: Sequence[float]) -> Cost:
    """The cost that comes nearest in relative error, by least squares over the terms that can be positive together.

    Of all subsets of terms whose best fit has no negative term, the one with the least error is taken.
    """
    n, t = np.asarray(patches, float), np.asarray(seconds, float)
    columns = np.stack([np.ones_like(n), n, n * n], axis=1) / t[:, None]
    best, least = np.zeros(3), np.inf
    for chosen in ([0, 1, 2], [1, 2], [0, 2], [0, 1], [2], [1], [0]):
        values = np.linalg.lstsq(columns[:, chosen], np.ones_like(n), rcond=None)[0]
        error = float(((columns[:, chosen] @ values - 1) ** 2).sum())
        if (values >= 0).all() and error < least:
            least, best = error, np.zeros(3)
            best[chosen] = values
    return Cost(fixed=best[0], per_patch=best[1], per_pair=best[2])
